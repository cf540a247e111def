"""AdamW's state goes to disk and back by name, and the rates of a schedule are what was asked."""

import pytest
import torch

from distill.errors import DistillError
from distill.training.adapters import optimizer_tensors, restore_optimizer
from distill.training.batches import learning_rate


def trained(steps: int):
    torch.manual_seed(0)
    named = {name: torch.nn.Parameter(torch.randn(3)) for name in ("a", "b")}
    optimizer = torch.optim.AdamW(
        list(named.values()), 0.0, (0.9, 0.99), weight_decay=0.1, fused=True
    )
    optimizer.param_groups[0]["lr"] = 0.1
    for _ in range(steps):
        step(named, optimizer)
    return named, optimizer


def step(named, optimizer) -> None:
    for p in named.values():
        p.grad = p.detach().sin()
    optimizer.step()


def test_a_restored_optimizer_takes_the_same_steps():
    named, _optimizer = trained(5)
    other, fresh = trained(3)
    saved = optimizer_tensors(fresh, other)
    again, restored = trained(0)
    for name in again:
        again[name].data.copy_(other[name])
    restore_optimizer(restored, again, saved, "x")
    restored.param_groups[0]["lr"] = 0.1
    for _ in range(2):
        step(again, restored)
    assert all(torch.equal(named[name], again[name]) for name in named)


def test_neither_saved_nor_restored_state_moves_with_the_optimizer():
    named, optimizer = trained(2)
    saved = optimizer_tensors(optimizer, named)
    before = {name: value.clone() for name, value in saved.items()}
    for _ in range(2):  # the second time after the very snapshot was restored
        step(named, optimizer)
        assert all(torch.equal(saved[name], before[name]) for name in before)
        assert not torch.equal(optimizer.state[named["a"]]["exp_avg"], before["a.exp_avg"])
        restore_optimizer(optimizer, named, saved, "x")


def test_a_missing_part_of_the_state_stops():
    named, optimizer = trained(1)
    saved = optimizer_tensors(optimizer, named)
    del saved["b.exp_avg_sq"]
    with pytest.raises(DistillError, match=r"b.exp_avg_sq"):
        restore_optimizer(optimizer, named, saved, "checkpoint")


@pytest.mark.parametrize(("warmup", "steps"), [(0.1, 20), (7, 7), (0, 0)])
def test_warm_up_is_a_share_below_one_and_a_count_above(warmup, steps):
    rates = [learning_rate(n, 200, 1.0, "constant", warmup) for n in range(200)]
    assert sum(rate < 1 for rate in rates) == steps


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_rates_rise_to_the_peak_and_never_leave_it_upwards(kind):
    rates = [learning_rate(n, 100, 1e-3, kind, 10) for n in range(100)]
    assert rates[:11] == sorted(rates[:11]) and rates[0] > 0
    assert max(rates) == rates[10] == 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] > 0
    assert (rates[-1] < 2e-5) == (kind != "constant")


def test_half_way_down_a_cosine_is_half_the_peak():
    assert learning_rate(50, 100, 2.0, "cosine", 0) == pytest.approx(1.0)

"""Losses against float64: exact, the same in chunks as whole, and 0 where nothing is supervised."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.training.losses import cross_entropy

ROWS, WIDTH, WORDS = 37, 16, 301


def problem(dtype=torch.float32, rows=ROWS, seed=0):
    make = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, WIDTH, generator=make).to(dtype).requires_grad_()
    head = torch.randn(WORDS, WIDTH, generator=make).to(dtype)
    targets = torch.randint(0, WORDS, (rows,), generator=make)
    weights = torch.rand(rows, generator=make)
    return hidden, head, targets, weights


def reference(hidden, head, targets, weights, bias=None):
    """The same sum in float64, by autograd over all logits at once."""
    exact = hidden.detach().double().requires_grad_()
    logits = torch.nn.functional.linear(exact, head.double(), bias)
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    total = (losses * weights.double()).sum()
    total.backward()
    return total.detach(), exact.grad


def test_sum_count_and_gradient_agree_with_float64():
    hidden, head, targets, weights = problem()
    total, count = cross_entropy(hidden, head, targets, weights)
    (total * 3).backward()
    wanted, slope = reference(hidden, head, targets, weights)
    torch.testing.assert_close(total.double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(count, weights.sum())
    torch.testing.assert_close(hidden.grad.double(), slope * 3, rtol=1e-5, atol=1e-6)


def test_bfloat16_loses_only_its_own_rounding():
    hidden, head, targets, weights = problem(torch.bfloat16)
    total, _ = cross_entropy(hidden, head, targets, weights)
    total.backward()
    wanted, slope = reference(hidden, head, targets, weights)
    assert abs(float(total) - float(wanted)) < 2e-3 * float(wanted)
    assert (hidden.grad.double() - slope).norm() < 0.01 * slope.norm()


@settings(max_examples=25, deadline=None)
@given(chunk=st.integers(1, ROWS + 3), seed=st.integers(0, 99))
def test_chunked_equals_whole(chunk, seed):
    whole, parts = problem(seed=seed), problem(seed=seed)
    one, _ = cross_entropy(*whole, chunk=ROWS)
    many, _ = cross_entropy(*parts, chunk=chunk)
    one.backward(), many.backward()
    torch.testing.assert_close(one, many, rtol=1e-6, atol=0)
    torch.testing.assert_close(whole[0].grad, parts[0].grad, rtol=1e-5, atol=4e-6)


@pytest.mark.parametrize("rows", [0, 5])
def test_all_masked_is_zero_and_finite(rows):
    hidden, head, targets, _ = problem(rows=rows)
    total, count = cross_entropy(hidden, head, targets, torch.zeros(rows))
    total.backward()
    assert float(total) == 0 and float(count) == 0
    assert bool((hidden.grad == 0).all())


def test_a_bias_of_the_head_counts():
    hidden, head, targets, weights = problem()
    bias = torch.randn(WORDS)
    total, _ = cross_entropy(hidden, head, targets, weights, bias)
    wanted, _ = reference(hidden, head, targets, weights, bias.double())
    torch.testing.assert_close(total.double(), wanted, rtol=1e-6, atol=0)


def test_large_logits_stay_finite():
    hidden, head, targets, weights = problem()
    total, _ = cross_entropy(hidden * 1000, head, targets, weights)
    assert bool(torch.isfinite(total))

"""Sampled signals: right in the mean, nearer than by chance, always the same draws, and no loss but those they suit."""

import numpy as np
import pytest
import torch

from distill.config import Signals
from distill.training import train
from distill.training.divergences import SoftTargets, soft_loss
from distill.training.soft_labels import capture
from distill.training.soft_labels.cache import Signal, expected_bytes, sample_offsets
from distill.training.soft_labels.capture import systematic_samples
from tests.training.test_capture import captured, dataset, exact, make_run
from tests.training.test_labels import SETTINGS

WORDS, WIDTH, TIMES, SAMPLES = 501, 6, 4000, 20


def flat(seed: int = 0) -> torch.Tensor:
    """Log-probabilities (1, V) with a long tail, as on text that is not the teacher's own."""
    make = torch.Generator().manual_seed(seed)
    return torch.log_softmax(1.5 * torch.randn(1, WORDS, generator=make), -1)


def shares(signal: Signal, words: int = WORDS) -> np.ndarray:
    """The probabilities (N, V) that a signal gives."""
    found = np.zeros((len(signal), words))
    found[np.repeat(np.arange(len(signal)), signal.counts_N), signal.ids_E] = np.exp(signal.logs())
    return found


def test_each_id_comes_up_its_expected_number_of_times_rounded_up_or_down():
    logs = flat()
    drawn = systematic_samples(
        logs.repeat(TIMES, 1), torch.tensor(sample_offsets("a", TIMES)), SAMPLES
    )
    assert (drawn.tail_mass_N == 0).all() and drawn.tails_TN.shape == (0, TIMES)
    found, wanted = shares(drawn) * SAMPLES, logs.double().exp().numpy() * SAMPLES
    assert (found - np.rint(found)).max() < 1e-4 and np.allclose(found.sum(1), SAMPLES)
    assert (found > np.floor(wanted) - 1e-4).all() and (found < np.ceil(wanted) + 1e-4).all()
    error = np.sqrt((wanted % 1) * (1 - wanted % 1) / TIMES)
    assert (np.abs(found.mean(0) - wanted) < 5 * error + 1e-5).all()


def gradients(
    hidden_SD: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, soft
) -> torch.Tensor:
    hidden = hidden_SD.clone().requires_grad_()
    mix = {"ce": 0.5, "forward_kl": 0.5}
    soft_loss(hidden, head, targets, torch.ones(len(hidden)), soft, mix)[0].backward()
    assert hidden.grad is not None
    return hidden.grad


def test_the_mean_gradient_over_many_draws_is_that_of_the_whole_vocabulary():
    make, logs = torch.Generator().manual_seed(1), flat(3)
    hidden, head = (torch.randn(n, WIDTH, generator=make) for n in (1, WORDS))
    drawn = systematic_samples(
        logs.repeat(TIMES, 1), torch.tensor(sample_offsets("b", TIMES)), SAMPLES
    )
    offsets = torch.tensor(np.concatenate([[0], np.cumsum(drawn.counts_N, dtype=int)]))
    ids, rest = torch.tensor(drawn.ids_E.astype(int)), torch.tensor(drawn.tail_mass_N)
    soft = SoftTargets(ids, torch.tensor(drawn.logs()), offsets, rest)
    targets = torch.full((TIMES,), 7)
    found = gradients(hidden.repeat(TIMES, 1), head, targets, soft).double()
    z = torch.log_softmax(hidden.double() @ head.double().t(), -1)
    one_hot = torch.nn.functional.one_hot(targets[:1], WORDS).double()
    slope = z.exp() - 0.5 * logs.double().exp() - 0.5 * one_hot
    error = found.std(0) / TIMES**0.5
    assert float(error.max()) < 0.01  # so that what follows says something
    assert bool(((found.mean(0) - slope @ head.double())[0].abs() < 5 * error + 1e-6).all())


def test_a_row_with_one_likely_id_and_a_student_that_rules_out_the_rest_stay_finite():
    logs = torch.log_softmax(torch.tensor([[0.0, 200.0, 1.0]]), -1)
    drawn = systematic_samples(logs, torch.tensor([0.99]), 50)
    assert drawn.ids_E.tolist() == [1] and drawn.codes_E.tolist() == [50]
    assert drawn.logs().tolist() == [0.0]
    soft = SoftTargets(
        *(torch.tensor([1]), torch.tensor([0.0]), torch.tensor([0, 1]), torch.tensor([0.0]))
    )
    head = torch.tensor([[1.0], [300.0], [2.0]])
    found = gradients(torch.ones(1, 1), head, torch.tensor([1]), soft)
    assert abs(float(found)) < 1e-4


def test_draws_hang_on_the_example_alone():
    assert (
        sample_offsets("a", 3).tolist()
        == sample_offsets("a", 9)[:3].tolist()
        != sample_offsets("b", 3).tolist()
    )
    assert 0 <= sample_offsets("a", 999).min() < sample_offsets("a", 999).max() < 1


def test_a_capture_holds_draws_from_the_teacher_and_another_the_same_bytes(tmp_path, monkeypatch):
    runs = [make_run(tmp_path / n, signals={"method": "sampled", "samples": 40}) for n in "ab"]
    rows, cache = captured(runs[0])
    for pair in dataset(runs[0]):
        row = rows[pair.response.id]
        signal = cache.read([row])[row.example]
        wanted = exact(runs[0], pair).exp().numpy()
        assert len(signal) == row.count == len(wanted)
        assert np.abs(shares(signal, wanted.shape[1]) - wanted).max() < 1 / 40 + 1e-4
    other = captured(runs[1])[1]
    for path in cache.folder.glob("*.signals"):
        assert path.read_bytes() == (other.folder / path.name).read_bytes()
    assert captured(make_run(tmp_path / "a", "more", signals={"method": "sampled"}))[1] != cache


def test_training_towards_draws_goes_through(tmp_path):
    settings = {**SETTINGS, "loss": {"forward_kl": 1, "ce": 0}}
    run = make_run(tmp_path, signals={"method": "sampled"}, train=settings)
    capture.main(run.config, run)
    train.main(run.config, run)
    assert run.path("adapter/adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train": {"loss": {"jsd": 1}}}, "not for jsd"),
        ({"train": {"loss": {"forward_kl": 1, "temperature": 2}}}, "not for temperature 2"),
        ({"train": {}, "on_policy": {"rounds": 1}}, "not for jsd"),
        ({"signals": {"method": "sampled", "temperatures": [2]}}, "leave temperatures out"),
        ({"signals": {"method": "sampled", "samples": 256}}, "less than or equal to 255"),
    ],
)
def test_a_loss_that_draws_do_not_suit_is_refused(tmp_path, changes, named):
    with pytest.raises(ValueError, match=named):
        make_run(tmp_path, **{"signals": {"method": "sampled"}, **changes})


def test_a_live_teacher_needs_no_draws(tmp_path):
    make_run(tmp_path, signals={"method": "sampled"}, train={"loss": {"jsd": 1, "teacher": "live"}})


def test_the_estimate_of_draws_grows_with_their_number():
    few, many = (Signals(method="sampled", samples=n) for n in (10, 100))
    assert expected_bytes(1000, few) < expected_bytes(1000, many)

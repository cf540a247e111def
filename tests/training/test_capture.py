"""The teacher's pass over the dataset: each token's distribution, its prompt, nothing twice."""

from typing import Any

import numpy as np
import pytest
import torch

from distill.config.learning import Signals
from distill.errors import DistillError
from distill.records import Message
from distill.storage.files import read_json, write_records
from distill.storage.run_folder import Run
from distill.training.losses import SoftTargets, soft_loss
from distill.training.soft_labels import cache as signal_cache
from distill.training.soft_labels import capture
from distill.training.soft_labels.cache import Signal, SignalCache, SignalKey, sample_offsets
from distill.training.soft_labels.capture import select, to_signal
from distill.training.soft_labels.labels import read_pairs
from tests.support.tiny import SPECIAL, TEMPLATE, make_tokenizer
from tests.support.training import exact_logs, make_soft_run, other_weights

SAMPLED = {"method": "sampled"}
WORDS, WIDTH, TIMES, SAMPLES = 501, 6, 4000, 20


def captured(run: Run) -> tuple[dict[str, SignalKey], SignalCache]:
    """Do the stage, and return the rows by answer, and the cache."""
    capture.main(run)
    made = read_json(run.path("signals.json"))
    rows = {name: SignalKey(*row) for name, row in made["rows"].items()}
    return rows, SignalCache(run.config.store_folder(), made["cache"])


def chunks(cache: SignalCache) -> dict[str, bytes]:
    """Return the chunks' files."""
    return {path.name: path.read_bytes() for path in cache.folder.glob("*.signals")}


def test_each_token_has_the_teacher_s_distribution_where_it_is_predicted(tmp_path):
    run = make_soft_run(tmp_path, signals={"p": 0.9, "k": 40, "temperatures": [2.0]})
    rows, cache = captured(run)
    found = cache.read(list(rows.values()))
    for pair in read_pairs(run):
        wanted = exact_logs(run, pair)
        signal = found[rows[pair.response.id].example]
        assert len(signal) == len(wanted) == rows[pair.response.id].length
        ends = np.cumsum(signal.counts_N, dtype=int)
        for place, (end, count) in enumerate(zip(ends, signal.counts_N, strict=True)):
            ids = torch.tensor(signal.ids_E[end - count : end].astype(np.int64))
            likeliest = wanted[place].topk(int(count)).values
            assert (wanted[place][ids] - likeliest).abs().max() < 1e-4  # the same, but for ties
            mass = wanted[place][ids].exp().sum().item()
            assert signal.tail_mass_N[place] == pytest.approx(1 - mass, abs=1e-5)
            last = wanted[place][ids[-1]].exp().item()
            assert count == 40 or mass > 0.9 - 1e-5 > mass - last - 2e-5
            logs = torch.tensor(signal.logs()[end - count : end])
            assert (logs - wanted[place][ids]).abs().max() < 1 / 16
            others = wanted[place].clone()
            others[ids] = float("-inf")
            tail = torch.logsumexp(others / 2.0, 0).item()
            assert signal.tails_TN[0, place] == pytest.approx(tail, abs=1e-4)


def test_the_teacher_reads_the_prompt_that_it_was_asked(tmp_path):
    run = make_soft_run(tmp_path)
    shown = (Message(role="system", content="a passage"), Message(role="user", content="why?"))
    first, *others = read_pairs(run)
    prompt = first.prompt.model_copy(update={"teacher_messages": shown})
    write_records(
        run.path("dataset/train.jsonl"), [first.model_copy(update={"prompt": prompt}), *others]
    )
    pair = read_pairs(run)[0]
    rows, cache = captured(run)
    signal = cache.read([rows[pair.response.id]])[rows[pair.response.id].example]
    firsts = np.cumsum(signal.counts_N, dtype=int) - signal.counts_N
    wanted = exact_logs(run, pair)
    assert signal.ids_E[firsts].tolist() == wanted.argmax(-1).tolist()
    assert signal.ids_E[firsts].tolist() != exact_logs(run, first).argmax(-1).tolist()


def test_what_the_store_holds_is_not_read_again_by_any_run(tmp_path, monkeypatch):
    rows, cache = captured(make_soft_run(tmp_path))
    before = chunks(cache)
    monkeypatch.setattr(capture, "fill", lambda *words: pytest.fail("read again"))
    again, _ = captured(make_soft_run(tmp_path, "other", seed=7))
    assert again == rows
    assert before == chunks(cache)


def test_a_stopped_capture_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(signal_cache, "CHUNK_TOKENS", 60)
    whole, cache = captured(make_soft_run(tmp_path / "whole"))
    run, append, seen = make_soft_run(tmp_path / "cut"), SignalCache.append, []

    def stops(self, rows, signal):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(rows)
        append(self, rows, signal)

    with monkeypatch.context() as patch:
        patch.setattr(SignalCache, "append", stops)
        with pytest.raises(KeyboardInterrupt):
            capture.main(run)
    rows, other = captured(run)
    assert rows == whole
    assert len(chunks(cache)) > 3 and chunks(cache) == chunks(other)


def test_other_settings_and_other_weights_have_caches_of_their_own(tmp_path):
    changes: list[dict[str, Any]] = [
        *({}, {"signals": {"p": 0.5}}, {"signals": {"temperatures": [2.0]}}),
        *({"signals": SAMPLED}, {"template_date": "2025-01-01"}),
    ]
    caches = [captured(make_soft_run(tmp_path, f"r{n}", **c))[1] for n, c in enumerate(changes)]
    other_weights(tmp_path / "teacher")
    caches.append(captured(make_soft_run(tmp_path, "other"))[1])
    assert len({cache.folder for cache in caches}) == len(caches)
    assert all(set(cache.index) == set(caches[0].index) for cache in caches)


def test_an_answer_with_other_tokens_under_the_teacher_s_template_is_refused(tmp_path):
    run = make_soft_run(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("<|im_end|>", SPECIAL[0])
    tokenizer.save_pretrained(tmp_path / "teacher")
    with pytest.raises(DistillError, match="other tokens under the teacher's chat template"):
        capture.main(run)


# Sampled signals: unbiased, nearer than independent samples, and always the same.


def systematic_samples(logs: torch.Tensor, offsets: Any, samples: int) -> Signal:
    settings = Signals(method="sampled", samples=samples)
    return to_signal(select(logs, torch.as_tensor(offsets), settings), settings)


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
    samples = systematic_samples(
        logs.repeat(TIMES, 1), torch.tensor(sample_offsets("a", TIMES)), SAMPLES
    )
    assert (samples.tail_mass_N == 0).all() and samples.tails_TN.shape == (0, TIMES)
    found, wanted = shares(samples) * SAMPLES, logs.double().exp().numpy() * SAMPLES
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


def test_the_mean_gradient_over_many_samples_is_that_of_the_whole_vocabulary():
    make, logs = torch.Generator().manual_seed(1), flat(3)
    hidden, head = (torch.randn(n, WIDTH, generator=make) for n in (1, WORDS))
    samples = systematic_samples(
        logs.repeat(TIMES, 1), torch.tensor(sample_offsets("b", TIMES)), SAMPLES
    )
    offsets = torch.tensor(np.concatenate([[0], np.cumsum(samples.counts_N, dtype=int)]))
    ids, rest = torch.tensor(samples.ids_E.astype(int)), torch.tensor(samples.tail_mass_N)
    soft = SoftTargets(ids, torch.tensor(samples.logs()), offsets, rest)
    targets = torch.full((TIMES,), 7)
    found = gradients(hidden.repeat(TIMES, 1), head, targets, soft).double()
    z = torch.log_softmax(hidden.double() @ head.double().t(), -1)
    one_hot = torch.nn.functional.one_hot(targets[:1], WORDS).double()
    slope = z.exp() - 0.5 * logs.double().exp() - 0.5 * one_hot
    error = found.std(0) / TIMES**0.5
    assert float(error.max()) < 0.01  # so that what follows says something
    assert bool(((found.mean(0) - slope @ head.double())[0].abs() < 5 * error + 1e-6).all())


def test_a_capture_holds_samples_of_the_teacher_and_another_the_same_bytes(tmp_path):
    signals = {**SAMPLED, "samples": 40}
    runs = [make_soft_run(tmp_path / n, signals=signals) for n in "ab"]
    rows, cache = captured(runs[0])
    for pair in read_pairs(runs[0]):
        row = rows[pair.response.id]
        signal = cache.read([row])[row.example]
        expected = exact_logs(runs[0], pair).exp().numpy()
        assert len(signal) == row.length == len(expected)
        assert np.abs(shares(signal, expected.shape[1]) - expected).max() < 1 / 40 + 1e-4
    assert chunks(captured(runs[1])[1]) == chunks(cache)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train": {"loss": {"jsd": 1}}}, "at temperature 1 only"),
        ({"train": {"loss": {"forward_kl": 1, "temperature": 2}}}, "at temperature 1 only"),
        ({"train": {}, "on_policy": {"rounds": 1}}, "at temperature 1 only"),
        ({"signals": {"method": "sampled", "temperatures": [2]}}, "leave temperatures out"),
        ({"signals": {"method": "sampled", "samples": 256}}, "less than or equal to 255"),
    ],
)
def test_a_loss_that_samples_do_not_suit_is_refused(tmp_path, changes, named):
    with pytest.raises(ValueError, match=named):
        make_soft_run(tmp_path, **{"signals": SAMPLED, **changes})
    live = {"loss": {"jsd": 1, "teacher": "live"}}
    make_soft_run(tmp_path, signals=SAMPLED, train=live)  # a live teacher needs no samples

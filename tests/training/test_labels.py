"""Training towards a teacher, cached or live: aligned, exact when resumed, loud about misfits."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distill.config import learning
from distill.config.tree import Config
from distill.errors import DistillError, Exit
from distill.storage.files import read_json, write_json, write_records
from distill.storage.run_folder import Run
from distill.training import train
from distill.training.adapters import WEIGHTS
from distill.training.prepare import load_adapted
from distill.training.soft_labels import capture
from distill.training.soft_labels.cache import Signal
from distill.training.soft_labels.labels import CachedLabels, load_labels, load_live, read_pairs
from distill.training.student import StudentModel, make_student
from tests.support.tiny import make_tiny, make_tokenizer
from tests.support.training import (
    SOFT,
    TRAIN,
    assert_close,
    assert_same,
    encoded,
    exact_logs,
    gradient,
    killed_at,
    make_soft_run,
    other_weights,
    outcome,
    pairs,
    sharpen,
    training,
)

LIVE = {**SOFT, "teacher": "live"}
by_kind = pytest.mark.parametrize("loss", [SOFT, LIVE], ids=["cached", "live"])


def make_run(
    folder: Path, name: str = "run", loss: dict = SOFT, signals: dict | None = None, **settings: Any
) -> Run:
    """Return a run in float32, whose signals are captured where it needs them."""
    signals = signals or {"p": 0.99, "k": 64}
    run = make_soft_run(folder, name, train={**TRAIN, "loss": loss, **settings}, signals=signals)
    if run.config.captures and not run.path("signals.json").exists():
        capture.main(run)
    return run


def make_labelled(run: Run) -> StudentModel:
    """Return the run's student with its labels, in evaluation."""
    config = run.config
    student, _ = make_student(load_adapted(config.student, config.train, config.train_seed))
    live = config.train.loss.teacher == "live"
    student.labels = load_live(run, encoded(run)) if live else load(run)
    return student.eval()


def load(run: Run) -> CachedLabels:
    vocabulary = len(make_tokenizer()) + 5
    return load_labels(run, encoded(run), vocabulary)


@torch.no_grad()
def losses(student: StudentModel, run: Run) -> list[float]:
    """Return the loss over all answers of a run, and its parts."""
    return student(student.batch(encoded(run))).tolist()


def test_a_student_that_is_its_teacher_has_no_divergence_and_a_shifted_one_would(tmp_path):
    make_tiny(tmp_path / "model", hidden=48)
    sharpen(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "teacher")
    parts = dict.fromkeys(("ce", *learning.SOFT), 1)
    run = make_run(tmp_path, max_steps=1, loss=parts, lora={"r": 4})
    train.main(run)
    row = training(run)["history"][0]
    assert row["ce"] > 1
    assert all(-1e-4 < row[name] < 4e-3 for name in parts if name != "ce")
    assert row["loss"] == pytest.approx(sum(row[name] for name in parts), rel=1e-6)
    student, labels = make_labelled(run), load(run)
    student.labels = replace(labels, signals={n: shift(s) for n, s in labels.signals.items()})
    tokens = sum(len(signal) for signal in labels.signals.values())
    assert losses(student, run)[2] / tokens > 0.5


def shift(signal: Signal) -> Signal:
    """Give every token the distribution of the one before it."""
    single = list(signal.split([1] * len(signal)))
    return Signal.join([single[-1], *single[:-1]])


def test_the_cached_loss_is_that_of_the_two_models_distributions_read_alone(tmp_path):
    """Bucketed forward KL at temperature 2, by hand in float64, over all tokens of all answers.

    The student's tail has the rows of its head that are no token's.
    """
    loss = {"ce": 0.25, "forward_kl": 0.75, "temperature": 2.0}
    run = make_run(tmp_path, signals={"p": 0.8, "k": 20, "temperatures": [2.0]}, loss=loss)
    labels, soft, count = load(run), 0.0, 0
    for pair in read_pairs(run):
        own = exact_logs(run, pair, 5, run.config.student.model) / 2
        teacher, signal = exact_logs(run, pair) / 2, labels.signals[pair.response.id]
        lists = np.split(signal.ids_E, np.cumsum(signal.counts_N)[:-1])
        for n, ids in enumerate(torch.from_numpy(ids_N.astype(np.int64)) for ids_N in lists):
            p, q = (bucketed(logits[n], ids) for logits in (teacher, own))
            soft += 4 * float((p * (p / q).log()).sum())
            count += 1
    total, hard, kl = losses(make_labelled(run), run)
    assert kl / count == pytest.approx(soft / count, rel=0.01)  # but for the sixteenths of a nat
    assert total == pytest.approx(0.25 * hard + 0.75 * kl, rel=1e-5)


def bucketed(logits_V: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    probs = torch.softmax(logits_V, 0)
    listed = probs[ids]
    return torch.cat([listed, (probs.sum() - listed.sum())[None]])


def test_the_live_loss_is_the_divergence_of_the_whole_vocabularies_as_a_full_cache_s(tmp_path):
    live = make_run(tmp_path, loss=LIVE)
    total, hard, kl = losses(make_labelled(live), live)
    expected = 0.0
    for pair in read_pairs(live):
        p, q = exact_logs(live, pair), exact_logs(live, pair, model=live.config.student.model)
        expected += float((p.exp() * (p - (q - q.logsumexp(1, keepdim=True)))).sum())
    assert kl == pytest.approx(expected, rel=1e-4)
    cached = make_run(tmp_path, "cached", signals={"p": 0.9999999, "k": 1024})
    found = losses(make_labelled(cached), cached)
    assert found == pytest.approx([total, hard, kl], rel=0.03)  # but for sixteenths of a nat


@pytest.fixture(scope="module", params=[SOFT, LIVE], ids=["cached", "live"])
def unbroken(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run = make_run(folder, loss=request.param)
    train.main(run)
    return folder, outcome(run), request.param


@pytest.mark.parametrize("call", [2, 7])
def test_a_killed_run_goes_on_to_the_same_bits(unbroken, call):
    folder, expected, loss = unbroken
    run = make_run(folder, f"kill{call}", loss)
    with killed_at(call):
        train.main(run)
    train.main(run)
    assert_same(outcome(run), expected)


def test_history_and_validation_name_the_parts_and_the_teacher_is_not_saved(unbroken):
    folder, made, _ = unbroken
    for row in [*made["history"], *made["validation"]]:
        assert row["loss"] == pytest.approx(0.5 * row["ce"] + 0.5 * row["forward_kl"], rel=1e-5)
    saved = load_file(folder / "runs/run/adapter" / WEIGHTS)
    student = make_labelled(make_run(folder, loss=LIVE))
    assert not any("labels" in name for name, _ in student.named_parameters())
    assert len(saved) == sum(p.requires_grad for p in student.parameters())
    teacher: Any = student.labels
    assert not any(p.requires_grad for p in teacher.teacher.parameters())


@by_kind
def test_eight_by_one_equals_two_by_four(tmp_path, loss):
    """The same steps in micro-batches of several sizes, packed and padded, with marked rows."""
    outcomes = []
    mixed = [
        pair.model_copy(update={"only_signals": n % 3 == 1}) for n, pair in enumerate(pairs(9))
    ]
    for limit, packing in ((10_000, True), (300, True), (1, True), (300, False)):
        settings = {"micro_batch_tokens": limit, "packing": packing, "num_train_epochs": 1}
        run = make_run(tmp_path, f"run{limit}{packing}", loss, **settings, lora={"r": 4})
        write_records(run.path("dataset/train.jsonl"), mixed)
        train.main(run)
        outcomes.append(outcome(run))
    for other in outcomes[1:]:
        assert_close(outcomes[0], other)


@pytest.mark.parametrize("loss", [SOFT, {**SOFT, "temperature": 2.0}, LIVE])
@pytest.mark.parametrize("packing", [True, False])
def test_a_marked_row_has_every_part_of_the_loss_but_the_cross_entropy(tmp_path, loss, packing):
    run = make_run(tmp_path, loss=loss, signals={"temperatures": [2.0]}, packing=packing)
    student = make_labelled(run)
    marked, plain = encoded(run)[:4], encoded(run)[4:]
    labels = student.labels
    assert labels

    def measured(examples: list, parts: dict) -> list[torch.Tensor]:
        """Return sums of loss and parts, and the gradient of each weight."""
        student.labels = replace(labels, settings=learning.Loss(**parts))
        student.zero_grad()
        sums = student(student.batch(examples))
        sums[0].backward()
        return [
            sums.detach(),
            *(gradient(p).clone() for p in student.parameters() if p.requires_grad),
        ]

    both = measured([*plain, *(e._replace(only_signals=True) for e in marked)], loss)
    full, soft = measured(plain, loss), measured(marked, {**loss, "ce": 0})
    expected = torch.stack([full[0][0] + soft[0][0], full[0][1], full[0][2] + soft[0][1]])
    torch.testing.assert_close(both[0], expected, rtol=1e-5, atol=1e-5)
    for one, other, another in zip(both[1:], full[1:], soft[1:], strict=True):
        torch.testing.assert_close(one, other + another, rtol=1e-3, atol=1e-4)
    plain_loss = measured([*plain, *marked], loss)[0]
    assert plain_loss[1] > 1.2 * both[0][1], "of the mark the cross-entropy is less"


def test_wrong_answers_bring_a_student_nearer_to_its_teacher_and_are_not_learnt(tmp_path):
    """Two right answers and seven wrong ones: dropped, kept for their soft labels, or learnt."""
    settings = {"loss": {"ce": 1.0, "forward_kl": 3.0}, "max_steps": 12, "eval_steps": 12}
    rows, ends = pairs(9), dict[str, dict]()
    for name, count, mark in (("drop", 2, False), ("signals_only", 9, True), ("keep", 9, False)):
        run = make_run(tmp_path, name, **settings)
        changes = {"only_signals": mark}
        some = [p.model_copy(update=changes if n > 1 else {}) for n, p in enumerate(rows[:count])]
        write_records(run.path("dataset/train.jsonl"), some)
        train.main(run)
        ends[name] = training(run)["validation"][-1]
    assert ends["signals_only"]["forward_kl"] < 0.98 * ends["drop"]["forward_kl"]
    assert ends["signals_only"]["ce"] > 1.02 * ends["keep"]["ce"]


@pytest.mark.parametrize("signals", [None, {"method": "sampled"}], ids=["nucleus", "sampled"])
def test_the_adapter_moves_towards_the_teacher_without_any_cross_entropy(tmp_path, signals):
    loss = {"ce": 0, "forward_kl": 1}
    run = make_run(tmp_path, loss=loss, signals=signals, num_train_epochs=8, eval_steps=None)
    train.main(run)
    rows = training(run)["history"]
    assert rows[-1]["forward_kl"] < 0.97 * rows[0]["forward_kl"] and "ce" not in rows[0]
    adapter = load_file(run.path("adapter") / WEIGHTS)
    assert all(t.abs().max() > 0 for name, t in adapter.items() if "lora_B" in name)


@pytest.mark.parametrize("loss", [SOFT, {**SOFT, "temperature": 2.0}, LIVE])
def test_an_idle_batch_weighs_nothing(tmp_path, loss):
    student = make_labelled(make_run(tmp_path, loss=loss, signals={"temperatures": [2.0]}))
    assert student(student.batch([])).tolist() == [0.0, 0.0, 0.0]


def signals_json(change: Callable[[dict[str, Any]], object]) -> Callable[[Run], None]:
    """Return what changes a run's signals.json."""

    def damage(run: Run) -> None:
        made = read_json(run.path("signals.json"))
        change(made)
        write_json(run.path("signals.json"), made)

    return damage


def change_row(made: dict[str, Any]) -> None:
    name, row = next(iter(made["rows"].items()))
    made["rows"][name] = [row[0], "0" * 32, row[2]]


def shorten_chunk(run: Run) -> None:
    path = next(run.config.store_folder().rglob("*.signals"))
    path.write_bytes(path.read_bytes()[:-1])


def other_template(run: Run) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = f"{tokenizer.chat_template} "
    tokenizer.save_pretrained(f"{run.config.teacher.model}")


def other_tokenizer(run: Run) -> None:
    make_tokenizer(("extra",)).save_pretrained(f"{run.config.teacher.model}")


def other_teacher(run: Run) -> None:
    other_weights(Path(f"{run.config.teacher.model}"))


def more_pairs(run: Run) -> None:
    write_records(run.path("dataset/train.jsonl"), pairs(10))


@pytest.mark.parametrize(
    ("damage", "code", "what"),
    [
        (more_pairs, Exit.TRAINING, "signals.json: has no signal of answer"),
        (signals_json(change_row), Exit.TRAINING, "signals.json: has no signal of answer"),
        (signals_json(lambda made: made["teacher"].update(p=0.1)), Exit.STATE, "is damaged"),
        (
            *(lambda run: run.path("signals.json").write_text('{"teacher": {'), Exit.STATE),
            "signals.json: is damaged",
        ),
        (
            *(lambda run: run.path("signals.json").unlink(), Exit.TRAINING),
            r"signals.json: is missing.*\(distill signals",
        ),
        (shorten_chunk, Exit.STATE, "00000001.signals: is damaged"),
        (
            *(lambda run: shutil.rmtree(run.config.store_folder() / "signals"), Exit.STATE),
            "holds no signal of example",
        ),
        (other_teacher, Exit.TRAINING, "signals.json: was made by another teacher.*weights"),
        (other_template, Exit.TRAINING, "signals.json: was made by another teacher.*template"),
        (other_tokenizer, Exit.CONFIG, "have different tokenizers"),
    ],
)
def test_what_does_not_fit_is_found_before_the_first_step(
    captured_once, tmp_path, damage, code, what
):
    folder = Path(shutil.copytree(captured_once.folder.parent.parent, tmp_path / "copy"))
    teacher, student = ({"model": str(folder / name)} for name in ("teacher", "model"))
    tree = captured_once.config.model_dump(mode="json") | {"student": student}
    tree |= {"runs": str(folder / "runs"), "teacher": {**teacher, "dtype": "float32"}}
    run = Run(Config.model_validate(tree))
    damage(run)
    with pytest.raises(DistillError, match=what) as error:
        train.main(run)
    assert error.value.code == code
    assert not run.path("checkpoints").exists()


@pytest.fixture(scope="module")
def captured_once(tmp_path_factory) -> Run:
    """A run whose signals are captured, to be copied."""
    return make_run(tmp_path_factory.mktemp("captured"))


@by_kind
def test_a_resume_towards_another_teacher_stops(tmp_path, loss):
    run = make_run(tmp_path, loss=loss)
    with killed_at(5):
        train.main(run)
    other_teacher(run)
    if run.config.captures:
        capture.main(run)
    with pytest.raises(DistillError, match="changed: signals"):
        train.main(run)


def test_a_live_teacher_needs_no_capture_and_any_temperature(tmp_path):
    run = make_run(tmp_path, loss={**LIVE, "temperature": 2.0})
    assert not run.config.captures and run.config.distributions
    with pytest.raises(ValueError, match="is not captured"):
        make_run(tmp_path, loss={**SOFT, "temperature": 2.0})
    with pytest.raises(ValueError, match="a local teacher must read"):
        tree = run.config.model_dump(mode="json")
        recorded = {"kind": "recorded", "model": "someone"}
        Config.model_validate({**tree, "teacher": recorded})

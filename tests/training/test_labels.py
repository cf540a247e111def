"""Training towards a teacher's distributions: aligned to the token, exact when resumed, and loud about a cache that does not fit."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distill.errors import DistillError, Exit
from distill.models.loading import load_model
from distill.records import Example
from distill.storage.files import read_json, write_json, write_records
from distill.storage.run_folder import Run
from distill.training import train
from distill.training.prepare import encode_split, load_adapted
from distill.training.soft_labels import capture
from distill.training.soft_labels.cache import Signal
from distill.training.soft_labels.labels import CachedLabels, load_labels
from distill.training.student import make_student
from tests.support.tiny import make_tiny, make_tokenizer
from tests.training.test_capture import SOFT, dataset, exact, other_weights, sharpen
from tests.training.test_capture import make_run as make_captured
from tests.training.test_train import assert_same, killed_at, outcome, pairs

SETTINGS = {
    "learning_rate": 1e-2,
    "num_train_epochs": 2,
    "tokens_per_step": 500,
    "micro_batch_tokens": 300,
    "eval_steps": 2,
    "save_steps": 1,
    "bf16": False,
    "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
    "loss": SOFT,
}


def make_run(folder: Path, name: str = "run", signals: dict | None = None, **train_) -> Run:
    """A run in float32 whose signals are captured."""
    made = {"train": {**SETTINGS, **train_}, "signals": signals or {"p": 0.99, "k": 64}}
    run = make_captured(folder, name, **made)
    if not run.path("signals.json").exists():
        capture.main(run.config, run)
    return run


def own_teacher(folder: Path) -> None:
    """Make the teacher the student itself, with peaked distributions."""
    make_tiny(folder / "model", hidden=48)
    sharpen(folder / "model")
    shutil.copytree(folder / "model", folder / "teacher")


def history(run: Run) -> list[dict]:
    return json.loads(run.path("training.json").read_text())["history"]


def test_a_student_that_is_its_teacher_has_no_divergence_and_a_shifted_one_would(tmp_path):
    own_teacher(tmp_path)
    parts = {"ce": 1, "forward_kl": 1, "reverse_kl": 1, "jsd": 1}
    run = make_run(tmp_path, max_steps=1, loss=parts, lora={"r": 4})
    train.main(run.config, run)
    row = history(run)[0]
    assert row["ce"] > 1
    assert all(-1e-4 < row[name] < 4e-3 for name in parts if name != "ce")
    assert row["loss"] == pytest.approx(sum(row[name] for name in parts), rel=1e-6)
    labels = load(run)
    shifted = {name: shift(signal) for name, signal in labels.signals.items()}
    student, _ = make_student(
        load_adapted(run.config.student, run.config.train, run.config.train_seed)
    )
    student.labels = replace(labels, signals=shifted)
    total = student(student.batch(examples(run))).tolist()
    assert total[2] / sum(len(signal) for signal in shifted.values()) > 0.5


def shift(signal: Signal) -> Signal:
    """Give every token the distribution of the one before it."""
    single = list(signal.split([1] * len(signal)))
    return Signal.join([single[-1], *single[:-1]])


def examples(run: Run) -> list[Example]:
    splits = ("train", "validation")
    return [
        e
        for s in splits
        for e in encode_split(make_tokenizer(), run, s, run.config.template_date, 2048)
    ]


def load(run: Run) -> CachedLabels:
    student, _ = make_student(
        load_adapted(run.config.student, run.config.train, run.config.train_seed)
    )
    return load_labels(run.config, run, examples(run), len(student.head()[0]))


def test_the_loss_is_that_of_the_two_models_distributions_read_alone(tmp_path):
    """Bucketed forward KL at temperature 2, by hand in float64, over all tokens of all answers; the student's tail has
    the rows of its head that are no token's."""
    loss = {"ce": 0.25, "forward_kl": 0.75, "temperature": 2.0}
    run = make_run(
        tmp_path, signals={"p": 0.8, "k": 20, "temperatures": [2.0]}, loss=loss, max_steps=1
    )
    student = run.config.student.model
    teacher_config = run.config.model_copy(
        update={"teacher": run.config.teacher.model_copy(update={"model": student})}
    )
    labels, soft, count = load(run), 0.0, 0
    for pair in dataset(run):
        own, teacher = exact(Run(teacher_config), pair, 5) / 2, exact(run, pair) / 2
        signal = labels.signals[pair.response.id]
        for place, ids_n in enumerate(np.split(signal.ids_E, np.cumsum(signal.counts_N)[:-1])):
            ids = torch.from_numpy(ids_n.astype(np.int64))
            p, q = (bucketed(z[place], ids) for z in (teacher, own))
            soft += 4 * float((p * (p / q).log()).sum())
            count += 1
    model, _ = make_student(
        load_adapted(run.config.student, run.config.train, run.config.train_seed)
    )
    model.labels = labels
    model.eval()
    with torch.no_grad():
        total, hard, kl = model(model.batch(examples(run))).tolist()
    assert kl / count == pytest.approx(soft / count, rel=0.01)  # but for the sixteenths of a nat
    assert total == pytest.approx(0.25 * hard + 0.75 * kl, rel=1e-5)


def bucketed(logits_V: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    probs = torch.softmax(logits_V, 0)
    listed = probs[ids]
    return torch.cat([listed, (probs.sum() - listed.sum())[None]])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run = make_run(folder)
    train.main(run.config, run)
    return folder, outcome(run)


@pytest.mark.parametrize("call", [1, 2, 5, 9])
def test_a_killed_run_goes_on_to_the_same_bits(unbroken, call):
    folder, wanted = unbroken
    run = make_run(folder, f"kill{call}")
    with killed_at(call):
        train.main(run.config, run)
    train.main(run.config, run)
    assert_same(outcome(run), wanted)


def test_history_and_validation_name_the_parts(unbroken):
    _, found = unbroken
    for row in [*found["history"], *found["validation"]]:
        assert row["loss"] == pytest.approx(0.5 * row["ce"] + 0.5 * row["forward_kl"], rel=1e-5)


def assert_deal_does_not_matter(make: Callable[..., Run], folder: Path) -> None:
    """Train with the same steps in micro-batches of several sizes, packed and padded, and compare every step."""
    rows = []
    for limit, packing in ((10_000, True), (300, True), (1, True), (300, False)):
        name = f"run{limit}{packing}"
        run = make(folder, name, micro_batch_tokens=limit, packing=packing, lora={"r": 4})
        train.main(run.config, run)
        rows.append(history(run))
    for other in rows[1:]:
        for one, two in zip(rows[0], other, strict=True):
            for key in ("loss", "ce", "forward_kl"):
                assert one[key] == pytest.approx(two[key], rel=1e-4)
            assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)


def test_eight_by_one_equals_two_by_four(tmp_path):
    assert_deal_does_not_matter(make_run, tmp_path)


def test_the_adapter_moves_towards_the_teacher_without_any_cross_entropy(tmp_path):
    run = make_run(tmp_path, loss={"ce": 0, "forward_kl": 1}, num_train_epochs=8)
    train.main(run.config, run)
    rows = history(run)
    assert rows[-1]["forward_kl"] < 0.97 * rows[0]["forward_kl"] and "ce" not in rows[0]
    adapter = load_file(run.path("adapter/adapter_model.safetensors"))
    assert all(t.abs().max() > 0 for name, t in adapter.items() if "lora_B" in name)


def test_an_idle_batch_weighs_nothing_at_any_temperature(tmp_path):
    for temperature in (1.0, 2.0):
        loss = {**SOFT, "temperature": temperature}
        run = make_run(tmp_path, f"t{temperature}", {"temperatures": [2.0]}, loss=loss)
        student, _ = make_student(load_model(run.config.student.model, "float32"))
        student.labels = load(run)
        assert student(student.batch([])).tolist() == [0.0, 0.0, 0.0]


def drop_one(run: Run) -> None:
    write_records(run.path("dataset/train.jsonl"), pairs(8))


def add_one(run: Run) -> None:
    write_records(run.path("dataset/train.jsonl"), pairs(10))


def change_row(run: Run) -> None:
    made = read_json(run.path("signals.json"))
    name, row = next(iter(made["rows"].items()))
    made["rows"][name] = [row[0], "0" * 32, row[2]]
    write_json(run.path("signals.json"), made)


def change_facts(run: Run) -> None:
    made = read_json(run.path("signals.json"))
    write_json(run.path("signals.json"), {**made, "teacher": {**made["teacher"], "p": 0.1}})


def cut_signals_json(run: Run) -> None:
    path = run.path("signals.json")
    path.write_text(path.read_text()[:50])


def remove(run: Run) -> None:
    run.path("signals.json").unlink()


def chunk(run: Run) -> Path:
    return next(run.config.store_folder().rglob("*.signals"))


def flip(run: Run) -> None:
    data = bytearray(chunk(run).read_bytes())
    data[-3] ^= 1
    chunk(run).write_bytes(data)


def cut(run: Run) -> None:
    chunk(run).write_bytes(chunk(run).read_bytes()[:-1])


def lose(run: Run) -> None:
    chunk(run).unlink()


def other_teacher(run: Run) -> None:
    other_weights(Path(run.config.teacher.model).parent)


def other_template(run: Run) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = f"{tokenizer.chat_template} "
    tokenizer.save_pretrained(run.config.teacher.model)


def other_tokenizer(run: Run) -> None:
    make_tokenizer(("extra",)).save_pretrained(run.config.teacher.model)


@pytest.mark.parametrize(
    ("damage", "code", "what"),
    [
        (drop_one, Exit.TRAINING, "signals.json: was made for 1 answers that the filters"),
        (add_one, Exit.TRAINING, "signals.json: has no signal of answer"),
        (change_row, Exit.TRAINING, "signals.json: was made for other tokens of answer"),
        (change_facts, Exit.STATE, "signals.json: is damaged"),
        (cut_signals_json, Exit.STATE, "signals.json: is damaged"),
        (remove, Exit.TRAINING, r"signals.json: is missing.*\(make it: distill signals"),
        (flip, Exit.STATE, "00000001.signals: is damaged"),
        (cut, Exit.STATE, "00000001.signals: is cut off"),
        (lose, Exit.STATE, "holds no signal of example"),
        (other_teacher, Exit.TRAINING, "signals.json: was made by another teacher.*weights"),
        (other_template, Exit.TRAINING, "signals.json: was made by another teacher.*template"),
        (other_tokenizer, Exit.CONFIG, "have different tokenizers"),
    ],
)
def test_what_does_not_fit_is_found_before_the_first_step(tmp_path, damage, code, what):
    run = make_run(tmp_path)
    damage(run)
    with pytest.raises(DistillError, match=what) as fault:
        train.main(run.config, run)
    assert fault.value.code == code
    assert not run.path("checkpoints").exists()


def test_a_resume_towards_other_distributions_stops(tmp_path):
    run = make_run(tmp_path)
    with killed_at(5):
        train.main(run.config, run)
    other_teacher(run)
    run.path("signals.json").unlink()
    capture.main(run.config, run)
    with pytest.raises(DistillError, match="changed: signals"):
        train.main(run.config, run)

"""The loop: exact to the bit when resumed, the same however a step is cut up, and loud about what is wrong."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill.config import Config
from distill.errors import DistillError, Exit
from distill.records import Message, Pair, Prompt, Response
from distill.storage.files import write_records
from distill.storage.run_folder import Run
from distill.training import checkpoint, train
from distill.training.adapters import WEIGHTS
from distill.training.student import StudentModel
from tests.support.tiny import make_tiny


def pairs(count: int, first: int = 0) -> list[Pair]:
    """Pairs whose lengths are ragged."""
    made = []
    for number in range(first, first + count):
        question = f"question {number} " + "word " * (number * 7 % 23)
        messages = (Message(role="user", content=question),)
        prompt = Prompt.make(messages=messages, document_id=str(number), task="t")
        answer = f"answer {number} " + "yes " * (number * 5 % 11)
        response = Response(
            id=Response.make_id(prompt.id, 0),
            request_key=prompt.id,
            sample=0,
            prompt_id=prompt.id,
            model="m",
            text=answer,
            stop="end",
        )
        made.append(Pair(prompt=prompt, response=response))
    return made


def make_run(folder: Path, name: str = "run", **settings) -> Run:
    """A run with a tiny model, a dataset of 24 pairs, and float32 for exact comparisons."""
    if not (folder / "model").exists():
        make_tiny(folder / "model")
    chosen = {
        "learning_rate": 1e-2,
        "num_train_epochs": 2,
        "tokens_per_step": 600,
        "eval_steps": 3,
        "save_steps": None,
        "bf16": False,
        "lora": {"r": 4, "alpha": 8},
        **settings,
    }
    config = Config.model_validate(
        {
            "name": name,
            "runs": folder / "runs",
            "corpus": {"source": "python-docs"},
            "teacher": {"kind": "canned", "answers": folder / "none"},
            "student": {"model": str(folder / "model")},
            "train": chosen,
        }
    )
    run = Run(config)
    write_records(run.path("dataset/train.jsonl"), pairs(24))
    write_records(run.path("dataset/validation.jsonl"), pairs(4, first=100))
    return run


def outcome(run: Run) -> dict:
    """Everything that must be equal; times are left out."""
    training = json.loads(run.path("training.json").read_text())
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in training["history"]]
    last = sorted(run.path("checkpoints").iterdir())[-1]
    return {
        "history": history,
        "validation": training["validation"],
        "adapter": load_file(run.path("adapter/adapter_model.safetensors")),
        "optimizer": load_file(last / "optimizer.safetensors"),
    }


def assert_same(one: dict, other: dict) -> None:
    assert one["history"] == other["history"] and one["validation"] == other["validation"]
    for part in ("adapter", "optimizer"):
        assert one[part].keys() == other[part].keys()
        for name in one[part]:
            assert torch.equal(one[part][name], other[part][name]), name


class Killed(BaseException):
    """Stands for a kill: nothing in the loop may catch it."""


@contextmanager
def killed_at(call: int) -> Iterator[None]:
    """Stop what the block does in the forward pass of the micro-batch number `call` (validation counts too)."""
    forward, seen = StudentModel.forward, [0]

    def counted(self, batch):
        seen[0] += 1
        if seen[0] == call:
            raise Killed
        return forward(self, batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(StudentModel, "forward", counted)
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The run that nothing interrupts, with dropout, two micro-batches a step, and a checkpoint at each step."""
    folder = tmp_path_factory.mktemp("unbroken")
    run = make_run(folder, save_steps=1, micro_batch_tokens=300, lora=LORA)
    train.main(run.config, run)
    return folder, outcome(run)


LORA = {"r": 4, "alpha": 8, "dropout": 0.1}


@pytest.mark.parametrize("call", [1, 2, 3, 6, 10, 11, 14, 19, 20, 25])
def test_a_killed_run_goes_on_to_the_same_bits(unbroken, call):
    folder, wanted = unbroken
    run = make_run(folder, f"kill{call}", save_steps=1, micro_batch_tokens=300, lora=LORA)
    with killed_at(call):
        train.main(run.config, run)
    train.main(run.config, run)
    assert_same(outcome(run), wanted)


def test_killed_twice_and_rarely_saved_it_goes_on_to_the_same_bits(unbroken):
    folder, wanted = unbroken
    run = make_run(folder, "twice", save_steps=3, micro_batch_tokens=300, lora=LORA)
    for call in (12, 9):
        with killed_at(call):
            train.main(run.config, run)
    train.main(run.config, run)
    assert_same(outcome(run), wanted)


def test_a_finished_run_started_again_changes_nothing(unbroken):
    folder, wanted = unbroken
    run = make_run(folder, save_steps=1, micro_batch_tokens=300, lora=LORA)
    train.main(run.config, run)
    assert_same(outcome(run), wanted)


@pytest.mark.parametrize("packing", [True, False])
def test_eight_by_one_equals_two_by_four(tmp_path, packing):
    rows = []
    for limit in (10_000, 300, 1):
        run = make_run(tmp_path, f"run{limit}", micro_batch_tokens=limit, packing=packing)
        train.main(run.config, run)
        rows.append(outcome(run))
    for other in rows[1:]:
        for one, two in zip(rows[0]["history"], other["history"], strict=True):
            assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
            assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)


def test_the_loss_falls_and_the_files_are_there(tmp_path):
    run = make_run(tmp_path, num_train_epochs=6)
    train.main(run.config, run)
    training = json.loads(run.path("training.json").read_text())
    assert training["history"][-1]["loss"] < 0.97 * training["history"][0]["loss"]
    assert training["steps"] == len(training["history"]) and training["examples"] == 24
    assert training["tokens"] == sum(row["tokens"] for row in training["history"])
    assert training["tokens_per_second"] > 0 and training["dtype"] == "float32"
    best = min(training["validation"], key=lambda row: row["loss"])
    assert training["best_step"] == training["adapter_step"] == best["step"]
    assert run.path("adapter/base.json").exists()
    assert not list(run.folder.rglob("*.bin")) and not list(run.folder.rglob("*.pt"))


def test_early_stopping_stops(tmp_path):
    run = make_run(
        tmp_path, num_train_epochs=30, learning_rate=1.0, eval_steps=1, early_stopping_patience=2
    )
    train.main(run.config, run)
    training = json.loads(run.path("training.json").read_text())
    assert training["stopped_early"] and training["steps"] == training["best_step"] + 2


def make_worsening(folder: Path, name: str = "run", **settings) -> Run:
    """A run that soon gets worse at its validation answers, which are unlike the others, with a checkpoint of each step."""
    every = {"eval_steps": 2, "save_steps": 1, "save_total_limit": 100, "micro_batch_tokens": 300}
    run = make_run(folder, name, **every, learning_rate=0.05, **settings)
    rows = [
        pair.model_copy(update={"response": pair.response.model_copy(update={"text": "QXZ" * 60})})
        for pair in pairs(4, first=100)
    ]
    write_records(run.path("dataset/validation.jsonl"), rows)
    return run


@pytest.fixture(scope="module")
def past_its_best(tmp_path_factory) -> Run:
    """A finished run whose best step was not its last."""
    run = make_worsening(tmp_path_factory.mktemp("past"))
    train.main(run.config, run)
    return run


def assert_best_is_kept(run: Run) -> None:
    """Compare the released adapter, and the best one of every checkpoint, with the weights of the best step then."""
    training = json.loads(run.path("training.json").read_text())
    best = training["best_step"]
    assert 1 < best < training["steps"] and training["adapter_step"] == best
    folders = sorted(run.path("checkpoints").iterdir())
    weights = {f: load_file(f / "adapter.safetensors") for f in folders}
    assert not equal(weights[folders[best - 1]], weights[folders[-1]])
    for folder in folders:
        if step := json.loads((folder / "state.json").read_text())["best_step"]:
            assert equal(load_file(folder / "best.safetensors"), weights[folders[step - 1]]), folder
    assert equal(load_file(run.path("adapter") / WEIGHTS), weights[folders[best - 1]])


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_the_adapter_and_every_checkpoint_hold_the_weights_of_the_best_step(past_its_best):
    assert_best_is_kept(past_its_best)


@pytest.mark.parametrize("extra", [1, 2, 5])
def test_a_run_killed_after_its_best_step_ends_with_the_same_best_weights(past_its_best, extra):
    best = json.loads(past_its_best.path("training.json").read_text())["best_step"]
    run = make_worsening(past_its_best.folder.parent.parent, f"killed{extra}")
    take = train.Loop._step

    def killed(loop, step):
        if loop.progress.step == best + extra:
            raise Killed
        return take(loop, step)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.Loop, "_step", killed)
        train.main(run.config, run)
    assert len(list(run.path("checkpoints").iterdir())) == best + extra
    train.main(run.config, run)
    assert_best_is_kept(run)
    assert_same(outcome(run), outcome(past_its_best))
    one, other = (each.path("adapter") / WEIGHTS for each in (run, past_its_best))
    assert one.read_bytes() == other.read_bytes()


def test_a_checkpoint_that_lost_its_best_weights_is_not_continued(past_its_best):
    """As a CPU once wrote them: `best` holds the weights of the step that was saved."""
    best = json.loads(past_its_best.path("training.json").read_text())["best_step"]
    run = make_worsening(past_its_best.folder.parent.parent, "lost")
    for step in (best, best + 1):
        saved = checkpoint.read(past_its_best.path(f"checkpoints/step-{step:08d}"))
        assert isinstance(saved, checkpoint.Checkpoint)
        groups = {name: saved.tensors(name) for name in ("adapter", "optimizer")}
        groups["best"] = groups["adapter"]
        facts = {name: saved.facts[name] for name in ("run", "epoch", "cursor")}
        checkpoint.save(run.path("checkpoints"), step, groups, saved.state(), facts, keep=2)
    with pytest.raises(DistillError, match=f"best.*step {best}.*step {best + 1}") as fault:
        train.main(run.config, run, allow_inexact=True)
    assert fault.value.code == Exit.TRAINING and "--redo train" in fault.value.fix
    (run.path("checkpoints") / f"step-{best + 1:08d}" / "manifest.json").unlink()
    train.main(run.config, run)
    assert_same(outcome(run), outcome(past_its_best))


def test_early_stopping_keeps_the_weights_of_the_best_step(tmp_path):
    run = make_worsening(tmp_path, early_stopping_patience=2)
    train.main(run.config, run)
    assert json.loads(run.path("training.json").read_text())["stopped_early"]
    assert_best_is_kept(run)


def test_the_last_adapter_is_released_where_the_best_is_not_asked_for(tmp_path):
    run = make_worsening(tmp_path, load_best_model_at_end=False)
    train.main(run.config, run)
    training = json.loads(run.path("training.json").read_text())
    last = sorted(run.path("checkpoints").iterdir())[-1]
    assert training["best_step"] < training["adapter_step"] == training["steps"]
    found = load_file(run.path("adapter") / WEIGHTS)
    assert equal(found, load_file(last / "adapter.safetensors"))


def test_training_leaves_the_arithmetic_of_the_process_as_it_was(tmp_path):
    run = make_run(tmp_path, max_steps=1)
    train.main(run.config, run)
    assert float(torch.tensor(1e-310, dtype=torch.float64) * 1) > 0


def test_no_dataset_names_the_command_that_makes_one(tmp_path):
    run = make_run(tmp_path)
    run.path("dataset/train.jsonl").unlink()
    with pytest.raises(DistillError, match="distill filter") as fault:
        train.main(run.config, run)
    assert fault.value.code == Exit.TRAINING


def test_a_loss_that_is_not_finite_stops_with_step_and_samples(tmp_path, monkeypatch):
    run = make_run(tmp_path, save_steps=1)
    forward, seen = StudentModel.forward, [0]

    def broken(self, batch):
        seen[0] += 1
        return forward(self, batch) * (float("nan") if seen[0] == 3 else 1)

    monkeypatch.setattr(StudentModel, "forward", broken)
    with pytest.raises(DistillError, match=r"step 3: loss nan.*over samples [0-9a-f]{32}") as fault:
        train.main(run.config, run)
    assert fault.value.code == Exit.TRAINING
    assert sorted(f.name for f in run.path("checkpoints").iterdir())[-1] == "step-00000002"


@pytest.mark.parametrize("change", [{"learning_rate": 1e-3}, {"tokens_per_step": 700}])
def test_a_resume_with_other_settings_stops_with_the_difference(tmp_path, change):
    run = make_run(tmp_path, save_steps=1)
    with killed_at(4):
        train.main(run.config, run)
    other = make_run(tmp_path, save_steps=1, **change)
    key, value = next(iter(change.items()))
    with pytest.raises(DistillError, match=f"train.{key} was .*, is {value}") as fault:
        train.main(other.config, other)
    assert fault.value.code == Exit.TRAINING
    train.main(other.config, other, allow_inexact=True)
    notes = json.loads(other.path("training.json").read_text())["notes"]
    assert "resumed inexactly at step" in notes[0]


def test_a_resume_on_other_data_stops(tmp_path):
    run = make_run(tmp_path, save_steps=1)
    with killed_at(4):
        train.main(run.config, run)
    write_records(run.path("dataset/train.jsonl"), pairs(25))
    with pytest.raises(DistillError, match="changed: data"):
        train.main(run.config, run)


def test_ctrl_c_finishes_the_step_saves_it_and_ends_with_130(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    forward, seen = StudentModel.forward, [0]

    def interrupted(self, batch):
        seen[0] += 1
        if seen[0] == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(StudentModel, "forward", interrupted)
        with pytest.raises(DistillError, match="stopped after step 2") as fault:
            train.main(run.config, run)
    assert fault.value.code == Exit.INTERRUPTED
    train.main(run.config, run)
    whole = make_run(tmp_path, "whole")
    train.main(whole.config, whole)
    assert_same(outcome(run), outcome(whole))


def test_a_tracker_that_is_missing_is_one_line(tmp_path, monkeypatch):
    run = make_run(tmp_path, report_to="trackio")
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DistillError, match="trackio is not installed"):
        train.main(run.config, run)


def test_other_processes_than_asked_stop(tmp_path):
    run = make_run(tmp_path, num_processes=2)
    with pytest.raises(DistillError, match="2 processes were asked for, 1 came"):
        train.main(run.config, run)


def test_four_bits_need_a_gpu(tmp_path):
    run = make_run(tmp_path)
    student = run.config.student.model_copy(update={"load_in_4bit": True})
    config = run.config.model_copy(update={"student": student})
    with pytest.raises(DistillError, match="needs an NVIDIA GPU"):
        train.main(config, Run(config))

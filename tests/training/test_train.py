"""The loop: exact when resumed, the same however a step is cut up, and loud about errors."""

import importlib.util
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill.errors import DistillError, Exit
from distill.storage.files import read_json, write_records
from distill.storage.run_folder import Run
from distill.training import train
from distill.training.adapters import WEIGHTS
from distill.training.student import StudentModel
from tests.support.training import (
    LORA,
    Killed,
    assert_same,
    equal,
    killed_at,
    make_run,
    outcome,
    pairs,
    training,
)

TWO = {"micro_batch_tokens": 300, "lora": LORA}  # micro-batches a step, and dropout


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The run that nothing interrupts, with a checkpoint at each step."""
    folder = tmp_path_factory.mktemp("unbroken")
    run = make_run(folder, save_steps=1, **TWO)
    train.main(run)
    return folder, outcome(run)


@pytest.mark.parametrize("calls", [[1], [3], [11], [14], [25], [12, 9]], ids=str)
def test_a_killed_run_goes_on_to_the_same_bits(unbroken, calls):
    folder, expected = unbroken
    often = {"save_steps": 1 if len(calls) == 1 else 3}
    run = make_run(folder, f"kill{calls[0]}of{len(calls)}", **often, **TWO)
    for call in calls:
        with killed_at(call):
            train.main(run)
    train.main(run)
    assert_same(outcome(run), expected)


def test_the_loss_falls_and_the_files_are_there(tmp_path):
    run = make_run(tmp_path, num_train_epochs=6)
    train.main(run)
    made = training(run)
    assert made["history"][-1]["loss"] < 0.97 * made["history"][0]["loss"]
    assert made["steps"] == len(made["history"]) and made["examples"] == 24
    assert made["tokens"] == sum(row["tokens"] for row in made["history"])
    assert made["tokens_per_second"] > 0 and made["dtype"] == "float32"
    best = min(made["validation"], key=lambda row: row["loss"])
    assert made["best_step"] == made["adapter_step"] == best["step"]
    assert run.path("adapter/base.json").exists()
    assert not list(run.folder.rglob("*.bin")) and not list(run.folder.rglob("*.pt"))
    # the arithmetic of the process is as it was: denormal numbers are no zeros
    assert float(torch.tensor(1e-310, dtype=torch.float64) * 1) > 0


def make_worsening(folder: Path, name: str = "run", **settings: Any) -> Run:
    """Return a run that soon gets worse at its validation answers, which are unlike the others."""
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
    train.main(run)
    return run


def assert_best_is_released(run: Run) -> None:
    """Compare the adapter, and the best one of every checkpoint, with the best step's weights."""
    made = training(run)
    best = made["best_step"]
    assert 1 < best < made["steps"] and made["adapter_step"] == best
    folders = sorted(run.path("checkpoints").iterdir())
    weights = {f: load_file(f / "adapter.safetensors") for f in folders}
    assert not equal(weights[folders[best - 1]], weights[folders[-1]])
    for folder in folders:
        if step := read_json(folder / "state.json")["best_step"]:
            assert equal(load_file(folder / "best.safetensors"), weights[folders[step - 1]]), folder
    assert equal(load_file(run.path("adapter") / WEIGHTS), weights[folders[best - 1]])


def test_the_adapter_and_every_checkpoint_hold_the_weights_of_the_best_step(past_its_best):
    """H12"""
    assert_best_is_released(past_its_best)


@pytest.mark.parametrize("extra", [1, 2, 5])
def test_a_run_killed_after_its_best_step_ends_with_the_same_best_weights(past_its_best, extra):
    """H12"""
    best = training(past_its_best)["best_step"]
    run = make_worsening(past_its_best.folder.parent.parent, f"killed{extra}")
    take = train.Loop._step

    def killed(loop, step):
        if loop.progress.step == best + extra:
            raise Killed
        return take(loop, step)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.Loop, "_step", killed)
        train.main(run)
    assert len(list(run.path("checkpoints").iterdir())) == best + extra
    train.main(run)
    assert_best_is_released(run)
    assert_same(outcome(run), outcome(past_its_best))
    one, other = (each.path("adapter") / WEIGHTS for each in (run, past_its_best))
    assert one.read_bytes() == other.read_bytes()


def test_early_stopping_stops_and_releases_the_weights_of_the_best_step(tmp_path):
    run = make_worsening(tmp_path, early_stopping_patience=2)
    train.main(run)
    made = training(run)
    assert made["stopped_early"] and made["steps"] == made["best_step"] + 4
    assert_best_is_released(run)


def test_the_last_adapter_is_released_where_the_best_is_not_requested(tmp_path):
    run = make_worsening(tmp_path, load_best_model_at_end=False)
    train.main(run)
    made, last = training(run), sorted(run.path("checkpoints").iterdir())[-1]
    assert made["best_step"] < made["adapter_step"] == made["steps"]
    weights = load_file(run.path("adapter") / WEIGHTS)
    assert equal(weights, load_file(last / "adapter.safetensors"))


def forward_with(monkeypatch: pytest.MonkeyPatch, call: int, change: Any) -> None:
    """Let the forward pass number `call` return what `change` makes of its loss."""
    forward, count = StudentModel.forward, [0]

    def changed(self, batch):
        count[0] += 1
        loss = forward(self, batch)
        return change(loss) if count[0] == call else loss

    monkeypatch.setattr(StudentModel, "forward", changed)


def test_a_loss_that_is_not_finite_stops_with_step_and_samples(tmp_path, monkeypatch):
    run = make_run(tmp_path, save_steps=1)
    forward_with(monkeypatch, 3, lambda loss: loss * float("nan"))
    with pytest.raises(DistillError, match=r"step 3: loss nan.*over samples [0-9a-f]{32}") as error:
        train.main(run)
    assert error.value.code == Exit.TRAINING
    assert sorted(f.name for f in run.path("checkpoints").iterdir())[-1] == "step-00000002"


def test_ctrl_c_finishes_the_step_saves_it_and_ends_with_130(tmp_path, monkeypatch):
    run, whole = make_run(tmp_path), make_run(tmp_path, "whole")

    def interrupt(loss: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return loss

    with monkeypatch.context() as patch:
        forward_with(patch, 2, interrupt)
        with pytest.raises(DistillError, match="stopped after step 2") as error:
            train.main(run)
    assert error.value.code == Exit.INTERRUPTED
    train.main(run)
    train.main(whole)
    assert_same(outcome(run), outcome(whole))


def test_a_resume_under_other_settings_or_data_stops_with_the_difference(tmp_path):
    run = make_run(tmp_path, save_steps=1)
    with killed_at(4):
        train.main(run)
    for key, value in {"learning_rate": 1e-3, "tokens_per_step": 700}.items():
        other = make_run(tmp_path, **{"save_steps": 1, key: value})
        with pytest.raises(DistillError, match=f"train.{key} was .*, is {value}") as error:
            train.main(other)
        assert error.value.code == Exit.TRAINING
    write_records(run.path("dataset/train.jsonl"), pairs(25))
    with pytest.raises(DistillError, match="changed: data"):
        train.main(run)
    train.main(run, allow_inexact=True)
    assert "resumed inexactly at step" in training(run)["notes"][0]


def test_what_a_training_lacks_is_one_line(tmp_path, monkeypatch):
    run = make_run(tmp_path, report_to="trackio")
    four_bits = run.config.student.model_copy(update={"load_in_4bit": True})
    plain = run.config.train.model_copy(update={"report_to": "none"})
    two = plain.model_copy(update={"num_processes": 2})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for message, changes in (
        ("trackio is not installed", {}),
        ("2 processes were asked for, 1 came", {"train": two}),
        ("needs an NVIDIA GPU", {"train": plain, "student": four_bits}),
    ):
        config = run.config.model_copy(update=changes)
        with pytest.raises(DistillError, match=message):
            train.main(Run(config))
    run.path("dataset/train.jsonl").unlink()
    with pytest.raises(DistillError, match="distill filter") as error:
        train.main(run)
    assert error.value.code == Exit.TRAINING

"""Checkpoints under kills, damage and a full disk: what is loaded is whole, or the run stops."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from distill.errors import DistillError, Exit
from distill.training import checkpoint

TENSORS = {"adapter": {"a": torch.arange(6.0)}, "optimizer": {"a.step": torch.tensor(3.0)}}
FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def save(folder: Path, step: int, keep: int = 2) -> checkpoint.Checkpoint:
    return checkpoint.save(folder, step, TENSORS, {"step": step}, {"run": {"seed": 1}}, keep)


def newest(folder: Path) -> checkpoint.Checkpoint:
    found = checkpoint.latest(folder)
    assert found is not None
    return found


def test_what_is_saved_is_read_back(tmp_path):
    save(tmp_path, 7)
    found = newest(tmp_path)
    assert found.facts["step"] == 7 and found.facts["run"] == {"seed": 1}
    assert found.state() == {"step": 7}
    assert torch.equal(found.tensors("adapter")["a"], TENSORS["adapter"]["a"])
    assert found.tensors("best") == {}


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_old_ones_go_but_two_stay(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=1)
    assert [f.name for f in sorted(tmp_path.iterdir())] == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "half", "empty", "flip"])
def test_damage_is_found_and_the_one_before_is_used(tmp_path, capfd, name, damage):
    save(tmp_path, 1)
    harm(save(tmp_path, 2).folder / name, damage)
    assert newest(tmp_path).facts["step"] == 1
    assert f"WARNING: {tmp_path / 'step-00000002'}" in capfd.readouterr().err


def harm(path: Path, damage: str, place: int = 0) -> None:
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "flip":
        place = place % len(data)
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "half" else b"")


def test_every_flipped_byte_is_found(tmp_path):
    folder = save(tmp_path, 1).folder
    for name in FILES:
        whole = (folder / name).read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 60)):
            harm(folder / name, "flip", place)
            assert isinstance(checkpoint.read(folder), str), (name, place)
            (folder / name).write_bytes(whole)
    assert not isinstance(checkpoint.read(folder), str)


def test_none_whole_stops_rather_than_begin_anew(tmp_path):
    for step in (1, 2):
        harm(save(tmp_path, step).folder / "optimizer.safetensors", "half")
    with pytest.raises(DistillError, match="none of 2 checkpoints is intact") as fault:
        checkpoint.latest(tmp_path)
    assert fault.value.code == Exit.TRAINING


def test_a_full_disk_keeps_the_one_before(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(DistillError, match="No space left"):
        save(tmp_path, 2)
    assert newest(tmp_path).facts["step"] == 1
    assert not list(tmp_path.glob(".step-*"))


SAVER = """
import sys, torch
from pathlib import Path
from distill.training import checkpoint
tensors = {"adapter": {"a": torch.zeros(200_000)}, "optimizer": {"b": torch.zeros(200_000)}}
print("ready", flush=True)
for step in range(1, 10_000):
    checkpoint.save(Path(sys.argv[1]), step, tensors, {"step": step}, {}, 2)
"""


def test_a_kill_while_saving_leaves_a_whole_one(tmp_path):
    for attempt in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE
        ) as saver:
            assert saver.stdout and saver.stdout.readline()
            time.sleep(0.3 + 0.037 * attempt)
            os.kill(saver.pid, signal.SIGKILL)
        assert newest(tmp_path).state()["step"] >= 1
        checkpoint.sweep(tmp_path)
        assert not list(tmp_path.glob(".step-*"))

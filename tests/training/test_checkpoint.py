"""Checkpoints under kills, damage and a full disk: what is loaded is intact, or the run stops."""

import errno
from pathlib import Path

import pytest
import torch

from distill.errors import DistillError, Exit
from distill.training import checkpoint
from tests.support.mortal import killed_at_every_call

TENSORS = {"adapter": {"a": torch.arange(6.0)}, "optimizer": {"a.step": torch.tensor(3.0)}}
FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def save(folder: Path, step: int, keep: int = 2) -> checkpoint.Checkpoint:
    return checkpoint.save(folder, step, TENSORS, {"step": step}, {"run": {"seed": 1}}, keep)


def newest(folder: Path) -> checkpoint.Checkpoint:
    saved = checkpoint.latest(folder)
    assert saved is not None
    return saved


def test_what_is_saved_is_read_back(tmp_path):
    save(tmp_path, 7)
    saved = newest(tmp_path)
    assert saved.facts["step"] == 7 and saved.facts["run"] == {"seed": 1}
    assert saved.state() == {"step": 7}
    assert torch.equal(saved.tensors("adapter")["a"], TENSORS["adapter"]["a"])
    assert saved.tensors("best") == {}
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_old_ones_go_but_two_stay(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=1)
    assert [f.name for f in sorted(tmp_path.iterdir())] == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "half"])
def test_damage_is_found_and_the_one_before_is_used(tmp_path, capfd, name, damage):
    save(tmp_path, 1)
    harm(save(tmp_path, 2).folder / name, damage)
    assert newest(tmp_path).facts["step"] == 1
    assert f"WARNING: {tmp_path / 'step-00000002'}" in capfd.readouterr().err


def harm(path: Path, damage: str) -> None:
    data = path.read_bytes()
    path.unlink()
    if damage == "half":
        path.write_bytes(data[: len(data) // 2])


def test_every_flipped_byte_is_found(tmp_path):
    folder = save(tmp_path, 1).folder
    for name in FILES:
        whole = (folder / name).read_bytes()
        for index in range(0, len(whole), max(1, len(whole) // 60)):
            flipped = bytes([whole[index] ^ 1])
            (folder / name).write_bytes(whole[:index] + flipped + whole[index + 1 :])
            with pytest.raises(DistillError, match=name):
                checkpoint.read(folder)
            (folder / name).write_bytes(whole)
    checkpoint.read(folder)


def test_none_intact_stops_rather_than_begin_anew(tmp_path):
    for step in (1, 2):
        harm(save(tmp_path, step).folder / "optimizer.safetensors", "half")
    with pytest.raises(DistillError, match="none of 2 checkpoints is intact") as error:
        checkpoint.latest(tmp_path)
    assert error.value.code == Exit.TRAINING


def test_a_full_disk_keeps_the_one_before(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(DistillError, match="No space left"):
        save(tmp_path, 2)
    assert newest(tmp_path).facts["step"] == 1
    assert not list(tmp_path.glob(".step-*"))


def test_a_kill_at_any_call_to_the_disk_leaves_an_intact_one(memory):
    save(memory, 1)
    save(memory, 2)

    def check() -> None:
        assert newest(memory).state()["step"] >= 2
        save(memory, 3)
        assert not list(memory.glob(".step-*"))

    assert killed_at_every_call(lambda: save(memory, 3), check) > 10

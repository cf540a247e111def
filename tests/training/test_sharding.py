"""Two processes take the steps of one, in copies and in shards, and end together."""

import os
import shutil
import signal
import time
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from distill.errors import DistillError, Exit
from distill.models.devices import send
from distill.training import processes, train
from distill.training.prepare import Preparation
from tests.support.launched import ROOT, alive, finished, launch, wait_for_workers, write_config
from tests.support.training import TRAIN, assert_close, make_run, make_soft_run, outcome

FILES = ROOT / "configs/accelerate"
COPIES, SHARDS = ("--multi_gpu",), ("--config_file", str(FILES / "fsdp2.yaml"))
SOFT = {**TRAIN, "num_train_epochs": 1, "lora": {"r": 4}, "loss": {"ce": 0.5, "forward_kl": 0.5}}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process with soft labels, whose cross-entropy is the loss of text alone."""
    from distill.training.soft_labels import capture

    run = make_soft_run(tmp_path_factory.mktemp("alone"), "one", train=SOFT)
    capture.main(run)
    train.main(run)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("way", ["copies", "shards", "resumed in shards"])
def test_two_processes_give_the_losses_and_gradients_of_one(alone, way):
    folder, name = alone.folder.parent.parent, way.replace(" ", "")
    two = make_soft_run(folder, name, train={**SOFT, "num_processes": 2})
    shutil.copy(alone.path("signals.json"), two.path("signals.json"))
    words = COPIES if way == "copies" else SHARDS
    more = ["--allow-inexact"] if "resumed" in way else []
    if more:
        step = sorted(alone.path("checkpoints").iterdir())[0]
        shutil.copytree(step, two.path("checkpoints") / step.name)
    path = str(write_config(two, folder))
    process = launch(*words, "--num_processes", "2", "scripts/train.py", path, *more)
    shown = finished(process)
    assert process.returncode == 0, shown
    assert ("sharded over 2 processes" in shown) == (way != "copies")
    assert ("continuing after step" in shown) == bool(more)
    assert two.path("stages/train.json").exists() and len(two.ledger.entries()) == 1
    one, other = outcome(alone), outcome(two)
    assert_close(one, other)
    for part in ("adapter", "optimizer"):
        assert one[part].keys() == other[part].keys()
        for key, value in one[part].items():
            assert (value - other[part][key]).norm() <= 2e-3 * value.norm(), key


def test_a_launcher_that_starts_one_process_of_two_is_stopped(tmp_path):
    config = write_config(make_run(tmp_path), tmp_path)
    process = launch("--cpu", "--num_processes", "2", "scripts/train.py", str(config))
    assert "2 processes were asked for, 1 came" in finished(process)
    assert process.returncode != 0


@pytest.mark.parametrize("victim", ["worker", "launcher"])
def test_when_one_process_dies_none_is_left(tmp_path, victim):
    run = make_run(tmp_path, num_train_epochs=1000, eval_steps=None)
    config = write_config(run, tmp_path)
    process = launch("--multi_gpu", "--num_processes", "2", "scripts/train.py", str(config))
    workers = wait_for_workers(process.pid)
    os.kill(process.pid if victim == "launcher" else workers[-1], signal.SIGKILL)
    finished(process, 60)
    assert process.returncode != 0
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in workers if alive(pid)]


def environment_of(name: str) -> dict[str, str]:
    """Return what `accelerate launch --config_file NAME` gives to each process."""
    words = ["--config_file", str(FILES / name), "scripts/train.py"]
    arguments = launch_command_parser().parse_args(words)
    return prepare_multi_gpu_env(_validate_launch_command(arguments)[0])


@pytest.mark.parametrize("path", sorted(FILES.iterdir()), ids=lambda path: path.name)
def test_accelerate_knows_every_key(path):
    config: Any = load_config_from_file(str(path))
    keys = vars(launch_command_parser().parse_args(["scripts/train.py"]))
    assert config.fsdp_config.keys() <= keys.keys()
    assert config.num_processes == (1 if path.name == "one-gpu.yaml" else 2)
    assert config.mixed_precision == "no"  # the model's type is the config's


@pytest.mark.parametrize("name", ["ddp.yaml", "fsdp2.yaml"])
def test_shards_come_where_the_file_asks_for_them(name, monkeypatch):
    for key, value in environment_of(name).items():
        monkeypatch.setenv(key, value)
    assert processes.sharded() == (name == "fsdp2.yaml")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("FSDP_VERSION", "1"),
        ("FSDP_OFFLOAD_PARAMS", "true"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true"),
    ],
)
def test_another_way_to_shard_is_refused(key, value, monkeypatch):
    for name, other in {**environment_of("fsdp2.yaml"), key: value}.items():
        monkeypatch.setenv(name, other)
    with pytest.raises(DistillError, match=f"{key.lower()}.* is not supported") as error:
        processes.check("none", None)
    assert error.value.code == Exit.TRAINING


@pytest.fixture
def first_of_two():
    """Let this process believe to be the first of two; the other never answers."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield SimpleNamespace(device=torch.device("cpu"), num_processes=2)
    torch.distributed.destroy_process_group()


def test_each_process_keeps_its_part_of_every_layer(first_of_two, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    run = make_run(tmp_path)
    student = Preparation(run).student
    processes.wrap(first_of_two, student)
    layers = student.decoder().layers
    assert all(isinstance(part, FSDPModule) for part in (student, *layers))
    parameters: list[Any] = list(student.parameters())
    assert all(p.to_local().numel() <= 0.6 * p.numel() for p in parameters)


@pytest.mark.parametrize("device", ["cuda", torch.device("cuda", 1)])
def test_a_gpu_gets_a_batch_from_pinned_memory_in_its_queue(device):
    tensor = MagicMock()
    send(tensor, device)
    tensor.pin_memory.return_value.to.assert_called_once_with(device, non_blocking=True)
    tensor.to.assert_not_called()
    row = torch.arange(3)
    assert send(row, "cpu") is row, "on a CPU nothing is copied"

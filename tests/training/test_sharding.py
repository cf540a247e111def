"""Launch files that accelerate reads as they are meant, and a student in shards that learns what a whole one does."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from distill.errors import DistillError, Exit
from distill.training import sharding, train
from distill.training.prepare import prepare
from tests.training.test_train import make_run, outcome
from tests.training.test_train_two_processes import finished, launch, write_config

FILES = Path(__file__).resolve().parent.parent.parent / "configs/accelerate"


def environment_of(name: str) -> dict[str, str]:
    """Return what `accelerate launch --config_file NAME` gives to each process."""
    parser = launch_command_parser()
    told = parser.parse_args(["--config_file", str(FILES / name), "scripts/train.py"])
    return prepare_multi_gpu_env(_validate_launch_command(told)[0])


@pytest.mark.parametrize("path", sorted(FILES.iterdir()), ids=lambda path: path.name)
def test_accelerate_knows_every_key(path):
    config = load_config_from_file(str(path))
    known = vars(launch_command_parser().parse_args(["scripts/train.py"]))
    assert config.fsdp_config.keys() <= known.keys()
    assert config.num_processes == (1 if path.name == "one-gpu.yaml" else 2)
    assert config.mixed_precision == "no"  # the model's type is the config's


@pytest.mark.parametrize("name", ["ddp.yaml", "fsdp2.yaml"])
def test_shards_come_where_the_file_asks_for_them(name, monkeypatch):
    for key, value in environment_of(name).items():
        monkeypatch.setenv(key, value)
    assert sharding.enabled() == (name == "fsdp2.yaml")


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
    with pytest.raises(DistillError, match=f"{key.lower()}.* is not supported") as fault:
        sharding.enabled()
    assert fault.value.code == Exit.TRAINING


def test_a_checkpoint_of_a_whole_student_continues_in_shards(tmp_path):
    settings = {"micro_batch_tokens": 300, "num_train_epochs": 1, "save_steps": 3}
    one, two = make_run(tmp_path, "one", **settings), make_run(tmp_path, "two", **settings)
    train.main(one.config, one)
    saved = one.path("checkpoints/step-00000003")
    shutil.copytree(saved, two.path("checkpoints") / saved.name)
    path = str(write_config(two, tmp_path))
    file = str(FILES / "fsdp2.yaml")
    process = launch("--config_file", file, "scripts/train.py", path, "--allow-inexact")
    shown = finished(process)
    assert process.returncode == 0, shown
    assert "continuing after step 3" in shown and "sharded over 2 processes" in shown
    whole, sharded = outcome(one), outcome(two)
    for row, other in zip(whole["history"], sharded["history"], strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    for part in ("adapter", "optimizer"):
        assert whole[part].keys() == sharded[part].keys()
        for name, value in whole[part].items():
            torch.testing.assert_close(value, sharded[part][name], rtol=1e-3, atol=1e-5)


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
    student = prepare(run.config, run).student
    sharding.wrap(first_of_two, student)
    layers = student.decoder().layers
    assert all(isinstance(part, FSDPModule) for part in (student, *layers))
    for name, parameter in student.named_parameters():
        assert parameter.to_local().numel() <= 0.6 * parameter.numel(), name

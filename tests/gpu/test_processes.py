"""Training under accelerate as people use it: their own config, too many processes, shards."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState

from distill.config.yaml_file import load_config
from distill.errors import DistillError, Exit
from distill.models import loading
from distill.models.arithmetic import LEAST, MICRO_BATCH_TOKENS
from distill.storage import environment
from distill.training import processes, train
from distill.training.batches import micro_batches, plan_steps, share
from distill.training.prepare import load_adapted
from tests.support import launched
from tests.support.training import Killed, assert_same, make_run, outcome, training

ROOT = Path(__file__).resolve().parent.parent.parent
SHARDS = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run whose process had no launcher."""
    folder = tmp_path_factory.mktemp("runs")
    run = make_run(folder, max_steps=3)
    train.main(run)
    return folder


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
    ],
)
def test_precision_accumulation_and_compilation_are_not_the_launchers(
    folder: Path, variable: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv(variable, value)
    for state in (AcceleratorState._reset_state, GradientState._reset_state):
        state()  # as in a process of its own
    run = make_run(folder, f"run-{value}", max_steps=3)
    train.main(run)
    assert_same(outcome(run), outcome(make_run(folder)))
    assert ("bf16 is not used: train.bf16" in capsys.readouterr().err) == (value == "bf16")


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "parallelism_config"),
    ],
)
def test_what_is_no_training_of_ours_is_refused_by_name(
    variable: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(DistillError, match=f"{name} is not supported.*--config_file") as error:
        processes.start("none", None, tmp_path)
    assert error.value.code == Exit.TRAINING


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch see two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


def test_a_cpu_in_accelerate_s_config_beside_a_gpu_is_refused(
    gpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(DistillError, match="use_cpu: true beside a GPU"):
        processes.start("none", None, tmp_path)


def test_more_processes_than_gpus_are_refused_before_anything_is_loaded(
    gpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(DistillError, match=r"8 were started here, for 2 GPUs.*num_processes 2"):
        processes.start("none", None, tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert loading.device() == torch.device("cuda", 1)


@pytest.mark.parametrize("variables", [{}, SHARDS], ids=["alone", "shards"])
def test_a_student_that_is_cut_into_shards_is_read_into_main_memory(
    variables: dict[str, str], gpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer goes to the GPU when it is cut, as `test_sharding` shows: none holds all."""
    run, maps = make_run(tmp_path), list[object]()
    monkeypatch.setattr(os, "environ", {**os.environ, **variables})

    def spied(*_: object, **options: object) -> None:
        maps.append(options.get("device_map"))
        raise Killed

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", spied)
    with pytest.raises(Killed):
        load_adapted(run.config.student, run.config.train, 0)
    assert maps == [None if variables else {"": torch.device("cuda", 0)}]


@pytest.mark.parametrize(
    ("command", "world"),
    [
        ("torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend c10d scripts/train.py", 8),
        ("accelerate launch --num_machines 2 --num_processes 8 scripts/train.py", 8),
        ("accelerate launch --num_processes 8 scripts/train.py", 2),
    ],
)
def test_processes_on_several_machines_are_counted_together(
    command: str, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "launcher_command", lambda: command.replace(" ", "\0"))
    if world == 8:
        environment.check_world({}, world)
        return
    with pytest.raises(DistillError, match="8 processes were asked for, 2 came"):
        environment.check_world({}, world)


def test_tasks_of_slurm_that_nothing_launched_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "launcher_command", lambda: "python\0scripts/train.py")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(DistillError, match="srun: 4 processes were asked for, 1 came"):
        environment.check_world({}, 1)
    monkeypatch.setenv("WORLD_SIZE", "4")  # a launcher's, or the user's own
    environment.check_world({}, 4)


def passes_with_samples(path: Path, world: int, overrides: tuple[str, ...] = ()) -> float:
    """Return the share of the passes of `world` processes that hold samples."""
    config = load_config(path, overrides).train
    most = min(config.max_length, 1500)
    lengths = np.random.default_rng(0).integers(most // 8, most, 2000).tolist()
    limit, held, passes = config.micro_batch_tokens or MICRO_BATCH_TOKENS, 0, 0
    for step in plan_steps(lengths, 0, config.tokens_per_step, 1, None):
        batches = micro_batches(step.samples, lengths, limit, world)
        shares = [share(batches, rank, world) for rank in range(world)]
        held += sum(bool(batch) for own in shares for batch in own)
        passes += sum(map(len, shares))
    return held / passes


def worlds() -> list[tuple[Path, int]]:
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    configs = [p for p in paths if "\ntrain:" in p.read_text() and p.stem != "reference"]
    return [(path, 8 if path.stem == "many-gpus" else 1) for path in configs]


@pytest.mark.parametrize(("path", "world"), worlds(), ids=lambda value: getattr(value, "stem", ""))
def test_the_passes_of_every_shipped_config_hold_samples(path: Path, world: int) -> None:
    assert passes_with_samples(path, world) >= 0.9


def test_passes_without_samples_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = make_run(tmp_path, max_steps=1, tokens_per_step=100, eval_steps=None)
    start = processes.start

    def started(*given: Any) -> Any:
        accelerator = start(*given)
        monkeypatch.setattr(type(accelerator), "num_processes", 8)
        return accelerator

    monkeypatch.setattr(processes, "start", started)
    monkeypatch.setattr(processes, "wrap", lambda accelerator, student: student)
    train.main(run)
    note = "of the passes of 8 processes hold no sample: raise train.tokens_per_step"
    assert note in capsys.readouterr().err and note in training(run)["notes"][0]


def test_processes_with_different_gpus_deal_the_micro_batches_of_the_smallest(
    tmp_path: Path,
) -> None:
    """Else they would train on other samples than were dealt to them, without a word."""
    make_run(tmp_path)  # else both would write it
    words = ("--multi_gpu", "--num_processes", "2", "tests/support/two_gpus.py", str(tmp_path))
    process = launched.launch(*words)
    shown = launched.finished(process)
    assert process.returncode == 0, shown
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one["alone"] > other["alone"] > LEAST
    assert one["limit"] == other["limit"] == other["alone"]
    assert one["facts"] == other["facts"], "one of them would refuse every resume"
    assert one["facts"]["processor"] == "CPU 0, CPU 1"
    assert one["errors"] == other["errors"]
    types, packing = one["errors"]
    assert "dtype differs between the processes: bfloat16, float32 (train.bf16=false" in types
    assert "packing differs between the processes: False, True (train.packing=false" in packing

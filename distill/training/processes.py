"""The processes of a training, and where tensors live: on the host, on a device, in shards (FSDP2).

Precision, accumulation and compilation are this loop's; what else accelerate's config can want is
refused by name. The layers are sharded here, by torch's `fully_shard`: accelerate would silently
leave them whole on a CPU, on which two processes are tested. Weights are read into main memory, and
each layer goes to the device when it is cut. What leaves the model is gathered by every process.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    gather_object,
    parse_flag_from_env,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from distill.errors import DistillError, Exit
from distill.models.devices import device
from distill.storage.environment import check_world
from distill.tasks.sandbox.namespaces import die_with_parent

TIMEOUT = timedelta(minutes=10)  # for a process that waits for another
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}
REFUSED_SHARDS = ("OFFLOAD_PARAMS", "CPU_RAM_EFFICIENT_LOADING", "ACTIVATION_CHECKPOINTING")


def check(report_to: str, num_processes: int | None) -> None:
    """Stop over what would keep a training from starting in this process.

    Raises DistillError (exit 7) for a tracker that is not installed, for what the launcher's config
    wants and this loop does not do, and for another number of processes than the one stated.
    """
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        what, fix = f"{report_to} is not installed", "pip install 'distill[tracking]'"
        raise DistillError(Exit.TRAINING, "train.report_to", what, fix)
    gpu = device().type == "cuda"  # raises where there are more processes than GPUs
    refused = [name for variable, name in REFUSED.items() if parse_flag_from_env(variable)]
    if gpu and parse_flag_from_env("ACCELERATE_USE_CPU"):
        refused.append("use_cpu: true beside a GPU that torch sees")
    if sharded():
        refused += [f"fsdp_{n.lower()}" for n in REFUSED_SHARDS if parse_flag_from_env(f"FSDP_{n}")]
        if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
            refused.append(f"fsdp_version: {version}")
    if refused:
        fix = "accelerate launch --config_file configs/accelerate/one-gpu.yaml (or ddp, fsdp2)"
        what = f"{refused[0]} is not supported"
        raise DistillError(Exit.TRAINING, "accelerate's config", what, fix)
    check_world({"train.num_processes": num_processes}, int(os.environ.get("WORLD_SIZE", "1")))


def start(report_to: str, num_processes: int | None, folder: Path) -> Accelerator:
    """Return the Accelerator of this process after `check`; trackers write into `folder`."""
    check(report_to, num_processes)
    accelerator = Accelerator(
        cpu=device().type != "cuda",
        mixed_precision="no",
        dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=None if report_to == "none" else report_to,
        project_dir=folder,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
    )
    check_world({}, accelerator.num_processes)
    if accelerator.num_processes > 1:
        die_with_parent()
    return accelerator


def sharded() -> bool:
    """Tell whether the launcher requests shards."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def wrap(accelerator: Accelerator, student: nn.Module) -> Any:
    """Return the student ready for several processes: in shards, or as accelerate prepares it."""
    if not sharded():
        return accelerator.prepare(student)
    if any(not p.is_floating_point() for p in student.parameters()):
        fix = "load_in_4bit: false, or configs/accelerate/ddp.yaml"
        raise DistillError(Exit.TRAINING, "student", "quantised weights cannot be sharded", fix)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    kinds = [getattr(module, "_no_split_modules", None) or () for module in student.modules()]
    layers = {name for names in kinds for name in names}
    again = parse_flag_from_env("FSDP_RESHARD_AFTER_FORWARD", default=True)
    for module in [m for m in student.modules() if type(m).__name__ in layers]:
        fully_shard(module, mesh=mesh, reshard_after_forward=again)
    return fully_shard(student, mesh=mesh)


def agree(own: dict[str, Any], world: int, fixes: dict[str, str]) -> dict[str, Any]:
    """Return what all processes say by name: one value, or where they differ, all of them.

    Each of the `world` must call. Raises DistillError (exit 7) where they differ in what has a fix.
    """
    shared, ranks = dict(own), gather_object([own]) if world > 1 else [own]
    for name in own:
        values = sorted({str(rank[name]) for rank in ranks})
        if len(values) > 1:
            shared[name] = ", ".join(values)
            if name in fixes:
                what = f"{name} differs between the processes: {shared[name]}"
                raise DistillError(Exit.TRAINING, "processes", what, fixes[name])
    return shared


@contextmanager
def no_sync(accelerator: Accelerator, student: nn.Module) -> Iterator[None]:
    """Keep gradients local inside the block: a later backward of the step brings them together."""
    if not isinstance(student, FSDPModule):
        with accelerator.no_sync(student):
            yield
        return
    student.set_requires_gradient_sync(False)
    yield
    student.set_requires_gradient_sync(True)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor, gathered where processes hold shards of it; each of them must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def snapshot(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a full, contiguous copy on the CPU that no later step changes; each process must call.

    `cpu`, `float` and `contiguous` copy nothing of what already is so.
    """
    layout = torch.contiguous_format
    return full_tensor(tensor).detach().to("cpu", dtype, copy=True, memory_format=layout)


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a copy of a full tensor as `parameter` is: on its device, sharded where it is."""
    value = value.to(parameter.device, copy=True)  # else an optimizer steps on the caller's tensor
    if isinstance(parameter, DTensor) and value.ndim:  # one number is never in shards
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value

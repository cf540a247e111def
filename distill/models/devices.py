"""Where a model is computed: the device, its type of numbers, its free memory, its errors.

The one place that asks what a GPU has and can do. Importing it loads no torch.
"""

import gc
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from distill.errors import DistillError, Exit
from distill.storage.environment import cpu_facts

if TYPE_CHECKING:
    import torch

BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
FAST_FP16 = 7  # major compute capability of the first GPUs with tensor cores: V100, T4
# Blocks of all sizes leave holes that only segments which can grow make use of. PyTorch reads this
# once, at the first word with a GPU, so it is said where this module is imported.
if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def device() -> "torch.device":
    """Return this process's GPU, set up for batches of every length, or the CPU.

    Raises DistillError (exit 2) where this machine has fewer GPUs than processes of the launch.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    processes, count = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes > count:
        what, fix = f"{processes} were started here, for {count} GPUs", f"--num_processes {count}"
        raise DistillError(Exit.CONFIG, "processes", what, fix)
    # cuDNN's attention builds a graph for every new shape, which decoding has at each step
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def pick_dtype(name: str = "auto", key: str = "dtype") -> "torch.dtype":
    """Return the named dtype; `auto` is the fastest that the machine does not emulate.

    That is bfloat16, on older GPUs float16, else float32. Raises DistillError (exit 7) for bfloat16
    on a GPU that only emulates it; `key` is the config's that names the type.
    """
    import torch

    if torch.cuda.is_available():
        able = torch.cuda.is_bf16_supported(including_emulation=False)
        old = torch.cuda.get_device_capability()[0] < FAST_FP16
        best = torch.bfloat16 if able else torch.float32 if old else torch.float16
        if name == "bfloat16" and not able:
            what = f"{torch.cuda.get_device_name()} does not compute in bfloat16"
            raise DistillError(Exit.TRAINING, key, what, f"set it to auto, here {best}")
    else:
        facts = cpu_facts()
        flags = f"{facts.get('flags', '')} {facts.get('Features', '')}".split()  # x86, ARM
        best = torch.float32 if BF16_FLAGS.isdisjoint(flags) else torch.bfloat16
    return best if name == "auto" else getattr(torch, name)


def device_name(place: "torch.device") -> str:
    """Return the name of a GPU; nothing for a CPU."""
    import torch

    return torch.cuda.get_device_name(place) if place.type == "cuda" else ""


def free_memory(place: "torch.device | None" = None) -> int:
    """Return the bytes that can be had on a GPU or in main memory, caches included."""
    if place is not None and place.type == "cuda":
        import torch

        cached = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
        return torch.cuda.mem_get_info(place)[0] + cached
    rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(rows["MemAvailable"].split()[0]) * 1024


def release_memory() -> None:
    """Give back what nothing refers to any more; call it outside of an error's handler."""
    if (torch := sys.modules.get("torch")) is not None:  # else there was no model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def free_frames(error: BaseException) -> None:
    """Let go of what an error's traceback holds on a GPU: a notebook keeps the last error."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return
    link: BaseException | None = error
    while link:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    release_memory()


def raise_device_error(error: Exception) -> None:
    """Raise an error of the GPU itself again: full or lost, it does not mean "not supported"."""
    import torch

    lost = isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError)
    if lost or "CUDA error" in str(error):
        raise error


def kind(place: "torch.device") -> str:
    """Return the kind of a device that sizes of blocks are by: cpu or cuda."""
    return "cpu" if place.type == "cpu" else "cuda"


def send(tensor: "torch.Tensor", device: "torch.device | str") -> "torch.Tensor":
    """Copy a tensor to the device, without waiting for what a GPU computes meanwhile.

    A plain copy waits for its queue; one from pinned memory takes its place in the queue.
    """
    if str(device).startswith("cuda"):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)

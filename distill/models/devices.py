"""Where a model is computed: the device, its type of numbers, its free memory, its errors; GPUs by
name, why one that is here is not used, and who fills it.

The one place that asks what a GPU has and can do. ROCm's build of torch has the interface of
CUDA's, so an AMD GPU is used like one of NVIDIA; Apple's and Intel's are named and not used.
Importing it loads no torch, and needs the standard library alone: a benchmark reads it on a bare
machine.
"""

import csv
import gc
import os
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from distill.errors import DistillError, Exit
from distill.storage.environment import DRIVERS, cpu_facts, driver_version

if TYPE_CHECKING:
    import torch

BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
FAST_FP16 = 7  # major compute capability of the first GPUs with tensor cores: V100, T4
TABLE = Path("configs/devices.yaml")
# Words of a name that make it another device than the one without them.
VARIANTS = {"d", "laptop", "max", "mig", "nvl", "super", "ti"}
NEAR = 0.1  # a driver states up to 8 % more or less than the data sheet
HIDING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
PCI, NVIDIA, KFD = Path("/sys/bus/pci/devices"), DRIVERS[0], "/dev/kfd"
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


def send(tensor: "torch.Tensor", device: "torch.device | str") -> "torch.Tensor":
    """Copy a tensor to the device, without waiting for what a GPU computes meanwhile.

    A plain copy waits for its queue; one from pinned memory takes its place in the queue.
    """
    if str(device).startswith("cuda"):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A row of configs/devices.yaml: the words of its name, and its data sheet.

    `tflops` are those of products in bfloat16, or where it has none in float16, summed in float32.
    """

    __pydantic_config__ = {"extra": "forbid"}

    match: str
    machine: str
    tflops: float
    bf16: bool = True
    gigabytes: float
    source: str


@cache
def gpus() -> tuple[Gpu, ...]:
    """Return the rows of configs/devices.yaml."""
    from distill.config.yaml_file import find_config, read_table

    return read_table(find_config(TABLE), tuple[Gpu, ...], "correct the row")


def find_gpu(name: str, memory: float, rows: Sequence[Gpu] | None = None) -> Gpu | None:
    """Return the row of a GPU by the name that its driver gives it and its bytes of memory."""
    words, fitting = set(re.findall(r"[a-z0-9]+", name.lower())), dict[Gpu, int]()
    for row in gpus() if rows is None else rows:
        near = abs(memory / (row.gigabytes * 1e9) - 1) <= NEAR
        required = set(re.findall(r"[a-z0-9]+", row.match.lower()))
        if near and required <= words and not (words - required) & VARIANTS:
            fitting[row] = len(required)
    return max(fitting, key=fitting.__getitem__, default=None)


def unused_gpu() -> str | None:
    """Return which GPU is here that torch does not compute on, why, and what to do about it."""
    import torch

    if torch.cuda.is_available():
        return None
    torch_ = f"torch {torch.__version__}"
    hidden = [name for name in HIDING if os.environ.get(name) in ("", "-1")]
    cards = [p for p in PCI.glob("*") if (p / "class").read_text().startswith("0x03")]  # displays
    vendors = {(card / "vendor").read_text().strip() for card in cards}
    driver = driver_version(NVIDIA)
    if "0x10de" in vendors or driver or shutil.which("nvidia-smi"):
        name, why = "an NVIDIA GPU", "no driver is loaded: install it, or docker run --gpus all"
        if torch.version.cuda is None:
            why = f"{torch_} is a build without CUDA: install the one with it"
        elif driver:
            why = f"driver {driver} is too old for {torch_}: install a newer one"
    elif "0x1002" in vendors and Path(KFD).exists():
        name, why = "an AMD GPU", f"{torch_} is a build without ROCm: install the one with it"
    else:
        others = {"an Apple GPU (MPS)": torch.backends.mps, "an Intel GPU (XPU)": torch.xpu}
        name = next((gpu for gpu, backend in others.items() if backend.is_available()), None)
        why, hidden = "distill computes on CPUs and by CUDA or ROCm", []
    if name is None:
        return None
    if hidden:
        why = f"{hidden[0]}={os.environ[hidden[0]]!r} hides it"
    return f"{name} is here and is not used: {why}"


def other_processes() -> list[str]:
    """Return who else holds memory of an NVIDIA GPU, with how much, as the driver lists them."""
    from distill.formatting import size

    query = ["--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader,nounits"]
    try:
        rows = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    holders = []
    for row in csv.reader(rows.stdout.splitlines(), skipinitialspace=True):
        if len(row) < 3 or not (row[0].isdigit() and row[-1].isdigit()):
            continue  # an error of the driver, or memory that it does not tell
        if int(row[0]) != os.getpid():
            name, memory = ",".join(row[1:-1]), size(int(row[-1]) * 2**20)
            holders.append(f"{name} (pid {row[0]}) {memory}")
    return holders

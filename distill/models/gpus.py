"""GPUs by name: what configs/devices.yaml has of them, why one here is not used, who fills it.

ROCm's build of torch has the interface of CUDA's, so an AMD GPU is used like one of NVIDIA. Apple's
and Intel's are named and not used. Importing this needs the standard library alone: a benchmark
reads it on a bare machine.
"""

import csv
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from distill.storage.environment import DRIVERS, driver_version

TABLE = Path("configs/devices.yaml")
# Words of a name that make it another device than the one without them.
VARIANTS = {"d", "laptop", "max", "mig", "nvl", "super", "ti"}
NEAR = 0.1  # a driver states up to 8 % more or less than the data sheet
HIDING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
PCI, NVIDIA, KFD = Path("/sys/bus/pci/devices"), DRIVERS[0], "/dev/kfd"


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
    gigabytes_per_second: float
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

"""How fast the machine is, as a range: a GPU of configs/devices.yaml, or this CPU by a short measurement.

A GPU reaches 15 to 40 % of its dense bfloat16 rate in this work; one that the table does not have gets no figure. A
CPU's float32 matrix product is timed with numpy for a moment, and its bfloat16 units are known by their flags.
"""

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distill.config_file import find_config, parse_yaml, read_text
from distill.environment import cores, cpu_facts, processor
from distill.estimates import Span

TABLE = Path("configs/devices.yaml")
GPU_SHARE = Span(0.15, 0.40)  # of the roof, in training and in reading prompts
CPU_SHARE = Span(0.2, 0.65)
# By flag of /proc/cpuinfo: operations a second of a core at its best, in the type that `dtype: auto` picks there, and
# how many times its float32 product that is at least. 0.43e12 was measured on two cores with avx512_bf16.
CORES = {
    "amx_bf16": (2.5e12, 4.0),
    "avx512_bf16": (0.45e12, 2.5),
    "bf16": (0.25e12, 1.5),
    "avx512f": (0.2e12, 1.0),
    "avx2": (0.14e12, 1.0),
    "": (0.1e12, 1.0),
}


@dataclass(frozen=True)
class Device:
    """A machine: operations a second that the work reaches, bytes a second that its memory gives, slots of a batch."""

    name: str
    rate: Span
    bandwidth: Span
    slots: Span
    source: str
    memory: float | None = None


def find_device(machine: str | None) -> tuple[Device | None, str]:
    """Return the GPU of this machine, else that of the `machine` which the config prices, else this CPU; and why.

    The device is None where there is a GPU that the table does not have.
    """
    names = gpu_names()
    if names:
        found = next((row for row in table() if row["match"] in names[0]), None)
        why = f"this machine's {names[0]}"
        return (gpu(found), why) if found else (None, f"{why}, which configs/devices.yaml lacks")
    priced = next((row for row in table() if machine and row.get("machine") == machine), None)
    if priced:
        return gpu(priced), f"evaluation.machine {machine}; this machine has no GPU"
    return cpu(), "this machine"


def table() -> list[dict]:
    """Return the rows of configs/devices.yaml, the longest name first."""
    path = find_config(TABLE)
    return sorted(parse_yaml(read_text(path), path), key=lambda row: -len(row["match"]))


def gpu_names() -> list[str]:
    """Return the names of the NVIDIA GPUs here, by nvidia-smi."""
    ask = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(ask, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return answer.stdout.split("\n")[:-1] if answer.returncode == 0 else []


def gpu(row: dict) -> Device:
    """Return the device of a row."""
    bandwidth = row["gigabytes_per_second"] * 1e9
    source = f"{row['tflops']} TFLOP/s in bfloat16 ({row['source']}), of which 15 to 40 %"
    rate = GPU_SHARE * (row["tflops"] * 1e12)
    memory = row["gigabytes"] * 1e9
    return Device(row["match"], rate, Span(0.3, 0.8) * bandwidth, Span(16, 128), source, memory)


def cpu() -> Device:
    """Return this CPU: at most what its units could give, at least by its float32 rate, measured in a moment."""
    flags = {"", *cpu_facts().get("flags", cpu_facts().get("Features", "")).split()}
    name = next(flag for flag in CORES if flag in flags)
    best, times = CORES[name][0] * cores(), CORES[name][1]
    measured = float32_rate()
    roof = Span(min(best, max(measured * times, best / 4)), max(best, measured))
    units = f" with {name}" if name else ""
    source = (
        f"{roof.low / 1e9:,.0f} to {roof.high / 1e9:,.0f} GFLOP/s{units} "
        f"({measured / 1e9:.0f} in float32, measured now), of which 20 to 65 %"
    )
    bandwidth, slots = Span(8e9, 60e9), Span(16, 64)
    return Device(f"{processor()}, {cores()} cores", CPU_SHARE * roof, bandwidth, slots, source)


def float32_rate(size: int = 1024, seconds: float = 0.25) -> float:
    """Return the best rate of a square float32 matrix product within `seconds`, in operations a second."""
    a = np.ones((size, size), dtype=np.float32)
    best, end = 0.0, time.monotonic() + seconds
    while time.monotonic() < end or not best:
        started = time.perf_counter()
        np.dot(a, a)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best

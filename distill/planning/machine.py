"""The machine that a plan is for: its rate of products and its memory.

The rate is that of a matrix product in the type that is used, measured for a second where the run
would compute. A machine that is not at hand (`evaluation.machine`, where this one has no GPU) has
the rate of its data sheet, from configs/devices.yaml. Loads torch only to measure.
"""

import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING

from distill.formatting import size
from distill.models.devices import gpus, other_processes, unused_gpu
from distill.records import Record
from distill.storage.environment import cores, processor

if TYPE_CHECKING:
    import torch

# The share of a matrix product's rate that a stage reaches as a whole. On a CPU from recorded runs
# (docs/measured.md: 858 GFLOP/s in bfloat16; an AVX2 machine, 150 in float32): what is not a
# product weighs more where products are fast, and most for the small student, which answers in the
# evaluation.
SHARES = {
    "bfloat16": {"generate": 0.75, "train": 0.5, "evaluate": 0.3},
    "float32": {"generate": 0.85, "train": 0.8, "evaluate": 0.55},
}
GPU_SHARE = 0.25  # of the same on a GPU: what others reach there, not measured with this code
ROWS, INNER, OUTER = 1024, 1024, 4096  # of the product that is measured


class Machine(Record):
    """A device, its rate by the config's name for a type (auto), and the bytes of its memory."""

    name: str
    kind: str  # cpu or cuda
    rates: dict[str, tuple[str, float]] = {}  # by a type as the config names it: which it is here
    memory: float | None = None  # of the device, and what of it is free
    free: float | None = None
    main_memory: float | None = None
    source: str
    notes: tuple[str, ...] = ()
    here: bool = True  # where the plan is made

    def seconds(self, flops: float, dtype: str, stage: str) -> float:
        """Return how long a stage computes; NaN, which sums keep, where the rate is not known."""
        name, rate = self.rates.get(dtype, ("float32", math.nan))
        return flops / rate / (GPU_SHARE if self.kind == "cuda" else SHARES[name][stage])

    def width(self, dtype: str) -> int:
        """Return the bytes of a number of the type that `dtype` names here."""
        return 4 if self.rates.get(dtype, (dtype,))[0] == "float32" else 2


@cache
def find_machine(priced: str | None, *dtypes: str) -> Machine:
    """Return this machine with its rates, or that which is `priced`, where this one has no GPU."""
    here = measure(dtypes)
    row = next((row for row in gpus() if row.machine == priced), None)
    if here.kind == "cuda" or row is None:
        return here
    half, notes = "bfloat16" if row.bf16 else "float16", here.notes
    if "bfloat16" in dtypes and not row.bf16:
        notes += (f"{row.match} does not compute in bfloat16: leave dtype auto, which is {half}",)
    return Machine(
        name=row.match,
        kind="cuda",
        rates={name: (half if name == "auto" else name, row.tflops * 1e12) for name in dtypes},
        memory=row.gigabytes * 1e9,
        source=f"evaluation.machine, {row.tflops:g} TFLOP/s by {row.source}",
        here=False,
        notes=notes,
    )


def product_rate(dtype: "torch.dtype", place: "torch.device", seconds: float) -> float:
    """Return the operations a second of a matrix product.

    It is that of all products in `seconds`, not of the best: a busy machine is slow for a run.
    """
    import torch

    inputs = torch.randn(ROWS, INNER, device=place).to(dtype)
    weight = torch.randn(OUTER, INNER, device=place).to(dtype)
    done, started = -1, 0.0  # the first product, which sets up the kernel, is not counted
    while done < 1 or time.perf_counter() - started < seconds:
        torch.nn.functional.linear(inputs, weight)
        if place.type == "cuda":
            torch.cuda.synchronize()
        done += 1
        started = started if done else time.perf_counter()
    return done * 2 * ROWS * INNER * OUTER / (time.perf_counter() - started)


def measure(dtypes: Sequence[str], seconds: float = 1.0) -> Machine:
    """Measure the rate of a product here in each of `dtypes`, and what memory there is."""
    import torch

    from distill.models.devices import device, pick_dtype

    place, rates = device(), dict[str, tuple[str, float]]()
    for name in dict.fromkeys(dtypes):
        dtype = pick_dtype(name)
        with suppress(RuntimeError):  # a GPU that is full: no seconds then
            rates[name] = (str(dtype).removeprefix("torch."), product_rate(dtype, place, seconds))
    speeds = dict.fromkeys(f"{r / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, r in rates.values())
    main = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    name, memory, free = f"{processor()}, {cores()} cores", main, None
    notes = [note for note in [unused_gpu()] if note]
    if place.type == "cuda":
        gpu = torch.cuda.get_device_properties(place)
        numbers = (n for n in range(torch.cuda.device_count()) if n != place.index)
        others = [torch.cuda.get_device_properties(n) for n in numbers]
        name, memory, free = gpu.name, gpu.total_memory, 0
        with suppress(RuntimeError):  # there is not even room for this process to begin
            free = torch.cuda.mem_get_info(place)[0]
        if free < 0.9 * memory:
            held = ", ".join(other_processes()) or "processes that the driver does not list"
            notes += [f"GPU: {size(free)} of {size(memory)} are free; the rest is held by {held}"]
        if others:
            listed = ", ".join(f"{one.name} with {size(one.total_memory)}" for one in others)
            notes += [f"{len(others) + 1} GPUs: one process computes on {name} alone, not {listed}"]
    return Machine(
        name=name,
        kind=place.type,
        rates=rates,
        memory=memory,
        free=free,
        main_memory=main,
        source=f"{', '.join(speeds)}, measured now" if speeds else "its rate could not be measured",
        notes=tuple(notes),
    )

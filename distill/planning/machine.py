"""How fast a machine is: one figure, the rate of a matrix product in the type that is used, measured for a second.

A child process measures, on the device that the run would take, so that nothing here loads torch. A machine that is not
at hand (`evaluation.machine`, where this one has no GPU) has the rate of its data sheet, from configs/devices.yaml.
"""

import json
import math
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from distill.config_file import find_config, parse_yaml, read_text
from distill.models.registry import Shape
from distill.planning.sizes import answer_flops
from distill.records import Record
from distill.storage.environment import cores, processor

TABLE = Path("configs/devices.yaml")
# The share of a matrix product's rate that a stage reaches as a whole. On a CPU from the quickstart's recorded stages
# (eval/results/quickstart-scorecard.json, 858 GFLOP/s in bfloat16; an AVX2 machine, 150 in float32): what is not a
# product weighs more where products are fast, and most for the small student, which answers in the evaluation.
SHARES = {
    "bfloat16": {"generate": 0.75, "train": 0.5, "evaluate": 0.33},
    "float32": {"generate": 0.85, "train": 0.75, "evaluate": 0.6},
}
GPU_SHARE = 0.25  # of the same on a GPU: what others reach there, not measured with this code
BANDWIDTH = {"cpu": 20e9, "cuda": 1e12}  # bytes a second, as in decoding one answer at a time
SLOTS = {"cpu": 64, "cuda": 128}  # answers that are decoded at once, as generation.local has it
TIMEOUT = 60  # seconds for a measurement, the start of torch included


class Machine(Record):
    """A device: its memory in bytes, and by a type as the config names it (auto), which it is here and its rate."""

    name: str
    kind: str  # cpu or cuda
    rates: dict[str, tuple[str, float]] = {}
    bandwidth: float = BANDWIDTH["cpu"]
    memory: float | None = None
    source: str

    def seconds(self, flops: float, dtype: str, stage: str) -> float:
        """Return how long a stage computes; NaN, which sums keep, where the rate is not known."""
        if dtype not in self.rates:
            return math.nan
        name, rate = self.rates[dtype]
        return flops / rate / (GPU_SHARE if self.kind == "cuda" else SHARES[name][stage])

    def answering(
        self, model: Shape, dtype: str, stage: str, prompt: float, answer: float, many: float
    ) -> float:
        """Return the seconds of `many` answers: their operations, and reading the weights at each step of a batch.

        A batch takes as many steps as its answers are long over the slots, and one answer's more until all have ended.
        """
        computing = self.seconds(many * answer_flops(model, prompt, answer), dtype, stage)
        steps = answer * (many / SLOTS[self.kind] + 1) if many else 0
        return computing + steps * self.width(dtype) * model.parameters / self.bandwidth

    def width(self, dtype: str) -> int:
        """Return the bytes of a number of the type that `dtype` names here."""
        return 4 if self.rates.get(dtype, (dtype,))[0] == "float32" else 2


@cache
def find_machine(priced: str | None, *dtypes: str) -> Machine:
    """Return this machine with its rates in `dtypes`, or that which the config prices, where this one has no GPU."""
    root = str(Path(__file__).parents[2])  # so that the child finds this very package
    code = f"import sys; sys.path.insert(0, {root!r}); from {__name__} import measure"
    command = [sys.executable, "-c", f"{code}; measure({list(dict.fromkeys(dtypes))!r})"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        facts = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        facts = {}  # no torch, or one that this processor does not run: no seconds then
    name, kind = facts.get("name", f"{processor()}, {cores()} cores"), facts.get("kind", "cpu")
    if kind == "cpu" and (
        row := next((r for r in devices() if priced and r.get("machine") == priced), None)
    ):
        return Machine(
            name=row["match"],
            kind="cuda",
            rates=dict.fromkeys(dtypes, ("bfloat16", row["tflops"] * 1e12)),
            bandwidth=row["gigabytes_per_second"] * 1e9,
            memory=row["gigabytes"] * 1e9,
            source=f"evaluation.machine, {row['tflops']} TFLOP/s by {row['source']}",
        )
    rates = facts.get("rates", {})
    speeds = dict.fromkeys(
        f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in rates.values()
    )
    like = (row["gigabytes_per_second"] * 1e9 for row in devices() if row["match"] in name)
    return Machine(
        name=name,
        kind=kind,
        rates=rates,
        bandwidth=next(like, BANDWIDTH[kind]),
        memory=facts.get("memory"),
        source=f"{', '.join(speeds)}, measured now" if speeds else "its rate could not be measured",
    )


def devices() -> list[dict[str, Any]]:
    """Return the rows of configs/devices.yaml, the longest name first."""
    path = find_config(TABLE)
    return sorted(parse_yaml(read_text(path), path), key=lambda row: -len(row["match"]))


def measure(dtypes: list[str], seconds: float = 1.0) -> None:
    """Print as JSON the device, its memory, and the rate of products of 1024 x 1024 x 4096 in each of `dtypes`.

    The rate is that of all products in `seconds`, not of the best: a busy machine is a slow one for the run as well.
    """
    import os
    import time

    import torch

    from distill.models import loading

    place, rates = loading.device(), {}
    for name in dtypes:
        dtype = loading.pick_dtype(name)
        inputs = torch.randn(1024, 1024, device=place).to(dtype)
        weight = torch.randn(4096, 1024, device=place).to(dtype)
        done, started = -1, 0.0  # the first product, which sets up the kernel, is not counted
        while done < 1 or time.perf_counter() - started < seconds:
            torch.nn.functional.linear(inputs, weight)
            if place.type == "cuda":
                torch.cuda.synchronize()
            done += 1
            started = started if done else time.perf_counter()
        flops = done * 2 * 1024 * 1024 * 4096 / (time.perf_counter() - started)
        rates[name] = (str(dtype).removeprefix("torch."), flops)
    facts: dict[str, Any] = {"kind": place.type, "rates": rates}
    if place.type == "cuda":
        properties = torch.cuda.get_device_properties(place)
        facts |= {"name": properties.name, "memory": properties.total_memory}
    else:
        facts["memory"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    print(json.dumps(facts))

"""What work is to a machine: operations and bytes by a model's shape, over one measured rate.

The rate is that of a matrix product in the type that is used, measured for a second where the run
would compute. A machine that is not at hand (`evaluation.machine`, where this one has no GPU) has
the rate of its data sheet, from configs/devices.yaml. Loads torch only to measure.

Formulas count a multiplication and an addition as two operations, after Kaplan et al. 2020 (arXiv
2001.08361, section 2.1). With LoRA the frozen weights get no gradient: forward and backward to the
inputs, 4 a weight, not 6.
"""

import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from distill.config.yaml_file import find_config, parse_yaml, read_text
from distill.models.registry import Shape
from distill.records import Record
from distill.storage.environment import cores, processor

DEVICES = Path("configs/devices.yaml")
# The share of a matrix product's rate that a stage reaches as a whole. On a CPU from recorded runs
# (docs/measured.md: 858 GFLOP/s in bfloat16; an AVX2 machine, 150 in float32): what is not a
# product weighs more where products are fast, and most for the small student, which answers in the
# evaluation.
SHARES = {
    "bfloat16": {"generate": 0.75, "train": 0.5, "evaluate": 0.3},
    "float32": {"generate": 0.85, "train": 0.8, "evaluate": 0.55},
}
GPU_SHARE = 0.25  # of the same on a GPU: what others reach there, not measured with this code
HEAD_CHUNK = 3 * 32 * 2**20  # bytes: a chunk of float32 logits, its gradient and its bfloat16 copy
ALLOCATOR = 1.06  # what PyTorch's CUDA allocator holds above what is in use


class Machine(Record):
    """A device, its rate by the config's name for a type (auto), and the bytes of its memory."""

    name: str
    kind: str  # cpu or cuda
    rates: dict[str, tuple[str, float]] = {}  # by a type as the config names it: which it is here
    memory: float | None = None  # of the device
    main_memory: float | None = None
    source: str

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
    row = next((r for r in devices() if priced and r.get("machine") == priced), None)
    if here.kind == "cuda" or row is None:
        return here
    return Machine(
        name=row["match"],
        kind="cuda",
        rates=dict.fromkeys(dtypes, ("bfloat16", row["tflops"] * 1e12)),
        memory=row["gigabytes"] * 1e9,
        source=f"evaluation.machine, {row['tflops']} TFLOP/s by {row['source']}",
    )


def devices() -> list[dict[str, Any]]:
    """Return the rows of configs/devices.yaml, the longest name first."""
    path = find_config(DEVICES)
    return sorted(parse_yaml(read_text(path), path), key=lambda row: -len(row["match"]))


def measure(dtypes: Sequence[str], seconds: float = 1.0) -> Machine:
    """Measure the rate of products of 1024 x 1024 x 4096 here, in each of `dtypes`.

    It is that of all products in `seconds`, not of the best: a busy machine is slow for a run.
    """
    import torch

    from distill.models import loading

    place, rates = loading.device(), dict[str, tuple[str, float]]()
    for name in dict.fromkeys(dtypes):
        dtype = loading.pick_dtype(name)
        with suppress(RuntimeError):  # a GPU that is full: no seconds then
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
    name, main = f"{processor()}, {cores()} cores", os.sysconf("SC_PAGE_SIZE")
    memory = main = main * os.sysconf("SC_PHYS_PAGES")
    if place.type == "cuda":
        properties = torch.cuda.get_device_properties(place)
        name, memory = properties.name, properties.total_memory
    speeds = dict.fromkeys(
        f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in rates.values()
    )
    source = f"{', '.join(speeds)}, measured now" if speeds else "its rate could not be measured"
    return Machine(
        name=name, kind=place.type, rates=rates, memory=memory, main_memory=main, source=source
    )


def adapter_parameters(model: Shape, r: int, targets: str | tuple[str, ...]) -> int:
    """Return the weights of a LoRA adapter of rank `r`; `targets` as in PEFT."""
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    hidden, inner = model.hidden, model.intermediate
    sizes = {  # in + out of each linear module of a layer
        "q_proj": hidden + queries,
        "k_proj": hidden + keys,
        "v_proj": hidden + keys,
        "o_proj": queries + hidden,
        "gate_proj": hidden + inner,
        "up_proj": hidden + inner,
        "down_proj": inner + hidden,
    }
    modules = sizes if targets == "all-linear" else [name for name in sizes if name in targets]
    head = model.vocab + hidden if "lm_head" in targets else 0
    return r * (model.layers * sum(sizes[name] for name in modules) + head)


def attention_flops(model: Shape, tokens: float) -> float:
    """Return the operations of causal attention over a text of `tokens`: scores and sums."""
    return 2 * model.layers * model.heads * model.head_dim * tokens**2


def answer_flops(model: Shape, prompt: float, answer: float) -> float:
    """Return the operations of an answer, or of its loss: only its tokens pass the head."""
    body = 2 * model.body * (prompt + answer)
    return body + 2 * model.head * answer + attention_flops(model, prompt + answer)


def training_flops(
    model: Shape, adapter: int, prompt: float, answer: float, checkpointing: bool
) -> float:
    """Return the operations of one sample of a LoRA step; the head sees the answer only."""
    tokens, passes = prompt + answer, 6 if checkpointing else 4
    body = (passes * model.body + 6 * adapter) * tokens
    attention = (3.5 + checkpointing) * attention_flops(model, tokens)
    return body + 4 * model.head * answer + attention


def cache_bytes(model: Shape, width: int = 2) -> int:
    """Return the bytes of keys and values, a token, of numbers of `width` bytes."""
    return 2 * width * model.layers * model.kv_heads * model.head_dim


def training_bytes(
    model: Shape,
    adapter: int,
    r: int,
    tokens: int,
    checkpointing: bool,
    four_bit: bool = False,
    width: int = 2,
) -> float:
    """Return the peak of a LoRA training on micro-batches of `tokens`, in numbers of `width` bytes.

    What a layer keeps for its backward: two float32 inputs of the norms; the inputs of attention
    and MLP; queries, keys, values and their sums; gate, its activation, up and their product; the
    inner activations of seven adapters.
    """
    weights = width * model.parameters
    if four_bit:  # NF4 with its constants (arXiv 2305.14314) for the layers; embedding, head stay
        weights -= (width - 0.52) * model.body
    masters = adapter * (4 + 4 + 8)  # weights, gradients, Adam's two moments, all float32
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    inner = 2 * model.hidden + 2 * queries + 2 * keys + 4 * model.intermediate + 7 * r
    layer = 2 * 4 * model.hidden + width * inner
    activations = layer * tokens * (1 if checkpointing else model.layers)
    inputs = width * model.hidden * tokens * (model.layers if checkpointing else 1)
    backward = width * 3 * (model.intermediate + model.hidden) * tokens
    return ALLOCATOR * (weights + masters + activations + inputs + backward + HEAD_CHUNK)

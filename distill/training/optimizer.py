"""AdamW over the adapter's float32 masters, its state as named tensors, and the learning rate of each step."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distill.errors import DistillError, Exit
from distill.training.sharding import like, snapshot

PARTS = ("exp_avg", "exp_avg_sq", "step")


def make_adamw(
    named: Mapping[str, nn.Parameter], betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """Return AdamW (arXiv 1711.05101) over `named`; the learning rate is set step by step."""
    return torch.optim.AdamW(
        list(named.values()), lr=0.0, betas=betas, weight_decay=weight_decay, fused=True
    )


def warmup_count(warmup_steps: float, total: int) -> int:
    """Return the steps of warm-up: `warmup_steps` below 1 is a share of all steps, else a count."""
    return round(warmup_steps * total) if warmup_steps < 1 else int(warmup_steps)


def learning_rate(step: int, total: int, peak: float, kind: str, warmup: int) -> float:
    """Return the rate of step `step` (from 0) of `total`: linear warm-up to `peak`, then `kind` down to zero.

    The first step of a warm-up is not zero, and the last step of a decay is not quite zero: no step is wasted.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    if kind == "constant":
        return peak
    return peak * (1 - progress if kind == "linear" else (1 + math.cos(math.pi * progress)) / 2)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Return a snapshot of the optimizer's state as tensors named `PARAMETER.PART`, on the CPU."""
    return {
        f"{name}.{part}": snapshot(optimizer.state[p][part])
        for name, p in named.items()
        if p in optimizer.state
        for part in PARTS
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    saved: Mapping[str, Tensor],
    where: object,
) -> None:
    """Put saved state into the optimizer; raises DistillError (exit 7) where it belongs to other parameters."""
    expected = {f"{name}.{part}" for name in named for part in PARTS}
    if expected != saved.keys():
        odd = sorted(expected ^ saved.keys())[0]
        raise DistillError(Exit.TRAINING, where, f"optimizer state differs: {odd}", "--redo train")
    for name, p in named.items():
        state = {part: saved[f"{name}.{part}"] for part in PARTS}
        step = {"step": state.pop("step").to(p.device, copy=True)}
        optimizer.state[p] = {part: like(value, p) for part, value in state.items()} | step

"""Measure the losses' extra peak memory and time against TRL's, the products with both heads
included.

    python -m venv --system-site-packages TRL && TRL/bin/pip install 'trl==1.16.*'
    python scripts/benchmarks/benchmark_losses.py --trl-python TRL/bin/python --json losses.json

Every figure comes from a process of its own, the sides taking turns: its first pass (forward and
backward) gives the memory, VmHWM after a reset of the mark, and its second one the time. The
student's head is frozen, as under LoRA; hidden states and heads are random, in bfloat16. TRL's
sides are `GKDTrainer.generalized_jsd_loss` on logits of all positions, in bfloat16 and (as
accelerate's mixed precision hands them over) in float32, and the loss of `DistillationTrainer`. Its
teacher's product is made without gradients. `half` means that half of the positions are masked.
"""

import argparse
import ctypes
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill.training.losses import Live, SoftTargets, cross_entropy, soft_loss

ROOT = Path(__file__).resolve().parent.parent.parent
SPREAD = 3.0  # standard deviation of the logits, in nats
LISTED = 32  # entries of a cached list, more than a nucleus of 0.99 has on average
MIX = {"ce": 0.5, "forward_kl": 0.5}


class Shape(NamedTuple):
    """How large the problem is."""

    tokens: int = 512
    vocabulary: int = 151_936
    student: int = 896
    teacher: int = 1536


class Problem(NamedTuple):
    """Hidden states of all positions, both heads, the tokens, and which positions count."""

    hidden_SD: Tensor
    head_VD: Tensor
    teacher_SE: Tensor
    teacher_VE: Tensor
    targets_S: Tensor
    counts_S: Tensor


def make(shape: Shape, half: bool) -> Problem:
    """Draw a problem."""
    torch.manual_seed(0)
    states, heads = [], []
    for width in (shape.student, shape.teacher):
        states.append(torch.randn(shape.tokens, width).bfloat16())
        head = torch.empty(shape.vocabulary, width, dtype=torch.bfloat16)
        heads.append(head.normal_(std=SPREAD / width**0.5))
    counts = torch.ones(shape.tokens, dtype=torch.bool)
    counts[: shape.tokens // 2] = not half
    targets = torch.randint(shape.vocabulary, (shape.tokens,))
    return Problem(states[0].requires_grad_(), heads[0], states[1], heads[1], targets, counts)


def lists(problem: Problem) -> SoftTargets:
    """Draw a cache's lists for the positions that count: making real ones would leave memory behind
    for the loss."""
    count, stride = int(problem.counts_S.sum()), len(problem.head_VD) // LISTED
    ids = torch.arange(LISTED) * stride + torch.randint(stride, (count, LISTED))
    logs = torch.log_softmax(torch.randn(count, LISTED + 1) * SPREAD, -1)
    offsets = torch.arange(count + 1, device="cpu") * LISTED
    return SoftTargets(ids.flatten(), logs[:, 1:].flatten(), offsets, logs[:, 0].exp())


Pass = Callable[[], Tensor]  # the forward of a side: its loss, in nats a position that counts


def plain(problem: Problem) -> Pass:
    """Return our cross-entropy."""
    counts = problem.counts_S

    def run() -> Tensor:
        states, targets = problem.hidden_SD[counts], problem.targets_S[counts]
        total, count = cross_entropy(
            states, problem.head_VD, targets, torch.ones_like(targets, dtype=torch.float32)
        )
        return total / count

    return run


def ours(problem: Problem, live: bool, mix: dict[str, float]) -> Pass:
    """Return our loss against a live teacher or a cache."""
    counts = problem.counts_S
    soft = None if live else lists(problem)

    def run() -> Tensor:
        states, targets = problem.hidden_SD[counts], problem.targets_S[counts]
        against = soft or Live(problem.teacher_SE[counts], problem.teacher_VE, len(problem.head_VD))
        ones = torch.ones_like(targets, dtype=torch.float32)
        total, count, _ = soft_loss(states, problem.head_VD, targets, ones, against, mix)
        return total / count

    return run


def gkd(problem: Problem, beta: float, dtype: torch.dtype) -> Pass:
    """Return the loss of TRL's GKDTrainer on materialised logits."""
    from trl.experimental.gkd import GKDTrainer  # pyright: ignore[reportMissingImports]

    labels = torch.where(problem.counts_S, problem.targets_S, -100)[None]

    def run() -> Tensor:
        student = torch.nn.functional.linear(problem.hidden_SD[None], problem.head_VD)
        with torch.no_grad():
            teacher = torch.nn.functional.linear(problem.teacher_SE[None], problem.teacher_VE)
        return GKDTrainer.generalized_jsd_loss(student.to(dtype), teacher.to(dtype), labels, beta)

    return run


def distillation(problem: Problem, beta: float) -> Pass:
    """Return the loss of TRL's DistillationTrainer."""
    from trl.trainer import distillation_trainer as trl  # pyright: ignore[reportMissingImports]

    def run() -> Tensor:
        loss, _, _ = trl._chunked_divergence_loss(
            problem.hidden_SD[None],
            problem.teacher_SE[None],
            problem.head_VD,
            problem.teacher_VE,
            problem.counts_S.long()[None],
            beta,
        )
        return loss

    return run


KL, JSD = {"forward_kl": 1.0}, {"jsd": 1.0}
OURS: dict[str, Callable[[Problem], Pass]] = {
    "cross-entropy": plain,
    "cached, ce + kl": partial(ours, live=False, mix=MIX),
    "cached, kl": partial(ours, live=False, mix=KL),
    "live, kl": partial(ours, live=True, mix=KL),
    "live, jsd": partial(ours, live=True, mix=JSD),
}
TRL: dict[str, Callable[[Problem], Pass]] = {
    "GKD bf16, kl": partial(gkd, beta=0, dtype=torch.bfloat16),
    "GKD bf16, jsd": partial(gkd, beta=0.5, dtype=torch.bfloat16),
    "GKD fp32, kl": partial(gkd, beta=0, dtype=torch.float32),
    "GKD fp32, jsd": partial(gkd, beta=0.5, dtype=torch.float32),
    "Distillation, kl": partial(distillation, beta=0),
    "Distillation, jsd": partial(distillation, beta=0.5),
}
HALVED = ("cached, ce + kl", "live, kl", "GKD bf16, kl", "Distillation, kl")


def resident(mark: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(mark))


def child(side: str, shape: Shape, half: bool) -> None:
    """Measure one side in this process, and print the figures as JSON."""
    torch.set_flush_denormal(True)
    problem = make(shape, half)
    run = (OURS | TRL)[side](problem)
    ctypes.CDLL(None).malloc_trim(0)  # what the set-up freed, and the loss would fill unseen
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run().backward()
    extra = resident("VmHWM") - before
    problem.hidden_SD.grad = None
    start = time.perf_counter()
    loss = run()
    loss.backward()
    seconds = time.perf_counter() - start
    print(json.dumps({"bytes": extra, "seconds": seconds, "loss": loss.item()}))


def sides(with_trl: bool) -> Iterator[tuple[str, bool]]:
    """Yield the sides' names, and whether half is masked."""
    names = [*OURS, *(TRL if with_trl else ())]
    yield from ((name, False) for name in names)
    yield from ((name, True) for name in names if name in HALVED)


def measure(asked: argparse.Namespace, shape: Shape) -> dict[str, list[dict[str, float]]]:
    """Run every side in a process of its own, in turn, as often as asked."""
    found: dict[str, list[dict[str, float]]] = {}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    for number in range(asked.repeats):
        for name, half in sides(asked.trl_python is not None):
            if asked.only and not re.search(asked.only, name):
                continue
            python = asked.trl_python if name in TRL else sys.executable
            told = json.dumps([name, shape, half])
            command = [str(python), __file__, "--child", told]
            done = subprocess.run(
                command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, check=True
            )
            label = f"{name}, half" if half else name
            found.setdefault(label, []).append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {number}, {label}: {found[label][-1]}", file=sys.stderr)
    return found


def main() -> None:
    """Read the arguments, measure, and show and store the result; or be a side's process."""
    from rich.table import Table

    from distill.storage.environment import environment
    from distill.storage.files import write_json
    from distill.storage.progress import console

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trl-python", type=Path, help="of an environment with TRL 1.16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", help="pattern of the names of the sides wanted")
    parser.add_argument("--tokens", type=int, default=Shape().tokens)
    parser.add_argument("--vocabulary", type=int, default=Shape().vocabulary)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        name, shape, half = asked.child
        return child(name, Shape(*shape), half)
    shape = Shape(asked.tokens, asked.vocabulary)
    found = measure(asked, shape)
    table = Table("side", "nats", "MiB", "seconds")
    for name, rows in found.items():
        cells = []
        for key, unit, form in (("bytes", 2**20, ".0f"), ("seconds", 1, ".2f")):
            values = [row[key] / unit for row in rows]
            spread = f"({min(values):{form}} to {max(values):{form}})"
            cells.append(f"{statistics.median(values):{form}} {spread}")
        table.add_row(name, f"{rows[0]['loss']:.4f}", *cells)
    console.print(table)
    if asked.json:
        facts: dict[str, Any] = {"environment": environment(), "shape": shape._asdict()}
        write_json(asked.json, facts | {"sides": found})
    return None


if __name__ == "__main__":
    main()

"""The order of training: which samples make which step, decided before the first of them.

An epoch's order is a permutation drawn from (seed, epoch) alone. A step is about `tokens_per_step` real tokens of whole
samples, whatever the number of processes; its samples are dealt into micro-batches, and those over the processes. So
where a run stopped is one number, its step, and two processes take the same steps as one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MICRO_BATCH_TOKENS = 2560  # holds a step of the default size, whose samples are whole


@dataclass(frozen=True)
class OptimizerStep:
    """One optimizer step: its epoch, how many samples of that epoch came before, and its samples."""

    epoch: int
    cursor: int
    samples: tuple[int, ...]


def order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation of `count` samples for an epoch (from 0)."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)


def epoch_steps(
    lengths: np.ndarray, seed: int, epoch: int, tokens_per_step: int
) -> list[OptimizerStep]:
    """Cut an epoch into steps of nearly equal tokens, each about `tokens_per_step`; none is left over small."""
    samples = order(len(lengths), seed, epoch)
    middles = np.cumsum(lengths[samples]) - lengths[samples] / 2
    total = int(lengths.sum())
    count = max(1, round(total / tokens_per_step))
    cuts = np.flatnonzero(np.diff((middles * count / total).astype(np.int64))) + 1
    starts = [0, *cuts.tolist()]
    parts = np.split(samples, cuts)
    return [OptimizerStep(epoch, s, tuple(p.tolist())) for s, p in zip(starts, parts, strict=True)]


def plan_steps(
    lengths: Sequence[int], seed: int, tokens_per_step: int, epochs: float, max_steps: int | None
) -> list[OptimizerStep]:
    """Return all steps of a run; `max_steps`, where given, decides instead of `epochs`."""
    array = np.asarray(lengths, dtype=np.int64)
    steps: list[OptimizerStep] = []
    for epoch in range(math.ceil(epochs) if max_steps is None else max_steps):
        fresh = epoch_steps(array, seed, epoch, tokens_per_step)
        share = 1.0 if max_steps else min(1.0, epochs - epoch)
        steps += fresh[: max(1, round(share * len(fresh)))]
        if max_steps and len(steps) >= max_steps:
            return steps[:max_steps]
    return steps


def micro_batches(samples: Sequence[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Deal samples into the fewest micro-batches of at most about `limit` tokens, evenly filled, longest first.

    A sample longer than `limit` has one of its own. The result does not depend on the number of processes.
    """
    count = max(1, math.ceil(sum(lengths[i] for i in samples) / limit))
    longest_first = sorted(samples, key=lambda i: (-lengths[i], i))
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        filled = [0] * count
        for sample in longest_first:
            place = filled.index(min(filled))
            bins[place].append(sample)
            filled[place] += lengths[sample]
        if all(f <= limit or len(b) == 1 for f, b in zip(filled, bins, strict=True)):
            return [b for b in bins if b]
        count += 1


def padded_batches(samples: Sequence[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Deal samples into batches of similar length whose padded size is at most `limit` tokens, longest first."""
    batches: list[list[int]] = []
    for sample in sorted(samples, key=lambda i: (-lengths[i], i)):
        batch = batches[-1] if batches else []
        if not batch or lengths[batch[0]] * (len(batch) + 1) > limit:
            batches.append(batch := [])
        batch.append(sample)
    return batches


def share(batches: Sequence[list[int]], rank: int, world: int) -> list[list[int]]:
    """Return the micro-batches of one process; every process has the same number, some of them empty."""
    rounds = math.ceil(len(batches) / world)
    mine = list(batches[rank::world])
    return mine + [[]] * (rounds - len(mine))

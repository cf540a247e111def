"""The order of training: which samples make which step, micro-batch and row; learning rates.

All follows from the seed before the first step, which is complete samples of `tokens_per_step`,
whatever the number of processes: so where a run stopped is one number, its step. A row lays samples
end to end without padding. A prefix that samples share has the same states in each and is computed
once: the row is a forest, and a segment attends to its ancestors and itself.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SHORTEST_PREFIX = 8  # tokens: a shorter prefix is not worth a segment of its own
Lengths = Sequence[int] | Mapping[int, int]  # tokens of samples, by their numbers


class Example(NamedTuple):
    """A tokenised pair: `weights[i]` is the loss weight of predicting `input_ids[i]`."""

    id: str
    response_id: str
    input_ids: tuple[int, ...]
    weights: tuple[float, ...]
    only_signals: bool = False  # all parts but the cross-entropy

    def target(self, i: int) -> int:
        """Return token `i` as a target: -1 for one whose cross-entropy does not count."""
        return -1 if self.only_signals else self.input_ids[i]


@dataclass(frozen=True)
class OptimizerStep:
    """One optimizer step: its epoch, how many samples of the epoch came before, and its samples."""

    epoch: int
    cursor: int
    samples: tuple[int, ...]


def order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation of `count` samples for an epoch (from 0)."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)


def plan_steps(
    lengths: Sequence[int], seed: int, tokens_per_step: int, epochs: float, max_steps: int | None
) -> list[OptimizerStep]:
    """Return all steps of a run; `max_steps`, unless None, decides instead of `epochs`.

    An epoch is cut into steps of nearly equal tokens, each about `tokens_per_step`, so that no
    small one is left over.
    """
    lengths_N, steps = np.asarray(lengths, dtype=np.int64), list[OptimizerStep]()
    total = int(lengths_N.sum())
    count = max(1, round(total / tokens_per_step))
    for epoch in range(math.ceil(epochs) if max_steps is None else max_steps):
        samples = order(len(lengths_N), seed, epoch)
        middles = np.cumsum(lengths_N[samples]) - lengths_N[samples] / 2
        cuts = np.flatnonzero(np.diff((middles * count / total).astype(np.int64))) + 1
        parts = zip([0, *cuts.tolist()], np.split(samples, cuts), strict=True)
        fresh = [OptimizerStep(epoch, start, tuple(part.tolist())) for start, part in parts]
        fraction = 1.0 if max_steps else min(1.0, epochs - epoch)
        steps += fresh[: max(1, round(fraction * len(fresh)))]
        if max_steps and len(steps) >= max_steps:
            return steps[:max_steps]
    return steps


def learning_rate(step: int, total: int, peak: float, kind: str, warmup_steps: float) -> float:
    """Return the rate of a step (from 0) of `total`: linear warm-up to `peak`, then `kind` to zero.

    `warmup_steps` below 1 is a fraction of all steps. The first step of a warm-up is not zero, and
    the last step of a decay is not quite zero: no step is wasted.
    """
    warmup = round(warmup_steps * total) if warmup_steps < 1 else int(warmup_steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    if kind == "constant":
        return peak
    return peak * (1 - progress if kind == "linear" else (1 + math.cos(math.pi * progress)) / 2)


def micro_batches(
    samples: Sequence[int], lengths: Lengths, limit: int, world: int = 1
) -> list[list[int]]:
    """Deal samples into the fewest micro-batches of about `limit` tokens, evenly, longest first.

    A sample longer than `limit` has one of its own. Their number is a multiple of `world`, unless
    there are fewer samples than that.
    """
    count = world * max(1, math.ceil(sum(lengths[i] for i in samples) / limit / world))
    longest_first = sorted(samples, key=lambda i: (-lengths[i], i))
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        tokens = [0] * count
        for sample in longest_first:
            emptiest = tokens.index(min(tokens))
            bins[emptiest].append(sample)
            tokens[emptiest] += lengths[sample]
        if all(n <= limit or len(b) == 1 for n, b in zip(tokens, bins, strict=True)):
            return [b for b in bins if b]
        count += world


def padded_batches(samples: Sequence[int], lengths: Lengths, limit: int) -> list[list[int]]:
    """Deal samples into batches of similar lengths, of at most `limit` tokens with padding."""
    batches: list[list[int]] = []
    for sample in sorted(samples, key=lambda i: (-lengths[i], i)):
        batch = batches[-1] if batches else []
        if not batch or lengths[batch[0]] * (len(batch) + 1) > limit:
            batches.append(batch := [])
        batch.append(sample)
    return batches


def share(batches: Sequence[list[int]], rank: int, world: int) -> list[list[int]]:
    """Return the micro-batches of one process; all have the same number, some of them empty."""
    mine = list(batches[rank::world])
    return mine + [[]] * (math.ceil(len(batches) / world) - len(mine))


class Segment(NamedTuple):
    """Indices [start, end) of a row, and the ranges of its ancestors, which it attends to too."""

    start: int
    end: int
    before: tuple[tuple[int, int], ...] = ()

    def position(self) -> int:
        """Return the position of the segment's first token in its samples."""
        return sum(end - start for start, end in self.before)

    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Return the ranges of the row that the segment attends to."""
        return (*self.before, (self.start, self.end))


class PackedRow(NamedTuple):
    """Token ids, the segments that they form, and each sample's indices in the row."""

    ids: list[int]
    segments: list[Segment]
    indices: dict[int, list[int]]


def pack(samples: Sequence[Sequence[int]], prompts: Sequence[int], sharing: bool) -> PackedRow:
    """Lay samples out in a row; `sharing` merges prefixes within the `prompts[i]` first tokens."""
    row = PackedRow([], [], {})

    def grow(group: list[int], before: tuple[tuple[int, int], ...]) -> None:
        """Add what is left of the samples of a group, which share the ranges `before`."""
        depth, first = sum(end - start for start, end in before), samples[group[0]]
        common, alone = len(first), len(group) == 1
        if not alone:
            prefixes = [tuple(samples[i][: prompts[i]]) for i in group]
            one, other = min(prefixes), max(prefixes)  # in lexical order: the two that differ most
            pairs = enumerate(zip(one, other, strict=False))
            common = next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))
        if alone or common - depth >= SHORTEST_PREFIX:
            start = len(row.ids)
            row.ids.extend(first[depth:common])
            row.segments.append(Segment(start, len(row.ids), before))
            before = row.segments[-1].ranges()
        if alone:
            row.indices[group[0]] = [i for start, end in before for i in range(start, end)]
            return
        # By the token after the prefix; a sample whose prompt ends there is a part of its own.
        parts: dict[tuple[int, int], list[int]] = {}
        for i in group:
            key = (1, i) if prompts[i] <= common else (0, samples[i][common])
            parts.setdefault(key, []).append(i)
        for part in parts.values():
            grow(part, before)

    everything = list(range(len(samples)))
    for group in [everything] if sharing else [[i] for i in everything]:
        grow(group, ())
    return row

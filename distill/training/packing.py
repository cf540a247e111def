"""Samples in one row: end to end without padding, and what several of them begin with computed only once.

Causal states depend on what came before and nothing else, so a prefix that samples share (the system prompt, a task's
instructions) has the same states in each. The row is then a forest: a segment sees its ancestors and itself. Losses
and gradients are those of the samples one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

SHORTEST = 8  # tokens that are worth a segment of their own


class Segment(NamedTuple):
    """Places [start, end) of the row; `before` are the places of its ancestors, which it also sees."""

    start: int
    end: int
    before: tuple[tuple[int, int], ...] = ()

    def position(self) -> int:
        """Return the position of the segment's first token in its samples."""
        return sum(end - start for start, end in self.before)

    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Return the places that the segment sees."""
        return (*self.before, (self.start, self.end))


@dataclass
class PackedRow:
    """Token ids, the segments that they form, and for each sample the places of its tokens."""

    ids: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    places: dict[int, list[int]] = field(default_factory=dict)

    def add(self, ids: Sequence[int], before: tuple[tuple[int, int], ...]) -> tuple[int, int]:
        """Append a segment, and return its places."""
        start = len(self.ids)
        self.ids += ids
        self.segments.append(Segment(start, len(self.ids), before))
        return start, len(self.ids)


def pack(samples: Sequence[Sequence[int]], prompts: Sequence[int], share: bool) -> PackedRow:
    """Lay samples out in a row; with `share`, prefixes within the first `prompts[i]` tokens of samples are shared."""
    row = PackedRow()
    groups = [list(range(len(samples)))] if share else [[i] for i in range(len(samples))]
    for group in groups:
        _grow(row, samples, prompts, group, ())
    return row


def _grow(
    row: PackedRow,
    samples: Sequence[Sequence[int]],
    prompts: Sequence[int],
    group: list[int],
    before: tuple[tuple[int, int], ...],
) -> None:
    """Add to the row what is left of the samples of a group, which share the places `before`."""
    depth = sum(end - start for start, end in before)
    if len(group) == 1:
        places = row.add(samples[group[0]][depth:], before)
        row.places[group[0]] = [p for start, end in (*before, places) for p in range(start, end)]
        return
    common = _common([tuple(samples[i][: prompts[i]]) for i in group])
    if common - depth >= SHORTEST:
        before = (*before, row.add(samples[group[0]][depth:common], before))
    for part in _split(samples, prompts, group, common):
        _grow(row, samples, prompts, part, before)


def _common(prefixes: list[tuple[int, ...]]) -> int:
    """Return how many tokens all of them begin with."""
    first, last = min(prefixes), max(prefixes)  # in the order of words: the two that differ most
    pairs = zip(first, last, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(last)))


def _split(
    samples: Sequence[Sequence[int]], prompts: Sequence[int], group: list[int], common: int
) -> list[list[int]]:
    """Part a group by the token after what is common; a sample whose prompt ends there is a part of its own."""
    parts: dict[tuple[int, int], list[int]] = {}
    for sample in group:
        ended = prompts[sample] <= common
        parts.setdefault((1, sample) if ended else (0, samples[sample][common]), []).append(sample)
    return list(parts.values())

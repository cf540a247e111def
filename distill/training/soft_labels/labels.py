"""Soft labels: the teacher's distributions beside the examples that are trained on, and the loss towards them.

They are cached, or made at every step by a teacher in memory, over its whole vocabulary (`Live`). Of a cache the run's signals.json says which rows of the shared cache belong to its answers. Whatever does not fit (another teacher
or setting than the config names, answers that were dropped or added since, other tokens, a damaged file) ends the
training before its first step, with the file and the reason.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from distill.config import Config, Loss
from distill.errors import DistillError, Exit
from distill.records import Example, Pair, digest
from distill.storage.files import read_json, read_records
from distill.storage.fingerprints import differences, unnamed
from distill.storage.run_folder import Run
from distill.training.divergences import soft_loss
from distill.training.host_to_device import send
from distill.training.losses import Head
from distill.training.soft_labels.cache import (
    TEXT_ONLY,
    Signal,
    SignalCache,
    SignalKey,
    describe,
    open_teacher,
    supervised_ids,
    token_hash,
)
from distill.training.targets import Live, SoftTargets

AGAIN = "distill signals CONFIG --redo captures what is missing"


class Labels(Protocol):
    """What a batch's soft targets come from; `digest` pins it, `settings` are the losses that they are for."""

    @property
    def digest(self) -> str: ...

    @property
    def settings(self) -> Loss: ...

    def targets(self, answers: Sequence[str], device: Any) -> SoftTargets | Live:
        """Return the soft targets of answers' supervised positions, end to end; of an idle position for none at all."""
        ...


@dataclass(frozen=True)
class CachedLabels:
    """Signals by answer; `place` is the row of the temperature's tails."""

    signals: Mapping[str, Signal]
    digest: str
    settings: Loss
    place: int | None

    def targets(self, answers: Sequence[str], device: Any) -> SoftTargets:
        """Lay the answers' lists end to end."""
        signals = [self.signals[name] for name in answers]
        signal = Signal.join(signals) if signals else IDLE
        tail_N = None
        if self.place is not None:
            tail_N = signal.tails_TN[self.place] if signals else np.log(signal.rest_N)
        offsets_N1 = np.concatenate([[0], np.cumsum(signal.counts_N, dtype=np.int64)])
        ids_M = signal.ids_E.astype(np.int64)
        arrays = (ids_M, signal.logs(), offsets_N1, signal.rest_N, tail_N)
        return SoftTargets(*(None if a is None else send(torch.tensor(a), device) for a in arrays))  # pyright: ignore[reportArgumentType]


def mixed_loss(
    settings: Loss,
    hidden_SE: Tensor,
    head: Head,
    targets_S: Tensor,
    weights_S: Tensor,
    soft: SoftTargets | Live,
    bias_V: Tensor | None,
) -> Tensor:
    """Return the mixed loss summed over positions, and then its parts before they are mixed, (1 + P,)."""
    mix, more = settings.parts, (settings.beta, settings.alpha, settings.temperature, bias_V)
    total, _, parts = soft_loss(hidden_SE, head, targets_S, weights_S, soft, mix, *more)
    return torch.stack([total, *(parts[name] for name in mix)])


IDLE = Signal(  # a position that weighs nothing: one token, half of the mass
    np.ones(1, np.uint16),
    np.zeros(1, np.uint32),
    np.zeros(1, np.uint8),
    np.full(1, 0.5, np.float32),
    np.zeros((0, 1), np.float32),
)


def load_labels(
    config: Config, run: Run, examples: Sequence[Example], vocabulary: int
) -> CachedLabels:
    """Read the signals of `examples`, under their ids, for a head of `vocabulary` rows.

    Raises DistillError: exit 7 where signals.json does not fit the config or the examples, 5 where a file is damaged.
    """
    path, temperatures = run.path("signals.json"), config.signals.temperatures
    cache_name, rows = read_run_rows(config, path)
    require_same(path, rows, examples, run)
    cache = SignalCache.open(config.store_folder(), cache_name)
    signals = cache.read([rows[example.response_id] for example in examples])
    if (largest := max(int(signal.ids_E.max()) for signal in signals.values())) >= vocabulary:
        what = f"name token {largest}, and the student's head has {vocabulary} rows"
        raise DistillError(Exit.TRAINING, cache.folder, what, TEXT_ONLY)
    by_answer = {e.response_id: signals[rows[e.response_id].example] for e in examples}
    hashes = sorted({cache.index[row.example][0].body for row in rows.values()})
    loss = config.train.loss
    place = None if loss.temperature == 1 else temperatures.index(loss.temperature)
    return CachedLabels(by_answer, digest([cache_name, hashes]), loss, place)


def read_run_rows(config: Config, path: Path) -> tuple[str, dict[str, SignalKey]]:
    """Return the cache's name and the rows by answer of a signals.json; raises DistillError where it is not the config's."""
    if not path.exists():
        what, fix = "is missing, and train.loss has soft parts", "make it: distill signals CONFIG"
        raise DistillError(Exit.TRAINING, path, what, fix)
    record = read_json(path)
    try:
        facts, name = record["teacher"], record["cache"]
        rows = {answer: SignalKey(*row) for answer, row in record["rows"].items()}
        if describe(facts) != name:
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DistillError(Exit.STATE, path, "is damaged", AGAIN) from None
    _, current = open_teacher(config)
    facts = {**unnamed(facts, current), **facts}
    changes = differences({**facts, "dtype": ""}, {**current, "dtype": ""})
    if changes:  # not the dtype, which `auto` chooses by the machine
        what = f"was made by another teacher or setting than the config names: {'; '.join(changes)}"
        raise DistillError(Exit.TRAINING, path, what, AGAIN)
    return name, rows


def require_same(
    path: Path, rows: Mapping[str, SignalKey], examples: Sequence[Example], run: Run
) -> None:
    """Stop where rows and examples are not of the same answers and tokens; raises DistillError (exit 7)."""
    for example in examples:
        row, ids = rows.get(example.response_id), supervised_ids(example)
        if row is None:
            what = f"has no signal of answer {example.response_id}"
            raise DistillError(Exit.TRAINING, path, what, AGAIN)
        if (row.tokens, row.count) != (token_hash(ids), len(ids)):
            what = f"was made for other tokens of answer {example.response_id}"
            raise DistillError(Exit.TRAINING, path, what, AGAIN)
    spare = rows.keys() - {example.response_id for example in examples}
    if spare and (gone := sorted(spare - {pair.response.id for pair in read_pairs(run)})):
        what = f"was made for {len(gone)} answers that the filters have dropped since: {gone[0]}"
        raise DistillError(Exit.TRAINING, path, what, AGAIN)


def read_pairs(run: Run) -> list[Pair]:
    """Return the pairs that training and validation use."""
    paths = [run.path(f"dataset/{split}.jsonl") for split in ("train", "validation")]
    return [pair for path in paths if path.exists() for pair in read_records(path, Pair)]

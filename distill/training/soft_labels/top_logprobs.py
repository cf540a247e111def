"""What a server lists at each token of a text, as signals: likeliest first, cut to p and k, the rest one minus their mass."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from distill.config import Signals
from distill.records import Example
from distill.training.soft_labels.cache import Signal, SignalCache, SignalKey, codes

KeyedExample = tuple[
    Example, SignalKey
]  # as the teacher reads it, and the row that its signal is kept under
Chances = Mapping[int, tuple[float, str | None]]  # id to its log-probability and its text
CHUNK_TOKENS = 4096  # supervised tokens of a chunk of the cache
SLACK = 1e-3  # by which rounded probabilities may sum to more than one


def enter(
    cache: SignalCache,
    texts: Sequence[KeyedExample],
    read: Callable[[Sequence[Example]], Iterable[Signal | str]],
) -> list[tuple[KeyedExample, str]]:
    """Put the signals that `read` finds into the cache, a chunk at a time; return the texts without one, and why."""
    signals = read([example for example, _ in texts])
    entries: list[tuple[SignalKey, Signal]] = []
    without: list[tuple[KeyedExample, str]] = []
    for text, signal in zip(texts, signals, strict=True):
        if isinstance(signal, str):
            without.append((text, signal))
            continue
        entries.append((text[1], signal))
        if sum(row.count for row, _ in entries) >= CHUNK_TOKENS:
            _append(cache, entries)
    _append(cache, entries)
    return without


def named(without: Sequence[tuple[KeyedExample, str]]) -> str:
    """Name the first text without a signal, and say how many others there are."""
    ((example, _), why), others = without[0], len(without) - 1
    more = f" (and {others} others have none)" if others else ""
    return f"answer {example.response_id} {why}{more}"


def _append(cache: SignalCache, found: list[tuple[SignalKey, Signal]]) -> None:
    """Write what was found as a chunk, and begin the next."""
    if found:
        rows, signals = zip(*found, strict=True)
        cache.append(rows, Signal.join(signals))
        found.clear()


def to_signal(
    places: Sequence[Chances], weights: Sequence[float], settings: Signals, vocabulary: int
) -> Signal:
    """Return the distributions of the supervised tokens: of each the likeliest ids that hold p, and one minus their mass.

    Ids from `vocabulary` on, which no text has, are left out. Raises ValueError where probabilities sum to more than 1.
    """
    lists = [
        _nucleus(place, settings, vocabulary)
        for place, weight in zip(places, weights, strict=True)
        if weight
    ]
    counts_N = np.array([len(ids) for ids, _, _ in lists], np.uint16)
    logs_E = np.concatenate([logs for _, logs, _ in lists])
    return Signal(
        counts_N,
        np.concatenate([ids for ids, _, _ in lists]).astype(np.uint32),
        codes(logs_E.astype(np.float32), counts_N),
        np.array([rest for _, _, rest in lists], np.float32),
        np.zeros((0, len(lists)), np.float32),
    )


def _nucleus(
    place: Chances, settings: Signals, vocabulary: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the listed ids, likeliest first, their log-probabilities, and the mass of all others."""
    listed = sorted((-log, i) for i, (log, _) in place.items() if i < vocabulary)
    logs_K = -np.array([negative for negative, _ in listed])
    ids_K, mass_K = np.array([i for _, i in listed]), np.exp(logs_K)
    if not len(listed) or mass_K.sum() > 1 + SLACK or not mass_K[0]:
        raise ValueError(
            "its log-probabilities are none: start vLLM with --logprobs-mode raw_logprobs"
        )
    kept_K = (np.cumsum(mass_K) - mass_K < settings.p) & (mass_K > 0)
    kept_K[settings.k :] = False
    kept_K[0] = True
    return ids_K[kept_K], logs_K[kept_K], max(0.0, 1 - float(mass_K[kept_K].sum()))

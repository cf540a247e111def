"""Find phrases: which of many texts hold, word for word, a piece of one of the evaluated texts.

Windows of the evaluated texts are indexed by 64-bit hashes, the other texts stream past, and every
match is verified on the words, so a collision costs time and never a false match. Memory is that of
the evaluated texts. Words are NFKC, case-folded, without punctuation and invisible characters.
"""

import hashlib
import re
import unicodedata
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.languages import UNSPACED

WINDOW = 13  # consecutive words that count as the same text (Brown et al. 2020, appendix C)
SHORTEST = 8  # words of a text that is looked for inside others; below, it must stand alone
MIN_ANSWER_WORDS = 4  # of a reference answer that may be evidence
PHRASE = 5  # consecutive words that many items share are nobody's own
SHARED = 0.05  # of the clusters: a phrase that so many share is nobody's own
FEW = 5  # clusters, at least
BATCH = 1 << 18  # words that are hashed together: what the processor's caches hold

WORD = re.compile(f"[^\\W_{UNSPACED}]+|[{UNSPACED}]")
# Apostrophes and what is invisible (soft hyphens, joiners, marks of direction) stand inside words.
INVISIBLE = (
    "'\u2018\u2019\u201b\u02bc\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff"
)
INSIDE = re.compile(f"[{INVISIBLE}\ufe00-\ufe0f]")
ASCII = {n: None if chr(n) == "'" else chr(n) if chr(n).isalnum() else " " for n in range(128)}

Hashes = NDArray[np.uint64]


class EvaluatedText(NamedTuple):
    """An item that is evaluated: id, cluster, question without its template, and reference."""

    id: str
    cluster: str
    question: tuple[str, ...]
    reference: str | None = None


def words(text: str) -> list[str]:
    """Return a text as the words that are compared."""
    if text.isascii():
        return text.lower().translate(ASCII).split()
    text = unicodedata.normalize("NFKC", INSIDE.sub("", text)).casefold()
    return WORD.findall(INSIDE.sub("", unicodedata.normalize("NFKC", text)))


def value(word: str) -> int:
    """Return a word's own 64 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest())


FACTORS = [value(f"place {place}") | 1 for place in range(WINDOW)]


class Windows:
    """The windows of one length: sorted hashes, where each begins, and a filter by hash."""

    def __init__(self, hashes: Hashes, starts: NDArray[np.int64]) -> None:
        order = np.argsort(hashes, kind="stable")
        self.hashes, self.starts = hashes[order], starts[order]
        # at least sixteen places a hash
        self.filter = np.zeros(1 << max(16, (16 * len(hashes)).bit_length()), np.bool_)
        self.filter[hashes & np.uint64(len(self.filter) - 1)] = True

    def hits(self, hashes_N: Hashes) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield which of the hashes are here, and where the windows with that hash begin."""
        places = np.flatnonzero(self.filter[hashes_N & np.uint64(len(self.filter) - 1)])
        low = np.searchsorted(self.hashes, hashes_N[places], "left").tolist()
        high = np.searchsorted(self.hashes, hashes_N[places], "right").tolist()
        for place, first, last in zip(places.tolist(), low, high, strict=True):
            if last > first:
                yield place, self.starts[first:last]


class Index:
    """The evaluated texts, searchable; fewer `bits` make hashes collide, for tests."""

    def __init__(self, items: Sequence[EvaluatedText], bits: int = 64) -> None:
        self.items, self.shift = items, np.uint64(64 - bits)
        self.stream: list[str] = []  # the words of all items, an empty one after each part
        self.owner: array[int] = array("l")  # of each word: the position of its item
        self.alone: dict[str, list[int]] = {}  # texts that must stand alone -> their owners
        # by owner and fewest words that are evidence: where the parts begin and end in the stream
        queries = list[tuple[int, int, list[tuple[int, int]]]]()
        vocabulary: dict[str, str] = {}
        names = {name: k for k, name in enumerate(sorted({item.cluster for item in items}))}
        for owner, item in enumerate(items):
            answer = [(MIN_ANSWER_WORDS, (item.reference,))] if item.reference else []
            for min_words, parts in ((1, item.question), *answer):
                queries.append((owner, min_words, []))
                for part in parts:
                    tokens = [vocabulary.setdefault(word, word) for word in words(part)]
                    start, end = len(self.stream), len(self.stream) + len(tokens)
                    queries[-1][2].append((start, end))
                    self.stream += [*tokens, ""]
                    self.owner.extend(repeat(owner, len(tokens) + 1))
        self.values = {"": 0} | {word: value(word) for word in vocabulary}
        values_N, owner_N = self._values_of(self.stream), np.array(self.owner, np.int64)
        # so many clusters must share a phrase for it to be nobody's own; of few clusters, all
        many = max(2, min(FEW, len(names)), int(SHARED * len(names)))
        cluster_N = np.array([names[item.cluster] for item in items], np.int64)[owner_N]
        own_N = np.ones(len(values_N), np.bool_)  # words outside what many share, as a template's
        for _, hashes_N in partial_hashes(values_N, {PHRASE}):
            hashes, counts = np.unique(
                hashes_N[first_places(hashes_N, cluster_N)], return_counts=True
            )
            for start in np.flatnonzero(np.isin(hashes_N, hashes[counts >= many])).tolist():
                if "" not in self.stream[start : start + PHRASE]:
                    own_N[start : start + PHRASE] = False
        begins: dict[int, list[int]] = {}
        for query in queries:
            self._choose_windows(*query, own_N, begins)
        for key, owners in list(self.alone.items()):
            if len({items[owner].cluster for owner in owners}) >= many:  # such as a class's name
                del self.alone[key]
        self.windows: dict[int, Windows] = {}
        for length, hashes_N in partial_hashes(values_N, set(begins)):
            starts = np.array(begins[length], np.int64)
            # of a window that a text repeats, the first: of "ha ha ha" in both, every pair would be
            # compared word by word
            starts = starts[first_places(hashes_N[starts], owner_N[starts])]
            self.windows[length] = Windows(hashes_N[starts] >> self.shift, starts)
        owners = {k for w in self.windows.values() for k in np.unique(owner_N[w.starts]).tolist()}
        owners |= {owner for of_text in self.alone.values() for owner in of_text}
        self.searchable = [items[owner] for owner in sorted(owners)]
        self.longest = max((len(text) for text in self.alone), default=0)

    def _values_of(self, stream: Sequence[str]) -> Hashes:
        """Return the values of words: of one in no item 0, so that no window with it matches."""
        values = map(self.values.get, stream, repeat(0))
        return np.fromiter(values, np.uint64, len(stream))

    def _choose_windows(
        self,
        owner: int,
        min_words: int,
        parts: list[tuple[int, int]],
        own_N: NDArray[np.bool_],
        begins: dict[int, list[int]],
    ) -> None:
        """Choose every window of 13 words, else each shorter run in full, else all of the text."""
        own_runs = []  # where the runs of a part's own words begin and end
        for start, end in parts:
            edges = np.diff(np.concatenate([[0], own_N[start:end].astype(np.int8), [0]]))
            edges = (np.flatnonzero(edges) + start).tolist()
            own_runs += zip(edges[::2], edges[1::2], strict=True)
        long = [(start, end) for start, end in own_runs if end - start >= WINDOW]
        for start, end in long:
            begins.setdefault(WINDOW, []).extend(range(start, end - WINDOW + 1))
        if long:
            return
        for start, end in own_runs:
            if end - start >= SHORTEST:
                begins.setdefault(end - start, []).append(start)
        tokens = [word for start, end in parts for word in self.stream[start:end]]
        if len(tokens) >= min_words:
            self.alone.setdefault(" ".join(tokens), []).append(owner)

    def find(self, texts: Iterable[tuple[str, str]]) -> Iterator[tuple[EvaluatedText, str, str]]:
        """Yield item, place and words of each match in texts, one a text and item."""
        places, stream, starts = list[str](), list[str](), list[int]()
        alone = set[tuple[int, str]]()
        for place, text in texts:
            tokens = words(text)
            if self.alone:  # items that are this text, or a line of it
                joined = " ".join(tokens)
                keys = {joined} if len(joined) <= self.longest else set[str]()
                if "\n" in text:
                    short = (line for line in text.split("\n") if len(line) <= 4 * self.longest)
                    keys.update(" ".join(words(line)) for line in short)
                alone |= {(len(places), key) for key in keys & self.alone.keys()}
            places.append(place)
            starts.append(len(stream))
            stream += [*tokens, ""]
            if len(stream) >= BATCH:
                yield from self._find_in_batch(places, stream, starts, alone)
                places, stream, starts, alone = [], [], [], set()
        yield from self._find_in_batch(places, stream, starts, alone)

    def _find_in_batch(
        self, places: list[str], stream: list[str], starts: list[int], alone: set[tuple[int, str]]
    ) -> Iterator[tuple[EvaluatedText, str, str]]:
        """Yield the matches in texts whose words are one stream; `starts` are their positions."""
        matches: dict[tuple[int, int], str] = {}  # by the numbers of text and item
        for number, phrase in sorted(alone):
            matches |= {(number, owner): phrase for owner in self.alone[phrase]}
        compared: set[tuple[int, str]] = set()
        for length, hashes_N in partial_hashes(self._values_of(stream), set(self.windows)):
            for position, candidates in self.windows[length].hits(hashes_N >> self.shift):
                window = stream[position : position + length]
                number = bisect_right(starts, position) - 1
                phrase = " ".join(window)
                if (number, phrase) in compared:  # a phrase that a text repeats is compared once
                    continue
                compared.add((number, phrase))
                for start in candidates.tolist():
                    if self.stream[start : start + length] == window:
                        matches.setdefault((number, self.owner[start]), phrase)
        for (number, owner), phrase in matches.items():
            yield self.items[owner], places[number], phrase


def partial_hashes(values_N: Hashes, lengths: set[int]) -> Iterator[tuple[int, Hashes]]:
    """Yield, for each of the lengths up to 13, the hashes of the windows that begin at each word.

    The hash is the sum of the words' values times an odd factor of their place, modulo 2^64.
    """
    longest = max(lengths, default=0)
    padded = np.concatenate([values_N, np.zeros(longest, np.uint64)])
    total_N = np.zeros(len(values_N), np.uint64)
    for place in range(longest):
        total_N += np.uint64(FACTORS[place]) * padded[place : place + len(values_N)]
        if place + 1 in lengths:
            yield place + 1, total_N


def first_places(hashes_N: Hashes, group_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the place of the first of each hash in each group."""
    order = np.lexsort((group_N, hashes_N))
    hashes, groups, new = hashes_N[order], group_N[order], np.ones(len(order), np.bool_)
    new[1:] = (hashes[1:] != hashes[:-1]) | (groups[1:] != groups[:-1])
    return np.sort(order[new])

"""Find phrases: which of many texts hold, word for word, a piece of one of the queries.

The queries are the small side. Their windows of words are indexed by exact 64-bit hashes, the texts stream past
in batches, and every match of a hash is verified on the words themselves, so a collision costs time and never a false
match. Text is compared as words: NFKC, case-folded, punctuation and invisible characters taken out; where a script is
written without spaces each character is a word. Memory is that of the queries, however many texts there are.
"""

import hashlib
import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

WINDOW = 13  # consecutive words that count as the same text (Brown et al. 2020, appendix C)
SHORTEST = (
    8  # words of a shorter text that are looked for inside others; below, it must stand alone
)
PHRASE = 5  # consecutive words that many queries share are nobody's own
SHARED = 0.05  # of the clusters: a phrase that so many share is nobody's own
FEW = 5  # clusters, at least
BATCH = 1 << 18  # words that are hashed together: what the processor's caches hold

# Scripts without spaces: kana, Han, Thai to Tibetan, Myanmar, Khmer.
UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
WORD = re.compile(f"[^\\W_{UNSPACED}]+|[{UNSPACED}]")
# Apostrophes and what is invisible (soft hyphens, joiners, marks of direction) stand inside words.
INVISIBLE = (
    "'\u2018\u2019\u201b\u02bc\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff"
)
INSIDE = re.compile(f"[{INVISIBLE}\ufe00-\ufe0f]")
ASCII = {n: None if chr(n) == "'" else chr(n) if chr(n).isalnum() else " " for n in range(128)}

Hashes = NDArray[np.uint64]


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


class Query(NamedTuple):
    """A text to look for: its owner, by number, its cluster, its parts, and the fewest words that are evidence."""

    owner: int
    cluster: str
    parts: tuple[str, ...]
    min_words: int = 1


class PhraseMatch(NamedTuple):
    """The text at `place` holds the words of a query of `owner`, or (`alone`) is the same as the query."""

    owner: int
    place: str
    phrase: str
    alone: bool


class Windows(NamedTuple):
    """The windows of one length: sorted hashes, where each begins among the queries' words, and a filter by hash."""

    hashes: Hashes
    starts: NDArray[np.int64]
    filter: NDArray[np.bool_]

    @classmethod
    def make(cls, hashes: Hashes, starts: NDArray[np.int64]) -> "Windows":
        """Sort, and mark each hash in a table of at least sixteen places a hash."""
        order = np.argsort(hashes, kind="stable")
        table = np.zeros(1 << max(16, (16 * len(hashes)).bit_length()), np.bool_)
        table[hashes & np.uint64(len(table) - 1)] = True
        return cls(hashes[order], starts[order], table)

    def hits(self, hashes_N: Hashes) -> tuple[NDArray[np.int64], ...]:
        """Return which of the hashes are here, and for each the range of its windows."""
        places = np.flatnonzero(self.filter[hashes_N & np.uint64(len(self.filter) - 1)])
        low = np.searchsorted(self.hashes, hashes_N[places], "left")
        high = np.searchsorted(self.hashes, hashes_N[places], "right")
        nonempty = high > low
        return places[nonempty], low[nonempty], high[nonempty]


class Index:
    """The queries as an index. `bits` shortens the hashes, so that a test can make them collide."""

    def __init__(self, queries: Sequence[Query], bits: int = 64) -> None:
        self.shift = np.uint64(64 - bits)
        self.stream: list[str] = []  # the words of all queries, an empty one after each part
        self.owner: array[int] = array("l")  # of each word
        self.alone: dict[str, list[int]] = {}  # texts that must stand alone -> their owners
        self.values: dict[str, int] = {"": 0}
        parts = self._read(queries)
        values_N = self._values_of(self.stream)
        clusters = len({query.cluster for query in queries})
        # so many clusters must share a phrase for it to be nobody's own; of few clusters, all
        many = max(2, min(FEW, clusters), int(SHARED * clusters))
        own_N = self._mark_own(values_N, queries, parts, many)
        begins: dict[int, list[int]] = {}
        for query, pieces in zip(queries, parts, strict=True):
            own = [run for piece in pieces for run in runs(own_N, *piece)]
            self._choose(query, own, begins)
        cluster = {query.owner: query.cluster for query in queries}
        for key, owners in list(self.alone.items()):
            if len({cluster[owner] for owner in owners}) >= many:  # such as the name of a class
                del self.alone[key]
        self.windows, owner_N = dict[int, Windows](), np.array(self.owner)
        for length, hashes_N in partial_hashes(values_N, set(begins)):
            starts = np.array(begins[length], np.int64)
            # of a window that a text repeats, the first: "ha ha ha" in both would be compared word by word, squared
            order = np.lexsort((owner_N[starts], hashes_N[starts]))
            pairs = np.stack([hashes_N[starts[order]], owner_N[starts[order]].astype(np.uint64)])
            new = np.concatenate([[True], (pairs[:, 1:] != pairs[:, :-1]).any(axis=0)])
            starts = starts[np.sort(order[new])]
            self.windows[length] = Windows.make(hashes_N[starts] >> self.shift, starts)
        self.searchable = {k for w in self.windows.values() for k in np.unique(owner_N[w.starts])}
        self.searchable |= {owner for owners in self.alone.values() for owner in owners}
        self.longest = max((len(text) for text in self.alone), default=0)

    def _read(self, queries: Sequence[Query]) -> list[list[tuple[int, int]]]:
        """Put the words of all queries in the stream, and return where the parts of each query begin and end."""
        vocabulary: dict[str, str] = {}
        parts = []
        for query in queries:
            parts.append([])
            for part in query.parts:
                tokens = [vocabulary.setdefault(word, word) for word in words(part)]
                parts[-1].append((len(self.stream), len(self.stream) + len(tokens)))
                self.stream += [*tokens, ""]
                self.owner.extend(repeat(query.owner, len(tokens) + 1))
        self.values |= {word: value(word) for word in vocabulary}
        return parts

    def _values_of(self, stream: Sequence[str]) -> Hashes:
        """Return the values of words; one that is in no query has the value 0, and no window with it matches."""
        values = map(self.values.get, stream, repeat(0))
        return np.fromiter(values, np.uint64, len(stream))

    def _mark_own(
        self,
        values_N: Hashes,
        queries: Sequence[Query],
        parts: list[list[tuple[int, int]]],
        many: int,
    ) -> NDArray[np.bool_]:
        """Mark the words that are the queries' own: not in a phrase that many clusters share, as a template's is."""
        own_N = np.ones(len(values_N), np.bool_)
        names = {name: k for k, name in enumerate(sorted({query.cluster for query in queries}))}
        cluster_N = np.zeros(len(values_N), np.int64)
        for query, pieces in zip(queries, parts, strict=True):
            for start, end in pieces:
                cluster_N[start:end] = names[query.cluster]
        for _, hashes_N in partial_hashes(values_N, {PHRASE}):
            for start in starts_of_shared(hashes_N, cluster_N, many):
                if "" not in self.stream[start : start + PHRASE]:
                    own_N[start : start + PHRASE] = False
        return own_N

    def _choose(
        self, query: Query, own: list[tuple[int, int]], begins: dict[int, list[int]]
    ) -> None:
        """Choose the windows: every one of 13 words, else each shorter run in full, else the query by itself."""
        long = [(start, end) for start, end in own if end - start >= WINDOW]
        for start, end in long:
            begins.setdefault(WINDOW, []).extend(range(start, end - WINDOW + 1))
        if long:
            return
        for start, end in own:
            if end - start >= SHORTEST:
                begins.setdefault(end - start, []).append(start)
        tokens = [word for part in query.parts for word in words(part)]
        if len(tokens) >= query.min_words:
            self.alone.setdefault(" ".join(tokens), []).append(query.owner)

    def find(self, texts: Iterable[tuple[str, str]]) -> Iterator[PhraseMatch]:
        """Yield the matches in each of the texts, (place, text): one for each text and owner."""
        for places, stream, starts, alone in self._batches(texts):
            seen: set[tuple[int, int]] = set()
            for number, phrase in alone:
                for owner in self.alone[phrase]:
                    if (number, owner) not in seen:
                        seen.add((number, owner))
                        yield PhraseMatch(owner, places[number], phrase, True)
            for number, owner, phrase in self._matches(stream, starts):
                if (number, owner) not in seen:
                    seen.add((number, owner))
                    yield PhraseMatch(owner, places[number], phrase, False)

    def _batches(
        self, texts: Iterable[tuple[str, str]]
    ) -> Iterator[tuple[list[str], list[str], list[int], list[tuple[int, str]]]]:
        """Yield batches: the texts' places, their words in one stream, where each begins, what stands alone in them."""
        places, stream, starts, alone = [], [], [], []
        for place, text in texts:
            tokens = words(text)
            if self.alone:  # queries that are this text, or a line of it
                joined = " ".join(tokens)
                keys = {joined} if len(joined) <= self.longest else set[str]()
                if "\n" in text:
                    short = (line for line in text.split("\n") if len(line) <= 4 * self.longest)
                    keys.update(" ".join(words(line)) for line in short)
                alone += [(len(places), key) for key in keys & self.alone.keys()]
            places.append(place)
            starts.append(len(stream))
            stream += tokens
            stream.append("")
            if len(stream) >= BATCH:
                yield places, stream, starts, alone
                places, stream, starts, alone = [], [], [], []
        if places:
            yield places, stream, starts, alone

    def _matches(self, stream: list[str], starts: list[int]) -> Iterator[tuple[int, int, str]]:
        """Yield the number of the text, the owner and the words of each window whose words are the same."""
        start_T = np.array(starts)
        for length, hashes_N in partial_hashes(self._values_of(stream), set(self.windows)):
            table = self.windows[length]
            places, low, high = table.hits(hashes_N >> self.shift)
            numbers = np.searchsorted(start_T, places, "right") - 1
            ranges = zip(*(a.tolist() for a in (places, low, high, numbers)), strict=True)
            compared: set[tuple[int, str]] = set()  # a text that repeats a phrase is compared once
            for place, first, last, number in ranges:
                window = stream[place : place + length]
                phrase = " ".join(window)
                if (number, phrase) in compared:
                    continue
                compared.add((number, phrase))
                for start in table.starts[first:last].tolist():
                    if self.stream[start : start + length] == window:
                        yield number, self.owner[start], phrase


def partial_hashes(values_N: Hashes, lengths: set[int]) -> Iterator[tuple[int, Hashes]]:
    """Yield, for each of the lengths up to 13, the hashes of the windows that begin at each word.

    The hash of a window is the sum of its words' values, each times an odd factor of its place, modulo 2^64: that of a
    longer window goes on from that of a shorter one. Windows at the end go on in zeros.
    """
    longest = max(lengths, default=0)
    padded = np.concatenate([values_N, np.zeros(longest, np.uint64)])
    total_N = np.zeros(len(values_N), np.uint64)
    for place in range(longest):
        total_N += np.uint64(FACTORS[place]) * padded[place : place + len(values_N)]
        if place + 1 in lengths:
            yield place + 1, total_N


def starts_of_shared(hashes_N: Hashes, cluster_N: NDArray[np.int64], least: int) -> Iterable[int]:
    """Return where the windows begin whose hash stands in at least so many clusters."""
    order = np.lexsort((cluster_N, hashes_N))
    hashes, clusters = hashes_N[order], cluster_N[order]
    new_hash = np.ones(len(order), np.bool_)
    new_hash[1:] = hashes[1:] != hashes[:-1]
    new_pair = new_hash.copy()
    new_pair[1:] |= clusters[1:] != clusters[:-1]
    group = np.cumsum(new_hash) - 1
    counts = np.bincount(group, weights=new_pair)
    return np.sort(order[counts[group] >= least]).tolist()


def runs(own_N: NDArray[np.bool_], start: int, end: int) -> list[tuple[int, int]]:
    """Return where the runs of a text's own words between `start` and `end` begin and end."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], own_N[start:end].astype(np.int8), [0]])))
    return [(start + int(a), start + int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]

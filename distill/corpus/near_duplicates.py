"""Near-duplicates: documents that share most of their 5-grams with an earlier one (Jaccard).

Grams are of words, or of characters in a script without spaces. Candidates come from MinHash with
locality sensitive hashing (Broder 1997; datasketch), and each is confirmed by the exact overlap.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.languages import SPACELESS, UNSPACED
from distill.records import Document

WORDS = 5  # of a shingle
PERMUTATIONS = 128
SHARED = 60  # characters of a beginning or end that several prompts share; less changes no verdict
LONG_WORD = 60  # characters of words, on average, that are none
DIFFERENT = 4  # words in which two prompts differ as prompts do, and not as copies
CANDIDATES = 64  # that are compared with one document, at most
WORD = re.compile(f"[^\\s{UNSPACED}]+|[{UNSPACED}]")
FACTORS = np.random.default_rng(1).integers(2**63, size=PERMUTATIONS, dtype=np.uint64) | np.uint64(
    1
)


class Compared(NamedTuple):
    """What is compared of a document: its core, what other prompts share, earlier turns."""

    core: str
    shared: tuple[str, str] = ("", "")
    before: str = ""
    prompt: bool = False


def split_words(text: str) -> list[str]:
    """Return the words of a text, case ignored; of a script without spaces, the characters."""
    text = text.casefold()
    words = text.split()
    if len(words) * LONG_WORD < len(text):  # of no words, or of a script that is not known
        return list("".join(words))
    return WORD.findall(text) if not text.isascii() and SPACELESS.search(text) else words


def shingles(text: str) -> set[str]:
    """Return the word 5-grams of a text, case ignored; of a shorter text, the text itself."""
    words = split_words(text)
    if len(words) < WORDS:
        return {" ".join(words)}
    return set(map(" ".join, zip(*(words[n:] for n in range(WORDS)), strict=False)))


def overlap(text: str, other: str) -> float:
    """Return the Jaccard similarity of two texts' shingles."""
    grams, others = shingles(text), shingles(other)
    return len(grams & others) / len(grams | others)


def common(text: str, other: str) -> int:
    """Return how many characters two texts have in common at their beginning."""
    low, high = 0, min(len(text), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def shared_beginnings(texts: Sequence[str]) -> list[int]:
    """Return how many characters of each text two others begin with too; 0 for a few."""
    order = sorted(range(len(texts)), key=texts.__getitem__)
    pairs = ((texts[place], texts[following]) for place, following in pairwise(order))
    # in common with the next in order, between two that have none
    lengths = [common(*pair) if pair[0][:SHARED] == pair[1][:SHARED] else 0 for pair in pairs]
    lengths = [0, 0, *lengths, 0, 0]
    results = [0] * len(texts)
    for rank, place in enumerate(order):
        size, text = max(map(min, pairwise(lengths[rank : rank + 4]))), texts[place]
        if 0 < size < len(text) and text[size].isalnum() and not SPACELESS.match(text[size]):
            size = max(text.rfind(space, 0, size) + 1 for space in " \n")  # at a word
        results[place] = size if size >= SHARED else 0
    return results


def parts_of(documents: Sequence[Document]) -> list[Compared]:
    """Return what is compared of each document."""
    places = [place for place, document in enumerate(documents) if "messages" in document.meta]
    turns = [documents[place].meta["messages"][-1]["content"] for place in places]
    starts = shared_beginnings(turns)
    ends = shared_beginnings(
        [turn[start:][::-1] for turn, start in zip(turns, starts, strict=True)]
    )
    parts = [Compared(document.text) for document in documents]
    for place, turn, start, size in zip(places, turns, starts, ends, strict=True):
        end = len(turn) - size
        earlier = (turn["content"] for turn in documents[place].meta["messages"][:-1])
        core, before = turn[start:end].strip(), "\n".join(earlier)
        if not core:  # "Go on.": what is the document's own stands before it
            core, start, end = documents[place].text, 0, len(turn)
        parts[place] = Compared(core, (turn[:start], turn[end:]), before, True)
    return parts


def nearly_same(part: Compared, other: Compared, threshold: float) -> bool:
    """Compare two parts in full."""
    if part.shared != other.shared or overlap(part.core, other.core) < threshold:
        return False
    if not part.prompt:
        return True
    if part.before != other.before and overlap(part.before, other.before) < threshold:
        return False
    start = common(part.core, other.core)
    texts = part.core[start:], other.core[start:]
    end = common(texts[0][::-1], texts[1][::-1])
    first, second = (split_words(text[: len(text) - end]) for text in texts)
    if min(len(first), len(second)) < DIFFERENT:
        return True
    return len({*first} & {*second}) >= threshold * len({*first} | {*second})


class Sketches:
    """Hashes of the bands of documents' MinHash signatures, by datasketch's parameters."""

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHash, MinHashLSH  # half a second, which plan need not wait for

        index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
        self.bands, self.rows = index.b, index.r
        self.empty = MinHash(num_perm=PERMUTATIONS, seed=1)

    def of(self, text: str) -> NDArray[np.uint64]:
        """Return a text's hashes, one a band."""
        sketch = self.empty.copy()
        sketch.update_batch([gram.encode() for gram in shingles(text)])
        signature = sketch.hashvalues[: self.bands * self.rows].astype(np.uint64)
        return (signature.reshape(self.bands, -1) * FACTORS[: self.rows]).sum(axis=1)


def near_repeats(
    documents: Sequence[Document], threshold: float, enough: int | None = None
) -> dict[int, int]:
    """Return, by the place of a document, that of an earlier one which it nearly repeats.

    Where `enough` documents are no repeats, those behind them are not looked at.
    """
    parts, sketches = parts_of(documents), Sketches(threshold)
    hashes_NB = np.empty((len(documents), sketches.bands), np.uint64)
    repeats, size, done = dict[int, int](), 0, 0
    while done < len(documents) and (enough is None or done - len(repeats) < enough):
        size = len(documents) if enough is None else min(len(documents), 2 * size + enough)
        for place in range(done, size):
            hashes_NB[place] = sketches.of(parts[place].core)
        # only what shares a band with another document is looked at again
        alike = set[int]()
        for band in range(sketches.bands):
            order = np.argsort(hashes_NB[:size, band], kind="stable")
            same = np.flatnonzero(np.diff(hashes_NB[order, band]) == 0)
            alike.update(order[same].tolist(), order[same + 1].tolist())
        repeats, buckets = dict[int, int](), dict[tuple[int, int], list[int]]()
        for place in sorted(alike):
            keys = list(enumerate(hashes_NB[place].tolist()))
            others = {other for key in keys for other in buckets.get(key, ())}
            by_id = sorted(others, key=lambda other: documents[other].id)
            for other in by_id[:CANDIDATES]:
                if nearly_same(parts[place], parts[other], threshold):
                    repeats[place] = other
                    break
            else:
                for key in keys:
                    if len(bucket := buckets.setdefault(key, [])) < CANDIDATES:
                        bucket.append(place)
        done = size
    return repeats

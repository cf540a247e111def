"""Deduplication: finds documents whose content, or nearly all of whose words, an earlier document has.

Near-duplicates share at least a threshold of their word 5-grams (Jaccard). Candidates come from MinHash with locality
sensitive hashing (Broder 1997; datasketch), and each is confirmed by the exact overlap. The first one stays.
"""

from collections.abc import Iterable, Iterator

from distill.errors import DistillError, Exit
from distill.records import Document

WORDS = 5
PERMUTATIONS = 128


def shingles(text: str) -> set[str]:
    """Return the word 5-grams of a text, case ignored; of a shorter text, the text itself."""
    words = text.casefold().split()
    return {" ".join(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))}


def overlap(left: set[str], right: set[str]) -> float:
    """Return the Jaccard similarity of two non-empty sets."""
    return len(left & right) / len(left | right)


def unique(documents: Iterable[Document]) -> Iterator[tuple[Document, str | None]]:
    """Yield each document with the place of an earlier one of the same content, or None.

    Raises DistillError (exit 3) where two documents of different content bear the same id of the user's.
    """
    places: dict[str, str] = {}
    by_id: dict[str, Document] = {}
    for document in documents:
        identity = document.meta.get("id")
        other = by_id.setdefault(identity, document) if identity else document
        if other.id != document.id:
            what = f"id {identity!r:.60} stands with other content at {other.source}"
            fix = "make ids unique, or name another column with corpus.columns.id"
            raise DistillError(Exit.INPUT, document.source, what, fix)
        yield document, places.get(document.id)
        places.setdefault(document.id, document.source)


class NearDuplicates:
    """The documents so far, searchable for one that a new document nearly repeats."""

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHash, MinHashLSH  # half a second, which plan need not wait for

        self.threshold = threshold
        self.empty = MinHash(num_perm=PERMUTATIONS, seed=1)  # making its permutations takes longest
        self.index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
        self.texts: dict[str, Document] = {}

    def find_or_add(self, document: Document) -> Document | None:
        """Return an earlier document that this one nearly repeats, or remember this one and return None."""
        grams = shingles(document.text)
        sketch = self.empty.copy()
        sketch.update_batch([gram.encode("utf-8") for gram in grams])
        for key in sorted(map(str, self.index.query(sketch))):
            if overlap(grams, shingles(self.texts[key].text)) >= self.threshold:
                return self.texts[key]
        self.index.insert(document.id, sketch)
        self.texts[document.id] = document
        return None

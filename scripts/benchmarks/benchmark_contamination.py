"""Measure the search for contamination: leaks found, false alarms, seconds and memory.

    python scripts/benchmarks/benchmark_contamination.py --documents 1000000 \\
        --json contamination.json

Items and documents are made on the fly from one vocabulary whose words are as uneven as those of a
language (Zipf), in letters of several scripts. Leaks are planted in documents: pieces of items as
they stand, in other case, punctuation, spacing and Unicode form, from every place of the item, and
short items whole. What is made costs time too: the seconds of the search alone are told apart.
"""

import argparse
import json
import random
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill.corpus.ngrams import SHORTEST, WINDOW, EvaluatedText, Index

LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
OTHER = ("éüñçøåß", "αβγδεηθικλμνοπρστυφω", "абвгдежзийклмнопрстуфхцчшщыэюя")
CHUNK = 2000  # documents that are made together


class Language:
    """Words drawn at random, the k-th commonest as often as 1 / (k + 2), and texts made of them."""

    def __init__(self, seed: int, vocabulary: int = 50_000) -> None:
        self.rng = np.random.default_rng(seed)
        draw = random.Random(seed)
        made: dict[str, None] = {}
        while len(made) < vocabulary:
            letters = LETTERS if draw.random() < 0.98 else LETTERS[:8] + draw.choice(OTHER)
            size = 1 + min(11, int(draw.expovariate(0.25)) + (len(made) > 400) * 2)
            made.setdefault("".join(draw.choices(letters, k=size)))
        self.words = np.array(list(made), dtype=object)
        shares = 1 / (np.arange(vocabulary) + 2)
        self.ranks = np.cumsum(shares / shares.sum())

    def texts(self, count: int, length: int) -> list[list[str]]:
        """Return `count` texts of `length` words each."""
        drawn = self.rng.random(count * length)
        found = self.words[np.minimum(np.searchsorted(self.ranks, drawn), len(self.words) - 1)]
        return found.reshape(count, length).tolist()


def sentence(words: list[str]) -> str:
    """Write words as sentences of twelve."""
    lines = (" ".join(words[k : k + 12]).capitalize() for k in range(0, len(words), 12))
    return ". ".join(lines) + "."


def punctuated(text: str, draw: random.Random) -> str:
    """Return the text with other punctuation between its words."""
    words = [re.sub(r"\W", "", word) for word in text.split()]
    return "".join(word + draw.choice((" ", ", ", "; ", " - ", "... ", '" ')) for word in words)


def respaced(text: str, draw: random.Random) -> str:
    """Return the text with other white space."""
    return "".join(word + draw.choice((" ", "  ", "\n", "\t", "\u00a0")) for word in text.split())


def reformed(text: str, draw: random.Random) -> str:
    """Return the text decomposed (NFD), every third word in full-width letters, with soft
    hyphens."""
    wide = {n: n + 0xFEE0 for n in range(0x21, 0x7F)}
    found = [unicodedata.normalize("NFD", word) for word in text.split()]
    found = [word.translate(wide) if k % 3 == 0 else word for k, word in enumerate(found)]
    return " ".join(word if len(word) < 6 else f"{word[:3]}\u00ad{word[3:]}" for word in found)


DISGUISES = {
    "verbatim": lambda text, draw: text,
    "case": lambda text, draw: draw.choice((text.upper(), text.lower(), text.swapcase())),
    "punctuation": punctuated,
    "white space": respaced,
    "Unicode form": reformed,
}


class Leak(NamedTuple):
    """A piece of an item, disguised; one of under eight words stands on a line of its own."""

    owner: int
    disguise: str
    text: str
    alone: bool


def plant(
    items: list[list[str]], leaks: int, documents: int, draw: random.Random
) -> dict[int, Leak]:
    """Return the leaks by document: one in each, each of another item."""
    planted: dict[int, Leak] = {}
    places = draw.sample(range(documents), leaks)
    for k, (owner, place) in enumerate(
        zip(draw.sample(range(len(items)), leaks), places, strict=True)
    ):
        words, name = items[owner], list(DISGUISES)[k % len(DISGUISES)]
        size = min(len(words), WINDOW if k % 2 else draw.randint(WINDOW, 60))
        first = draw.randint(0, len(words) - size)
        text = DISGUISES[name](sentence(words[first : first + size]), draw)
        alone = size < SHORTEST
        planted[place] = Leak(owner, name, text.replace("\n", " ") if alone else text, alone)
    return planted


def corpus(
    language: Language, documents: int, length: int, planted: dict[int, Leak], draw: random.Random
) -> Iterator[tuple[str, str]]:
    """Yield the documents, with what leaks into them somewhere among their words; a very short leak
    has its line."""
    for start in range(0, documents, CHUNK):
        made = language.texts(min(CHUNK, documents - start), length)
        for place, words in enumerate(made, start):
            if leak := planted.get(place):
                at = draw.randint(0, len(words))
                words[at:at] = ["\n", leak.text, "\n"] if leak.alone else [leak.text]
            yield str(place), sentence(words) if place not in planted else " ".join(words)


class Clock:
    """Passes texts on, and counts the seconds that making them took."""

    def __init__(self, texts: Iterable[tuple[str, str]]) -> None:
        self.texts, self.seconds = iter(texts), 0.0

    def __iter__(self) -> Iterator[tuple[str, str]]:
        while True:
            started = time.perf_counter()
            batch = [text for _, text in zip(range(CHUNK), self.texts, strict=False)]
            self.seconds += time.perf_counter() - started
            if not batch:
                return
            yield from batch


def peak() -> float:
    """Return the most memory that this process ever held, in megabytes."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def measure(items: int, documents: int, length: int, leaks: int, seed: int) -> dict[str, Any]:
    """Plant, search, and count."""
    language, draw = Language(seed), random.Random(seed)
    short = items // 20
    sizes = [*language.texts(items - short, length), *language.texts(short, 12)]
    wanted = [words if len(words) > 12 else words[: 4 + k % 9] for k, words in enumerate(sizes)]
    planted = plant(wanted, leaks, documents, draw)
    started = time.perf_counter()
    index = Index([EvaluatedText(str(k), str(k), (sentence(w),)) for k, w in enumerate(wanted)])
    indexed = time.perf_counter() - started
    texts = Clock(corpus(language, documents, length, planted, draw))
    started = time.perf_counter()
    found = {(int(item.id), int(place)) for item, place, _ in index.find(texts)}
    seconds = time.perf_counter() - started
    told = {(leak.owner, place): leak.disguise for place, leak in planted.items()}
    missed = Counter(name for pair, name in told.items() if pair not in found)
    alarms = {owner for owner, _ in found - told.keys()}
    return {
        "documents": documents,
        "words": documents * length,
        "items": items,
        "short_items": short,
        "leaks": leaks,
        "found": len(found & told.keys()),
        "missed": dict(missed),
        "false_alarms": len(alarms),
        "false_alarm_rate": len(alarms) / (items - leaks),
        "documents_wrongly_flagged": len({place for _, place in found - told.keys()}),
        "seconds_index": indexed,
        "seconds_search": seconds - texts.seconds,
        "seconds_making_documents": texts.seconds,
        "documents_per_second": documents / (seconds - texts.seconds),
        "peak_megabytes": peak(),
    }


def main() -> None:
    """Measure, print the figures, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument(
        "--length", type=int, default=200, help="words of a document and of an item"
    )
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--leaks", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures = measure(options.items, options.documents, options.length, options.leaks, options.seed)
    for name, value in figures.items():
        shown = f"{value:,.4g}" if isinstance(value, float) and value < 1 else value
        shown = f"{value:,.1f}" if isinstance(value, float) and value >= 1 else shown
        print(f"{name.replace('_', ' '):28} {shown}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()

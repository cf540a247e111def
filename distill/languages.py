"""Scripts and languages: where words end without spaces, and which language a text is in.

That is told by its script, in Latin letters by its commonest words, and decides nothing but what a
run says of its corpus, and in which language questions are asked for.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable

from distill import shipped_table

# Scripts without spaces: kana, Han, Thai to Tibetan, Myanmar, Khmer.
UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
SPACELESS = re.compile(f"[{UNSPACED}]")
TABLE = shipped_table("languages.yaml")
SENTENCE_END = re.compile(TABLE["sentence_end"])
PUNCTUATION = dict.fromkeys(map(ord, string.punctuation + TABLE["punctuation"]))
SCRIPTS: dict[str, str] = TABLE["scripts"]
COMMON_WORDS = {name: frozenset(words.split()) for name, words in TABLE["common_words"].items()}
SAMPLE = 2000  # characters of a text that are looked at
LEAST = 0.1  # of the words of a text in Latin letters must be common ones of its language


def language_of(text: str) -> str | None:
    """Return the English name of a text's language, or None where nothing tells it."""
    sample = text[:SAMPLE]
    letters = [c for c in sample if c.isalpha()]
    if not letters:
        return None
    others = Counter(
        SCRIPTS.get(unicodedata.name(c, "").partition(" ")[0]) for c in letters if c > "\u036f"
    )
    del others[None]
    if others["Japanese"] * 10 > len(letters):  # with Han, and more of it
        return "Japanese"
    if others and others.total() * 2 > len(letters):
        return others.most_common(1)[0][0]
    words = re.findall(r"[^\W\d_]+", sample.lower())
    shares = {
        language: sum(word in common for word in words) / max(1, len(words))
        for language, common in COMMON_WORDS.items()
    }
    best = max(shares, key=shares.__getitem__)
    return best if len(words) >= 5 and shares[best] >= LEAST else None


def main_language(texts: Iterable[str]) -> str | None:
    """Return the language of more than half of the texts whose language can be told."""
    counts = Counter(map(language_of, texts))
    del counts[None]
    (language, count), *_ = counts.most_common(1) or [(None, 0)]
    return language if 2 * count > counts.total() else None

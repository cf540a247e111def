"""Refusals: answers that decline and give nothing, in the languages of configs/refusals.yaml.

The first sentences say, in the first person and outside quotations, that the writer cannot or will
not, and what follows is no answer: an offer, a reason, advice to ask somebody else.
"""

import re
import unicodedata
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator

from distill.config.values import Section
from distill.config.yaml_file import find_config, read_table

TABLE = Path("configs/refusals.yaml")
HEAD = 300  # letters within which a refusal is declared
LONG = 1200  # characters of an answer, whatever it begins with
ANSWERED = 24  # letters that make an answer, after a "but", or where only something is lacking
EXPLAINED, REASON = 160, 40  # and elsewhere; shorter, it is why the writer declines
QUOTED = tuple("\"'\u201c\u2018\u00ab\u201e\u300c\u300e`<{[|\u2014\u2013-")
QUOTATIONS = re.compile(
    '"[^"]*"|\u201c[^\u201d]*\u201d|\u00ab[^\u00bb]*\u00bb|\u300c[^\u300d]*\u300d|\u201e[^\u201c\u201d]*[\u201c\u201d]'
)
GIVES = re.compile(
    r"```|(?:\n\s*(?:[-*\u2022]|\d{1,2}[.)])\s.*){2}|\w\(\w.*?[,)]|=\w|\d\s?[=+*/]\s?\d"
)
SENTENCE = re.compile(r"(?<=[.!?\u061f\u0964])\s+|[\u3002\uff01\uff1f\uff1b;\n]+")
CLAUSE = re.compile(r"[,;:\uff0c\u3001\uff1a\u060c]")
WIDE = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")  # as three letters
# Accents of Latin and Cyrillic letters, vowel marks of Arabic and Hebrew, the dot of Devanagari
MARKS = re.compile("[\u0300-\u036f\u0591-\u05c7\u064b-\u0652\u0640\u093c\u200b-\u200f]")
LETTERS = str.maketrans("\u2019\u2018\u0901\u0623\u0625\u0622", "''\u0902\u0627\u0627\u0627")


Alternatives = Annotated[
    re.Pattern[str],
    BeforeValidator(lambda words: re.compile(without_marks("|".join(words)).replace(" ", r"\s+"))),
]


class Language(Section):
    """What one language declines with, as alternatives of regular expressions."""

    language: str
    declines: Alternatives
    lacks: Alternatives
    but: Alternatives
    offers: Alternatives
    letters: Alternatives


@cache
def known_languages() -> tuple[Language, ...]:
    """Read the table; raises DistillError (exit 2) where it is wrong."""
    fix = "see the first lines of configs/refusals.yaml"
    return read_table(find_config(TABLE), tuple[Language, ...], fix)


def without_marks(text: str) -> str:
    """Return a text without accents, vowel marks and invisible characters, its quotes alike."""
    bare = MARKS.sub("", unicodedata.normalize("NFKD", text))
    return unicodedata.normalize("NFC", bare).translate(LETTERS)


def is_refusal(text: str) -> bool:
    """Tell whether an answer declines and gives nothing."""
    if len(text) > LONG or text.lstrip("*_# \n").startswith(QUOTED):
        return False
    plain = QUOTATIONS.sub(" ", without_marks(text).casefold().strip("*_# \n"))
    return any(_declines(plain, language) for language in known_languages())


def _declines(text: str, language: Language) -> bool:
    refusal = language.declines.search(text, 0, HEAD)
    if refusal is None or language.letters.match(text):
        return False
    if text[: refusal.start()].rstrip().endswith((":", "\uff1a")):  # what somebody else says
        return False
    if sum(1 for _ in SENTENCE.finditer(text, 0, refusal.start())) > 2:
        return False
    sentences = SENTENCE.split(text[refusal.end() :])
    lacking = language.lacks.search(refusal[0] + sentences[0][:60])
    answer = explanation = 0  # letters
    for number, sentence in enumerate(sentences):
        for turned, clause in enumerate(language.but.split(sentence, 1)):
            if language.offers.search(clause) or language.declines.search(clause):
                if number and not turned:  # "I can, however, look at a draft" is one offer
                    break
                continue
            if not number and not turned:  # what is left of the sentence that declines
                content = lacking or GIVES.search(clause)
                clause = CLAUSE.split(clause, 1)[-1] if content else ""
            size = len(clause) + 2 * len(WIDE.findall(clause))
            if turned or GIVES.search(clause):
                answer += size
            else:
                explanation += size if number else max(0, size - REASON)
    return answer < ANSWERED and explanation < (ANSWERED if lacking else EXPLAINED)

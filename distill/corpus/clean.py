"""Cleaning and cutting text: what normalising changes, and where a long document is cut.

A text is cut at the last paragraph end that fits, else sentence end, else white space, else hard; each chunk after the
first begins `overlap` characters earlier, at a word. Nothing but white space is lost.
"""

import re
import unicodedata

CONTROL = re.compile(r"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]")
BOUNDARIES = (
    re.compile(r"\n\s*\n"),
    re.compile(r"(?<=[.!?。！？])\s+|\n"),
    re.compile(r"\s+"),
)
WORD_START = re.compile(r"(?<=\s)\S")


def normalise(text: object) -> str:
    """Return clean text: NFC, `\\n` line ends, no control characters, no space at line ends, one blank line at most.

    Raises ValueError with the reason where the value is no text, is empty, or holds NUL or a lone surrogate.
    """
    if not isinstance(text, str):
        raise ValueError(f"the text is {type(text).__name__}, not text")
    if "\0" in text:
        raise ValueError("holds a NUL character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("holds a lone surrogate or a byte that is not UTF-8") from None
    text = unicodedata.normalize("NFC", text.removeprefix("\ufeff"))
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n")
    # not by a pattern of spaces before a line's end, which takes time in the square of the spaces
    text = "\n".join(line.rstrip(" \t") for line in CONTROL.sub("", text).split("\n"))
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    if not text:
        raise ValueError("the text is empty")
    return text


def chunk(text: str, max_chars: int, overlap_chars: int) -> list[str]:
    """Cut a text into pieces of at most `max_chars` characters, by the rule above."""
    pieces, start = [], 0
    while len(text) - start > max_chars:
        end = high = start + max_chars
        for boundary in BOUNDARIES:
            matches = boundary.finditer(text, start + max_chars // 2 + 1, high + 1)
            places = [match.start() for match in matches if match.start() <= high]
            if places:
                end = places[-1]
                break
        pieces.append(text[start:end].strip())
        word = WORD_START.search(text, end - overlap_chars, end)
        start = word.start() if word else end
    return [piece for piece in [*pieces, text[start:].strip()] if piece]

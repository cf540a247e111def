"""Cleaning and cutting: what changes, what is refused, and that cutting loses nothing."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.corpus.clean import chunk, normalise


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("\ufeff a\r\nb\rc ", "a\nb\nc"),
        ("a  \n\n\n\n b", "a\n\n b"),
        ("cafe\u0301", "caf\u00e9"),
        ("a\x1b[0mb\x07", "a[0mb"),
        ("page\fpage", "page\npage"),
        ("a\u2028b", "a\u2028b"),
        ("    indented\n\tcode", "indented\n\tcode"),
    ],
)
def test_what_normalising_changes(raw, clean):
    assert normalise(raw) == clean


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_normalising_twice_changes_nothing(text):
    try:
        once = normalise(text)
    except ValueError:
        return
    assert normalise(once) == once and once.encode("utf-8")


def test_a_text_is_cut_at_paragraphs_then_sentences_then_words():
    paragraphs = "First one is here.\n\nSecond one. Is here."
    assert chunk(paragraphs, 30, 0) == ["First one is here.", "Second one. Is here."]
    assert chunk("One sentence here. Another sentence.", 25, 0) == [
        "One sentence here.",
        "Another sentence.",
    ]
    assert chunk("several plain words", 10, 0) == ["several", "plain", "words"]
    assert chunk("x" * 25, 10, 0) == ["x" * 10, "x" * 10, "x" * 5]


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=30),
    gaps=st.lists(st.sampled_from([" ", "\n", "\n\n", " . "]), min_size=30, max_size=30),
    size=st.integers(2, 60),
    share=st.floats(0, 2),  # the config allows a half; above, cutting ends as well
)
def test_cutting_loses_no_letter_and_keeps_the_size(lengths, gaps, size, share):
    letters = iter(map(chr, range(0x4E00, 0x9000)))  # each stands once, so its place is known
    words = ["".join(next(letters) for _ in range(length)) for length in lengths]
    text = "".join(word + gap for word, gap in zip(words, gaps, strict=False)).strip()
    pieces = chunk(text, size, int(size * share))
    assert all(0 < len(piece) <= size and piece in text for piece in pieces)
    assert set("".join(pieces)) >= set("".join(words))
    starts = [text.index(piece) for piece in pieces if piece != "."]
    assert starts == sorted(starts)

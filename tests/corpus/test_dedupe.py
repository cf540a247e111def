"""Repeats: exact ones, near ones, and ids that stand twice."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.corpus.dedupe import NearDuplicates, overlap, shingles, unique
from distill.errors import DistillError, Exit
from distill.records import Document

WORDS = [f"word{n}" for n in range(100)]


def document(text: str, source: str = "a", **meta: str) -> Document:
    return Document.make(text, source, meta)


def test_the_first_of_equal_documents_stays() -> None:
    found = list(unique([document("x", "a:1"), document("y", "a:2"), document("x", "a:3")]))
    assert [earlier for _, earlier in found] == [None, None, "a:1"]


def test_an_id_with_other_content_stops() -> None:
    same = [document("x", "a:1", id="7"), document("x", "a:2", id="7")]
    assert len(list(unique(same))) == 2
    with pytest.raises(DistillError) as caught:
        list(unique([*same, document("y", "a:3", id="7")]))
    assert caught.value.code == Exit.INPUT
    assert caught.value.where == "a:3" and "a:1" in caught.value.what


def test_near_repeats_are_found_at_the_threshold_and_others_are_not() -> None:
    seen = NearDuplicates(0.8)
    first = document(" ".join(WORDS))
    assert seen.find_or_add(first) is None
    one_word = [*WORDS[:50], "other", *WORDS[51:]]  # 5 of 96 shingles differ: 91 / 101
    assert seen.find_or_add(document(" ".join(one_word).upper())) == first
    five_words = [word if n % 20 else "other" for n, word in enumerate(WORDS)]
    assert seen.find_or_add(document(" ".join(five_words))) is None


def test_short_texts_are_compared_whole() -> None:
    seen = NearDuplicates(0.85)
    assert seen.find_or_add(document("two words")) is None
    assert seen.find_or_add(document("two  Words")) is not None
    assert seen.find_or_add(document("two others")) is None


@settings(deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_the_overlap_is_a_share_and_symmetric(left: str, right: str) -> None:
    a, b = shingles(left), shingles(right)
    assert 0 <= overlap(a, b) == overlap(b, a) <= 1 and overlap(a, a) == 1

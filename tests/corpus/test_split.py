"""The split: sizes, stability when documents come, and what is refused."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.corpus.split import split
from distill.errors import DistillError, Exit

IDS = [f"{n:032x}" for n in range(2000)]


def test_counts_are_exact() -> None:
    assert Counter(split(IDS, 0, 24, 66).values()) == {
        "train": 1910,
        "validation": 24,
        "heldout": 66,
    }


def test_shares_are_shares_of_all() -> None:
    found = Counter(split(IDS, 0, 0.1, 0.3).values())
    assert abs(found["validation"] / 2000 - 0.1) < 0.025
    assert abs(found["heldout"] / 2000 - 0.3) < 0.035


@settings(deadline=None)
@given(st.integers(0, 9), st.permutations(range(40)), st.integers(20, 39))
def test_new_documents_move_no_old_one(seed: int, order: list[int], count: int) -> None:
    ids = [IDS[n] for n in order]
    before, after = split(ids[:count], seed, 0.2, 0.3), split(ids, seed, 0.2, 0.3)
    if {"validation", "heldout"} <= set(before.values()):
        moved = [i for i in ids[:count] if before[i] != after[i]]
        assert len(moved) <= 2  # only documents that stood in for an empty share may go back


def test_the_split_depends_on_the_seed_and_not_on_the_order() -> None:
    assert split(IDS, 1, 0.1, 0.1) == split(IDS[::-1], 1, 0.1, 0.1)
    assert split(IDS, 1, 0.1, 0.1) != split(IDS, 2, 0.1, 0.1)


def test_a_share_gets_a_document_at_least() -> None:
    assert set(split(IDS[:5], 0, 0.001, 0.001).values()) == {"train", "validation", "heldout"}
    assert set(split(IDS[:5], 0, 0, 0).values()) == {"train"}


@pytest.mark.parametrize(
    ("count", "validation", "heldout"),
    [(3, 1, 2), (10, 0, 11), (1, 0.1, 0.1), (2, 0.1, 0.1), (0, 0, 0), (100, 0.6, 0.5)],
)
def test_too_few_documents_stop(count: int, validation: float, heldout: float) -> None:
    with pytest.raises(DistillError) as caught:
        split(IDS[:count], 0, validation, heldout)
    assert caught.value.code == Exit.INPUT and "to train" in str(caught.value)

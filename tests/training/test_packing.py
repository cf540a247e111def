"""Rows of samples: every sample can be read back along its places, prefixes are stored once, answers never shared."""

from hypothesis import given, settings
from hypothesis import strategies as st

from distill.training import batches
from distill.training.batches import pack

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(samples=st.lists(TOKENS, min_size=1, max_size=8), share=st.booleans(), data=st.data())
def test_every_sample_is_read_back_along_its_segments(samples, share, data):
    prompts = [data.draw(st.integers(0, len(s))) for s in samples]
    row = pack(samples, prompts, share)
    assert [s.start for s in row.segments] == [0, *(s.end for s in row.segments[:-1])]
    by_last = {s.end - 1: s for s in row.segments}
    for number, sample in enumerate(samples):
        places = row.indices[number]
        assert [row.ids[p] for p in places] == sample
        if places:
            leaf = by_last[places[-1]]
            seen = [p for a, b in (*leaf.before, (leaf.start, leaf.end)) for p in range(a, b)]
            assert seen == places  # it sees itself and nothing else
        answers = [set(row.indices[n][prompts[n] :]) for n in range(len(samples))]
        assert all(
            not answers[number] & set(row.indices[n]) for n in range(len(samples)) if n != number
        )


def test_what_all_begin_with_is_there_once_and_what_some_share_too():
    system, task = list(range(20)), list(range(50, 60))
    samples = [[*system, *task, 1, 2], [*system, *task, 3], [*system, 4, 5]]
    row = pack(samples, [31, 30, 21], sharing=True)
    assert len(row.ids) == 20 + 10 + 2 + 1 + 2
    assert [s.position() for s in row.segments] == [0, 20, 30, 30, 20]


def test_short_beginnings_are_not_worth_it():
    samples = [[1] * (batches.SHORTEST_PREFIX - 1) + [n] for n in (2, 3)]
    assert len(pack(samples, [8, 8], sharing=True).ids) == 2 * batches.SHORTEST_PREFIX

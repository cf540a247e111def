"""The order of training: each sample once an epoch, complete, packed and read back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.training.batches import (
    learning_rate,
    micro_batches,
    order,
    pack,
    padded_batches,
    plan_steps,
    share,
)

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=60)
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=30)


@settings(max_examples=100, deadline=None)
@given(
    lengths=LENGTHS, seed=st.integers(0, 9), tokens=st.integers(1, 900), epochs=st.integers(1, 3)
)
def test_every_sample_is_seen_once_an_epoch(lengths, seed, tokens, epochs):
    steps = plan_steps(lengths, seed, tokens, epochs, None)
    for epoch in range(epochs):
        own = [step for step in steps if step.epoch == epoch]
        seen = [sample for step in own for sample in step.samples]
        assert seen == order(len(lengths), seed, epoch).tolist()
        assert [step.cursor for step in own] == [
            sum(len(s.samples) for s in own[:n]) for n in range(len(own))
        ]
        assert all(step.samples for step in own)


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, tokens=st.integers(300, 900))
def test_steps_are_about_as_large_as_asked(lengths, tokens):
    sizes = [
        sum(lengths[i] for i in step.samples) for step in plan_steps(lengths, 0, tokens, 1, None)
    ]
    assert max(sizes) <= 1.5 * tokens + 300


def test_max_steps_decide_into_further_epochs_and_a_share_of_an_epoch_is_one_of_its_steps():
    steps = plan_steps([10] * 8, 0, 20, 1, 11)
    assert len(steps) == 11 and steps[-1].epoch == 2
    assert len(plan_steps([10] * 8, 0, 20, 1.5, None)) == 6


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, limit=st.integers(1, 600), world=st.integers(1, 4))
def test_micro_batches_hold_every_sample_once_and_keep_to_the_limit(lengths, limit, world):
    batches = micro_batches(range(len(lengths)), lengths, limit)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(b) == 1 or sum(lengths[i] for i in b) <= limit for b in batches)
    shares = [share(batches, rank, world) for rank in range(world)]
    assert len({len(own) for own in shares}) == 1  # every process takes part in every round
    dealt = [batch for own in shares for batch in own if batch]
    assert sorted(dealt) == sorted(batches)


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, limit=st.integers(1, 600))
def test_padded_batches_keep_to_the_limit_with_their_padding(lengths, limit):
    batches = padded_batches(range(len(lengths)), lengths, limit)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(b) == 1 or max(lengths[i] for i in b) * len(b) <= limit for b in batches)


@pytest.mark.parametrize(("warmup", "steps"), [(0.1, 20), (7, 7), (0, 0)])
def test_warm_up_is_a_share_below_one_and_a_count_above(warmup, steps):
    rates = [learning_rate(n, 200, 1.0, "constant", warmup) for n in range(200)]
    assert sum(rate < 1 for rate in rates) == steps


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_rates_rise_to_the_peak_and_never_leave_it_upwards(kind):
    rates = [learning_rate(n, 100, 1e-3, kind, 10) for n in range(100)]
    assert rates[:11] == sorted(rates[:11]) and rates[0] > 0
    assert max(rates) == rates[10] == 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] > 0
    assert (rates[-1] < 2e-5) == (kind != "constant")


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

"""The order of training: every sample once an epoch, whole samples in steps, the same for any number of processes."""

from hypothesis import given, settings
from hypothesis import strategies as st

from distill.training.batches import micro_batches, order, padded_batches, plan_steps, share

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=60)


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


def test_epochs_differ_and_repeat():
    assert order(50, 1, 0).tolist() != order(50, 1, 1).tolist()
    assert order(50, 1, 1).tolist() == order(50, 1, 1).tolist()


def test_max_steps_decides_and_runs_on_into_further_epochs():
    assert len(plan_steps([10] * 8, 0, 20, 1, 11)) == 11
    assert plan_steps([10] * 8, 0, 20, 1, 11)[-1].epoch == 2


def test_a_share_of_an_epoch_is_a_share_of_its_steps():
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

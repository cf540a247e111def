"""The forecast: ranges that hold the truth, narrower with answers that are known, and no dollars without a price."""

import random
from collections.abc import Callable
from decimal import Decimal

import pytest

from distill.estimates import NOTHING, Span
from distill.forecast import Forecast, Group, Sample, forecast, interval, more_of, pooled
from distill.records import Usage
from tests.fake_teacher import PRICE

CAP = 256
Lengths = Callable[[random.Random], float]
LENGTHS: dict[str, Lengths] = {
    "even": lambda chance: chance.randint(1, CAP),
    "short": lambda chance: chance.randint(1, 4),
    "two kinds": lambda chance: chance.choice([8, 200]),
    "skewed": lambda chance: chance.lognormvariate(4, 0.7),
    "at the cap": lambda chance: chance.gauss(250, 60),
}


def answers(count: int, seed: int, lengths: Lengths) -> list[Sample]:
    """Return answers of scripted lengths to questions of many sizes; a token is 4 bytes, give or take."""
    chance, found = random.Random(seed), []
    for _ in range(count):
        size = chance.randint(40, 4000)
        read = round(size / chance.uniform(3.5, 4.5)) + 12
        usage = Usage(input_tokens=read, output_tokens=max(1, min(CAP, round(lengths(chance)))))
        found.append(Sample(size, usage, PRICE.of(usage), "end", usage.output_tokens / 50, 0.1))
    return found


def group_of(left: list[Sample], known: list[Sample], name: str = "x", cap: int = CAP) -> Group:
    size = sum(sample.size for sample in left) / max(1, len(left))
    return Group(name, Span(len(left), len(left)), Span(size, size), cap, tuple(known))


def truth(left: list[Sample]) -> tuple[int, int, Decimal]:
    read = sum(sample.usage.input_tokens for sample in left)
    written = sum(sample.usage.output_tokens for sample in left)
    return read, written, sum((sample.dollars or Decimal(0) for sample in left), Decimal(0))


def holds(found: Forecast, left: list[Sample]) -> tuple[bool, bool, bool]:
    """Tell whether input, output and dollars lie in their ranges."""
    read, written, dollars = truth(left)
    assert found.dollars
    return (
        found.input.low <= read <= found.input.high,
        found.output.low <= written <= found.output.high,
        found.dollars[0] <= dollars <= found.dollars[1],
    )


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_without_answers_the_range_holds_all_that_a_request_allows(lengths: Lengths) -> None:
    for seed in range(30):
        left = answers(20, seed, lengths)
        assert all(holds(forecast([group_of(left, [])], PRICE), left))


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_with_answers_the_narrow_range_holds_the_truth_as_often_as_it_says(
    lengths: Lengths,
) -> None:
    hits, trials = [0, 0, 0], 100
    for seed in range(trials):
        found = answers(320, seed, lengths)
        wide = forecast([group_of(found[20:], [])], PRICE)
        narrow = forecast([group_of(found[20:], found[:20])], PRICE)
        assert narrow.dollars and wide.dollars
        assert narrow.dollars[1] - narrow.dollars[0] < (wide.dollars[1] - wide.dollars[0]) / 2
        hits = [n + hit for n, hit in zip(hits, holds(narrow, found[20:]), strict=True)]
    assert min(hits) >= 0.88 * trials, hits  # of a nominal 95 %; long tails cost a little


def test_strata_are_summed_by_their_own_means() -> None:
    long, short = answers(60, 1, lambda c: c.randint(190, 210)), answers(600, 2, LENGTHS["short"])
    groups = [group_of(long[10:], long[:10], "a"), group_of(short[10:], short[:10], "b")]
    found = forecast(groups, PRICE)
    assert all(holds(found, long[10:] + short[10:]))
    assert found.output.high - found.output.low < 0.1 * found.output.low
    assert len(found.samples) == 20 and found.count == Span(640, 640)


def test_kinds_with_few_answers_are_joined_and_kinds_with_none_stay_wide() -> None:
    found = answers(100, 3, LENGTHS["even"])
    few = [group_of(found[10 * i + 3 : 10 * i + 10], found[10 * i : 10 * i + 3]) for i in range(3)]
    joined = pooled([*few, group_of(found[90:], [], "none")])
    assert sorted((g.count.low, len(g.samples)) for g in joined) == [(10, 0), (21, 9)]
    both = forecast([*few, group_of(found[90:], [], "none")], PRICE)
    assert both.seconds is None and both.output.high > 10 * CAP
    lone = forecast(few[:1], PRICE)
    assert lone.output == Span(7, 7 * CAP) and not lone.samples
    assert len(pooled([few[0], group_of(found[:1], found[1:4], cap=9)])) == 2  # unlike caps


def test_equal_answers_leave_no_doubt_and_nothing_left_costs_nothing() -> None:
    same = answers(30, 4, lambda chance: 7)
    assert forecast([group_of(same[10:], same[:10])], PRICE).output == Span(140, 140)
    done = forecast([group_of([], same)], PRICE)
    assert (done.input, done.output, done.dollars) == (NOTHING, NOTHING, (0, 0))
    assert interval([], lambda sample: 1.0) == NOTHING


def test_without_a_price_dollars_are_unknown_unless_the_server_states_them() -> None:
    found = answers(30, 5, LENGTHS["even"])
    assert forecast([group_of(found, [])], None).dollars is None
    stated = forecast([group_of(found[10:], found[:10])], None)
    assert all(holds(stated, found[10:]))
    silent = [Sample(s.size, s.usage, None, s.stop, s.waiting, s.seconds) for s in found[:10]]
    assert forecast([group_of(found[10:], silent)], None).dollars is None


def test_an_unknown_count_widens_the_range() -> None:
    known = answers(20, 6, LENGTHS["even"])
    some = Group("q", Span(0, 50), Span(100, 200), CAP, tuple(known))
    found = forecast([some], PRICE)
    assert found.output.low == 0 < 50 < found.output.high and found.count == Span(0, 50)


def test_questions_to_come_are_counted_as_those_that_came() -> None:
    assert more_of([3, 3, 3, 3], 10, 40) == Span(0, 40)  # too few to tell
    assert more_of([3] * 5, 10, 20) == Span(
        30, 30
    )  # a teacher may write more than it was asked for
    found = more_of([1, 2, 3, 2, 1, 3], 100, 400)
    assert 100 < found.low < 200 < found.high < 300

"""Intervals and tests respect clusters; too little data gives a reason in place of a number."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from distill.errors import DistillError, Exit
from distill.evaluation.statistics import (
    FEW_CLUSTERS,
    FEWEST_DOCUMENTS,
    Bounds,
    Certainty,
    Estimate,
    across_seeds,
    conclude,
    estimate_difference,
    estimate_gap_recovered,
    estimate_mean,
    mcnemar,
    non_inferiority,
    paired,
    smallest_visible,
)
from scripts.benchmarks import simulate_statistics

SHARE, SEED = Bounds(0.0, 1.0), Certainty(seed=1)


def test_few_clusters_use_the_t_form_by_hand() -> None:
    found = estimate_mean([1.0, 2.0, 3.0, 6.0], ["a", "b", "c", "d"])
    error = np.std([1, 2, 3, 6], ddof=1) / 2  # one item a cluster: the ordinary standard error
    assert found.method == "analytic" and found.value == 3.0
    assert found.high == pytest.approx(3 + 3.182446 * error, rel=1e-6)


def test_bootstrap_and_analytic_agree_where_both_apply() -> None:
    draw = np.random.default_rng(3)
    values = draw.normal(size=200)
    found = estimate_mean(values, range(200), Certainty(samples=20_000))
    half = 1.972 * values.std(ddof=1) / np.sqrt(200)
    assert found.method == "bootstrap" and found.low is not None and found.high is not None
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.04)


def test_the_same_seed_gives_the_same_interval_and_weights_make_a_weighted_mean() -> None:
    values, clusters = [0.0, 1.0] * 15, list(range(30))
    assert estimate_mean(values, clusters, SEED) == estimate_mean(values, clusters, SEED)
    weighted = estimate_mean([1.0, 3.0, 2.0], "abc", weights=[1.0, 3.0, 0.0])
    assert weighted.value == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("values", "clusters", "reason"),
    [
        ([], "", "0 items"),
        ([1.0], "a", "1 items"),
        ([1.0, 0.0, 1.0], "aaa", "one document"),
        ([1.0, float("nan"), 0.0], "abc", "not a finite number"),
        ([0.5, 0.5, 0.5], "abc", "all values are equal"),
    ],
)
def test_too_little_data_is_a_reason(values: list[float], clusters: str, reason: str) -> None:
    found = estimate_mean(values, clusters)
    assert found.value is None and found.low is None and found.high is None
    assert found.reason is not None and "not enough data" in found.reason and reason in found.reason


@pytest.mark.parametrize("groups", [2, 10, FEW_CLUSTERS, 66])
def test_equal_scores_never_give_an_interval_of_width_zero(groups: int) -> None:
    same = [1.0] * groups
    one = estimate_mean(same, range(groups), bounds=SHARE)
    assert one.high == 1.0 and one.low == pytest.approx(0.025 ** (1 / groups))
    both = estimate_difference(same, same, range(groups), bounds=SHARE)
    assert both.low is not None and both.high is not None and both.low < 0 < both.high


def test_clusters_that_agree_in_their_means_are_no_certainty() -> None:
    found = estimate_mean([0.0, 1.0] * 25, [k // 2 for k in range(50)], bounds=SHARE)
    assert found.value == 0.5 and found.low is not None and found.low < 0.5


def scores(rate: float, count: int = 60) -> list[float]:
    return [1.0] * round(rate * count) + [0.0] * (count - round(rate * count))


def test_gap_recovered_is_the_share_with_its_interval() -> None:
    found = estimate_gap_recovered(scores(0.7), scores(0.9), scores(0.1), range(60), bounds=SHARE)
    assert found.value == pytest.approx(0.75)
    assert (
        found.low is not None and found.high is not None and 0.5 < found.low < 0.75 < found.high < 1
    )


@pytest.mark.parametrize(
    ("student", "teacher", "base", "reason"),
    [
        (0.5, 0.5, 0.5, "do not differ"),
        (0.5, 0.1, 0.9, "below base"),
        (0.5, 0.5, 0.48, "do not differ"),
        (0.9, 0.9, 0.1, "not enough data"),  # equal everywhere: no bound
    ],
)
def test_no_gap_no_share_of_it(student: float, teacher: float, base: float, reason: str) -> None:
    three = (scores(student), scores(teacher), scores(base))
    found = estimate_gap_recovered(*three, range(60), bounds=SHARE)
    assert found.value is None and found.low is None and reason in str(found.reason)


def test_pairing_uses_the_intersection_and_counts_the_rest() -> None:
    student, teacher = np.ones(100), np.ones(100)
    student[96:] = teacher[0] = np.nan
    assert paired(student, teacher, "here").tolist() == [False, *[True] * 95, *[False] * 4]
    student[1] = np.inf
    with pytest.raises(DistillError) as caught:
        paired(student, teacher, "here")
    assert caught.value.code == Exit.EVALUATION and "94 of 100" in str(caught.value)


def test_mcnemar_is_the_binomial_test_of_the_items_that_differ() -> None:
    a = [1.0] * 9 + [0.0] * 2 + [1.0] * 20
    b = [0.0] * 9 + [1.0] * 2 + [1.0] * 20
    found = mcnemar(a, b, range(31))
    assert (found.only_a, found.only_b) == (9, 2)
    assert found.p == pytest.approx(stats.binomtest(9, 11).pvalue)
    assert mcnemar([1.0, 0.0], [1.0, 0.0], "ab").reason == "no item tells the two apart"
    assert mcnemar([0.5, 0.0], [1.0, 0.0], "ab").p is None
    for documents in range(1, 12):  # fewer than the rule asks for could never pass
        p = mcnemar([1.0] * documents, [0.0] * documents, range(documents)).p
        assert p is not None and (p < 0.05) == (documents >= FEWEST_DOCUMENTS)


def test_items_of_one_document_keep_their_signs_together() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 2, (2, 12)).astype(float)
    clusters = [0, 0, 0, 1, 1, 2, 2, 2, 3, 4, 4, 5]
    sums = [sum(x - y for x, y, c in zip(a, b, clusters, strict=True) if c == k) for k in range(6)]
    seen = abs(sum(sums))
    flips = [abs(np.dot(sums, signs)) >= seen for signs in product((-1, 1), repeat=6)]
    assert mcnemar(a, b, clusters).p == pytest.approx(sum(flips) / len(flips))


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.04, 0.2, "not inferior"),
        (-0.2, -0.06, "inferior"),
        (-0.2, 0.2, "undecided"),
        (-0.05, 0.2, "undecided"),
    ],
)
def test_non_inferiority_is_read_off_the_interval(low: float, high: float, verdict: str) -> None:
    assert non_inferiority(Estimate(value=0.0, low=low, high=high, clusters=24), 0.05) == verdict
    assert non_inferiority(Estimate(value=None, reason="not enough data"), 0.05) is None


@pytest.mark.parametrize(
    ("ends", "documents", "p", "verdict", "reason"),
    [
        ((0.1, 0.2), 24, 0.01, "better", ""),
        ((-0.2, -0.1), 24, None, "worse", ""),
        ((-0.1, 0.1), 24, None, "undecided", "includes 0"),
        ((0.0, 0.1), 24, None, "undecided", "includes 0"),
        ((0.1, 0.2), 24, 0.07, "undecided", "does not confirm"),
        ((0.1, 0.2), 5, None, "undecided", "5 documents are too few"),
        ((0.1, 0.2), 1, None, "undecided", "1 document are too few"),
        ((0.1, 0.2), None, None, "better", ""),
        ((None, None), 24, None, "undecided", "nothing varies"),
    ],
)
def test_one_rule_decides(ends, documents, p, verdict, reason) -> None:
    conclusion = conclude(ends[0], ends[1], documents, p, why_no_interval="nothing varies")
    assert conclusion.verdict == verdict and reason in conclusion.reason
    assert bool(conclusion.reason) == (verdict == "undecided")


def test_the_smallest_visible_difference_is_that_of_the_formula() -> None:
    noise = np.random.default_rng(1).normal(size=40)
    size = smallest_visible(noise, np.zeros(40), range(40))
    error = noise.std(ddof=1) / 40**0.5  # one item a cluster: the ordinary standard error
    assert size == pytest.approx((stats.t.ppf(0.975, 39) + stats.t.ppf(0.8, 39)) * error)
    for few in ([1.0], [1.0, 1.0, 1.0]):
        assert smallest_visible(few, [0.0] * len(few), range(len(few))) is None


@pytest.mark.parametrize("design", [simulate_statistics.DESIGNS[i] for i in (1, 2, 4, 6)])
def test_a_short_simulation_is_within_its_bounds(design: simulate_statistics.Design) -> None:
    row = simulate_statistics.simulate(design, 200, samples=500)
    assert simulate_statistics.passed(row), row


def test_the_simulation_would_find_intervals_that_ignore_documents(monkeypatch):
    real = simulate_statistics.estimate_difference
    monkeypatch.setattr(
        simulate_statistics,
        "estimate_difference",
        lambda a, b, clusters, *rest: real(a, b, range(len(a)), *rest),
    )
    row = simulate_statistics.simulate(simulate_statistics.DESIGNS[6], 200, samples=500)
    assert not simulate_statistics.passed(row), row


def test_several_seeds_cover_and_one_says_nothing() -> None:
    one = np.arange(80.0)[None]
    assert "one seed" in (across_seeds(one, one, range(80)).reason or "")
    assert simulate_statistics.passed(simulate_statistics.simulate_seeds(300, 3))

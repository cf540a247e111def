"""Intervals cover, respect clusters, and give a reason in place of a number for too little data."""

import numpy as np
import pytest

from distill.errors import DistillError, Exit
from distill.evaluation.statistics import (
    FEW_CLUSTERS,
    Bounds,
    Certainty,
    estimate_difference,
    estimate_gap_recovered,
    estimate_mean,
    paired,
)

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

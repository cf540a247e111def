"""Tests of differences: exact against a binomial by hand, honest about clusters and seeds."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from distill.evaluation.statistics import (
    FEWEST_DOCUMENTS,
    Estimate,
    across_seeds,
    conclude,
    mcnemar,
    non_inferiority,
    smallest_visible,
)
from scripts.benchmarks import simulate_statistics


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
def test_one_rule_decides(
    ends: tuple[float | None, float | None],
    documents: int | None,
    p: float | None,
    verdict: str,
    reason: str,
) -> None:
    conclusion = conclude(*ends, documents, p, why_no_interval="nothing varies")
    assert conclusion.verdict == verdict and reason in conclusion.reason
    assert bool(conclusion.reason) == (verdict == "undecided")


def test_the_smallest_visible_difference_is_that_of_the_formula() -> None:
    noise = np.random.default_rng(1).normal(size=40)
    size = smallest_visible(noise, np.zeros(40), range(40))
    error = noise.std(ddof=1) / 40**0.5  # one item a cluster: the ordinary standard error
    assert size == pytest.approx((stats.t.ppf(0.975, 39) + stats.t.ppf(0.8, 39)) * error)
    for few in ([1.0], [1.0, 1.0, 1.0]):
        assert smallest_visible(few, [0.0] * len(few), range(len(few))) is None


def test_seeds_widen_the_interval_and_one_seed_says_nothing() -> None:
    draw = np.random.default_rng(2)
    item = draw.normal(size=80)
    a = item + draw.normal(size=(3, 80)) * 0.1
    lucky = a + np.array([[0.5], [0.0], [-0.5]])
    calm, wide = across_seeds(a, a[:1] * 0, range(80)), across_seeds(lucky, a[:1] * 0, range(80))
    assert calm.low is not None and wide.low is not None and wide.low < calm.low - 0.3
    assert "one seed" in (across_seeds(a[:1], a[:1], range(80)).reason or "")


@pytest.mark.parametrize("design", [simulate_statistics.DESIGNS[i] for i in (1, 2, 4, 6)])
def test_a_short_simulation_is_within_its_bounds(design: simulate_statistics.Design) -> None:
    row = simulate_statistics.simulate(design, 200, samples=500)
    assert simulate_statistics.passed(row), row


def test_the_simulation_would_find_intervals_that_ignore_documents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = simulate_statistics.estimate_difference
    monkeypatch.setattr(
        simulate_statistics,
        "estimate_difference",
        lambda a, b, clusters, *rest: real(a, b, range(len(a)), *rest),
    )
    row = simulate_statistics.simulate(simulate_statistics.DESIGNS[6], 200, samples=500)
    assert not simulate_statistics.passed(row), row


def test_several_seeds_cover() -> None:
    assert simulate_statistics.passed(simulate_statistics.simulate_seeds(300, 3))

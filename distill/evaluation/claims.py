"""What a paired difference allows to claim: better, worse or undecided, by one rule for all texts.

`conclude` is that rule. Beside it stand an exact test for yes/no scores, non-inferiority, and the
smallest difference that so many items could show. N items, G clusters (documents), S seeds.
"""

from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from distill.evaluation.statistics import (
    USUAL,
    Certainty,
    Clusters,
    Estimate,
    Floats,
    Values,
    by_cluster,
)
from distill.records import Record

POWER = 0.8  # the usual one: how often a difference of the stated size would have been seen
ALPHA = 0.05  # of the exact test beside an interval: a few items that differ can fool the interval
FEWEST_DOCUMENTS = 6  # if all of G pointed one way, p = 2 / 2^G: below ALPHA from 6 on
Noninferiority = Literal["not inferior", "inferior", "undecided"]


class Conclusion(NamedTuple):
    """What a difference allows to claim, and why where it is undecided."""

    verdict: Literal["better", "worse", "undecided"]
    reason: str = ""


def conclude(
    low: float | None,
    high: float | None,
    documents: int | None = None,
    p: float | None = None,
    items: int | None = None,
    why_no_interval: str | None = None,
) -> Conclusion:
    """Decide a difference: no 0 in the interval, enough documents, an exact test (`p`) that agrees.

    An interval of few documents rests on a handful of numbers, whatever the scores. `documents` and
    `p` are None where they are unknown (old scorecards) or do not apply (scores that are graded).
    """
    if low is None or high is None:
        return Conclusion("undecided", why_no_interval or "there is no interval")
    if documents is not None and documents < FEWEST_DOCUMENTS:
        of = f"{items} items of " if items else ""
        plural = "s" * (documents != 1)
        return Conclusion("undecided", f"{of}{documents} document{plural} are too few")
    if low <= 0 <= high:
        return Conclusion("undecided", "the interval includes 0")
    if p is not None and p >= ALPHA:
        why = f"the exact test does not confirm the interval (p = {p:.2g})"
        return Conclusion("undecided", why)
    return Conclusion("better" if low > 0 else "worse")


class Discordant(Record):
    """McNemar's test: items that only a or only b passes, and the p of so uneven a split."""

    only_a: int
    only_b: int
    p: float | None = None
    reason: str | None = None


def mcnemar(a: Values, b: Values, clusters: Clusters) -> Discordant:
    """Test whether two models pass equally often, from yes/no scores of the same items; exact.

    With one item a cluster this is McNemar's two-sided binomial test (Psychometrika 12:153, 1947).
    Items of one cluster keep their signs together: of all 2^G ways to swap the two models in
    complete clusters, p is the share that is at least as uneven as what was observed.
    """
    if not np.isin(np.concatenate([a, b]), (0, 1)).all():
        return Discordant(only_a=0, only_b=0, p=None, reason="the scores are not yes or no")
    difference_N = np.subtract(a, b, dtype=np.float64)
    only_a, only_b = int((difference_N > 0).sum()), int((difference_N < 0).sum())
    if not only_a + only_b:
        return Discordant(only_a=0, only_b=0, p=None, reason="no item tells the two apart")
    chance = np.ones(1)  # of each sum of the sizes so far with random signs, from -total to total
    for size in np.abs(by_cluster(difference_N, clusters).sums_G).astype(int):
        if size:
            wider = np.zeros(len(chance) + 2 * size)
            wider[: len(chance)] += chance / 2
            wider[2 * size :] += chance / 2
            chance = wider
    sums = np.arange(len(chance)) - len(chance) // 2
    p = min(1.0, float(chance[np.abs(sums) >= abs(only_a - only_b)].sum()))
    return Discordant(only_a=only_a, only_b=only_b, p=p, reason=None)


def non_inferiority(difference: Estimate, margin: float) -> Noninferiority | None:
    """Say whether a - b is surely above -`margin`, surely below it, or neither.

    None without an interval. The lower end of a two-sided 95 % interval is a one-sided test at
    2.5 % (Piaggio et al. 2012, JAMA 308:2594). The margin is chosen before the data are seen.
    """
    if difference.low is None or difference.high is None:
        return None
    if difference.clusters < FEWEST_DOCUMENTS:
        return "undecided"
    if difference.low > -margin:
        return "not inferior"
    return "inferior" if difference.high < -margin else "undecided"


def smallest_visible(
    a: Values, b: Values, clusters: Clusters, certainty: Certainty = USUAL
) -> float | None:
    """Return the smallest true difference that items like these, and so many, show with POWER.

    That is (t of the confidence + t of the power) x the cluster-robust standard error (Bloom 1995,
    Evaluation Review 19:547). None where the data are too few or do not vary.
    """
    data = by_cluster(np.subtract(a, b), clusters)
    if data.shortage or data.error <= 1e-12:
        return None
    quantiles = stats.t.ppf([(1 + certainty.confidence) / 2, POWER], len(data.sizes_G) - 1)
    return float(quantiles.sum()) * data.error


def across_seeds(
    a_SN: Floats, b_SN: Floats, clusters: Clusters, certainty: Certainty = USUAL
) -> Estimate:
    """Estimate a - b where one or both were trained with several seeds: (S, N) scores, same items.

    The variance is that of the items (over clusters, of the seeds' mean) plus that of each side's
    seeds. Seeds vary the items' scores a little as well, so the sum is an upper bound (Owen 2007,
    Annals of Applied Statistics 1:386). The t quantile has Satterthwaite's degrees of freedom.
    """
    data = by_cluster(a_SN.mean(axis=0) - b_SN.mean(axis=0), clusters)
    if data.shortage:
        return data.unknown(data.shortage)
    if max(len(a_SN), len(b_SN)) < 2:
        return data.unknown("one seed a side: nothing is known of the others")
    groups = len(data.sizes_G)
    sides = [side_SN.mean(axis=1) for side_SN in (a_SN, b_SN) if len(side_SN) > 1]
    parts = [(data.error**2, groups - 1)]
    parts += [(float(mean_S.var(ddof=1)) / len(mean_S), len(mean_S) - 1) for mean_S in sides]
    variance = sum(part for part, _ in parts)
    if variance <= 1e-24:
        return data.unknown("not enough data: nothing varies")
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    half = float(stats.t.ppf((1 + certainty.confidence) / 2, freedom)) * variance**0.5
    ends = {"low": data.mean - half, "high": data.mean + half}
    method = f"{len(a_SN)} and {len(b_SN)} seeds, analytic"
    return Estimate(value=data.mean, **ends, n=data.n, clusters=groups, method=method)

"""How sure a number is, and what a difference allows to claim: intervals that respect clusters.

Items of one document are not independent, so complete clusters are resampled. Too little data gives
a reason and no number; no interval has width zero; `conclude` is the one rule of all claims.
N items, G clusters (documents), B bootstrap samples, S seeds.
"""

from collections.abc import Hashable, Iterable, Sequence
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from distill.errors import DistillError, Exit
from distill.records import Record

Floats = NDArray[np.float64]
FEW_CLUSTERS = 20  # below this a bootstrap of clusters is too coarse, and the analytic form is used
MIN_PAIRED = 0.95  # a comparison on fewer of the items is refused
CHUNK = 4_000_000  # resampled counts held in memory at once
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


class Estimate(Record):
    """A number with its interval, or None with the reason; a bound has no interval."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    clusters: int = 0
    method: str | None = None
    reason: str | None = None

    @property
    def ends(self) -> tuple[float | None, float | None]:
        """Return the interval."""
        return self.low, self.high

    @classmethod
    def unknown(cls, reason: str | None) -> "Estimate":
        """Return a number that is unknown for a reason; its JSON has the null."""
        return cls(value=None, low=None, high=None, reason=reason)

    def excludes(self, point: float) -> bool:
        """Say whether the interval is there and does not hold `point`."""
        return self.low is not None and self.high is not None and not self.low <= point <= self.high

    def scaled(self, factor: float, plus: float = 0.0) -> "Estimate":
        """Return factor x this + plus; a negative factor turns the interval round."""
        ends = self.ends[::-1] if factor < 0 else self.ends
        value, low, high = (None if x is None else x * factor + plus for x in (self.value, *ends))
        return self.model_copy(update={"value": value, "low": low, "high": high})

    def conclude(self, documents: int | None = None) -> Conclusion:
        """Decide whether it is above 0 ("better"), by the rule of all claims."""
        return conclude(*self.ends, documents=documents, why_no_interval=self.reason)


class Bounds(NamedTuple):
    """The smallest and the largest value that one item can have."""

    low: float
    high: float


class Certainty(NamedTuple):
    """How intervals are made: confidence, bootstrap samples, seed; margin of non-inferiority."""

    confidence: float = 0.95
    samples: int = 10_000
    seed: int = 0
    margin: float = 0.05


USUAL = Certainty()
Values = Sequence[float] | Floats
Clusters = Sequence[Hashable] | NDArray[np.object_]


class Clustered(NamedTuple):
    """N values summed by cluster, their mean, and its cluster-robust standard error."""

    sums_G: Floats
    sizes_G: Floats  # summed weights
    n: int
    mean: float
    error: float
    shortage: str | None  # why there is not enough data for an interval

    def unknown(self, reason: str) -> Estimate:
        """Return the estimate of a number that is not known."""
        return Estimate(value=None, n=self.n, clusters=len(self.sizes_G), reason=reason)


def by_cluster(values: Values, clusters: Clusters, weights: Values | None = None) -> Clustered:
    """Sum values, each times its weight, by cluster, in the order in which clusters appear."""
    values_N = np.asarray(values, dtype=np.float64)
    weight_N = np.ones(len(values_N)) if weights is None else np.asarray(weights, dtype=np.float64)
    index: dict[Hashable, int] = {}
    member_N = np.array([index.setdefault(c, len(index)) for c in clusters], dtype=np.int64)
    groups, mean, error, shortage = len(index), np.nan, np.nan, None
    sums_G = np.bincount(member_N, values_N * weight_N, groups).astype(np.float64)
    sizes_G = np.bincount(member_N, weight_N, groups).astype(np.float64)
    if not np.isfinite(values_N).all():
        shortage = "not enough data: a value is not a finite number"
    elif len(values_N) < 2:
        shortage = f"not enough data: {len(values_N)} items"
    elif groups < 2:
        shortage = "not enough data: all items are of one document"
    else:
        mean = float(sums_G.sum() / sizes_G.sum())
        squares = np.square(sums_G - mean * sizes_G).sum()
        error = float(np.sqrt(groups / (groups - 1) * squares) / sizes_G.sum())
    return Clustered(sums_G, sizes_G, len(values_N), mean, error, shortage)


def estimate_mean(
    values: Values,
    clusters: Clusters,
    certainty: Certainty = USUAL,
    bounds: Bounds | None = None,
    weights: Values | None = None,
) -> Estimate:
    """Estimate the mean of clustered values, or with `weights` (tokens, say) their weighted mean.

    With 20 clusters or more: the expanded percentile bootstrap of clusters (Hesterberg 2015, The
    American Statistician 69:371), which widens percentiles for the bootstrap's narrowness in small
    samples. With fewer: the cluster-robust variance with a t quantile of G - 1 degrees (Cameron and
    Miller 2015, Journal of Human Resources 50:317). Where all G clusters agree, at most
    p = 1 - (alpha / 2)^(1/G) of all differ, with any value within the bounds (Clopper and Pearson
    1934, Biometrika 26:404; about 3.7 / G, the "rule of three").
    """
    data = by_cluster(values, clusters, weights)
    if data.shortage:
        return data.unknown(data.shortage)
    groups, mean, confidence = len(data.sizes_G), data.mean, certainty.confidence
    if data.error <= 1e-12 * max(1.0, abs(mean)):
        if bounds is None:
            return data.unknown("not enough data: all values are equal")
        share = 1 - ((1 - confidence) / 2) ** (1 / groups)
        low, high = mean - share * (mean - bounds.low), mean + share * (bounds.high - mean)
        method = "no variation: rule of three"
    elif groups < FEW_CLUSTERS:
        half = stats.t.ppf((1 + confidence) / 2, groups - 1) * data.error
        low, high, method = mean - half, mean + half, "analytic"
    else:
        means_B = _resampled_means(data.sums_G, data.sizes_G, certainty)
        low, high = np.quantile(means_B, _expanded(confidence, groups))
        method = "bootstrap"
    low, high = float(low), float(high)
    if bounds:
        low, high = max(low, bounds.low), min(high, bounds.high)
    return Estimate(value=mean, low=low, high=high, n=data.n, clusters=groups, method=method)


def estimate_difference(
    a: Values,
    b: Values,
    clusters: Clusters,
    certainty: Certainty = USUAL,
    bounds: Bounds | None = None,
    weights: Values | None = None,
) -> Estimate:
    """Estimate the mean of a - b on the same items; `bounds` are those of one score."""
    spread = Bounds(bounds.low - bounds.high, bounds.high - bounds.low) if bounds else None
    return estimate_mean(np.subtract(a, b, dtype=np.float64), clusters, certainty, spread, weights)


def estimate_gap_recovered(
    student: Values,
    teacher: Values,
    base: Values,
    clusters: Clusters,
    certainty: Certainty = USUAL,
    bounds: Bounds | None = None,
) -> Estimate:
    """Estimate (student - base) / (teacher - base), where the teacher is surely above base.

    The interval is the expanded percentile bootstrap of clusters, both parts resampled together.
    """
    gap = estimate_difference(teacher, base, clusters, certainty, bounds)
    if gap.value is None:
        return gap
    gain, full = (by_cluster(np.subtract(x, base), clusters) for x in (student, teacher))
    if not gap.excludes(0):
        return full.unknown("teacher and base do not differ beyond their interval")
    if gap.value < 0:
        return full.unknown("the teacher is below base")
    gain_B, full_B = _resampled_means(np.stack([gain.sums_G, full.sums_G]), full.sizes_G, certainty)
    ratio_B = np.where(gain_B < 0, -np.inf, np.inf)  # where a sample has no gap
    np.divide(gain_B, full_B, out=ratio_B, where=full_B > 0)
    percentiles = _expanded(certainty.confidence, gap.clusters)
    low, high = np.sort(ratio_B)[[round(p * (len(ratio_B) - 1)) for p in percentiles]]
    if not np.isfinite([low, high]).all() or high - low <= 1e-12:
        return full.unknown("not enough data to bound the share of the gap")
    update = {"value": gain.mean / full.mean, "low": float(low), "high": float(high)}
    return gap.model_copy(update={**update, "method": "bootstrap"})


def mean_or_none(values: Iterable[float]) -> float | None:
    """Return the mean of values; None where there are none."""
    numbers = list(values)
    return fmean(numbers) if numbers else None


def paired(a_N: Floats, b_N: Floats, where: str) -> NDArray[np.bool_]:
    """Return where two models both have a score, (N,); a missing one is NaN.

    Raises DistillError (exit 8) where these are fewer than 95 % of the items.
    """
    both_N = np.isfinite(a_N) & np.isfinite(b_N)
    if both_N.sum() < MIN_PAIRED * len(both_N):
        what = f"only {both_N.sum()} of {len(both_N)} items have both scores"
        fix = "scores/*.jsonl says why; answer the missing items"
        raise DistillError(Exit.EVALUATION, where, what, fix)
    return both_N


def _resampled_means(sums_KG: Floats, sizes_G: Floats, certainty: Certainty) -> Floats:
    """Return the means of B bootstrap samples of G clusters with replacement, (K, B) or (B,)."""
    groups, samples = len(sizes_G), certainty.samples
    generator = np.random.default_rng(certainty.seed)
    share_G, step = np.full(groups, 1 / groups), max(1, CHUNK // groups)
    parts = []
    for start in range(0, samples, step):
        counts_GB = generator.multinomial(groups, share_G, size=min(step, samples - start)).T
        parts.append(sums_KG @ counts_GB / (sizes_G @ counts_GB))
    return np.concatenate(parts, axis=-1)


def _expanded(confidence: float, groups: int) -> tuple[float, float]:
    """Return the two percentiles of the expanded percentile interval (Hesterberg 2015)."""
    quantile = stats.t.ppf((1 + confidence) / 2, groups - 1)
    tail = float(stats.norm.cdf(-np.sqrt(groups / (groups - 1)) * quantile))
    return tail, 1 - tail


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

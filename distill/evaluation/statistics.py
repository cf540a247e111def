"""How sure a number is: means, paired differences and the gap recovered, with clustered intervals.

Items of one document are not independent, so complete clusters are resampled. Too little data gives
a reason and no number; no interval has width zero. N items, G clusters, B bootstrap samples.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from distill.errors import DistillError, Exit
from distill.records import Record

Floats = NDArray[np.float64]
FEW_CLUSTERS = 20  # below this a bootstrap of clusters is too coarse, and the analytic form is used
MIN_PAIRED = 0.95  # a comparison on fewer of the items is refused
CHUNK = 4_000_000  # resampled counts held in memory at once


class Estimate(Record):
    """A number with its interval, or None with the reason."""

    value: float | None
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

    def excludes(self, point: float) -> bool:
        """Say whether the interval is there and does not hold `point`."""
        return self.low is not None and self.high is not None and not self.low <= point <= self.high


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

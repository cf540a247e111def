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


class Paired(NamedTuple):
    """Two models' scores on the items that both have a score for."""

    items: list[str]
    a_N: Floats
    b_N: Floats


def estimate_mean(
    values: Sequence[float] | Floats,
    clusters: Sequence[Hashable],
    certainty: Certainty = USUAL,
    bounds: Bounds | None = None,
    weights: Sequence[float] | None = None,
) -> Estimate:
    """Estimate the mean of clustered values, or with `weights` (tokens, say) their weighted mean.

    With 20 clusters or more: the expanded percentile bootstrap of clusters (Hesterberg 2015, The
    American Statistician 69:371), which widens percentiles for the bootstrap's narrowness in small
    samples. With fewer: the cluster-robust variance with a t quantile of G - 1 degrees (Cameron and
    Miller 2015, Journal of Human Resources 50:317). If no cluster varies: see `_no_variation`.
    """
    values_N = np.asarray(values, dtype=np.float64)
    sums_G1, sizes_G = by_cluster(values_N[:, None], clusters, weights)
    n, groups = len(values_N), len(sizes_G)
    reason = shortage(values_N, groups)
    if reason:
        return Estimate(value=None, n=n, clusters=groups, reason=reason)
    mean = float(sums_G1.sum() / sizes_G.sum())
    error = cluster_error(sums_G1[:, 0] - mean * sizes_G, sizes_G.sum())
    if error <= 1e-12 * max(1.0, abs(mean)):
        return _no_variation(mean, n, groups, certainty.confidence, bounds)
    if groups < FEW_CLUSTERS:
        half = float(stats.t.ppf((1 + certainty.confidence) / 2, groups - 1)) * error
        low, high, method = mean - half, mean + half, "analytic"
    else:
        means_B = _resampled_means(sums_G1, sizes_G, certainty)[:, 0]
        low, high = np.quantile(means_B, _expanded(certainty.confidence, groups))
        method = "bootstrap"
    low, high = float(low), float(high)
    if bounds:
        low, high = max(low, bounds.low), min(high, bounds.high)
    return Estimate(value=mean, low=low, high=high, n=n, clusters=groups, method=method)


def estimate_difference(
    a: Sequence[float] | Floats,
    b: Sequence[float] | Floats,
    clusters: Sequence[Hashable],
    certainty: Certainty = USUAL,
    bounds: Bounds | None = None,
    weights: Sequence[float] | None = None,
) -> Estimate:
    """Estimate the mean of a - b on the same items; `bounds` are those of one score."""
    spread = Bounds(bounds.low - bounds.high, bounds.high - bounds.low) if bounds else None
    difference_N = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return estimate_mean(difference_N, clusters, certainty, spread, weights)


def estimate_gap_recovered(
    student: Sequence[float] | Floats,
    teacher: Sequence[float] | Floats,
    base: Sequence[float] | Floats,
    clusters: Sequence[Hashable],
    certainty: Certainty = USUAL,
    bounds: Bounds | None = None,
) -> Estimate:
    """Estimate (student - base) / (teacher - base), where the teacher is surely above base.

    The interval is the expanded percentile bootstrap of clusters, both parts resampled together.
    """
    student_N, teacher_N, base_N = (
        np.asarray(x, dtype=np.float64) for x in (student, teacher, base)
    )
    gap = estimate_difference(teacher_N, base_N, clusters, certainty, bounds)
    if gap.value is None:
        return gap
    unknown = Estimate(value=None, n=gap.n, clusters=gap.clusters)
    if not gap.excludes(0):
        reason = "teacher and base do not differ beyond their interval"
        return unknown.model_copy(update={"reason": reason})
    if gap.value < 0:
        return unknown.model_copy(update={"reason": "the teacher is below base"})
    parts_N2 = np.stack([student_N - base_N, teacher_N - base_N], axis=1)
    means_B2 = _resampled_means(*by_cluster(parts_N2, clusters), certainty)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio_B = means_B2[:, 0] / means_B2[:, 1]
    limit_B = np.where(means_B2[:, 0] < 0, -np.inf, np.inf)  # where a sample has no gap
    ratio_B = np.where(means_B2[:, 1] > 0, ratio_B, limit_B)
    percentiles = _expanded(certainty.confidence, gap.clusters)
    low, high = np.sort(ratio_B)[[round(p * (len(ratio_B) - 1)) for p in percentiles]]
    if not np.isfinite([low, high]).all() or high - low <= 1e-12:
        reason = "not enough data to bound the share of the gap"
        return unknown.model_copy(update={"reason": reason})
    ratio = float(parts_N2[:, 0].mean() / parts_N2[:, 1].mean())
    update = {"value": ratio, "low": float(low), "high": float(high), "method": "bootstrap"}
    return gap.model_copy(update=update)


def pair(a_N: Floats, b_N: Floats, items: Sequence[str], where: str) -> Paired:
    """Pair two models' scores of `items` where both are finite; a missing one is NaN.

    Raises DistillError (exit 8) where these are fewer than 95 % of the items.
    """
    both_N = np.isfinite(a_N) & np.isfinite(b_N)
    ids = [i for i, both in zip(items, both_N, strict=True) if both]
    if len(ids) < MIN_PAIRED * len(items):
        what = f"only {len(ids)} of {len(items)} items have both scores"
        fix = "scores/*.jsonl says why; answer the missing items"
        raise DistillError(Exit.EVALUATION, where, what, fix)
    return Paired(ids, a_N[both_N], b_N[both_N])


def shortage(values_N: Floats, groups: int) -> str | None:
    """Say why there is not enough data for an interval, or None."""
    if not np.isfinite(values_N).all():
        return "not enough data: a value is not a finite number"
    if len(values_N) < 2:
        return f"not enough data: {len(values_N)} items"
    return "not enough data: all items are of one document" if groups < 2 else None


def by_cluster(
    values_NK: Floats, clusters: Sequence[Hashable], weights: Sequence[float] | None = None
) -> tuple[Floats, Floats]:
    """Return the values' weighted sums by cluster, (G, K), and the clusters' weights, (G,)."""
    weight_N = np.ones(len(values_NK)) if weights is None else np.asarray(weights, dtype=np.float64)
    index: dict[Hashable, int] = {}
    member_N = np.array([index.setdefault(c, len(index)) for c in clusters], dtype=np.int64)
    sums_GK = np.zeros((len(index), values_NK.shape[1]))
    np.add.at(sums_GK, member_N, values_NK * weight_N[:, None])
    weight_G = np.zeros(len(index))
    np.add.at(weight_G, member_N, weight_N)
    return sums_GK, weight_G


def cluster_error(residual_G: Floats, weight: float) -> float:
    """Return the cluster-robust standard error of a mean from the clusters' summed residuals."""
    groups = len(residual_G)
    return float(np.sqrt(groups / (groups - 1) * np.square(residual_G).sum()) / weight)


def _resampled_means(sums_GK: Floats, sizes_G: Floats, certainty: Certainty) -> Floats:
    """Return the means of B bootstrap samples of G clusters with replacement, (B, K)."""
    groups, samples = len(sizes_G), certainty.samples
    generator = np.random.default_rng(certainty.seed)
    share_G, step = np.full(groups, 1 / groups), max(1, CHUNK // groups)
    parts = []
    for start in range(0, samples, step):
        counts_BG = generator.multinomial(groups, share_G, size=min(step, samples - start))
        parts.append(counts_BG @ sums_GK / (counts_BG @ sizes_G)[:, None])
    return np.concatenate(parts)


def _expanded(confidence: float, groups: int) -> tuple[float, float]:
    """Return the two percentiles of the expanded percentile interval (Hesterberg 2015)."""
    quantile = stats.t.ppf((1 + confidence) / 2, groups - 1)
    tail = float(stats.norm.cdf(-np.sqrt(groups / (groups - 1)) * quantile))
    return tail, 1 - tail


def _no_variation(
    value: float, n: int, groups: int, confidence: float, bounds: Bounds | None
) -> Estimate:
    """Bound the mean where all clusters agree, by how many unlike them may have been missed.

    None of G clusters differs, so at most p = 1 - (alpha / 2)^(1/G) of all do (Clopper and Pearson
    1934, Biometrika 26:404; about 3.7 / G, the "rule of three"), with any value within the bounds.
    """
    if bounds is None:
        reason = "not enough data: all values are equal"
        return Estimate(value=None, n=n, clusters=groups, reason=reason)
    share = 1 - ((1 - confidence) / 2) ** (1 / groups)
    low = value - share * (value - bounds.low)
    high = value + share * (bounds.high - value)
    return Estimate(
        value=value, low=low, high=high, n=n, clusters=groups, method="no variation: rule of three"
    )

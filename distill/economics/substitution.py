"""The substitution share: how many of the held-out requests the student can take, because its answer is acceptable.

Plain, by requests; and weighted by what each costs at the teacher's price, for long answers cost more and fail more. With
its interval, clustered by document. Null without a test, and where too many answers could not be tested.
"""

from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple

from distill.economics.costs import Tariff
from distill.evaluation.scorecard import Amount
from distill.evaluation.scorers import HeldOutRequest
from distill.evaluation.statistics import MIN_PAIRED, Bounds, Certainty, Estimate, estimate_mean
from distill.records import Usage

SHARE = Bounds(0.0, 1.0)
NO_TEST = "no task has a checker, and no judge that passed its probe stands in"


def amount_of(estimate: Estimate) -> Amount:
    """Return an estimate as an amount."""
    bounds = (estimate.value, *estimate.ends)
    value, low, high = (None if b is None else Decimal(repr(b)) for b in bounds)
    return Amount(value=value, low=low, high=high, reason=estimate.reason)


def unknown(reason: str) -> Amount:
    """Return an amount that is not known."""
    return Amount(value=None, low=None, high=None, reason=reason)


class Shares(NamedTuple):
    """The share of requests that the student can take: plain, weighted by price, and with failures of ours against it."""

    plain: Amount
    of_price: Amount
    if_unscored_fail: Amount | None = None


def shares_of(requests: Sequence[HeldOutRequest], teacher: Tariff, certainty: Certainty) -> Shares:
    """Estimate the substitution share over requests that a test covers; null without a test or with too few verdicts."""
    scored = [asked for asked in requests if asked.accepted is not None]
    if not any(asked.test for asked in requests):
        return Shares(unknown(NO_TEST), unknown(NO_TEST))
    if len(scored) < MIN_PAIRED * len(requests):
        why = unknown(f"only {len(scored)} of {len(requests)} answers could be tested")
        return Shares(why, why)
    prices = [teacher.of(asked.usage.get("teacher", Usage())) for asked in scored]
    known = [price for price in prices if price is not None]
    plain, whole = _share(scored, certainty), len(known) == len(scored) and sum(known) > 0
    against = _share(requests, certainty) if len(scored) < len(requests) else None
    return Shares(plain, _share(scored, certainty, known) if whole else plain, against)


def _share(
    requests: Sequence[HeldOutRequest],
    certainty: Certainty,
    weights: Sequence[Decimal] | None = None,
) -> Amount:
    """Estimate the share that is accepted, of the requests or of their weights; its value is exact."""
    accepted = [asked.accepted is True for asked in requests]
    clusters = [asked.cluster for asked in requests]
    of = weights or [Decimal(1)] * len(requests)
    found = estimate_mean(
        [float(a) for a in accepted], clusters, certainty, SHARE, [float(weight) for weight in of]
    )
    if found.value is None:
        return amount_of(found)
    part = sum((weight for weight, a in zip(of, accepted, strict=True) if a), Decimal(0))
    return amount_of(found).model_copy(update={"value": part / sum(of)})

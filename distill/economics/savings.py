"""What the people who ask would save: three ways to use the student, and when it has paid off.

All is per 1,000 requests like the held-out ones, of which the teacher costs T and the student S.
The share p of acceptable answers is weighted by price: long answers cost more and fail more. Its
interval is carried through; break-even is null where it, or the savings, reach 0.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.economics.costs import NO_TIME, THOUSAND, Tariff, percent
from distill.evaluation.measurements import Difference
from distill.evaluation.scorecard import (
    WAYS,
    Amount,
    BreakEven,
    Economics,
    Rent,
    Saving,
    StudentPrice,
    TeacherPrice,
    Way,
)
from distill.evaluation.scorers import SHARE, HeldOutRequest
from distill.evaluation.statistics import MIN_PAIRED, Bounds, Certainty, Estimate, estimate_mean
from distill.records import Usage
from distill.responders.prices import MachinePrice

MONTH_DAYS, DAY_SECONDS = 30, 86_400
LOW_USE, ONE = Decimal("0.25"), Decimal(1)
NEEDS_ANSWER = "the test compares with an answer that is not there when a new request is served"
NO_TEST = "no task has a checker, and no judge that passed its probe stands in"


class Assumptions(NamedTuple):
    """What savings are computed with: tariffs, the distillation's cost, requests of a month."""

    teacher: Tariff
    student: Tariff
    distillation: Decimal | None
    why_no_distillation: str
    requests_per_month: int


class Change(NamedTuple):
    """What is other than measured: prices and volume by a factor, or the share at its low end."""

    case: str
    teacher: Decimal = ONE
    student: Decimal = ONE
    volume: int = 1
    lowest: bool = False


AS_MEASURED = Change("as measured")


def economics(
    requests: Sequence[HeldOutRequest],
    assumed: Assumptions,
    certainty: Certainty,
    compared_with: TeacherPrice,
    quality: Difference,
) -> Economics:
    """Compute everything from the held-out requests; whose price it is (`compared_with`) and the
    student's difference to this run's teacher (`quality`) are shown beside the amounts."""
    covered = [request for request in requests if request.test] or list(requests)
    scored = [request for request in covered if request.accepted is not None]
    plain, part, if_unscored_fail = shares_of(covered, scored, assumed.teacher, certainty)
    priced = PricedRequests.of(covered, part, assumed, certainty)
    tests = tuple(dict.fromkeys(request.test for request in covered if request.test))
    when_served = bool(tests) and all(request.when_served for request in covered)
    headline: Way = "try_then_escalate" if when_served else "replace_all"
    saved = {way: priced.saved(way) for way in WAYS}
    if tests and not when_served:
        saved["try_then_escalate"] = unknown(NEEDS_ANSWER)
    dollars, student_dollars = priced.means()
    facts = {"price": assumed.teacher.described(), "hosted": assumed.teacher.hosted}
    missing = {"distillation_dollars": assumed.why_no_distillation}
    return Economics(
        requests=len(covered),
        of=len(requests),
        documents=len({request.cluster for request in covered}),
        teacher=compared_with.model_copy(update={"dollars_per_1k": dollars, **facts}),
        student=StudentPrice(
            dollars_per_1k=student_dollars,
            price=assumed.student.described(),
            utilisation=assumed.student.utilisation,
            month_of_machines=priced.month_of_machines(),
        ),
        tests=tests,
        when_served=when_served,
        unscored=len(covered) - len(scored) if tests else 0,
        share=plain,
        share_of_price=part,
        share_if_unscored_fail=if_unscored_fail,
        quality=quality,
        distillation_dollars=assumed.distillation,
        requests_per_month=assumed.requests_per_month,
        headline=headline,
        rows=tuple(priced.saving(saved[way], way=way) for way in WAYS),
        sensitivity=tuple(priced.case(headline, change) for change in priced.changes(headline)),
        reasons=missing if assumed.distillation is None else {},
    )


@dataclass(frozen=True)
class PricedRequests:
    """N requests with the dollars of 1,000 of each, or `why` they are unknown, and assumptions."""

    part: Amount  # of the teacher's cost, on requests that the student can take
    assumed: Assumptions
    certainty: Certainty
    teacher_N: NDArray[np.object_]
    student_N: NDArray[np.object_]
    clusters: tuple[str, ...]
    why: str

    @classmethod
    def of(
        cls,
        requests: Sequence[HeldOutRequest],
        part: Amount,
        assumed: Assumptions,
        certainty: Certainty,
    ) -> "PricedRequests":
        """Price the requests that both models answered."""
        both = [r for r in requests if {"teacher", "student"} <= r.usage.keys()]
        sides, reasons = [], []
        for model, tariff in (("teacher", assumed.teacher), ("student", assumed.student)):
            dollars = [tariff.of(request.usage[model]) for request in both]
            sides.append(np.array([each and each * THOUSAND for each in dollars], dtype=object))
            if not both or None in dollars:
                reasons.append(tariff.why if tariff.price is None else f"{model}: {NO_TIME}")
        clusters = tuple(request.cluster for request in both)
        (teacher_N, student_N), why = sides, "".join(reasons[:1])
        return cls(part, assumed, certainty, teacher_N, student_N, clusters, why)

    def means(self, change: Change = AS_MEASURED) -> tuple[Decimal, Decimal] | tuple[None, None]:
        """Return what 1,000 requests cost the teacher and the student."""
        if self.why:
            return None, None
        return self.teacher_N.mean() * change.teacher, self.student_N.mean() * change.student

    def saved(self, way: Way, change: Change = AS_MEASURED) -> Amount:
        """Return what 1,000 requests save in one way.

        replace_all: T - S, whatever the answers are worth, with the interval of the requests'
        differences. try_then_escalate: p T - S, for the student always answers, and where a test
        rejects its answer the teacher does too. perfect_router: p (T - S), an upper bound.
        """
        teacher, student = self.means(change)
        if teacher is None or student is None:
            return unknown(self.why)
        part = Amount(value=self.part.low, reason=self.part.reason) if change.lowest else self.part
        if way == "try_then_escalate":
            return part.scaled(teacher, -student)
        if way == "perfect_router":
            return part.scaled(teacher - student)
        teacher_N = (self.teacher_N * change.teacher).astype(np.float64)
        student_N = (self.student_N * change.student).astype(np.float64)
        bounds = Bounds(-student_N.max(), teacher_N.max())
        estimate = estimate_mean(teacher_N - student_N, self.clusters, self.certainty, bounds)
        return amount_of(estimate).model_copy(update={"value": teacher - student})

    def saving(self, saved: Amount, volume: int = 1, **facts: object) -> Saving:
        """Return what is saved on 1,000 requests and by the month, and when it has paid off."""
        months = self.assumed.requests_per_month * volume
        amounts = {
            "dollars_per_1k": saved,
            "dollars_per_month": saved.scaled(Decimal(months) / THOUSAND),
            "break_even": self.break_even(saved, months),
        }
        return Saving.model_validate({**facts, **amounts})

    def case(self, way: Way, change: Change) -> Saving:
        """Return one way with what has been changed."""
        teacher, student = self.means(change)
        return self.saving(
            self.saved(way, change),
            change.volume,
            case=change.case,
            teacher_dollars_per_1k=teacher,
            student_dollars_per_1k=student,
            requests_per_month=self.assumed.requests_per_month * change.volume,
        )

    def changes(self, way: Way) -> Iterator[Change]:
        """Yield what would change today's figures, one thing at a time."""
        teacher, student = self.assumed.teacher, self.assumed.student
        yield AS_MEASURED
        yield Change("the teacher's price halves", teacher=Decimal("0.5"))
        yield Change("ten times the requests", volume=10)
        if way != "replace_all":
            yield Change("the share at its lower bound", lowest=True)
        if not isinstance(student.price, MachinePrice) or self.why:
            return
        idle, low = student.utilisation / LOW_USE, f"{percent(LOW_USE)} of the time"
        if not teacher.hosted:
            yield Change(f"both machines work {low}", teacher=idle, student=idle)
            return
        yield Change(f"the student's machine works {low}", student=idle)
        rent, dollars = self.month_of_machines(), self.means()[1]
        if rent and dollars:
            month = dollars * self.assumed.requests_per_month / THOUSAND
            rented = rent.dollars_per_month / month
            yield Change("the student's machine is rented for the whole month", student=rented)

    def month_of_machines(self) -> Rent | None:
        """Return how many machines the requests of a month need, their rent, how busy they are."""
        price, dollars = self.assumed.student.price, self.means()[1]
        if not isinstance(price, MachinePrice) or dollars is None or not price.dollars_per_hour:
            return None
        busy = dollars * self.assumed.student.utilisation  # without the time that it idles
        month = price.of(MONTH_DAYS * DAY_SECONDS)
        needed = self.assumed.requests_per_month * busy / THOUSAND / month
        machines = int(needed.to_integral_value(ROUND_CEILING)) or 1
        return Rent(machines=machines, dollars_per_month=machines * month, in_use=needed / machines)

    def break_even(self, saved: Amount, requests_per_month: int) -> BreakEven:
        """Return when `saved`, dollars of 1,000 requests, has paid the distillation back."""
        decided, why = saved.conclude(len(set(self.clusters))), ""
        distillation = self.assumed.distillation
        if distillation is None or saved.value is None or saved.reason:
            why = saved.reason or self.assumed.why_no_distillation
        elif saved.low is not None and decided.verdict == "undecided" and (saved.high or 0) > 0:
            why = f"it may never be paid back: {decided.reason}"
        elif saved.value <= 0:
            why = "nothing is saved, so the distillation is never paid back"
        if why or distillation is None or saved.value is None:
            return BreakEven(requests=unknown(why), days=unknown(why))
        cost = distillation * THOUSAND
        requests = Amount(
            value=cost / saved.value,
            low=None if saved.high is None else cost / saved.high,
            high=None if saved.low is None else cost / saved.low,
        )
        days = requests.scaled(Decimal(MONTH_DAYS) / requests_per_month)
        return BreakEven(requests=requests, days=days)


def shares_of(
    requests: Sequence[HeldOutRequest],
    scored: Sequence[HeldOutRequest],
    teacher: Tariff,
    certainty: Certainty,
) -> tuple[Amount, Amount, Amount | None]:
    """Estimate the share of requests that the student can take, because its answer is acceptable.

    Plain, weighted by the teacher's price, and with errors of ours against it. Null without a test,
    and where too many answers could not be tested.
    """

    def share(requests: Sequence[HeldOutRequest], weights: Sequence[Decimal]) -> Amount:
        accepted = [request.accepted is True for request in requests]
        clusters = [request.cluster for request in requests]
        floats = [float(weight) for weight in weights]
        amount = amount_of(estimate_mean(accepted, clusters, certainty, SHARE, floats))
        if amount.value is None:
            return amount
        part = sum((w for w, passed in zip(weights, accepted, strict=True) if passed), Decimal(0))
        return amount.model_copy(update={"value": part / sum(weights)})  # exact

    if not any(request.test for request in requests):
        return unknown(NO_TEST), unknown(NO_TEST), None
    if len(scored) < MIN_PAIRED * len(requests):
        why = unknown(f"only {len(scored)} of {len(requests)} answers could be tested")
        return why, why, None
    dollars = [teacher.of(request.usage.get("teacher", Usage())) for request in scored]
    prices = [price for price in dollars if price is not None]
    plain = share(scored, [ONE] * len(scored))
    part = share(scored, prices) if len(prices) == len(scored) and sum(prices) > 0 else plain
    complete = len(scored) == len(requests)
    return plain, part, None if complete else share(requests, [ONE] * len(requests))


def amount_of(estimate: Estimate) -> Amount:
    """Return an estimate as an amount."""
    ends = (estimate.value, *estimate.ends)
    value, low, high = (None if end is None else Decimal(repr(end)) for end in ends)
    return Amount(value=value, low=low, high=high, reason=estimate.reason)


def unknown(reason: str) -> Amount:
    """Return an amount that is unknown for a reason."""
    return Amount(value=None, low=None, high=None, reason=reason)

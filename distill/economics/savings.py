"""What the people who ask would save: three ways to use the student, and when it has paid off.

All is per 1,000 requests like the held-out ones, of which the teacher costs T and the student S.
The share p of acceptable answers is weighted by price: long answers cost more and fail more. Its
interval is carried through; break-even is null where it, or the savings, reach 0.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from distill.economics.costs import NO_TIME, THOUSAND, Tariff
from distill.evaluation import scorecard
from distill.evaluation.measurements import Difference
from distill.evaluation.scorecard import WAYS, Saving, TeacherPrice, Way
from distill.evaluation.scorers import SHARE, HeldOutRequest
from distill.evaluation.statistics import MIN_PAIRED, Bounds, Certainty, Estimate, estimate_mean
from distill.records import Usage
from distill.responders.prices import MachinePrice

MONTH_DAYS, DAY_SECONDS = 30, 86_400
LOW_USE = 0.25
NEEDS_ANSWER = "the test compares with an answer that is not there when a new request is served"
NO_TEST = "no task has a checker, and no judge that passed its probe stands in"


class Assumptions(NamedTuple):
    """What savings are computed with: tariffs, the distillation's cost, requests of a month."""

    teacher: Tariff
    student: Tariff
    distillation: float | None
    why_no_distillation: str
    requests_per_month: int


class Change(NamedTuple):
    """What is other than measured: prices and volume by a factor, or the share at its low end."""

    case: str
    teacher: float = 1.0
    student: float = 1.0
    volume: int = 1
    lowest: bool = False


AS_MEASURED = Change("as measured")


def economics(
    requests: Sequence[HeldOutRequest],
    assumed: Assumptions,
    certainty: Certainty,
    compared_with: TeacherPrice,
    quality: Difference,
) -> scorecard.Economics:
    """Compute everything from the held-out requests; whose price it is (`compared_with`) and the
    student's difference to this run's teacher (`quality`) are shown beside the amounts."""
    covered = [request for request in requests if request.test] or list(requests)
    scored = [request for request in covered if request.accepted is not None]
    plain, part = shares_of(covered, scored, assumed.teacher, certainty)
    priced = PricedRequests(covered, part, assumed, certainty)
    tests = tuple(dict.fromkeys(request.test for request in covered if request.test))
    when_served = bool(tests) and all(request.when_served for request in covered)
    headline: Way = "try_then_escalate" if when_served else "replace_all"
    saved = {way: priced.saved(way) for way in WAYS}
    if tests and not when_served:
        saved["try_then_escalate"] = Estimate.unknown(NEEDS_ANSWER)
    dollars, student_dollars = priced.means()
    facts = {"price": assumed.teacher.described(), "hosted": assumed.teacher.hosted}
    missing = {"distillation_dollars": assumed.why_no_distillation}
    return scorecard.Economics(
        requests=len(covered),
        of=len(requests),
        documents=len({request.cluster for request in covered}),
        teacher=compared_with.model_copy(update={"dollars_per_1k": dollars, **facts}),
        student=scorecard.StudentPrice(
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
        quality=quality,
        distillation_dollars=assumed.distillation,
        requests_per_month=assumed.requests_per_month,
        headline=headline,
        rows=tuple(priced.saving(saved[way], way=way) for way in WAYS),
        sensitivity=tuple(priced.case(headline, change) for change in priced.changes(headline)),
        reasons=missing if assumed.distillation is None else {},
    )


class PricedRequests:
    """N requests that both models answered, with the dollars of 1,000 of each; `why` if unknown.

    `part` is the share of the teacher's cost that is of requests which the student can take.
    """

    def __init__(
        self,
        requests: Sequence[HeldOutRequest],
        part: Estimate,
        assumed: Assumptions,
        certainty: Certainty,
    ) -> None:
        both = [r for r in requests if {"teacher", "student"} <= r.usage.keys()]
        self.part, self.assumed, self.certainty, self.why = part, assumed, certainty, ""
        self.clusters, prices = [request.cluster for request in both], []
        for model, tariff in (("teacher", assumed.teacher), ("student", assumed.student)):
            dollars = [tariff.of(request.usage[model]) for request in both]
            if not self.why and (not both or None in dollars):
                self.why = tariff.why if tariff.price is None else f"{model}: {NO_TIME}"
            prices.append(np.array(dollars, dtype=np.float64) * THOUSAND)
        self.teacher_N, self.student_N = prices

    def means(self, change: Change = AS_MEASURED) -> tuple[float, float] | tuple[None, None]:
        """Return what 1,000 requests cost the teacher and the student."""
        if self.why:
            return None, None
        teacher, student = float(self.teacher_N.mean()), float(self.student_N.mean())
        return teacher * change.teacher, student * change.student

    def saved(self, way: Way, change: Change = AS_MEASURED) -> Estimate:
        """Return what 1,000 requests save in one way.

        replace_all: T - S, whatever the answers are worth, with the interval of the requests'
        differences. try_then_escalate: p T - S, for the student always answers, and where a test
        rejects its answer the teacher does too. perfect_router: p (T - S), an upper bound.
        """
        teacher, student = self.means(change)
        if teacher is None or student is None:
            return Estimate.unknown(self.why)
        part = self.part
        if change.lowest:
            part = Estimate(value=part.low, reason=part.reason)
        if way == "try_then_escalate":
            return part.scaled(teacher, -student)
        if way == "perfect_router":
            return part.scaled(teacher - student)
        teacher_N, student_N = self.teacher_N * change.teacher, self.student_N * change.student
        bounds = Bounds(-student_N.max(), teacher_N.max())
        estimate = estimate_mean(teacher_N - student_N, self.clusters, self.certainty, bounds)
        return estimate.model_copy(update={"value": teacher - student})

    def saving(self, saved: Estimate, volume: int = 1, **facts: object) -> Saving:
        """Return what is saved on 1,000 requests and by the month, and when it has paid off."""
        months = self.assumed.requests_per_month * volume
        amounts = {
            "dollars_per_1k": saved,
            "dollars_per_month": saved.scaled(months / THOUSAND),
            "break_even": self.break_even(saved, months),
        }
        return Saving.model_validate({**facts, **amounts})

    def case(self, way: Way, change: Change) -> Saving:
        """Return one way with what has been changed."""
        teacher, student = self.means(change)
        prices = {"teacher_dollars_per_1k": teacher, "student_dollars_per_1k": student}
        return self.saving(self.saved(way, change), change.volume, case=change.case, **prices)

    def changes(self, way: Way) -> Iterator[Change]:
        """Yield what would change today's figures, one thing at a time."""
        student, dollars = self.assumed.student, self.means()[1]
        yield AS_MEASURED
        yield Change("the teacher's price halves", teacher=0.5)
        yield Change("ten times the requests", volume=10)
        if way != "replace_all":
            yield Change("the share at its lower bound", lowest=True)
        if dollars is None or not isinstance(student.price, MachinePrice):
            return
        idle, low = student.utilisation / LOW_USE, f"{100 * LOW_USE:g}\u00a0% of the time"
        if not self.assumed.teacher.hosted:
            yield Change(f"both machines work {low}", teacher=idle, student=idle)
            return
        yield Change(f"the student's machine works {low}", student=idle)
        if rent := self.month_of_machines():
            month = dollars * self.assumed.requests_per_month / THOUSAND
            rented = rent.dollars_per_month / month
            yield Change("the student's machine is rented for the whole month", student=rented)

    def month_of_machines(self) -> scorecard.Rent | None:
        """Return how many machines the requests of a month need, their rent, how busy they are."""
        price, dollars = self.assumed.student.price, self.means()[1]
        if not isinstance(price, MachinePrice) or not dollars:
            return None
        busy = dollars * self.assumed.student.utilisation  # without the time that it idles
        month = float(price.of(MONTH_DAYS * DAY_SECONDS))
        needed = self.assumed.requests_per_month * busy / THOUSAND / month
        machines = math.ceil(needed)
        rent, in_use = machines * month, needed / machines
        return scorecard.Rent(machines=machines, dollars_per_month=rent, in_use=in_use)

    def break_even(self, saved: Estimate, requests_per_month: int) -> scorecard.BreakEven:
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
            return scorecard.BreakEven(requests=Estimate.unknown(why), days=Estimate.unknown(why))
        cost = distillation * THOUSAND
        requests = Estimate(
            value=cost / saved.value,
            low=None if saved.high is None else cost / saved.high,
            high=None if saved.low is None else cost / saved.low,
        )
        days = requests.scaled(MONTH_DAYS / requests_per_month)
        return scorecard.BreakEven(requests=requests, days=days)


def shares_of(
    requests: Sequence[HeldOutRequest],
    scored: Sequence[HeldOutRequest],
    teacher: Tariff,
    certainty: Certainty,
) -> tuple[Estimate, Estimate]:
    """Estimate the share of requests that the student can take, because its answer is acceptable.

    Plain, and weighted by the teacher's price. Null without a test, and where too many answers
    could not be tested.
    """
    if not any(request.test for request in requests):
        return Estimate.unknown(NO_TEST), Estimate.unknown(NO_TEST)
    if len(scored) < MIN_PAIRED * len(requests):
        why = Estimate.unknown(f"only {len(scored)} of {len(requests)} answers could be tested")
        return why, why
    accepted = [request.accepted is True for request in scored]
    clusters = [request.cluster for request in scored]
    plain = estimate_mean(accepted, clusters, certainty, SHARE)
    dollars = [teacher.of(request.usage.get("teacher", Usage())) for request in scored]
    prices = [price for price in dollars if price is not None]
    if len(prices) < len(scored) or not sum(prices):
        return plain, plain
    return plain, estimate_mean(accepted, clusters, certainty, SHARE, prices)

"""What the people who ask would save: three ways to use the student, and when it has paid off.

All is per 1,000 requests like the held-out ones. T is what they cost the teacher, S what they cost
the student, and p the part of T that falls on requests whose student answer is acceptable:

- replace_all: T - S, whatever the answers are worth; the quality lost stands beside it
- try_then_escalate: p T - S; the student always answers, and where a test rejects its answer the
  teacher answers too, so the test must be one that needs no right answer
- perfect_router: p (T - S); the requests that the student fails never reach it. An upper bound

p is weighted by price, for long answers cost more and fail more. The interval is that of p, carried
through; of replace_all, that of the requests' differences, clustered by document. Break-even is the
cost of the distillation over a request's savings, and null where these or their interval reach 0.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Decimal
from typing import NamedTuple

from distill.economics.costs import NO_TIME, THOUSAND, Tariff, percent
from distill.evaluation.measurements import Difference
from distill.evaluation.scorecard import (
    WAYS,
    Amount,
    BreakEven,
    Case,
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
LOW_USE = Decimal("0.25")
NEEDS_ANSWER = "the test compares with an answer that is not there when a new request is served"
NO_TEST = "no task has a checker, and no judge that passed its probe stands in"


class Assumptions(NamedTuple):
    """What savings are computed with: tariffs, the distillation's cost, requests of a month."""

    teacher: Tariff
    student: Tariff
    distillation: Decimal | None
    why_no_distillation: str
    requests_per_month: int


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
    rows = {way: priced.row(way, priced.saved(way)) for way in WAYS}
    if tests and not when_served:
        rows["try_then_escalate"] = priced.row("try_then_escalate", unknown(NEEDS_ANSWER))
    dollars, student_dollars = (None, None) if priced.why else priced.means
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
        rows=tuple(rows.values()),
        sensitivity=tuple(priced.sensitivity(headline)),
        reasons=missing if assumed.distillation is None else {},
    )


@dataclass(frozen=True)
class PricedRequests:
    """Requests with the dollars of 1,000 of each, or `why` they are unknown, and assumptions."""

    part: Amount  # of the teacher's cost, on requests that the student can take
    assumed: Assumptions
    certainty: Certainty
    teacher: tuple[Decimal, ...] = ()
    student: tuple[Decimal, ...] = ()
    clusters: tuple[str, ...] = ()
    why: str = ""

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
        sides = {}
        for model, tariff in (("teacher", assumed.teacher), ("student", assumed.student)):
            dollars = [tariff.of(request.usage[model]) for request in both]
            sides[model] = tuple(each * THOUSAND for each in dollars if each is not None)
            if not both or len(sides[model]) < len(both):
                why = tariff.why if tariff.price is None else f"{model}: {NO_TIME}"
                return cls(part, assumed, certainty, why=why)
        clusters = tuple(request.cluster for request in both)
        return cls(part, assumed, certainty, **sides, clusters=clusters)

    @property
    def means(self) -> tuple[Decimal, Decimal]:
        """Return what 1,000 requests cost the teacher and the student."""
        count = len(self.clusters)
        return sum(self.teacher, Decimal(0)) / count, sum(self.student, Decimal(0)) / count

    def scaled(self, teacher: Decimal | int = 1, student: Decimal | int = 1) -> "PricedRequests":
        """Return the same requests at other prices."""
        dollars = tuple(each * teacher for each in self.teacher)
        return replace(
            self, teacher=dollars, student=tuple(each * student for each in self.student)
        )

    def saved(self, way: Way) -> Amount:
        """Return what 1,000 requests save in one way."""
        if self.why:
            return unknown(self.why)
        teacher, student = self.means
        if way == "try_then_escalate":
            return self.part.scaled(teacher, -student)
        if way == "perfect_router":
            return self.part.scaled(teacher - student)
        differences = [float(t - s) for t, s in zip(self.teacher, self.student, strict=True)]
        bounds = Bounds(-float(max(self.student)), float(max(self.teacher)))
        estimate = estimate_mean(differences, self.clusters, self.certainty, bounds)
        return amount_of(estimate).model_copy(update={"value": teacher - student})

    def row(self, way: Way, saved: Amount) -> Saving:
        """Return one way to use the student, which saves so much on 1,000 requests."""
        volume = self.assumed.requests_per_month
        return Saving(
            way=way,
            dollars_per_1k=saved,
            dollars_per_month=saved.scaled(Decimal(volume) / THOUSAND),
            break_even=break_even(saved, self.assumed, len(set(self.clusters))),
        )

    def case(self, name: str, way: Way) -> Case:
        """Return one way with what has been changed here."""
        row = self.row(way, self.saved(way))
        teacher, student = (None, None) if self.why else self.means
        return Case(
            case=name,
            teacher_dollars_per_1k=teacher,
            student_dollars_per_1k=student,
            requests_per_month=self.assumed.requests_per_month,
            dollars_per_1k=row.dollars_per_1k,
            dollars_per_month=row.dollars_per_month,
            break_even=row.break_even,
        )

    def sensitivity(self, way: Way) -> Iterator[Case]:
        """Yield today's figures and what would change them, one thing at a time."""
        teacher, tariff = self.assumed.teacher, self.assumed.student
        volume, rent = self.assumed.requests_per_month, self.month_of_machines()
        yield self.case("as measured", way)
        yield self.scaled(teacher=Decimal("0.5")).case("the teacher's price halves", way)
        if teacher.batch_discount is not None:
            batched = self.scaled(teacher=1 - teacher.batch_discount)
            yield batched.case("the teacher is asked in batches, at its discount", way)
        more = replace(self, assumed=self.assumed._replace(requests_per_month=10 * volume))
        yield more.case("ten times the requests", way)
        if way != "replace_all":
            low = Amount(value=self.part.low, reason=self.part.reason)
            yield replace(self, part=low).case("the share at its lower bound", way)
        if not isinstance(tariff.price, MachinePrice) or self.why:
            return
        idle, student = tariff.utilisation / LOW_USE, self.means[1]
        if not teacher.hosted:
            both = self.scaled(teacher=idle, student=idle)
            yield both.case(f"both machines work {percent(LOW_USE)} of the time", way)
            return
        alone = self.scaled(student=idle)
        yield alone.case(f"the student's machine works {percent(LOW_USE)} of the time", way)
        if rent and student:
            dedicated = self.scaled(student=rent.dollars_per_month / volume * THOUSAND / student)
            yield dedicated.case("the student's machine is rented for the whole month", way)

    def month_of_machines(self) -> Rent | None:
        """Return how many machines the requests of a month need, their rent, how busy they are."""
        price, volume = self.assumed.student.price, self.assumed.requests_per_month
        if not isinstance(price, MachinePrice) or self.why or not price.dollars_per_hour:
            return None
        student = self.means[1] * self.assumed.student.utilisation  # busy time alone
        needed = volume * student / THOUSAND / price.of(MONTH_DAYS * DAY_SECONDS)
        machines = int(needed.to_integral_value(ROUND_CEILING)) or 1
        rent = machines * price.of(MONTH_DAYS * DAY_SECONDS)
        return Rent(machines=machines, dollars_per_month=rent, in_use=needed / machines)


def break_even(saved: Amount, assumed: Assumptions, documents: int) -> BreakEven:
    """Return when `saved`, dollars of 1,000 requests of some documents, has paid it back."""
    decided, why = saved.conclude(documents), ""
    if assumed.distillation is None or saved.value is None or saved.reason:
        why = saved.reason or assumed.why_no_distillation
    elif saved.low is not None and decided.verdict == "undecided" and (saved.high or 0) > 0:
        why = f"it may never be paid back: {decided.reason}"
    elif saved.value <= 0:
        why = "nothing is saved, so the distillation is never paid back"
    if why or assumed.distillation is None or saved.value is None:
        return BreakEven(requests=unknown(why), days=unknown(why))
    cost = assumed.distillation * THOUSAND
    requests = Amount(
        value=cost / saved.value,
        low=None if saved.high is None else cost / saved.high,
        high=None if saved.low is None else cost / saved.low,
    )
    days = requests.scaled(Decimal(MONTH_DAYS) / assumed.requests_per_month)
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
    if not any(request.test for request in requests):
        return unknown(NO_TEST), unknown(NO_TEST), None
    if len(scored) < MIN_PAIRED * len(requests):
        why = unknown(f"only {len(scored)} of {len(requests)} answers could be tested")
        return why, why, None
    dollars = [teacher.of(request.usage.get("teacher", Usage())) for request in scored]
    prices = [price for price in dollars if price is not None]
    plain = _share(scored, certainty, [Decimal(1)] * len(scored))
    part = plain
    if len(prices) == len(scored) and sum(prices) > 0:
        part = _share(scored, certainty, prices)
    if len(scored) == len(requests):
        return plain, part, None
    return plain, part, _share(requests, certainty, [Decimal(1)] * len(requests))


def _share(
    requests: Sequence[HeldOutRequest], certainty: Certainty, weights: Sequence[Decimal]
) -> Amount:
    """Estimate the share of the requests' weights that is accepted; its value is exact."""
    accepted = [request.accepted is True for request in requests]
    estimate = estimate_mean(
        [float(a) for a in accepted],
        [request.cluster for request in requests],
        certainty,
        SHARE,
        [float(weight) for weight in weights],
    )
    if estimate.value is None:
        return amount_of(estimate)
    part = sum((weight for weight, a in zip(weights, accepted, strict=True) if a), Decimal(0))
    return amount_of(estimate).model_copy(update={"value": part / sum(weights)})


def amount_of(estimate: Estimate) -> Amount:
    """Return an estimate as an amount."""
    ends = (estimate.value, *estimate.ends)
    value, low, high = (None if end is None else Decimal(repr(end)) for end in ends)
    return Amount(value=value, low=low, high=high, reason=estimate.reason)


def unknown(reason: str) -> Amount:
    """Return an amount that is unknown for a reason."""
    return Amount(value=None, low=None, high=None, reason=reason)

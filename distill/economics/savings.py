"""What the people who ask would save: three ways to use the student, when it has paid for itself, and what could change.

All is per 1,000 requests like the held-out ones. With T what they cost the teacher, S what they cost the student, and p
the part of T that falls on requests whose student answer is acceptable:

- replace_all: T - S, whatever the answers are worth; the quality lost stands beside it
- try_then_escalate: p T - S; the student always answers, and where a test rejects its answer the teacher answers too. So
  the test must be one that can be run when a request is served: none that needs the right answer
- perfect_router: p (T - S); the requests that the student fails never reach it. An upper bound: no router is perfect

p is weighted by price, for long answers cost more and fail more; `share` is the plain share of requests. The interval is
that of p, carried through; of replace_all, that of the requests' differences, clustered by document. T and S are taken
as measured. Break-even is the cost of the distillation over the surplus of a request, and null where the surplus or its
interval reaches 0. What is unknown is null with its reason (see evaluation/scorecard.py for the shape of it all).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Decimal
from typing import NamedTuple

from distill.economics.costs import NO_TIME, THOUSAND, Tariff, percent
from distill.economics.substitution import amount_of, shares_of, unknown
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
from distill.evaluation.scorers import HeldOutRequest
from distill.evaluation.statistics import Bounds, Certainty, estimate_mean
from distill.responders.prices import MachinePrice, TokenPrice

MONTH_DAYS, DAY_SECONDS = 30, 86_400
LOW_USE = Decimal("0.25")
NEEDS_ANSWER = "the test compares with an answer that is not there when a new request is served"


class Assumptions(NamedTuple):
    """What a surplus is reckoned with: both tariffs, the cost of the distillation, the requests of a month."""

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
    """Reckon everything from the held-out requests.

    `compared_with` names the teacher whose price it is, `quality` is the student's difference to the teacher of this
    run; both are shown beside the amounts.
    """
    covered = [asked for asked in requests if asked.test] or list(requests)
    basis = Basis.of(covered, assumed)
    shares = shares_of(covered, assumed.teacher, certainty)
    reckoning = Reckoning(basis, shares.of_price, certainty, assumed)
    tests = tuple(dict.fromkeys(asked.test for asked in covered if asked.test))
    when_served = bool(tests) and all(asked.when_served for asked in covered)
    headline: Way = "try_then_escalate" if when_served else "replace_all"
    rows = {way: reckoning.row(way) for way in WAYS}
    if tests and not when_served:
        rows["try_then_escalate"] = reckoning.row_of("try_then_escalate", unknown(NEEDS_ANSWER))
    missing = {"distillation_dollars": assumed.why_no_distillation}
    missing = missing if assumed.distillation is None else {}
    return Economics(
        requests=len(covered),
        of=len(requests),
        documents=len({asked.cluster for asked in covered}),
        teacher=reckoning.teacher_price(compared_with),
        student=StudentPrice(
            dollars_per_1k=None if basis.why else basis.means[1],
            price=assumed.student.described(),
            utilisation=assumed.student.utilisation,
            month_of_machines=reckoning.month_of_machines(),
        ),
        tests=tests,
        when_served=when_served,
        unscored=sum(asked.accepted is None for asked in covered) if tests else 0,
        share=shares.plain,
        share_of_price=shares.of_price,
        share_if_unscored_fail=shares.if_unscored_fail,
        quality=quality,
        distillation_dollars=assumed.distillation,
        requests_per_month=assumed.requests_per_month,
        headline=headline,
        rows=tuple(rows.values()),
        sensitivity=tuple(reckoning.sensitivity(headline)),
        reasons=missing,
    )


@dataclass(frozen=True)
class Basis:
    """The requests that are reckoned with: dollars of 1,000 of each, and whose cluster they are; or why there are none."""

    teacher: tuple[Decimal, ...] = ()
    student: tuple[Decimal, ...] = ()
    clusters: tuple[str, ...] = ()
    why: str = ""

    @classmethod
    def of(cls, requests: Sequence[HeldOutRequest], assumed: Assumptions) -> "Basis":
        """Price the requests that both models answered."""
        both = [asked for asked in requests if {"teacher", "student"} <= asked.usage.keys()]
        priced = {
            model: [tariff.of(asked.usage[model]) for asked in both]
            for model, tariff in (("teacher", assumed.teacher), ("student", assumed.student))
        }
        known = {m: tuple(d * THOUSAND for d in row if d is not None) for m, row in priced.items()}
        for model, tariff in (("teacher", assumed.teacher), ("student", assumed.student)):
            if not both or len(known[model]) < len(both):
                return cls(why=tariff.why if tariff.price is None else f"{model}: {NO_TIME}")
        return cls(known["teacher"], known["student"], tuple(asked.cluster for asked in both))

    @property
    def means(self) -> tuple[Decimal, Decimal]:
        """Return what 1,000 requests cost the teacher and the student."""
        return _mean(self.teacher), _mean(self.student)

    def scaled(self, teacher: Decimal | int = 1, student: Decimal | int = 1) -> "Basis":
        """Return the same requests at other prices."""
        changed = {
            "teacher": tuple(amount * teacher for amount in self.teacher),
            "student": tuple(amount * student for amount in self.student),
        }
        return replace(self, **changed)

    def difference(self, certainty: Certainty) -> Amount:
        """Return teacher minus student, with the interval of the requests' differences."""
        teacher, student = self.means
        pairs = zip(self.teacher, self.student, strict=True)
        bounds = Bounds(-float(max(self.student)), float(max(self.teacher)))
        found = estimate_mean([float(t - s) for t, s in pairs], self.clusters, certainty, bounds)
        return amount_of(found).model_copy(update={"value": teacher - student})


class Reckoning(NamedTuple):
    """The three rows and their cases, over one basis and one share of the price."""

    basis: Basis
    part: Amount
    certainty: Certainty
    assumed: Assumptions

    def surplus(self, way: Way) -> Amount:
        """Return what 1,000 requests save in one way."""
        if self.basis.why:
            return unknown(self.basis.why)
        teacher, student = self.basis.means
        if way == "replace_all":
            return self.basis.difference(self.certainty)
        if way == "try_then_escalate":
            return self.part.scaled(teacher, -student)
        return self.part.scaled(teacher - student)

    def row(self, way: Way) -> Saving:
        """Return one way to use the student."""
        return self.row_of(way, self.surplus(way))

    def row_of(self, way: Way, surplus: Amount) -> Saving:
        """Return a row whose surplus per 1,000 requests is known."""
        volume = self.assumed.requests_per_month
        return Saving(
            way=way,
            dollars_per_1k=surplus,
            dollars_per_month=surplus.scaled(Decimal(volume) / THOUSAND),
            break_even=break_even(surplus, self.assumed, len(set(self.basis.clusters))),
        )

    def case(self, name: str, way: Way) -> Case:
        """Return one way with what this reckoning has changed."""
        row = self.row(way)
        teacher, student = (None, None) if self.basis.why else self.basis.means
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
        volume = self.assumed.requests_per_month
        yield self.case("as measured", way)
        yield self.scaled(teacher=Decimal("0.5")).case("the teacher's price halves", way)
        discount = self.batch_discount()
        if discount is not None:
            batched = self.scaled(teacher=1 - discount)
            yield batched.case("the teacher is asked in batches, at its discount", way)
        more = self._replace(assumed=self.assumed._replace(requests_per_month=10 * volume))
        yield more.case("ten times the requests", way)
        if way != "replace_all":
            low = Amount(value=self.part.low, reason=self.part.reason)
            lowest = self._replace(part=low)
            yield lowest.case("the share at its lower bound", way)
        yield from self._other_machines(way)

    def _other_machines(self, way: Way) -> Iterator[Case]:
        """Yield the cases of a machine that is less busy than assumed: the student's, and the teacher's where it has one."""
        tariff, rent = self.assumed.student, self.month_of_machines()
        if not isinstance(tariff.price, MachinePrice) or self.basis.why:
            return
        idle, student = tariff.utilisation / LOW_USE, self.basis.means[1]
        if not self.assumed.teacher.hosted:
            both = self.scaled(teacher=idle, student=idle)
            yield both.case(f"both machines work {percent(LOW_USE)} of the time", way)
            return
        alone = self.scaled(student=idle)
        yield alone.case(f"the student's machine works {percent(LOW_USE)} of the time", way)
        if rent and student:
            per_1k = rent.dollars_per_month / self.assumed.requests_per_month * THOUSAND
            dedicated = self.scaled(student=per_1k / student)
            yield dedicated.case("the student's machine is rented for the whole month", way)

    def scaled(self, teacher: Decimal | int = 1, student: Decimal | int = 1) -> "Reckoning":
        """Return the reckoning at other prices."""
        return self._replace(basis=self.basis.scaled(teacher, student))

    def batch_discount(self) -> Decimal | None:
        """Return the discount for answers that may take a day, where the teacher's price has one."""
        price = self.assumed.teacher.price
        return price.batch_discount if isinstance(price, TokenPrice) else None

    def month_of_machines(self) -> Rent | None:
        """Return how many machines the requests of a month need, their rent, and how busy they are."""
        price, volume = self.assumed.student.price, self.assumed.requests_per_month
        if not isinstance(price, MachinePrice) or self.basis.why or not price.dollars_per_hour:
            return None
        student = self.basis.means[1] * self.assumed.student.utilisation  # busy time alone
        needed = volume * student / THOUSAND / price.of(MONTH_DAYS * DAY_SECONDS)
        machines = int(needed.to_integral_value(ROUND_CEILING)) or 1
        rent = machines * price.of(MONTH_DAYS * DAY_SECONDS)
        return Rent(machines=machines, dollars_per_month=rent, in_use=needed / machines)

    def teacher_price(self, compared_with: TeacherPrice) -> TeacherPrice:
        """Return whose price the student is compared with, and what it comes to."""
        dollars = None if self.basis.why else self.basis.means[0]
        discount = self.batch_discount()
        batch = None if dollars is None or discount is None else dollars * (1 - discount)
        price = {"dollars_per_1k": dollars, "batch_dollars_per_1k": batch}
        facts = {"price": self.assumed.teacher.described(), "hosted": self.assumed.teacher.hosted}
        return compared_with.model_copy(update={**price, **facts})


def break_even(surplus: Amount, assumed: Assumptions, documents: int) -> BreakEven:
    """Return when `surplus`, dollars of 1,000 requests of some documents, has paid for the distillation."""
    if assumed.distillation is None or surplus.value is None or surplus.reason:
        never = unknown(surplus.reason or assumed.why_no_distillation)
        return BreakEven(requests=never, days=never)
    decided = surplus.conclude(documents)
    if surplus.low is not None and decided.verdict == "undecided" and (surplus.high or 0) > 0:
        never = unknown(f"it may never be paid back: {decided.reason}")
        return BreakEven(requests=never, days=never)
    if surplus.value <= 0:
        never = unknown("nothing is saved, so the distillation is never paid back")
        return BreakEven(requests=never, days=never)
    cost = assumed.distillation * THOUSAND
    requests = Amount(
        value=cost / surplus.value,
        low=None if surplus.high is None else cost / surplus.high,
        high=None if surplus.low is None else cost / surplus.low,
    )
    days = requests.scaled(Decimal(MONTH_DAYS) / assumed.requests_per_month)
    return BreakEven(requests=requests, days=days)


def _mean(amounts: Sequence[Decimal]) -> Decimal:
    return sum(amounts, Decimal(0)) / len(amounts)

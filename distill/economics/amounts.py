"""The surplus statement as data: the shape of `economics` in scorecard.json.

Every amount is a `Ranged`: value, low, high, or null and `reason`; low and high are null also where a case is a bound of
its own and has no interval. Money is Decimal until it is written, and dollars throughout.
"""

from decimal import Decimal
from typing import Any, Literal

from distill.evaluation.statistics import Estimate
from distill.records import Record

Way = Literal["replace_all", "try_then_escalate", "perfect_router"]
WAYS: tuple[Way, ...] = ("replace_all", "try_then_escalate", "perfect_router")


class Ranged(Record):
    """An amount with its interval, or None with the reason."""

    value: Decimal | None = None
    low: Decimal | None = None
    high: Decimal | None = None
    reason: str | None = None

    def scaled(self, factor: Decimal | int, plus: Decimal | int = 0) -> "Ranged":
        """Return factor x amount + plus; a negative factor turns the interval round."""
        ends = ("high", "low") if factor < 0 else ("low", "high")
        amounts = {
            "value": self.value,
            "low": getattr(self, ends[0]),
            "high": getattr(self, ends[1]),
        }
        scaled = {key: None if a is None else a * factor + plus for key, a in amounts.items()}
        return self.model_copy(update=scaled)

    def lowest(self) -> "Ranged":
        """Return the lower end of the interval, as an amount without one."""
        return Ranged(value=self.low, reason=self.reason)


def ranged(estimate: Estimate) -> Ranged:
    """Return an estimate as an amount."""
    bounds = (estimate.value, estimate.low, estimate.high)
    value, low, high = (None if b is None else Decimal(repr(b)) for b in bounds)
    return Ranged(value=value, low=low, high=high, reason=estimate.reason)


def unknown(reason: str) -> Ranged:
    """Return an amount that is not known."""
    return Ranged(reason=reason)


class BreakEven(Record):
    """After how many requests, and days at the volume, the surplus has paid for the distillation."""

    requests: Ranged
    days: Ranged


class Row(Record):
    """One way to use the student, and what it saves; negative where it costs more than the teacher."""

    way: Way
    dollars_per_1k: Ranged
    dollars_per_month: Ranged
    break_even: BreakEven


class Case(Record):
    """The headline row with one thing changed."""

    case: str
    teacher_dollars_per_1k: Decimal | None
    student_dollars_per_1k: Decimal | None
    requests_per_month: int
    dollars_per_1k: Ranged
    dollars_per_month: Ranged
    break_even: BreakEven


class Economics(Record):
    """The surplus statement as data: what is compared, the share, the three rows, the headline, what could change."""

    requests: int  # that these figures are over: those that a test covers, or all where none does
    of: int  # held-out requests in all
    documents: int | None = None  # that they are of: with few, no saving is claimed
    teacher: dict[
        str, Any
    ]  # whose price: name, hypothetical, price, hosted, dollars_per_1k, and the like
    student: dict[str, Any]  # dollars_per_1k, price, utilisation, month_of_machines
    tests: tuple[str, ...]  # that decide whether an answer is acceptable
    when_served: bool  # they can be run on a new request
    unscored: int
    share: Ranged
    share_of_price: Ranged
    share_if_unscored_fail: Ranged | None = None
    quality: dict[str, Any]  # student minus teacher, beside replace_all
    distillation_dollars: Decimal | None
    requests_per_month: int
    headline: Way
    rows: tuple[Row, ...]
    sensitivity: tuple[Case, ...]
    reasons: dict[str, str] = {}

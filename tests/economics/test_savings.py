"""The savings, against a worked example whose every figure was computed by hand, and at its edges.

Twenty requests, each of a document of its own. The teacher is paid $1 a million tokens in and $10
out; a request has 400 tokens in and 60 out: $0.001, and 1,000 cost $1. The student takes 0.5 s on a
machine of $0.36 an hour that works half of its time: $0.0001, and 1,000 cost $0.10. Sixteen of the
twenty answers are acceptable.
"""

from collections.abc import Sequence
from datetime import date
from decimal import Decimal
from typing import Any

import pytest

from distill.economics.costs import NO_TIME, Tariff
from distill.economics.savings import NEEDS_ANSWER, NO_TEST, Assumptions, economics
from distill.evaluation.measurements import Difference
from distill.evaluation.scorecard import Economics, Saving, TeacherPrice, Way
from distill.evaluation.scorers import HeldOutRequest
from distill.evaluation.statistics import Certainty, Estimate
from distill.records import Usage
from distill.responders.prices import MachinePrice, TokenPrice

near = pytest.approx
MACHINE = MachinePrice(
    name="m", dollars_per_hour=Decimal("0.36"), date=date(2026, 1, 1), source="s"
)
HOSTED = TokenPrice(
    model="x", dollars_per_million_input=Decimal(1), dollars_per_million_output=Decimal(10),
    date=date(2026, 1, 1), source="s",
)  # fmt: skip
TEACHER, STUDENT = Tariff(HOSTED), Tariff(MACHINE, 0.5)
CERTAINTY = Certainty(samples=1000)
ASSUMED = Assumptions(TEACHER, STUDENT, 3.20, "", 10_000)


def asked(accepted: Sequence[bool | None], **changes: Any) -> list[HeldOutRequest]:
    usage = {
        "teacher": Usage(input_tokens=400, output_tokens=60),
        "student": Usage(input_tokens=400, output_tokens=60, seconds=0.5),
    }
    told = {"usage": usage, "test": "valid_json", "when_served": True, **changes}
    return [
        HeldOutRequest(item=f"i{k}", cluster=f"d{k}", accepted=verdict, **told)
        for k, verdict in enumerate(accepted)
    ]


def reckon(requests: Sequence[HeldOutRequest], assumed: Assumptions = ASSUMED) -> Economics:
    quality = Difference(mean=-0.1, low=-0.2, high=0.0)
    return economics(requests, assumed, CERTAINTY, TeacherPrice(name="x"), quality)


def saved(found: Economics, way: Way | None = None) -> Estimate:
    return found.saving(way).dollars_per_1k


def case(found: Economics, words: str) -> Saving:
    return next(case for case in found.sensitivity if words in (case.case or ""))


SIXTEEN = asked([k < 16 for k in range(20)])


def test_the_worked_example_has_the_figures_of_the_hand() -> None:
    found = reckon(SIXTEEN)
    assert (found.teacher.dollars_per_1k, found.student.dollars_per_1k) == near((1, 0.1))
    assert (found.share.value, found.share_of_price.value) == near((0.8, 0.8))
    ways = ("replace_all", "try_then_escalate", "perfect_router")
    assert [saved(found, way).value for way in ways] == near([0.9, 0.7, 0.72])
    tried = found.saving()
    assert tried.way == "try_then_escalate" and tried.dollars_per_month.value == near(7)
    # 3.20 / 0.0007 = 4,571.43 requests, at 10,000 in 30 days 13.714 days
    requests, days = tried.break_even.requests, tried.break_even.days
    assert (requests.value, days.value) == near((4571.4286, 13.714286))
    assert found.headline == "try_then_escalate" and found.tests == ("valid_json",)
    low, high = found.share_of_price.low, found.share_of_price.high
    assert low and high and 0.5 < low < 0.8 < high <= 1
    assert saved(found).ends == near((low - 0.1, high - 0.1))
    assert saved(found, "perfect_router").ends == near((low * 0.9, high * 0.9))
    assert requests.ends == near((3200 / (high - 0.1), 3200 / (low - 0.1)))


def test_every_case_has_the_figures_of_the_hand() -> None:
    found = reckon(SIXTEEN)
    assert case(found, "as measured").dollars_per_1k == saved(found)
    halved = case(found, "halves")
    assert (halved.teacher_dollars_per_1k, halved.dollars_per_1k.value) == near((0.5, 0.3))
    more = case(found, "ten times")
    assert (more.dollars_per_month.value, more.dollars_per_1k.value) == near((70, 0.7))
    assert more.break_even.days.value == near((found.saving().break_even.days.value or 0) / 10)
    lowest = case(found, "lower bound").dollars_per_1k
    assert lowest.value == saved(found).low and lowest.low is None
    idle = case(found, "25")
    assert (idle.student_dollars_per_1k, idle.dollars_per_1k.value) == near((0.2, 0.6))


def test_a_machine_rented_for_the_month_costs_its_whole_rent() -> None:
    found = reckon(SIXTEEN)
    # 720 h at $0.36 are $259.20; 10,000 requests of 0.5 s are 5,000 s of 2,592,000
    month, whole = found.student.month_of_machines, case(found, "whole month")
    assert month and (month.machines, month.dollars_per_month) == near((1, 259.2))
    assert month.in_use == near(5000 / 2592000)
    assert (whole.student_dollars_per_1k, whole.dollars_per_1k.value) == near((25.92, -25.12))
    assert whole.break_even.requests.value is None and whole.break_even.requests.reason
    busy = reckon(SIXTEEN, ASSUMED._replace(requests_per_month=11_000_000))
    month = busy.student.month_of_machines  # 5,500,000 s need 2.12
    assert month and month.machines == 3


def test_the_share_is_weighted_by_price_where_dear_requests_fail() -> None:
    dear = {"teacher": Usage(output_tokens=300), "student": Usage(seconds=0.5)}
    requests = asked([True] * 10) + [
        r.model_copy(update={"item": f"j{r.item}", "cluster": f"e{r.cluster}", "usage": dear})
        for r in asked([False] * 10)
    ]
    found = reckon(requests)  # ten of $0.001 accepted, ten of $0.003 not
    assert (found.share.value, found.share_of_price.value) == near((0.5, 0.25))
    assert found.teacher.dollars_per_1k == near(2)
    assert saved(found).value == near(0.4)  # 0.25 * 2 - 0.1


def test_a_local_teacher_is_paid_by_its_machine() -> None:
    usage = {"teacher": Usage(seconds=2.0), "student": Usage(seconds=0.5)}
    local = ASSUMED._replace(teacher=STUDENT)
    found = reckon(asked([k < 16 for k in range(20)], usage=usage), local)
    assert (found.teacher.dollars_per_1k, saved(found).value) == near((0.4, 0.22))
    idle = case(found, "25")  # for both: what one pays while it idles, so does the other
    assert (idle.teacher_dollars_per_1k, idle.dollars_per_1k.value) == near((0.8, 0.44))
    assert not any("whole month" in (case.case or "") for case in found.sensitivity)


def test_a_student_that_is_dearer_saves_less_than_nothing() -> None:
    found = reckon(SIXTEEN, ASSUMED._replace(student=Tariff(MACHINE, 0.01)))  # $5 for 1,000
    assert saved(found).value == near(-4.2)
    why = "nothing is saved, so the distillation is never paid back"
    assert found.saving().break_even.requests.reason == why
    low, value, high = (
        getattr(saved(found, "perfect_router"), k) for k in ("low", "value", "high")
    )
    assert value == near(-3.2) and low < value < high, "a negative difference turns the interval"


def test_without_a_test_that_can_be_run_only_replacing_all_is_known() -> None:
    none = reckon(asked([None] * 20, test=None, when_served=False))
    assert none.headline == "replace_all" and none.unscored == 0 and none.tests == ()
    assert none.share == saved(none, "perfect_router") == Estimate(reason=NO_TEST)
    assert saved(none, "try_then_escalate") == Estimate(reason=NO_TEST)
    assert not any("lower bound" in (case.case or "") for case in none.sensitivity)
    found = reckon(asked([k < 16 for k in range(20)], test="correct", when_served=False))
    assert found.headline == "replace_all" and found.share.value == 0.8
    tried = found.saving("try_then_escalate")
    assert tried.dollars_per_1k == tried.break_even.requests == Estimate(reason=NEEDS_ANSWER)
    assert saved(none).value == saved(found).value == near(0.9)
    assert saved(found, "perfect_router").value == near(0.72)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"teacher": Tariff(None, why="no row")}, "no row"),
        ({"student": Tariff(None, why="no machine")}, "no machine"),
        ({"teacher": STUDENT}, f"teacher: {NO_TIME}"),
    ],
)
def test_an_unknown_price_leaves_the_surplus_unknown(changes: dict[str, Any], reason: str) -> None:
    found = reckon(SIXTEEN, ASSUMED._replace(**changes))
    assert found.share.value == 0.8, "the share needs no price"
    for row in (*found.rows, *found.sensitivity):
        assert row.dollars_per_1k == row.dollars_per_month == Estimate(reason=reason)
        assert row.break_even.days == Estimate(reason=reason)
        assert row.student_dollars_per_1k is None


def test_an_unknown_cost_of_the_distillation_leaves_the_break_even_unknown() -> None:
    found = reckon(SIXTEEN, ASSUMED._replace(distillation=None, why_no_distillation="not stated"))
    assert saved(found).value == near(0.7)
    assert found.saving().break_even.requests == Estimate(reason="not stated")
    assert found.reasons == {"distillation_dollars": "not stated"}
    free = reckon(SIXTEEN, ASSUMED._replace(distillation=0.0))
    assert free.saving().break_even.requests.value == 0 and free.reasons == {}


def test_too_little_data_gives_no_interval_and_no_break_even() -> None:
    one = reckon(SIXTEEN[:1])
    assert one.share.value is None and "not enough data" in (one.share.reason or "")
    assert saved(one).value is None
    replaced = one.saving("replace_all")
    assert replaced.dollars_per_1k.value == near(0.9) and replaced.dollars_per_1k.low is None
    assert replaced.break_even.requests.value is None and replaced.break_even.requests.reason


def test_what_could_not_be_tested_is_counted_apart_and_too_much_of_it_is_no_share() -> None:
    few = reckon(asked([None, *[k < 16 for k in range(39)]]))
    assert few.unscored == 1 and few.share.value == near(16 / 39)
    many = reckon(asked([None] * 10 + [True] * 10))
    assert many.share.value is None
    assert many.share.reason == "only 10 of 20 answers could be tested"

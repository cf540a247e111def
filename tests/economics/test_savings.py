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
from distill.evaluation.scorecard import Amount, Economics, Saving, TeacherPrice
from distill.evaluation.scorers import HeldOutRequest
from distill.evaluation.statistics import Certainty
from distill.records import Usage
from distill.responders.prices import MachinePrice, TokenPrice

D = Decimal
MACHINE = MachinePrice(name="m", dollars_per_hour=D("0.36"), date=date(2026, 1, 1), source="s")
HOSTED = TokenPrice(
    model="x", dollars_per_million_input=D(1), dollars_per_million_output=D(10),
    date=date(2026, 1, 1), source="s",
)  # fmt: skip
TEACHER, STUDENT = Tariff(HOSTED), Tariff(MACHINE, D("0.5"))
CERTAINTY = Certainty(samples=1000)
ASSUMED = Assumptions(TEACHER, STUDENT, D("3.20"), "", 10_000)


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


def row(found: Economics, way: str) -> Saving:
    return next(row for row in found.rows if row.way == way)


def case(found: Economics, words: str) -> Saving:
    return next(case for case in found.sensitivity if words in (case.case or ""))


SIXTEEN = asked([k < 16 for k in range(20)])


def test_the_worked_example_has_the_figures_of_the_hand() -> None:
    found = reckon(SIXTEEN)
    assert found.teacher.dollars_per_1k == D("1") and found.student.dollars_per_1k == D("0.1")
    assert found.share.value == found.share_of_price.value == D("0.8")
    saved = {way: row(found, way).dollars_per_1k.value for way in ("replace_all", "perfect_router")}
    assert saved == {"replace_all": D("0.9"), "perfect_router": D("0.72")}
    tried = row(found, "try_then_escalate")
    assert tried.dollars_per_1k.value == D("0.7") and tried.dollars_per_month.value == D("7")
    # 3.20 / 0.0007 = 4,571.43 requests, at 10,000 in 30 days 13.714 days
    paid = tried.break_even
    assert paid.requests.value and round(paid.requests.value, 2) == D("4571.43")
    assert paid.days.value and round(paid.days.value, 3) == D("13.714")
    assert found.headline == "try_then_escalate" and found.tests == ("valid_json",)
    low, high = found.share_of_price.low, found.share_of_price.high
    assert low and high and D("0.5") < low < D("0.8") < high <= 1
    assert tried.dollars_per_1k.low == low - D("0.1")
    assert tried.dollars_per_1k.high == high - D("0.1")
    assert row(found, "perfect_router").dollars_per_1k.low == low * D("0.9")
    assert paid.requests.low == 3200 / (high - D("0.1"))
    assert paid.requests.high == 3200 / (low - D("0.1"))


def test_every_case_has_the_figures_of_the_hand() -> None:
    found = reckon(SIXTEEN)
    assert case(found, "as measured").dollars_per_1k == row(found, found.headline).dollars_per_1k
    halved = case(found, "halves")
    assert halved.teacher_dollars_per_1k == D("0.5") and halved.dollars_per_1k.value == D("0.3")
    more = case(found, "ten times")
    assert more.dollars_per_month.value == D("70") and more.dollars_per_1k.value == D("0.7")
    days = row(found, found.headline).break_even.days.value
    assert days and more.break_even.days.value == days / 10
    lowest = case(found, "lower bound").dollars_per_1k
    assert lowest.value == row(found, found.headline).dollars_per_1k.low and lowest.low is None
    idle = case(found, "25")
    assert idle.student_dollars_per_1k == D("0.2") and idle.dollars_per_1k.value == D("0.6")


def test_a_machine_rented_for_the_month_costs_its_whole_rent() -> None:
    found = reckon(SIXTEEN)
    # 720 h at $0.36 are $259.20; 10,000 requests of 0.5 s are 5,000 s of 2,592,000
    month = found.student.month_of_machines
    assert month and month.machines == 1 and month.dollars_per_month == D("259.2")
    assert round(month.in_use, 6) == D("0.001929")
    whole = case(found, "whole month")
    assert whole.student_dollars_per_1k and round(whole.student_dollars_per_1k, 9) == D("25.92")
    assert whole.dollars_per_1k.value and round(whole.dollars_per_1k.value, 9) == D("-25.12")
    assert whole.break_even.requests.value is None and whole.break_even.requests.reason
    busy = reckon(SIXTEEN, ASSUMED._replace(requests_per_month=11_000_000))
    assert (
        busy.student.month_of_machines and busy.student.month_of_machines.machines == 3
    )  # 5,500,000 s need 2.12


def test_the_share_is_weighted_by_price_where_dear_requests_fail() -> None:
    dear = {"teacher": Usage(output_tokens=300), "student": Usage(seconds=0.5)}
    requests = asked([True] * 10) + [
        r.model_copy(update={"item": f"j{r.item}", "cluster": f"e{r.cluster}", "usage": dear})
        for r in asked([False] * 10)
    ]
    found = reckon(requests)  # ten of $0.001 accepted, ten of $0.003 not
    assert found.share.value == D("0.5") and found.share_of_price.value == D("0.25")
    assert found.teacher.dollars_per_1k == D("2")
    assert row(found, "try_then_escalate").dollars_per_1k.value == D("0.4")  # 0.25 * 2 - 0.1


def test_a_local_teacher_is_paid_by_its_machine() -> None:
    usage = {"teacher": Usage(seconds=2.0), "student": Usage(seconds=0.5)}
    local = ASSUMED._replace(teacher=STUDENT)
    found = reckon(asked([k < 16 for k in range(20)], usage=usage), local)
    assert found.teacher.dollars_per_1k == D("0.4")
    assert row(found, "try_then_escalate").dollars_per_1k.value == D("0.22")  # 0.8 * 0.4 - 0.1
    idle = case(found, "25")  # for both: what one pays while it idles, so does the other
    assert (idle.teacher_dollars_per_1k, idle.dollars_per_1k.value) == (D("0.8"), D("0.44"))
    assert not any("whole month" in (case.case or "") for case in found.sensitivity)


def test_a_student_that_is_dearer_saves_less_than_nothing() -> None:
    dear = ASSUMED._replace(student=Tariff(MACHINE, D("0.01")))  # $5 for 1,000
    found = reckon(SIXTEEN, dear)
    tried, router = row(found, "try_then_escalate"), row(found, "perfect_router")
    assert tried.dollars_per_1k.value == D("-4.2")
    assert tried.break_even.requests.reason == (
        "nothing is saved, so the distillation is never paid back"
    )
    low, value, high = (getattr(router.dollars_per_1k, k) for k in ("low", "value", "high"))
    assert value == D("-3.2") and low < value < high, "a negative difference turns the interval"


def test_without_a_test_only_replacing_all_is_known() -> None:
    found = reckon(asked([None] * 20, test=None, when_served=False))
    assert found.headline == "replace_all" and found.unscored == 0 and found.tests == ()
    assert found.share == Amount(reason=NO_TEST)
    for way in ("try_then_escalate", "perfect_router"):
        assert row(found, way).dollars_per_1k == Amount(reason=NO_TEST)
    assert row(found, "replace_all").dollars_per_1k.value == D("0.9")
    assert not any("lower bound" in (case.case or "") for case in found.sensitivity)


def test_a_test_that_needs_the_answer_cannot_be_run_when_served() -> None:
    found = reckon(asked([k < 16 for k in range(20)], test="correct", when_served=False))
    assert found.headline == "replace_all" and found.share.value == D("0.8")
    assert row(found, "try_then_escalate").dollars_per_1k == Amount(reason=NEEDS_ANSWER)
    assert row(found, "try_then_escalate").break_even.requests.reason == NEEDS_ANSWER
    assert row(found, "perfect_router").dollars_per_1k.value == D("0.72")


@pytest.mark.parametrize(
    ("assumed", "reason"),
    [
        (ASSUMED._replace(teacher=Tariff(None, why="no row")), "no row"),
        (ASSUMED._replace(student=Tariff(None, why="no machine")), "no machine"),
        (ASSUMED._replace(teacher=STUDENT), f"teacher: {NO_TIME}"),
    ],
)
def test_an_unknown_price_leaves_the_surplus_unknown(assumed: Assumptions, reason: str) -> None:
    found = reckon(SIXTEEN, assumed)
    assert found.share.value == D("0.8"), "the share needs no price"
    for found_row in found.rows:
        assert found_row.dollars_per_1k == found_row.dollars_per_month == Amount(reason=reason)
        assert found_row.break_even.days == Amount(reason=reason)
    for found_case in found.sensitivity:
        assert found_case.dollars_per_1k.value is None
        assert found_case.student_dollars_per_1k is None


def test_an_unknown_cost_of_the_distillation_leaves_the_break_even_unknown() -> None:
    unpriced = ASSUMED._replace(distillation=None, why_no_distillation="not stated")
    found = reckon(SIXTEEN, unpriced)
    assert row(found, "try_then_escalate").dollars_per_1k.value == D("0.7")
    assert row(found, "try_then_escalate").break_even.requests == Amount(reason="not stated")
    assert found.reasons == {"distillation_dollars": "not stated"}
    free = reckon(SIXTEEN, ASSUMED._replace(distillation=D(0)))
    assert row(free, "try_then_escalate").break_even.requests.value == 0 and free.reasons == {}


def test_too_little_data_gives_no_interval_and_no_break_even() -> None:
    one = reckon(SIXTEEN[:1])
    assert one.share.value is None and one.share.reason and "not enough data" in one.share.reason
    assert row(one, "try_then_escalate").dollars_per_1k.value is None
    replaced = row(one, "replace_all")
    assert replaced.dollars_per_1k.value == D("0.9") and replaced.dollars_per_1k.low is None
    assert replaced.break_even.requests.value is None and replaced.break_even.requests.reason


def test_what_could_not_be_tested_is_counted_apart_and_too_much_of_it_is_no_share() -> None:
    few = reckon(asked([None, *[k < 16 for k in range(39)]]))
    assert few.unscored == 1 and few.share.value == D(16) / 39
    assert few.share_if_unscored_fail and few.share_if_unscored_fail.value == D("0.4")
    many = reckon(asked([None] * 10 + [True] * 10))
    assert many.share.value is None and many.share.reason == (
        "only 10 of 20 answers could be tested"
    )

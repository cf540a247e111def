"""The surplus statement in words: it claims what its interval supports, names whose price it is, and says what is unknown."""

from decimal import Decimal
from typing import Any

import pytest

from distill.economics.costs import Tariff
from distill.economics.savings import NEEDS_ANSWER, Assumptions, economics
from distill.evaluation.measurements import Difference
from distill.evaluation.scorecard import Costs, Economics, TeacherPrice
from distill.report.render import environment
from distill.report.tables import saving_rows, sensitivity_rows, token_rows, whole_requests
from tests.economics.test_savings import ASSUMED, CERTAINTY, MACHINE, SIXTEEN, asked, reckon


def worded(economics: Economics) -> str:
    sentences = environment(markdown=True).globals["savings"](economics)
    return "\n".join(sentences).replace("\u00a0", " ")


def said(requests: Any, assumed: Assumptions = ASSUMED) -> str:
    return worded(reckon(requests, assumed))


def test_the_statement_says_share_surplus_break_even_and_assumptions() -> None:
    text = said(SIXTEEN)
    assert "can take 80 % [60 %, 95 %] of 20 held-out" in text and "valid json" in text
    assert "saves $0.70 per 1,000 requests [$0." in text and "], of $1.00 at x's list price" in text
    assert "10,000 requests a month save $7.00 [" in text
    assert "cost $3.20 of machine time and tokens" in text
    assert "\n4,572 requests [" in text.replace(". ", ".\n") and "13.7" not in text, (
        "days are said in hours"
    )
    assert "a machine that works 50 % of its paid time" in text
    assert "1 machine would cost $259.20 a month and work 0.2 % of the time" in text
    assert "hypothetical" not in text


def test_a_price_of_another_model_is_called_hypothetical() -> None:
    named = TeacherPrice(name="giant", hypothetical=True, answers_dollars=Decimal(2))
    found = economics(
        SIXTEEN, ASSUMED, quality=Difference(), compared_with=named, certainty=CERTAINTY
    )
    text = worded(found)
    assert "This is hypothetical" in text and "a model that is not giant" in text
    assert "$2.00 of it is what the teacher's answers would have cost" in text


def test_what_costs_more_is_said_to_cost_more() -> None:
    text = said(SIXTEEN, ASSUMED._replace(student=Tariff(MACHINE, Decimal("0.01"))))
    assert "saves nothing: it costs $4.20 more per 1,000 requests" in text
    assert "No break-even is stated: nothing is saved" in text


def test_where_the_interval_holds_nothing_no_saving_is_claimed() -> None:
    text = said(SIXTEEN, ASSUMED._replace(student=Tariff(MACHINE, Decimal("0.5") / 7)))
    assert "undecided: the interval includes 0" in text and " saves $" not in text
    assert "No break-even is stated: it may never be paid back: the interval includes 0" in text


@pytest.mark.parametrize(
    ("requests", "words"),
    [
        (asked([None] * 9, test=None, when_served=False), "Which requests the student can take is not known"),
        (SIXTEEN[:1], "not enough data"),
        ([*SIXTEEN, *asked([None] * 3, test=None)], "leave out 3 requests that no test covers"),
        (asked([None, *[True] * 30]), "1 answers could not be tested"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_said(requests: Any, words: str) -> None:
    assert words in said(requests)


def test_replacing_all_says_what_it_does_to_quality() -> None:
    named = TeacherPrice(name="x")
    untested = asked([None] * 20, test=None, when_served=False)
    for quality, words in (
        ({"mean": -0.05, "low": -0.1, "high": 0.0}, "−5.0 points"),
        ({"mean": None, "reason": "no checker"}, "not known (no checker)"),
    ):
        found = economics(untested, ASSUMED, CERTAINTY, named, Difference(**quality))
        text = worded(found)
        assert "good or not" in text and words in text


def test_a_test_that_needs_the_answer_is_no_way_to_try_first() -> None:
    text = said(asked([True] * 20, test="correct", when_served=False))
    assert f"What a cascade would save is not stated: {NEEDS_ANSWER}." in text
    assert "good or not" in text and "good or not" not in said(SIXTEEN)


def test_an_unknown_price_is_a_reason_and_dashes() -> None:
    unpriced = ASSUMED._replace(teacher=Tariff(None, why="no row of x"))
    text = said(SIXTEEN, unpriced)
    assert "what it saves is not known: no row of x." in text
    found = reckon(SIXTEEN, unpriced)
    assert all(cell == "–" for row in saving_rows(found)[1] for cell in row[1:])


def test_tables_have_a_row_for_each_way_and_case() -> None:
    found = reckon(SIXTEEN)
    head, rows = saving_rows(found)
    assert [len(row) for row in rows] == [len(head)] * 3 and "upper bound" in rows[2][0]
    head, rows = sensitivity_rows(found)
    assert [len(row) for row in rows] == [len(head)] * len(found.sensitivity)
    assert rows[-1][3].startswith("−$25.12 [−$25.")
    head, rows = token_rows(Costs())
    assert [len(row) for row in rows] == [len(head)] * 3 and set(rows[0][1:]) == {"–"}


def test_requests_are_rounded_up() -> None:
    assert (whole_requests(4571.43), whole_requests(12.0)) == ("4,572", "12")

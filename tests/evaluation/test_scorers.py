"""Scores: an answer that is wrong is 0, an error of ours is no score; what is acceptable."""

from typing import Any

import pytest

from distill.evaluation import results, scorers
from distill.evaluation.scorers import (
    Acceptance,
    AnswersByModel,
    agrees,
    by_checker,
    compares_with_answer,
    measure_task,
    passes,
    requests_of,
)
from distill.evaluation.statistics import Certainty
from distill.records import Item, Message, Prompt, Response, Usage

NUMBER = {"kind": "number"}
FEW = Certainty(samples=200)


def item(reference: str | None = "7", number: int = 0, task: str = "math") -> Item:
    messages = (Message(role="user", content=f"{number}: 3 + 4?"),)
    return Item.make(Prompt.make(messages, f"d{number}", task, reference=reference))


def answer(text: str, stop: Any = "end", error: str | None = None) -> Response:
    usage = Usage(input_tokens=3, output_tokens=2, seconds=0.5)
    return Response(
        id="r", request_key="k", sample=0, prompt_id="p", model="m", text=text, stop=stop,
        error=error, usage=usage,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("response", "value", "reason"),
    [
        (answer("so it is #### 7"), 1.0, "equals"),
        (answer("#### 8"), 0.0, "reference"),
        (answer("I would rather not."), 0.0, "no number"),
        (answer("  "), 0.0, "empty"),
        (answer("#### 7", stop="length"), 0.0, "truncated"),
        (answer("", stop="filtered"), 0.0, "refused"),
        (answer("", stop="error", error="boom"), None, "request failed: boom"),
        (None, None, "no answer was stored"),
    ],
)
def test_a_checked_answer(response: Response | None, value: float | None, reason: str) -> None:
    score = passes(item(), response, NUMBER, "student")
    assert score.value == value and reason in score.reason and score.model == "student"
    assert score.answer == ("7" if value else score.answer), "what was extracted is kept"


def test_a_missing_reference_is_not_the_models_error() -> None:
    assert passes(item(None), answer("7"), NUMBER, "student").value is None


def test_a_checker_that_crashes_scores_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise ValueError("bad checker")

    monkeypatch.setattr(scorers, "check", crash)
    score = passes(item(), answer("7"), NUMBER, "student")
    assert score.value is None and "bad checker" in score.reason


@pytest.mark.parametrize(
    ("response", "reference", "value"),
    [
        (answer("The answer is seven."), "The answer is seven.", 100.0),
        (answer("xyz"), "The answer is seven.", 0.0),
        (answer(""), "The answer is seven.", 0.0),
        (None, "The answer is seven.", None),
        (answer("7"), " ", None),
    ],
)
def test_agreement_is_chrf_against_the_teachers_answer(
    response: Response | None, reference: str, value: float | None
) -> None:
    score = agrees(item(), response, reference, "student").value
    assert score == (None if value is None else pytest.approx(value, abs=5))


def test_grades_are_measured_and_are_no_checks_passed() -> None:
    items = [item(f'{{"name": "A{k}", "age": {k}}}', k) for k in range(4)]
    base = {i.id: answer('{"name": "A1"}') for i in items}
    answers = {"base": base, "student": {i.id: answer(i.reference or "") for i in items}}
    measured = measure_task("math", items, answers, "field_f1", {"kind": "field_f1"}, "x")
    row = results.row_of(measured, FEW)
    assert row.student == 1.0 and row.base and row.base < 0.5
    assert row.student_minus_base.mcnemar is None and results.pool([measured]) is None


@pytest.mark.parametrize(
    ("checker", "needs_it"),
    [
        ({"kind": "number"}, True),
        ({"kind": "exact"}, True),
        ({"kind": "regex", "pattern": "answer is (.*)"}, True),
        ({"kind": "regex", "pattern": "^[A-Z]"}, False),
        ({"kind": "json_object", "keys": {"a": "any"}}, False),
        ({"kind": "python_code"}, False),  # the name to use is part of the question
        ({"kind": "max_sentences", "max": 1}, False),
    ],
)
def test_a_check_against_the_right_answer_is_told_from_one_of_form(
    checker: dict[str, Any], needs_it: bool
) -> None:
    assert compares_with_answer(checker) is needs_it


def test_only_answers_that_pass_are_accepted_and_errors_of_ours_are_unknown() -> None:
    items, untested = [item(number=k) for k in range(3)], item(number=9, task="chat")
    texts = [answer("#### 7"), answer("#### 8"), answer("", "error"), answer("hello")]
    by_id = {i.id: text for i, text in zip([*items, untested], texts, strict=True)}
    answers: AnswersByModel = dict.fromkeys(("teacher", "base", "student"), by_id)
    measured = measure_task("math", items, answers, "correct", NUMBER)
    rows = requests_of([*items, untested], answers, [by_checker(measured, NUMBER)])
    assert [row.accepted for row in rows] == [True, False, None, None]
    assert [row.test for row in rows] == ["correct"] * 3 + [None]
    assert rows[0].usage["student"].seconds == 0.5 and rows[0].cluster == "d0"
    assert rows[2].usage == {}, "a request that failed took nothing that could be measured"


def test_another_s_verdicts_stand_in_by_item() -> None:
    one, two = item(number=1), item(number=2)
    judge = Acceptance("judge", {one.id: True}, when_served=False)
    rows = requests_of([one, two], {"student": {}}, [judge])
    assert (rows[0].test, rows[0].accepted, rows[0].when_served) == ("judge", True, False)
    assert (rows[1].test, rows[1].accepted) == (None, None)

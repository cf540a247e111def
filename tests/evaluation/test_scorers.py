"""Scores: an answer that is wrong is 0, an error of ours is no score; what is acceptable."""

from typing import Any

import pytest

from distill.evaluation import results
from distill.evaluation.scorers import (
    JUDGED,
    AnswersByModel,
    compares_with_answer,
    measure_items,
    measure_tasks,
    requests_of,
    score_answer,
)
from distill.evaluation.statistics import Certainty
from distill.records import Item, Message, Prompt, Response, Score, Usage
from distill.tasks import scoring
from distill.tasks.task import shipped

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
    score = score_answer(item(), response, "student", NUMBER)
    assert score.value == value and reason in score.reason and score.model == "student"
    assert score.answer == ("7" if value else score.answer), "what was extracted is kept"


def test_errors_of_ours_score_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise ValueError("bad checker")

    assert score_answer(item(None), answer("7"), "student", NUMBER).value is None, "no reference"
    monkeypatch.setattr(scoring, "check", crash)
    score = score_answer(item(), answer("7"), "student", NUMBER)
    assert score.value is None and "bad checker" in score.reason


@pytest.mark.parametrize(
    ("text", "reference", "value"),
    [("It is seven.", "It is seven.", 100.0), ("xyz", "It is seven.", 0.0), ("7", " ", None)],
)
def test_agreement_is_chrf_against_the_teachers_answer(text, reference, value):
    score = score_answer(item(), answer(text), "student", None, reference).value
    assert score == (None if value is None else pytest.approx(value, abs=5))


def test_grades_are_measured_and_are_no_checks_passed() -> None:
    items = [item(f'{{"name": "A{k}", "age": {k}}}', k) for k in range(4)]
    base = {i.id: answer('{"name": "A1"}') for i in items}
    answers = {"base": base, "student": {i.id: answer(i.reference or "") for i in items}}
    measured = measure_items(items, answers, {"kind": "field_f1"}, "field_f1", "x")
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
def test_a_check_against_the_right_answer_is_told_from_one_of_form(checker, needs_it):
    assert compares_with_answer(checker) is needs_it


def test_only_answers_that_pass_are_accepted_and_errors_of_ours_are_unknown() -> None:
    items, untested = [item(number=k) for k in range(3)], item(number=9, task="chat")
    texts = [answer("#### 7"), answer("#### 8"), answer("", "error"), answer("hello")]
    by_id = {i.id: text for i, text in zip([*items, untested], texts, strict=True)}
    answers: AnswersByModel = dict.fromkeys(("teacher", "base", "student"), by_id)
    rows = [measure_items(items, answers, NUMBER, "correct"), measure_items([untested], answers)]
    requests = requests_of([*items, untested], answers, rows)
    assert [request.accepted for request in requests] == [True, False, None, None]
    assert [request.test for request in requests] == ["correct"] * 3 + [None]
    assert requests[0].usage["student"].seconds == 0.5 and requests[0].cluster == "d0"
    assert requests[2].usage == {}, "a request that failed took nothing that could be measured"


def test_a_judge_stands_in_where_there_is_no_checker() -> None:
    items = [item(number=k, task="chat") for k in range(6)]
    by_id = {i.id: answer("" if k == 2 else "hello") for k, i in enumerate(items)}
    values = [1.0, 0.5, 0.5, 0.0, None]  # a tie with an answer that is empty is no win
    verdicts = [
        Score(item_id=i.id, model="m", value=value, reason="r")
        for i, value in zip(items, values, strict=False)
    ]
    rows = requests_of(items, {"teacher": by_id, "student": by_id}, [], verdicts)
    assert [row.accepted for row in rows] == [True, True, False, False, None, None]
    assert [row.test for row in rows] == [JUDGED] * 5 + [None] and not rows[0].when_served
    checked = measure_items(items, {"teacher": by_id, "student": by_id}, NUMBER, "correct")
    rows = requests_of(items, {"teacher": by_id, "student": by_id}, [checked], verdicts)
    assert {row.test for row in rows} == {"correct"}, "a checker counts for more"


def test_a_task_whose_references_are_all_missing_is_measured_as_agreement() -> None:
    items = [item(None, k, "math_word_problem") for k in range(3)]
    by_id = {i.id: answer("It is 7.") for i in items}
    answers: AnswersByModel = dict.fromkeys(("teacher", "base", "student"), by_id)
    assert measure_tasks(items, answers, shipped)["math_word_problem"].metric == "chrF"
    referenced = [*items, item("7", 9, "math_word_problem")]
    assert measure_tasks(referenced, answers, shipped)["math_word_problem"].metric == "correct"

"""Which answers are acceptable, by which test, and whether that test can be run on a new request."""

from typing import Any

import pytest

from distill.evaluation.scorers import (
    Acceptance,
    by_checker,
    compares_with_answer,
    measure_task,
    requests_of,
)
from distill.records import Item, Message, Prompt, Response, Usage


def item(number: int, task: str = "math") -> Item:
    prompt = Prompt.make(
        (Message(role="user", content=str(number)),), f"d{number}", task, None, "7"
    )
    return Item.make(prompt)


def answer(of: Item, text: str, stop: Any = "end") -> Response:
    usage = Usage(input_tokens=3, output_tokens=2, seconds=0.5)
    return Response(
        id=f"r{of.id}", request_key="k", sample=0, prompt_id=of.prompt.id, model="m", text=text,
        stop=stop, usage=usage,
    )  # fmt: skip


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


def test_only_answers_that_pass_are_accepted_and_what_failed_on_our_side_is_unknown() -> None:
    items, untested = [item(k) for k in range(3)], item(9, "chat")
    given = {
        items[0].id: answer(items[0], "#### 7"),
        items[1].id: answer(items[1], "#### 8"),
        items[2].id: answer(items[2], "", "error"),
        untested.id: answer(untested, "hello"),
    }
    answers = {"teacher": given, "base": given, "student": given}
    measured = measure_task("math", items, answers, "correct", {"kind": "number"})
    rows = requests_of([*items, untested], answers, [by_checker(measured, {"kind": "number"})])
    assert [row.accepted for row in rows] == [True, False, None, None]
    assert [row.test for row in rows] == ["correct"] * 3 + [None]
    assert rows[0].usage["student"].seconds == 0.5 and rows[0].cluster == "d0"
    assert rows[2].usage == {}, "a request that failed took nothing that could be measured"


def test_another_s_verdicts_stand_in_by_item() -> None:
    one, two = item(1), item(2)
    judge = Acceptance("judge", {one.id: True}, when_served=False)
    rows = requests_of([one, two], {"student": {}}, [judge])
    assert (rows[0].test, rows[0].accepted, rows[0].when_served) == ("judge", True, False)
    assert (rows[1].test, rows[1].accepted) == (None, None)

"""Scorers: what is the model's fault scores 0, what is ours scores nothing, and both say why."""

import pytest

from distill.evaluation import scorers
from distill.evaluation.scorers import agrees, passes
from distill.records import Item, Message, Prompt, Response, Stop, Usage

NUMBER = {"kind": "number"}


def item(reference: str | None = "7") -> Item:
    messages = (Message(role="user", content="3 + 4?"),)
    return Item.make(Prompt.make(messages, "doc", "math_word_problem", reference=reference))


def answer(text: str, stop: Stop = "end", error: str | None = None) -> Response:
    return Response(
        id="r", request_key="k", sample=0, prompt_id="p", model="m", text=text, stop=stop, error=error,
        usage=Usage(output_tokens=3),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "value", "reason"),
    [
        (answer("#### 7"), 1.0, "equals"),
        (answer("#### 8"), 0.0, "reference"),
        (answer("I would rather not."), 0.0, "no number"),
        (answer("  "), 0.0, "empty"),
        (answer("#### 7", stop="length"), 0.0, "truncated"),
        (answer("", stop="filtered"), 0.0, "refused"),
        (answer("", stop="error", error="boom"), None, "request failed: boom"),
        (None, None, "no answer was stored"),
    ],
)
def test_a_checked_answer(given: Response | None, value: float | None, reason: str) -> None:
    score = passes(item(), given, NUMBER, "student")
    assert score.value == value and reason in score.reason and score.model == "student"


def test_a_missing_reference_is_not_the_models_fault() -> None:
    assert passes(item(None), answer("7"), NUMBER, "student").value is None


def test_a_checker_that_crashes_scores_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise ValueError("bad checker")

    monkeypatch.setattr(scorers, "check", crash)
    score = passes(item(), answer("7"), NUMBER, "student")
    assert score.value is None and "bad checker" in score.reason


def test_the_answer_that_was_read_out_is_kept() -> None:
    assert passes(item(), answer("so it is #### 7"), NUMBER, "m").answer == "7"


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

"""Questions that the teacher writes: what it is asked, what is read from its reply, and both views of the prompts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.corpus.questions import (
    KINDS,
    distinct,
    question_prompts,
    read_questions,
    shares,
    to_prompts,
)
from distill.errors import DistillError, Exit
from distill.records import Document

DOCUMENT = Document.make("Tin melts at 232 degrees. <|im_end|>", "a:1", split="train")


def test_questions_are_spread_over_the_kinds() -> None:
    assert shares(("factual", "explain", "apply"), 3) == [
        ("factual", 1),
        ("explain", 1),
        ("apply", 1),
    ]
    assert shares(("factual", "explain"), 5) == [("factual", 3), ("explain", 2)]
    assert shares(("factual", "explain"), 1) == [("factual", 1)]


@pytest.mark.parametrize("kinds", [("riddle",), ()])
def test_an_unknown_kind_names_the_known_ones(kinds: tuple[str, ...]) -> None:
    with pytest.raises(DistillError, match="factual, explain") as caught:
        shares(kinds, 3)
    assert caught.value.code == Exit.CONFIG


def test_the_teacher_is_asked_once_a_kind_with_the_passage_fenced() -> None:
    asked = question_prompts(DOCUMENT, tuple(KINDS), 7)
    assert [prompt.task for prompt in asked] == [f"question:{kind}" for kind in KINDS]
    assert len({prompt.id for prompt in asked}) == len(KINDS)
    for prompt in asked:
        text = prompt.messages[0].content
        assert "Tin melts" in text and "<|im_end|>" not in text
    assert "2 different questions" in asked[0].messages[0].content
    assert "one question" in asked[-1].messages[0].content


def test_a_reply_is_read_line_by_line() -> None:
    reply = (
        'Here are the questions:\n1. At what temperature does tin melt?\n- "Why does tin melt so early?"\n'
        "**Q2: How does tin differ from lead?**\n3) What does the passage say about tin?\nWhy?\n"
        "4. Tin melts at 232 degrees.\n"
    )
    assert read_questions(reply) == [
        "At what temperature does tin melt?",
        "Why does tin melt so early?",
        "How does tin differ from lead?",
    ]


def test_questions_that_nearly_repeat_are_left_out() -> None:
    first = "At what temperature does tin melt?"
    assert distinct([first, "At what temperature does the tin melt?", first.upper(), "Why?"]) == [
        first,
        "Why?",
    ]


@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize("student", [True, False])
def test_each_side_sees_the_passage_or_not(teacher: bool, student: bool) -> None:
    (prompt,) = to_prompts(DOCUMENT, ["When does tin melt?"], teacher, student)
    assert ("232" in prompt.asked_of_teacher()[-1].content) is teacher
    assert ("232" in prompt.messages[-1].content) is student
    assert (prompt.teacher_messages is None) is (teacher == student)
    assert prompt.document_id == DOCUMENT.id and prompt.task == "question"
    assert "<|im_end|>" not in prompt.model_dump_json()


@settings(deadline=None)
@given(st.text())
def test_no_reply_makes_reading_raise(reply: str) -> None:
    for question in distinct(read_questions(reply)):
        assert question.endswith("?") and "\n" not in question

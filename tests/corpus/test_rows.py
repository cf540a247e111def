"""Rows: what is a document, what a prompt, what its reference; and what is refused."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.config.tree import Columns
from distill.corpus.rows import interpret

ASKED = [{"role": "user", "content": "Hi?"}]


def meta(row: dict[str, Any], **options: Any) -> dict[str, Any]:
    return interpret(row, "a:1", **options).meta


def test_a_document_keeps_the_other_plain_columns() -> None:
    row = {"id": 7, "text": " Text. ", "title": "T", "n": 3, "list": [1], "none": None}
    document = interpret(row, "a:1")
    assert (document.text, document.source) == ("Text.", "a:1")
    assert document.meta == {"title": "T", "n": 3, "id": "7"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi?"},
        {"question": "Hi?"},
        {"instruction": "Hi?"},
        {"messages": ASKED},
        {"conversations": [{"from": "human", "value": "Hi?"}]},
        {"prompt": ASKED},
    ],
)
def test_the_usual_shapes_of_a_prompt(row: dict[str, Any]) -> None:
    assert meta(row) == {"messages": ASKED}
    assert interpret(row, "a:1").text == "Hi?"


def test_the_answer_is_the_reference_and_is_recorded() -> None:
    row = {"question": "2+3?", "answer": "2+3=5\n#### 5"}
    assert meta(row)["reference"] == row["answer"]
    found = meta(row, pattern=r"####\s*(.+)$")
    assert (found["reference"], found["recorded_answer"]) == ("5", row["answer"])
    assert meta({"prompt": "2+3?", "reference": 5})["reference"] == "5"
    assert "recorded_answer" not in meta({"prompt": "2+3?", "reference": 5})


def test_the_last_turn_of_the_assistant_is_recorded_and_not_asked() -> None:
    turns = [
        {"from": "system", "value": "Be kind."},
        {"from": "human", "value": "One?"},
        {"from": "gpt", "value": "1"},
        {"from": "human", "value": "Two?"},
        {"from": "gpt", "value": "2"},
    ]
    found = meta({"conversations": turns, "model": "m", "license": "mit", "cost": 0.25})
    assert [turn["role"] for turn in found["messages"]] == ["system", "user", "assistant", "user"]
    assert found["recorded_answer"] == "2" and "reference" not in found
    assert (found["recorded_model"], found["recorded_license"]) == ("m", "mit")
    assert found["recorded_dollars"] == 0.25
    assert meta({"messages": turns}, pattern="(.)")["reference"] == "2"


def test_conversations_with_another_history_are_other_documents() -> None:
    first = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, *ASKED]
    assert interpret({"messages": first}, "a").id != interpret({"messages": ASKED}, "a").id


def test_named_columns_win() -> None:
    row = {"text": "no", "body_html": "yes", "q": "ask?", "gold": "g", "key": "k"}
    assert interpret(row, "a", Columns(text="body_html")).text == "yes"
    found = meta(row, columns=Columns(prompt="q", reference="gold", id="key"), form="prompts")
    assert (found["reference"], found["id"]) == ("g", "k")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "no column of text"),
        ({"text": None}, "no column of text"),
        ({"text": 3}, "int, not text"),
        ({"text": ""}, "empty"),
        ({"text": "ok", "title": "\ud800"}, "surrogate"),
        ({"messages": []}, "list of turns"),
        ({"messages": "text"}, None),
        ({"messages": [1]}, "role and a text"),
        ({"messages": [{"role": "root", "content": "x"}]}, "unknown role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
        ({"messages": [{"role": "user", "content": None}]}, "NoneType"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no last user turn"),
        ({"messages": [*ASKED, {"role": "system", "content": "x"}]}, "no last user turn"),
    ],
)
def test_a_row_that_is_neither_says_why(row: dict[str, Any], reason: str | None) -> None:
    if reason is None:
        assert meta(row)["messages"][0]["content"] == "text"
        return
    with pytest.raises(ValueError, match=reason):
        interpret(row, "a:1")


def test_a_reference_pattern_that_finds_nothing_is_a_bad_row() -> None:
    with pytest.raises(ValueError, match="reference_pattern"):
        interpret({"question": "q", "answer": "none"}, "a:1", pattern="#### (.+)")


def test_forms_that_are_asked_for_are_not_guessed() -> None:
    row = {"prompt": "p", "text": "t"}
    assert "messages" in meta(row) and "messages" not in meta(row, form="documents")
    with pytest.raises(ValueError, match="with a prompt"):
        interpret({"text": "t"}, "a", form="prompts")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=())),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
NAMES = st.sampled_from(
    ["id", "text", "prompt", "messages", "answer", "conversations", "model", "x"]
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]), "content": JSON}
    ),
    max_size=3,
)


@settings(deadline=None)
@given(st.dictionaries(NAMES, JSON | TURNS, max_size=5))
def test_any_row_is_read_or_refused_and_what_is_read_can_be_stored(row: dict[str, Any]) -> None:
    try:
        document = interpret(row, "a:1")
    except ValueError:
        return
    again = type(document).from_line(document.to_line())
    assert again == document and json.dumps(again.meta, allow_nan=False)

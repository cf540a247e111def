"""The records: ids come from content, the JSON form is strict and comes back whole."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from distill.records import (
    Document,
    Item,
    Message,
    Pair,
    Prompt,
    Response,
    Score,
    canonical,
    digest,
)

ASKED = (Message(role="system", content="be brief"), Message(role="user", content="why?\u2028"))
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def prompt(**changes) -> Prompt:
    """Return a prompt; `changes` replace its parts."""
    return Prompt.make(**{"messages": ASKED, "document_id": "d", "task": "t", **changes})


def response(text: str = "because") -> Response:
    """Return an answer."""
    identity = Response.make_id("k", 0)
    return Response(
        id=identity, request_key="k", sample=0, prompt_id="p", model="m", text=text, stop="end"
    )


@given(JSON)
def test_canonical_json_comes_back_and_does_not_depend_on_order(value):
    line = canonical({"b": value, "a": 1})
    assert json.loads(line) == {"a": 1, "b": value} and b"\n" not in line
    assert line == canonical({"a": 1, "b": json.loads(canonical(value))})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800", {"a": ["\udfff"]}])
def test_what_json_or_utf8_cannot_hold_is_a_value_error(value):
    with pytest.raises(ValueError):
        canonical(value)


def test_ids_are_the_same_on_every_machine():
    assert digest({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad808"
    assert Document.make("x", "here").id == Document.make("x", "there", split="train").id


def test_a_split_that_an_earlier_version_wrote_in_meta_is_read():
    line = '{"id":"1","text":"x","source":"s","meta":{"split":"heldout","name":"n"}}'
    document = Document.model_validate_json(line)
    assert (document.split, document.meta) == ("heldout", {"name": "n"})
    own = Document.make("x", "s", {"split": "a column of the user's"}, "train")
    assert Document.model_validate_json(own.model_dump_json()) == own


def test_a_prompt_s_id_depends_on_everything_in_it():
    other = (Message(role="user", content="else"),)
    changes = {"messages": other, "teacher_messages": other}
    changes |= {"document_id": "e", "task": "u", "reference": "r"}
    assert len({prompt().id, *(prompt(**{key: changes[key]}).id for key in changes)}) == 6
    assert prompt().id == prompt().id


def test_an_item_is_clustered_by_document():
    item = Item.make(prompt(reference="r"))
    assert (item.cluster, item.task, item.reference) == ("d", "t", "r")
    assert item.id == Item.make(prompt(reference="r")).id != Item.make(prompt()).id


@given(st.text())
def test_every_text_comes_back_on_one_line(text):
    pair = Pair(prompt=prompt(), response=response(text))
    line = pair.model_dump_json()
    assert Pair.model_validate_json(line) == pair and "\n" not in line


@pytest.mark.parametrize(
    "line",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"item_id": "i", "model": "m", "value": 1, "reason": "r", "extra": 1}',
        '{"item_id": "i", "model": "m", "value": "x", "reason": "r"}',
        '{"item_id": "\\ud800", "model": "m", "value": 1, "reason": "r"}',
        b'{"item_id": "\xff", "model": "m", "value": 1, "reason": "r"}',
        "[" * 100_000,
    ],
)
def test_anything_else_is_a_validation_error(line):
    with pytest.raises(ValidationError):
        Score.model_validate_json(line)

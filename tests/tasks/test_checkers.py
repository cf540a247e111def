"""The checks of an answer: what passes, what fails and why, and that no text makes one raise."""

import json
import time
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, Json

from distill.records import Message, Prompt
from distill.tasks import checkers, json_schema
from distill.tasks.checkers import (
    KINDS,
    NEEDS_REFERENCE,
    RUNS_CODE,
    check,
    count_sentences,
    read_number,
    validate,
)
from distill.tasks.sandbox.programs import permit, unavailable

API = {
    "kind": "json_object",
    "keys": {"name": "string", "purpose": "string", "parameters": "[string]", "returns": "any"},
}
CHECKERS: list[dict[str, Any]] = [
    API,
    {"kind": "regex", "pattern": r"answer: (\w+)"},
    {"kind": "max_sentences", "max": 2},
    {"kind": "json_schema", "schema": {"type": "object", "required": ["a"]}},
    *({"kind": kind} for kind in "python_code python_tests number math field_f1 exact".split()),
    *({"kind": kind} for kind in "normalised includes choice".split()),
]
LABEL = {"kind": "regex", "pattern": r"label=(\w+)"}
GOOD = {"name": "len", "purpose": "Counts.", "parameters": ["obj"], "returns": None}


def prompt(reference: str | None = None) -> Prompt:
    return Prompt.make((Message(role="user", content="q"),), "d", "t", reference=reference)


def passes(checker: dict[str, Any], text: str, reference: str | None = None) -> bool:
    return bool(check(checker, prompt(reference), text).passed)


JSON = json.dumps(GOOD)
TABLE = yaml.safe_load(Path("tests/fixtures/answers.yaml").read_text(encoding="utf-8"))
PASSING: list[tuple[str | dict[str, Any], str | None, str, bool]] = [
    *map(tuple, TABLE["checks"]),
    # checker, reference, text, whether it passes
    (API, None, JSON, True),
    (API, None, json.dumps(GOOD | {"returns": {"type": "int"}}), True),
    (API, None, json.dumps(GOOD | {"parameters": []}), True),
    (API, None, json.dumps(GOOD | {"parameters": [1]}), False),
    (API, None, json.dumps(GOOD | {"parameters": "obj"}), False),
    (API, None, json.dumps(GOOD | {"name": None}), False),
    (API, None, json.dumps(GOOD | {"raises": "TypeError"}), False),
    (API, None, '{"name": "len"}', False),
    (API, None, json.dumps([GOOD]), False),
    (API, None, f"```json\n{JSON}\n```", True),
    (API, None, f"Here it is:\n```json\n{JSON}\n```", False),
    (API, None, f"```\n```json\n{JSON}\n```\n```", False),
    *((API, None, text, False) for text in ("[" * 100_000, '{"a":' * 100_000, "1" * 5_000)),
    *((API, None, text, False) for text in ("", "\x00", "{" + "}" * 99)),
    ("python_code", "json.dumps", "(" * 10_000, False),
    ("python_code", "json.dumps", "-" * 19_000 + "dumps", False),
    ("python_code", "json.dumps", "dumps(1)" + "\n" * 30_000, True),
    ("python_code", "json.dumps", "dumps(1)\n" * 30_000, False),
    (LABEL, None, "label=spam", True),
    (API, None, JSON.replace("null", "NaN"), False),
    (API, None, f" ```py\n{JSON}\n``` ", True),
    (LABEL, "spam", "label=spam", True),
    (LABEL, "spam", "label=ham", False),
    (LABEL, "spam", "spam", False),
]


@pytest.mark.parametrize(
    ("checker", "reference", "text", "passed"), PASSING, ids=lambda v: str(v)[:20]
)
def test_what_passes(checker, reference, text, passed):
    rule = {"kind": checker} if isinstance(checker, str) else checker
    assert check(rule, prompt(reference), text).passed is passed
    if rule["kind"] in NEEDS_REFERENCE:
        assert check(rule, prompt(), text).reason == "no reference to compare with"


@pytest.mark.parametrize(("text", "number"), TABLE["numbers"])
def test_the_number_of_an_answer(text, number):
    found = read_number(text)
    assert (None if found is None else str(found)) == number


@pytest.mark.parametrize(("text", "count"), TABLE["sentences"])
def test_sentences_are_counted(text, count):
    assert count_sentences(text) == count
    assert passes({"kind": "max_sentences", "max": 2}, text) is (1 <= count <= 2)


WRONG: list[dict[str, Any]] = [
    *({}, {"kind": "vibes"}, {"kind": "number", "tolerance": 1}, {"kind": "json_object"}),
    *({"kind": "json_object", "keys": keys} for keys in ({"a": "integer"}, ["a"])),
    *({"kind": "regex", "pattern": "("}, {"kind": "regex", "pattern": 3}),
    {"kind": "max_sentences", "max": "two"},
    *({"kind": "python_tests", **one} for one in ({"seconds": 0}, {"megabytes": "all"}, {"x": 1})),
]


@pytest.mark.parametrize("checker", WRONG)
def test_a_wrong_checker_is_refused_before_it_is_used(checker):
    with pytest.raises(ValueError):
        validate(checker)


def test_every_kind_is_tested_here():
    assert {checker["kind"] for checker in CHECKERS} == set(KINDS)
    for checker in CHECKERS:
        validate(checker)


HUMANEVAL = {
    "prompt": "import math\n\ndef two(x: int) -> int:\n    return 2\n\n"
    'def f(x: int) -> int:\n    """Add two."""\n',
    "test": "def check(candidate):\n    assert candidate(1) == 1 + two(0)\n",
    "entry_point": "f",
}


@pytest.fixture
def sandbox() -> Iterator[None]:
    if unavailable():
        pytest.skip(f"no sandbox here: {unavailable()}")
    permit(True)
    yield
    permit(False)


MBPP = "import math\nassert f(1) == 3\nassert math.isclose(f(0.5), 2.5)"  # lines that assert


@pytest.mark.parametrize(
    ("text", "passed"),
    [
        ("```python\ndef f(x):\n    return x + 2\n```", True),
        ("Here:\n```\ndef f(x):\n    return x + two(x)\n```\nUse it as f(1).", True),
        ("    return math.floor(x) + 2", True),
        ("def f(x):\n    return x", False),
        ("def g(x):\n    return x + 2", False),
        ("def two(x):\n    return 0\n\ndef f(x):\n    return x", False),
        ("It is x + 2.", False),
        ("", False),
        ("x = 1\n" * 10_000, False),
    ],
)
def test_code_must_pass_the_tests(text, passed, sandbox):
    checker = {"kind": "python_tests", "seconds": 5}
    assert passes(checker, text, json.dumps(HUMANEVAL)) is passed
    alone = passed and "def f" in text and "two" not in text
    assert passes(checker, text, MBPP) is alone
    assert check(checker, prompt("assert f("), "f = 1").passed is None


ANSWERS = st.one_of(
    st.text(st.characters(exclude_categories=())),
    st.text(alphabet='{}[]":,`#$.-|019e\\nul (=\n'),
    st.recursive(st.none() | st.floats() | st.text(), st.lists, max_leaves=20).map(json.dumps),
    st.text(max_size=5).map(lambda text: f"```\n{text}\n```"),
)


@settings(deadline=None)
@given(text=ANSWERS, reference=st.none() | st.text())
def test_no_text_makes_a_check_raise(text, reference):
    for checker in (checker for checker in CHECKERS if checker["kind"] not in RUNS_CODE):
        verdict = check(checker, prompt(reference), text)
        ours = verdict.passed is None and reference is not None  # no check can use that reference
        assert verdict.reason and (ours or isinstance(verdict.passed, bool))
        assert verdict.answer is None or verdict.answer.encode("utf-8") is not None


FIELDS = '{"name": "Ada Lovelace", "born": 1815, "tags": ["maths", "code"]}'


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        (FIELDS, 1.0),
        ('{"tags": ["code", "Maths."], "born": 1815.0, "name": "ada lovelace"}', 1.0),
        ('{"name": "Ada Lovelace"}', 2 * 1 / (1 + 4)),
        ('{"name": "Ada Lovelace", "born": 1815, "tags": ["maths", "code"], "x": 1}', 8 / 9),
        ('{"born": true}', 0.0),
        ('{"born": "1815"}', 0.0),
        ("[1815]", 0.0),
        ("{}", 0.0),
        ("prose", 0.0),
    ],
)
def test_fields_are_graded_by_f1(answer, value):
    verdict = check({"kind": "field_f1"}, prompt(FIELDS), answer)
    assert verdict.value == pytest.approx(value) and verdict.passed is (value == 1)


def test_a_grade_passes_from_its_least_value_and_a_bad_reference_is_ours():
    half = '{"name": "Ada Lovelace", "born": 1815}'
    assert check({"kind": "field_f1", "least": 0.6}, prompt(FIELDS), half).passed
    assert not check({"kind": "field_f1", "least": 0.7}, prompt(FIELDS), half).passed
    assert "born" in check({"kind": "field_f1"}, prompt(FIELDS), '{"born": 2}').reason
    assert check({"kind": "field_f1"}, prompt("prose"), half).passed is None


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(9, ge=1, title="Lives", examples=[7])


class Dog(BaseModel):
    """A dog, and its puppies."""

    kind: Literal["dog"]
    name: Annotated[str, Field(pattern="^[A-Z]")]
    puppies: list["Dog"] = []


class Visit(BaseModel):
    model_config = ConfigDict(extra="forbid")
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    at: datetime | None = None
    price: Decimal = Decimal(0)
    ids: set[int] = set()
    place: tuple[int, str] = (0, "")
    notes: dict[Annotated[str, Field(pattern="^n")], str] = {}
    raw: Json[Cat] | None = Field(None, deprecated=True)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"pet": {"kind": "cat"}, "at": None, "ids": [1, 2], "place": [1, "a"]}, "conforms"),
        ({"pet": {"kind": "cat", "lives": 0}}, "$.pet.lives: 0 is less than the minimum of 1"),
        ({"pet": {"kind": "cow"}}, "$.pet: {'kind': 'cow'} is not valid under any"),
        (
            {"pet": {"kind": "dog", "name": "A", "puppies": [{"kind": "dog", "name": 1}]}},
            "$.pet.puppies[0].name: 1 is not of type 'string'",
        ),
        ({"pet": {"kind": "cat"}, "ids": [1, 1.0]}, "$.ids: has equal items"),
        ({"pet": {"kind": "cat"}, "place": [1, 2]}, "$.place[1]: 2 is not of type 'string'"),
        ({"pet": {"kind": "cat"}, "notes": {"n": 1}}, "$.notes.n: 1 is not of type 'string'"),
        ({"pet": {"kind": "cat"}, "b": 1, "a": 1}, "$: has an extra field 'b'"),
        ({}, "$: 'pet' is a required property"),
        ([], "$: [] is not of type 'object'"),
        ({"pet": {"kind": "cat"}, "ids": [True]}, "$.ids[0]: True is not of type 'integer'"),
        ({"pet": {"kind": "cat", "lives": float("inf")}}, "not JSON"),
        ({"pet": {"kind": "cat"}, "at": "\ud800", "a": 1}, "$: has an extra field 'a'"),
        ({"pet": {"kind": "cat"}, "ids": "x" * 999}, "$.ids: breaks type 'array'"),
        ({"pet": {"kind": "dog", "name": "a"}}, "$.pet.name: 'a' does not match '^[A-Z]'"),
    ],
)
def test_what_pydantic_writes_is_a_schema(answer, reason):
    checker = {"kind": "json_schema", "schema": Visit.model_json_schema()}
    validate(checker)
    verdict = check(checker, prompt(), f"```json\n{json.dumps(answer)}\n```")
    assert reason in verdict.reason and verdict.passed is (reason == "conforms")
    assert len(verdict.reason) < 300


WRONG_SCHEMAS = yaml.safe_load(Path("tests/fixtures/wrong_schemas.yaml").read_text())


@pytest.mark.parametrize(("message", "schema"), [row.values() for row in WRONG_SCHEMAS])
def test_a_schema_that_would_not_check_what_it_says_is_refused(message, schema):
    with pytest.raises(ValueError, match=message):
        validate({"kind": "json_schema", "schema": schema})


@pytest.mark.parametrize(
    "schema",
    [
        {"items": {"$ref": "#/$defs/a~1b%20c"}, "$defs": {"a/b c": {"type": "integer"}}},
        {"items": {"$ref": "#/prefixItems/0"}, "prefixItems": [{"type": "integer"}]},
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "$id": "https://example.org/list",
            "items": {"$ref": "#/definitions/a"},
            "definitions": {"a": {"type": "integer"}},
        },
    ],
)
def test_references_inside_a_schema_are_followed(schema):
    checker = {"kind": "json_schema", "schema": schema}
    validate(checker)
    assert passes(checker, "[1, 2]") and not passes(checker, '[1, "a"]')


TREE = {"$ref": "#/$defs/node"}
BRANCHES = [{"required": ["x"], "properties": {"c": TREE}}, {"properties": {"c": TREE}}]
SLOW = "^(a|aa)+$"
STRING = "a" * 80 + "b"


@pytest.mark.parametrize(
    ("schema", "answer", "passed"),
    [
        # two alternatives at each level, of which the first fails at the bottom only
        ({**TREE, "$defs": {"node": {"anyOf": BRANCHES}}}, '{"c":' * 60 + "1" + "}" * 60, True),
        ({"items": {"$ref": "#"}}, "[" * 60 + "]" * 60, True),
        ({"items": {"$ref": "#"}}, "[" * 300 + "]" * 300, False),
        ({"uniqueItems": True}, json.dumps([{"a": n} for n in range(20_000)]), True),
        ({"multipleOf": 0.1}, "1e999", False),
        ({"items": {"pattern": SLOW}}, json.dumps([STRING] * 100), None),
        ({"patternProperties": {SLOW: True}}, json.dumps({STRING: 1}), None),
        (
            {"patternProperties": {SLOW: True}, "additionalProperties": False},
            json.dumps({STRING: 1}),
            None,
        ),
        ({"propertyNames": {"pattern": SLOW}}, json.dumps({STRING: 1}), None),
    ],
)
def test_a_schema_is_checked_in_bounded_time(schema, answer, passed, monkeypatch):
    monkeypatch.setattr(json_schema, "SECONDS", 0.2)
    checker = {"kind": "json_schema", "schema": schema}
    validate(checker)
    started = time.thread_time()
    assert check(checker, prompt(), answer).passed is passed
    assert time.thread_time() - started < 4


def test_a_pattern_that_takes_too_long_is_no_verdict(monkeypatch):
    monkeypatch.setattr(checkers, "SECONDS", 0.2)
    verdict = check({"kind": "regex", "pattern": SLOW}, prompt(), STRING)
    assert verdict.passed is None and "too long" in verdict.reason


def test_an_endless_expression_is_no_answer_and_is_not_shown(capfd, monkeypatch):
    monkeypatch.setattr(checkers, "SECONDS", 1)
    verdict = check({"kind": "math"}, prompt("4"), "\\boxed{" + "(" * 3000 + "}")
    assert verdict.passed is False
    assert "(((" not in "".join(capfd.readouterr())

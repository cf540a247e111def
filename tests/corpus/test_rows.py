"""Rows: what is a document, what a prompt, what its reference; and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.config.tree import Columns
from distill.corpus.rows import LeftOut, Reading, interpret

TABLE = yaml.safe_load(Path("tests/fixtures/rows.yaml").read_text(encoding="utf-8"))
ASKED = [{"role": "user", "content": "Hi?"}]
TRANSCRIPT = "\n\nHuman: What is 2 and 2?\n\nAssistant:"


def meta(row: dict[str, Any], **options: Any) -> dict[str, Any]:
    return interpret(row, "a:1", **options).meta


def test_a_document_keeps_the_other_plain_columns():
    row = {"id": 7, "text": " Text. ", "title": "T", "n": 3, "list": [1], "none": None}
    document = interpret(row, "a:1")
    assert (document.text, document.source) == ("Text.", "a:1")
    assert document.meta == {"title": "T", "n": 3, "id": "7"}


def test_a_completion_beside_the_conversation_that_it_ends_is_that_answer():
    last = [{"role": "assistant", "content": "Hello!"}]
    read = meta({"messages": ASKED + last, "prompt": ASKED, "completion": last, "reference": None})
    assert (read["messages"], read["recorded_answer"]) == (ASKED, "Hello!")
    assert "reference" not in read and "reference" not in meta({"prompt": "Hi?", "reference": ""})
    other = meta({"messages": ASKED + last, "completion": [{**last[0], "content": "Bye!"}]})
    assert other["recorded_answer"] == "Hello!\n\nBye!"


def test_the_answer_is_the_reference_and_is_recorded():
    row = {"question": "2+3?", "answer": "2+3=5\n#### 5"}
    assert meta(row)["reference"] == "5"  # as the checker `number` reads it
    assert meta({"question": "2+3?", "answer": "5\n"})["reference"] == "5"
    found = meta(row, pattern=r"####\s*(.+)$")
    assert (found["reference"], found["recorded_answer"]) == ("5", row["answer"])
    assert meta({"prompt": "2+3?", "reference": 5})["reference"] == "5"
    assert "recorded_answer" not in meta({"prompt": "2+3?", "reference": 5})


def test_the_last_turn_of_the_assistant_is_recorded_and_not_asked():
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


LONE = [
    ({"text": "ok", "t": "\ud800"}, "surrogate"),
    ({"prompt": "q", "output": "\ud800"}, "surrogate"),
]


@pytest.mark.parametrize(("row", "reason"), [*TABLE["refused"], *LONE])
def test_a_row_that_is_neither_says_why(row, reason):
    both = {"prompt": "p", "text": "t"}
    assert "messages" in meta(both) and "messages" not in meta(both, form="documents")
    if reason is None:
        assert meta(row)["messages"][0]["content"] == "text"
        return
    with pytest.raises(ValueError, match=reason):
        interpret(row, "a:1")


def recorded(row: dict[str, Any]) -> list[dict[str, str]]:
    return interpret(row, "a:1").recorded_answers


def test_a2_earlier_exchanges_and_named_columns_are_used():
    row = {"instruction": "Three?", "output": "3", "history": [["One?", "1"], ["Two?", "2"]]}
    assert [turn["content"] for turn in meta(row)["messages"]] == [
        "One?",
        "1",
        "Two?",
        "2",
        "Three?",
    ]
    columns = Columns(prompt=("task", "given text"), answer="gold answer", system="persona")
    row = {"task": "Sum up.", "given text": "Text.", "gold answer": " A ", "persona": "P", "n": 1}
    reading = Reading()
    found = interpret(row, "a:1", columns, reading=reading)
    assert [turn["content"] for turn in found.meta["messages"]] == ["P", "Sum up.\n\nText."]
    assert found.recorded_answers == [{"text": " A "}]
    assert reading.lines() == [
        "1 row as prompts: task + given text → prompt, persona → system turn, "
        "gold answer → recorded answer; column `n` not used"
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASKED, "completion": [{"role": "assistant", "content": " a "}]},
        {"prompt": ASKED, "chosen": {"role": "assistant", "content": " a "}, "rejected": ASKED},
        {
            "prompt": "Hi?",
            "chosen": [*ASKED, {"role": "assistant", "content": " a "}],
            "rejected": 1,
        },
        {"chosen": [*ASKED, {"role": "assistant", "content": " a "}], "rejected": [*ASKED]},
        {"prompt": "Hi?", "chosen": " a ", "rejected": "b"},
        {"prompt": ASKED, "completion": " a "},
    ],
)
def test_a3_the_answer_of_a_pair_is_read(row):
    assert meta(row)["messages"] == ASKED
    assert recorded(row) == [{"text": " a "}] and meta(row)["reference"] == "a"


@pytest.mark.parametrize(
    "turn",
    [
        {"reasoning_content": "2+2", "content": "4"},
        {"reasoning": "2+2", "content": "4"},
        {"thinking": "2+2", "content": "4"},
        {"content": [{"type": "thinking", "thinking": "2+2"}, {"type": "text", "text": "4"}]},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "2+2"}]}, "4"]},
    ],
)
def test_a4_reasoning_stands_beside_its_answer(turn):
    row = {"messages": [*ASKED, {"role": "assistant", **turn}]}
    assert recorded(row) == [{"text": "4", "reasoning": "2+2"}]
    assert recorded({"prompt": "q", "completion": "4", "reasoning": "2+2"}) == recorded(row)
    assert "2+2" not in json.dumps(meta(row)["messages"])
    block = {"prompt": "q", "completion": "<think>\n2+2\n</think>\n\n4"}
    assert recorded(block) == [{"text": block["completion"]}]  # which the store splits when read
    assert meta(block)["reference"] == "4"


CODE = "    return x\n\n\ndef g():\n    pass\t \r\n"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": CODE},
        {"instruction": "q", "output": CODE},
        {"messages": [*ASKED, {"role": "assistant", "content": CODE}]},
        {"messages": [*ASKED, {"role": "assistant", "content": [{"type": "text", "text": CODE}]}]},
        {"prompt": "q", "chosen": CODE, "rejected": "x"},
        {"data": ["q", CODE]},
        {"prompt": "q", "completions": 1, "answers": [CODE, CODE]},
        {"prompt": "q", "completions": [{"completion": CODE, "score": 1}, {"response": CODE}]},
        {"question": "q", "context": TRANSCRIPT, "answer": CODE},
    ],
)
def test_a6_an_answer_keeps_every_space(row):
    assert recorded(row) == [{"text": CODE}]
    decomposed = "cafe\u0301 \ufeff"
    assert recorded({"prompt": "q", "response": decomposed}) == [{"text": decomposed}]


TURNS = [*ASKED, {"role": "assistant", "content": 'It\'s "here".', "weight": None}]


@pytest.mark.parametrize("text", [json.dumps(TURNS), json.dumps(TURNS, indent=1), repr(TURNS)])
def test_a9_turns_written_as_text_are_turns(text):
    for name in ("messages", "conversations"):
        assert meta({name: text})["messages"] == ASKED
        assert recorded({name: text}) == [{"text": 'It\'s "here".'}]
    row = {"prompt": repr(ASKED), "completion": json.dumps(TURNS[1:])}
    assert meta(row)["messages"] == ASKED and recorded(row) == [{"text": 'It\'s "here".'}]
    squad = {"question": "q", "context": "c", "answers": "{'text': ['a'], 'answer_start': [1]}"}
    assert recorded(squad) == [{"text": "a"}]
    # an answer that is JSON stays the text that it is
    for answer in ('{"role": 1}', '[{"content": "x"}]', '{"text": "x"}', "[1, 2]"):
        assert recorded({"prompt": "q", "completion": answer}) == [{"text": answer}]


def test_a10_parts_are_joined_and_turns_of_tools_are_left_out_with_a_count():
    parts = [{"type": "text", "text": "Hi"}, {"type": "input_text", "text": "there?"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    result = {"role": "tool", "content": "21 degrees", "tool_call_id": "1"}
    answer = {"role": "assistant", "content": "It is 21 degrees."}
    reading, row = Reading(), [{"role": "user", "content": parts}, call, result, answer, *ASKED]
    document = interpret({"messages": row}, "a:1", reading=reading)
    assert [turn["role"] for turn in document.meta["messages"]] == ["user", "assistant", "user"]
    assert document.meta["messages"][0]["content"] == "Hi\nthere?"
    assert reading.lines()[-1] == "tool turns left out: 2"
    for turns in (row[:2], row[:4], [*ASKED, {"from": "function_call", "value": "{}"}, answer]):
        with pytest.raises(LeftOut, match="tool"):
            interpret({"messages": turns}, "a:1")
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(LeftOut, match="image_url"):
        interpret({"messages": [{"role": "user", "content": image}]}, "a:1")


@pytest.mark.parametrize(("row", "asked", "answer"), TABLE["sets"])
def test_a2_other_sets_of_the_hub(row, asked, answer):
    """A2: LIMA, WildChat, Orca DPO, HotpotQA, NuminaMath and such."""
    found = interpret(row, "a:1")
    turns = found.meta.get("messages", [{"role": "user", "content": ""}])
    assert [turn["content"] for turn in turns if turn["role"] == "user"] == [asked]
    system = [turn["content"] for turn in turns if turn["role"] == "system"]
    assert system == ["s"] * ("s" in (row.get("system"), row.get("system_prompt")))
    assert [one["text"] for one in found.recorded_answers] == [answer] * bool(answer)


@pytest.mark.parametrize(("value", "texts"), TABLE["answers"])
def test_answers_that_are_no_text(value, texts):
    assert [one["text"] for one in recorded({"question": "q", "answer": value})] == texts


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
    [
        *("id", "text", "prompt", "messages", "answer", "conversations", "model", "x", "chosen"),
        *("rejected", "history", "data", "completion", "system", "reasoning", "question"),
    ]
)
TURN_LISTS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]), "content": JSON}
    ),
    max_size=3,
)


@settings(deadline=None)
@given(st.dictionaries(NAMES, JSON | TURN_LISTS, max_size=5))
def test_any_row_is_read_or_refused_and_what_is_read_can_be_stored(row):
    try:
        document = interpret(row, "a:1")
    except ValueError:
        return
    again = type(document).model_validate_json(document.model_dump_json())
    assert again == document and json.dumps(again.meta, allow_nan=False)

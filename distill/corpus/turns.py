"""Conversations in the forms that rows bring, and the answers in a column."""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeGuard

from distill import shipped_table

TABLE = shipped_table("row_shapes.yaml")
TOOL = "tool"  # a call of a tool, or what one returned
ROLES = {name: role for role, names in TABLE["roles"].items() for name in names.split()}
REASONING, SPEAKER, SAID, RESPONSES = (
    tuple[str, ...](TABLE[name].split()) for name in ("reasoning", "speaker", "said", "responses")
)
TURNS_AS_TEXT = re.compile(r"""\s*+\[?\s*+\{\s*+['"](?:role|from|content|value)['"]\s*:""")


# How HH-RLHF and Guanaco write turns into one text: each is looked for once, in linear time
FIRST_TURN = re.compile(r"\s{0,9}+(?:### ?)?Human:")
NEXT_TURN = re.compile(r"(?:\n|### ?)Assistant:")


class LeftOut(ValueError):
    """Why a well-formed row cannot be used; it does not count as a bad one."""


class RowTurn(NamedTuple):
    """A turn as it came; `model` where an answer names its own."""

    role: str
    text: object
    reasoning: str | None = None
    model: str | None = None


def first_of(value: Mapping[str, object], keys: Sequence[str]) -> object:
    """Return the first of the values under some keys that holds something, or None."""
    return next((value[key] for key in keys if holds(value.get(key))), None)


def read_turns(value: object) -> list[RowTurn]:
    """Read a conversation in any of the usual forms; raises ValueError with the reason."""
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not value:
        raise ValueError("a conversation must be a list of turns")
    if are_texts(value):
        return [RowTurn(("user", "assistant")[n % 2], text) for n, text in enumerate(value)]
    turns = list[RowTurn]()
    for turn in value:
        if not isinstance(turn, dict):
            raise ValueError("a turn must have a role and a text")
        if holds(turn.get("replies")):
            raise ValueError("a tree of replies: join each thread to `messages`")
        name = first_of(turn, SPEAKER)
        role = ROLES.get(name.lower()) if isinstance(name, str) else None
        if role is None:
            raise ValueError(f"unknown role {str(name)[:40]!r}")
        text = next((turn[key] for key in SAID if key in turn), None)
        thought = first_of(turn, REASONING)
        if turn.get("tool_calls") or turn.get("function_call"):
            role = TOOL
        elif isinstance(text, list):
            role, text, thoughts = _join_parts(text, role)
            thought = thought or thoughts
        elif text is None and role == "assistant":
            text = ""
        turns.append(RowTurn(role, text, thought if isinstance(thought, str) else None))
    return turns


def _join_parts(parts: Sequence[object], role: str) -> tuple[str, str, str]:
    """Return the role, the text and the reasoning of a turn whose content is a list of parts."""
    texts, thoughts = list[str](), list[str]()
    for part in parts:
        part = part if isinstance(part, dict) else {"text": part}
        kind = part.get("type", "text")
        if kind in ("tool_use", "tool_call", "tool_result"):
            role = TOOL
        elif kind in ("thinking", "reasoning"):
            value = first_of(part, (kind, "text"))
            thoughts.append(_join_parts(value, role)[1] if isinstance(value, list) else str(value))
        elif kind in ("text", "input_text", "output_text", "refusal"):
            text = part.get("text", part.get(kind))
            if not isinstance(text, str):
                raise ValueError(f"the text is {type(text).__name__}, not text")
            texts.append(text)
        elif kind != "redacted_thinking":
            raise LeftOut(f"a turn holds a part of type {str(kind)[:40]}, which is no text")
    return role, "\n".join(texts), "\n".join(thoughts)


def read_answers(value: object) -> list[RowTurn]:
    """Return the answers in a column: a text as it is, a number or JSON as text, each of a list."""
    if isinstance(value, dict) and "answer_start" in value:  # of SQuAD
        value = value.get("text")
    if not holds(value):
        return []
    if isinstance(value, str):
        return [RowTurn("assistant", value)]
    if isinstance(value, dict) and "model" in value and {*RESPONSES} & value.keys():
        model = str(value["model"]) if holds(value["model"]) else None
        return [turn._replace(model=model) for turn in read_answers(first_of(value, RESPONSES))]
    if isinstance(value, list) and all(
        isinstance(one, str | int | float)
        or (isinstance(one, dict) and one.keys() & {"answer_start", *RESPONSES})
        for one in value
    ):
        rows = [{"model": None} | one if isinstance(one, dict) else one for one in value]
        return list(dict.fromkeys(answer for row in rows for answer in read_answers(row)))
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
    return [RowTurn("assistant", text)]


def parsed(value: object) -> object:
    """Return the turns or answers that a text holds as JSON or Python print them, or the value."""
    if not isinstance(value, str) or not ("answer_start" in value or TURNS_AS_TEXT.match(value)):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            result = read(value)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        listed = isinstance(result, dict) and "answer_start" in result
        return result if listed or are_turns(result) else value
    if TURNS_AS_TEXT.match(value):
        raise ValueError("looks like a list of turns and is neither JSON nor a Python literal")
    return value


def holds(value: object) -> bool:
    """Tell whether a value is neither missing (None, NaN) nor empty."""
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and value != [] and value != {} and value == value


def are_texts(value: object) -> TypeGuard[list[str]]:
    """Tell whether a value is a list of texts, and not empty."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def are_turns(value: object) -> bool:
    """Tell whether a value is a turn or a list of turns, each with its role."""
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, dict) or not {*SAID, "tool_calls"} & first.keys():
        return False
    return isinstance(first_of(first, SPEAKER), str)

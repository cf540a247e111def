"""Conversations in any of the forms that rows bring, and the answers in a column."""

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from distill.corpus.readers import Reject, SourceRow

TOOL = "tool"  # a call of a tool, or what one returned
ROLES = {
    name: role
    for role, names in (
        ("system", "system developer"),
        ("user", "user human prompter input instruction question prompt query"),
        ("assistant", "assistant gpt model bot ai chatbot chatgpt output response answer"),
        (TOOL, "tool function observation ipython tool_response function_response"),
        (TOOL, "tool_call tool_calls function_call"),
    )
    for name in names.split()
}
REASONING = ("reasoning_content", "reasoning", "thinking", "complex_cot")
SPEAKER, SAID = ("role", "from", "speaker"), ("content", "value", "text")  # keys of a turn
RESPONSES = ("response", "completion", "generated_text")  # keys of an answer in a list of them
TURNS_AS_TEXT = re.compile(r"""\s*+\[?\s*+\{\s*+['"](?:role|from|content|value)['"]\s*:""")
TRANSCRIPT = re.compile(r"\n\n(Human|Assistant): ?")  # of Anthropic's preference rows


MESSAGE = {"message_id", "parent_id", "role", "text"}  # columns of OASST's rows
LONGEST_THREAD = 1000  # messages


class LeftOut(ValueError):
    """Why a well-formed row cannot be used; it does not count as a bad one."""


class RowTurn(NamedTuple):
    """A turn as it came; `model` where an answer names its own."""

    role: str
    text: object
    reasoning: str | None = None
    model: str | None = None


def read_turns(value: object) -> list[RowTurn]:
    """Read a conversation in any of the usual forms; raises ValueError with the reason."""
    if isinstance(value, dict):
        lists = [one for one in value.values() if isinstance(one, list)]
        if lists and len(lists) == len(value):  # a table of turns, as `datasets` writes them
            value = [dict(zip(value, one, strict=False)) for one in zip(*lists, strict=False)]
        else:
            value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError("a conversation must be a list of turns")
    if are_texts(value):
        return [RowTurn(("user", "assistant")[n % 2], text) for n, text in enumerate(value)]
    turns = list[RowTurn]()
    for turn in value:
        if not isinstance(turn, dict):
            raise ValueError("a turn must have a role and a text")
        if turn.get("replies"):
            raise ValueError("a tree of replies: give the rows of messages, with parent_id")
        role = _first(turn, SPEAKER)
        if role is None and turn and ROLES.keys() >= turn.keys():  # a turn a key
            turns += [RowTurn(ROLES[name], text) for name, text in turn.items() if holds(text)]
            continue
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise ValueError(f"unknown role {str(role)[:40]!r}")
        role, text = ROLES[role.lower()], _first(turn, SAID)
        thought = next((turn[name] for name in REASONING if holds(turn.get(name))), None)
        if turn.get("tool_calls") or turn.get("function_call"):
            role = TOOL
        elif isinstance(text, list):
            role, text, thoughts = _join_parts(text, role)
            thought = thought or thoughts
        elif text is None and role == "assistant":
            text = ""
        turns.append(RowTurn(role, text, thought if isinstance(thought, str) else None))
    return turns


def _first(turn: dict[str, Any], keys: tuple[str, ...]) -> object:
    return next((turn[key] for key in keys if key in turn), None)


def _join_parts(parts: list[Any], role: str) -> tuple[str, str, str]:
    """Return the role, the text and the reasoning of a turn whose content is a list of parts."""
    texts, thoughts = list[str](), list[str]()
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind in ("tool_use", "tool_call", "tool_result"):
            role = TOOL
        elif kind in ("thinking", "reasoning"):
            value = next((part[key] for key in (kind, "text") if holds(part.get(key))), "")
            thoughts.append(_join_parts(value, role)[1] if isinstance(value, list) else str(value))
        elif kind in ("text", "input_text", "output_text", "refusal"):
            text = part.get("text", part.get(kind))
            if not isinstance(text, str):
                raise ValueError(f"the text is {type(text).__name__}, not text")
            texts.append(text)
        elif kind != "redacted_thinking":
            raise LeftOut(f"a turn holds a part of type {str(kind)[:40]}, which is no text")
    return role, "\n".join(texts), "\n".join(thoughts)


def join_threads(rows: Iterable[SourceRow | Reject]) -> Iterator[SourceRow | Reject]:
    """Yield the rows, and for messages of trees (OASST) the thread that ends with each answer.

    A question that nobody answered ends one too.
    """
    messages = dict[object, SourceRow]()
    for row in rows:
        if isinstance(row, SourceRow) and row.value.keys() >= MESSAGE:
            messages[row.value["message_id"]] = row
        else:
            yield row
    answered = {row.value["parent_id"] for row in messages.values()}
    for identity, row in messages.items():
        if row.value["role"] != "assistant" and identity in answered:
            continue
        thread, at = list[Mapping[str, object]](), messages.get(identity)
        while at and len(thread) < LONGEST_THREAD:
            thread.append({"role": at.value["role"], "content": at.value["text"]})
            at = messages.get(at.value["parent_id"])
        yield SourceRow(row.where, {"messages": thread[::-1], "lang": row.value.get("lang")})


def read_transcript(text: str) -> list[RowTurn]:
    """Return the turns of a text that begins `\\n\\nHuman: `; of another, nothing."""
    parts = TRANSCRIPT.split(text)
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return [RowTurn(ROLES[who.lower()], said) for who, said in pairs if said.strip()]


def read_answers(value: object) -> list[RowTurn]:
    """Return the answers in a column: a text as it is, a number or JSON as text, each of a list."""
    if isinstance(value, dict) and "answer_start" in value:  # of SQuAD
        value = value.get("text")
    if not holds(value):
        return []
    if isinstance(value, str):
        return [RowTurn("assistant", value)]
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):  # UltraFeedback
        said = [
            RowTurn("assistant", one[key], model=str(one.get("model") or "") or None)
            for one in value
            for key in RESPONSES
            if isinstance(one.get(key), str)
        ]
        if len(said) == len(value):
            return [turn for turn in said if holds(turn.text)]
    if isinstance(value, list) and all(
        isinstance(one, str | int | float) or (isinstance(one, dict) and "answer_start" in one)
        for one in value
    ):
        return list(dict.fromkeys(answer for one in value for answer in read_answers(one)))
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
    return [RowTurn("assistant", text)]


def parsed(value: object) -> object:
    """Return the turns or answers that a column of CSV or Parquet holds as a text, else the value.

    JSON, or what Python prints, as pandas writes it. Raises ValueError where turns cannot be read.
    """
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


def are_texts(value: object) -> bool:
    """Tell whether a value is a list of texts, and not empty."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def are_turns(value: object) -> bool:
    """Tell whether a value is a turn or a list of turns, each with its role."""
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, dict) or not {*SAID, "tool_calls"} & first.keys():
        return False
    return isinstance(_first(first, SPEAKER), str)

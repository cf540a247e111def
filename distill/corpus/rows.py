"""What a row means: a document, or a prompt that is there already, with a reference or a recorded answer.

Prompts become documents whose `meta["messages"]` holds the conversation to answer; the last user turn is answered, and
an assistant's turn after it is kept as `meta["recorded_answer"]`.
"""

import math
from typing import Any

import regex

from distill.config import Columns
from distill.corpus.clean import normalise
from distill.records import Document

SECONDS = 2.0  # that finding a reference in one answer may take
TEXT_COLUMNS = ("text", "content", "document", "passage", "body")
PROMPT_COLUMNS = ("prompt", "question", "instruction")
ANSWER_COLUMNS = ("answer", "completion", "response", "output")
CONVERSATIONS = ("messages", "conversations", "conversation")
ROLES = {
    **{name: name for name in ("system", "user", "assistant")},
    **{"human": "user", "gpt": "assistant", "model": "assistant", "developer": "system"},
}
STATED = {
    "model": "recorded_model",
    "license": "recorded_license",
    "licence": "recorded_license",
    "dollars": "recorded_dollars",
    "cost": "recorded_dollars",
}


def interpret(
    row: dict[str, Any],
    where: str,
    columns: Columns | None = None,
    form: str = "auto",
    pattern: str | None = None,
) -> Document:
    """Read a row as a document; `form` is auto, documents or prompts. Raises ValueError with the reason if it is none."""
    columns = columns or Columns()
    text_column = columns.text or _first(row, TEXT_COLUMNS)
    asks = columns.prompt or _first(row, (*CONVERSATIONS, *PROMPT_COLUMNS))
    if form == "documents" or (form == "auto" and (columns.text or not asks)):
        if text_column is None or text_column not in row:
            raise ValueError(f"no column {columns.text or 'of text'} among: {_names(row)}")
        return Document.make(normalise(row[text_column]), where, _other(row, columns, text_column))
    if asks is None or asks not in row:
        raise ValueError(f"no column {columns.prompt or 'with a prompt'} among: {_names(row)}")
    return _conversation(row, where, columns, asks, pattern)


def _conversation(
    row: dict[str, Any], where: str, columns: Columns, asks: str, pattern: str | None
) -> Document:
    """Read a row that holds a prompt: a text, or turns."""
    turns = _turns(row[asks]) if not isinstance(row[asks], str) else [_turn("user", row[asks])]
    answer_column = columns.reference or _first(row, ("reference", *ANSWER_COLUMNS))
    answer = _text_or_none(row.get(answer_column)) if answer_column else None
    recorded = None if answer_column == "reference" else answer
    if turns[-1]["role"] == "assistant":
        recorded = turns.pop()["content"]
    if not turns or turns[-1]["role"] != "user":
        raise ValueError("the conversation has no last user turn to answer")
    reference = extract(answer if answer is not None or not pattern else recorded, pattern)
    kept = {"reference": reference, "recorded_answer": recorded, **_stated(row)}
    meta = {
        **_other(row, columns, asks, answer_column or ""),
        "messages": turns,
        **{key: value for key, value in kept.items() if value is not None},
    }
    plain = turns[0]["content"] if len(turns) == 1 else _script(turns)
    return Document.make(plain, where, meta)


def _script(turns: list[dict[str, str]]) -> str:
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def extract(answer: str | None, pattern: str | None) -> str | None:
    """Return what the pattern's group finds in an answer; raises ValueError where it finds nothing."""
    if answer is None or pattern is None:
        return answer
    try:
        found = regex.search(pattern, answer, timeout=SECONDS)
    except TimeoutError:
        raise ValueError("corpus.reference_pattern takes too long on the answer") from None
    if found is None or found[1] is None:
        raise ValueError("corpus.reference_pattern is not found in the answer")
    return found[1].strip()


def _turns(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ValueError("a conversation must be a list of turns")
    turns = []
    for turn in value:
        if not isinstance(turn, dict):
            raise ValueError("a turn must have a role and a text")
        role = turn.get("role", turn.get("from"))
        turns.append(_turn(role, turn.get("content", turn.get("value"))))
    return turns


def _turn(role: Any, content: Any) -> dict[str, str]:
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"unknown role {str(role)[:40]!r}")
    return {"role": ROLES[role], "content": normalise(content)}


def _text_or_none(value: Any) -> str | None:
    if value is None or isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    return normalise(str(value))


def _stated(row: dict[str, Any]) -> dict[str, Any]:
    """Return what the row says about who gave its answer, and for what price."""
    return {ours: row[theirs] for theirs, ours in STATED.items() if _is_plain(row.get(theirs))}


def _other(row: dict[str, Any], columns: Columns, *used: str) -> dict[str, Any]:
    """Return the plain values of the other columns, for templates; `id` is the user's own id."""
    skipped = {*used, *STATED, columns.id or "id"}
    meta = {key: value for key, value in row.items() if key not in skipped and _is_plain(value)}
    given = row.get(columns.id or "id")
    if given is not None and _is_plain(given):
        meta["id"] = str(given)
    for value in (*meta, *meta.values()):
        if isinstance(value, str) and value:
            value.encode("utf-8")  # a lone surrogate raises UnicodeEncodeError, a ValueError
    return meta


def _is_plain(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str | int) and not (isinstance(value, int) and abs(value) > 2**63)


def _first(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if row.get(name) is not None), None)


def _names(row: dict[str, Any]) -> str:
    return ascii(", ".join(row)[:120])

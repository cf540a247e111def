"""What a row means: a document, or a prompt with, perhaps, its reference or a recorded answer.

Prompts become documents whose `meta["messages"]` holds the conversation to answer; the last user
turn is answered, and an assistant's turn after it is kept as `meta["recorded_answer"]`.
"""

import math
from collections.abc import Mapping

import regex

from distill.config.tree import Columns
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
    row: Mapping[str, object],
    where: str,
    columns: Columns | None = None,
    form: str = "auto",
    pattern: str | None = None,
) -> Document:
    """Read a row as a document; `form` is auto, documents or prompts.

    Raises ValueError with the reason where it is neither.
    """
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
    row: Mapping[str, object], where: str, columns: Columns, asks: str, pattern: str | None
) -> Document:
    """Read a row that holds a prompt: a text, or turns."""
    value = row[asks]
    if isinstance(value, str):
        turns = [_turn("user", value)]
    elif not isinstance(value, list) or not value:
        raise ValueError("a conversation must be a list of turns")
    elif not all(isinstance(turn, dict) for turn in value):
        raise ValueError("a turn must have a role and a text")
    else:
        turns = [
            _turn(turn.get("role", turn.get("from")), turn.get("content", turn.get("value")))
            for turn in value
        ]
    answer_column = columns.reference or _first(row, ("reference", *ANSWER_COLUMNS))
    answer = row.get(answer_column) if answer_column else None
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        answer = None
    answer = None if answer is None else normalise(str(answer))
    recorded = None if answer_column == "reference" else answer
    if turns[-1]["role"] == "assistant":
        recorded = turns.pop()["content"]
    if not turns or turns[-1]["role"] != "user":
        raise ValueError("the conversation has no last user turn to answer")
    reference = extract(answer if answer is not None or not pattern else recorded, pattern)
    answers = {"reference": reference, "recorded_answer": recorded}
    meta = {
        **_other(row, columns, asks, answer_column or ""),
        "messages": turns,
        **{key: value for key, value in answers.items() if value is not None},
        **{key: row[name] for name, key in STATED.items() if _is_plain(row.get(name))},
    }
    text = turns[0]["content"]
    if len(turns) > 1:
        text = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
    return Document.make(text, where, meta)


def extract(answer: str | None, pattern: str | None) -> str | None:
    """Return what the pattern's group matches in an answer; raises ValueError for no match."""
    if answer is None or pattern is None:
        return answer
    try:
        match = regex.search(pattern, answer, timeout=SECONDS)
    except TimeoutError:
        raise ValueError("corpus.reference_pattern takes too long on the answer") from None
    if match is None or match[1] is None:
        raise ValueError("corpus.reference_pattern is not found in the answer")
    return match[1].strip()


def _turn(role: object, content: object) -> dict[str, str]:
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"unknown role {str(role)[:40]!r}")
    return {"role": ROLES[role], "content": normalise(content)}


def _other(row: Mapping[str, object], columns: Columns, *used: str) -> dict[str, object]:
    """Return the plain values of the other columns, for templates; `id` is the user's own id."""
    skipped = {*used, *STATED, columns.id or "id"}
    meta = {key: value for key, value in row.items() if key not in skipped and _is_plain(value)}
    identity = row.get(columns.id or "id")
    if identity is not None and _is_plain(identity):
        meta["id"] = str(identity)
    for value in (*meta, *meta.values()):
        if isinstance(value, str) and value:
            value.encode("utf-8")  # a lone surrogate raises UnicodeEncodeError, a ValueError
    return meta


def _is_plain(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str | int) and not (isinstance(value, int) and abs(value) > 2**63)


def _first(row: Mapping[str, object], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if row.get(name) is not None), None)


def _names(row: Mapping[str, object]) -> str:
    return ascii(", ".join(row)[:120])

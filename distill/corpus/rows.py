"""What a row means: a document, or a prompt with, perhaps, its reference and recorded answers.

`SHAPES` says which columns of the sets that people use hold what; one more set is one more line.
The columns of a prompt are joined by blank lines, in the order of the training code or harness that
the set is known by: Alpaca and Dolly the instruction first, SQuAD the passage first.

A prompt becomes a document whose `meta["messages"]` holds the conversation to answer. The last user
turn is answered; what answers it is kept as it came, to the space, in `meta["recorded_answer"]`.
"""

import ast
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import regex

from distill.config.tree import Columns
from distill.corpus.clean import normalise
from distill.reasoning import split_reasoning
from distill.records import Document

SECONDS = 2.0  # that finding a reference in one answer may take
TEXT_COLUMNS = ("text", "content", "document", "passage", "body")


class Shape(NamedTuple):
    """A kind of row: the columns by which it is known, those of its prompt, those of its answer.

    The first of `known_by` holds something. Of `answer`, the first counts that holds something.
    """

    name: str
    known_by: tuple[str, ...]
    prompt: tuple[str, ...]
    answer: tuple[str, ...]


ANY_ANSWER = "answer completion response output chosen answers completions responses outputs"
SHAPES = tuple(
    Shape(name, *(tuple(columns.split()) for columns in table))
    for name, *table in (
        ("preference rows", "chosen rejected", "prompt", "chosen"),
        ("UltraChat", "messages prompt_id", "messages", ANY_ANSWER),
        ("OpenAI messages", "messages", "messages", ANY_ANSWER),
        ("OpenHermes", "conversations system_prompt", "conversations", ANY_ANSWER),
        ("ShareGPT", "conversations", "conversations", ANY_ANSWER),
        ("conversations", "conversation", "conversation", ANY_ANSWER),
        ("UltraChat's list form", "data", "data", ANY_ANSWER),
        ("TRL prompt/completion", "prompt completion", "prompt", "completion"),
        ("prompts", "prompt", "prompt input context", ANY_ANSWER),
        ("Open-Orca", "question system_prompt response", "question", "response"),
        ("SQuAD", "question context answers", "context question", "answers"),
        ("GSM8K", "question answer", "context question", "answer"),
        ("questions", "question", "context question", ANY_ANSWER),
        ("Alpaca", "instruction output", "instruction input", "output"),
        ("Dolly", "instruction response", "instruction context", "response"),
        ("instructions", "instruction", "instruction input context", ANY_ANSWER),
        ("queries", "query response", "query", "response"),
        ("problems", "problem solution", "problem", "solution"),
        ("pairs", "input output", "input", "output"),
        ("pairs", "inputs targets", "inputs", "targets"),
    )
)
SYSTEM = ("system", "system_prompt", "system_message")
HISTORY = "history"  # LLaMA-Factory's earlier exchanges, in pairs
REASONING = ("reasoning_content", "reasoning", "thinking")
STATED = {
    "model": "recorded_model",
    "license": "recorded_license",
    "licence": "recorded_license",
    "dollars": "recorded_dollars",
    "cost": "recorded_dollars",
}
USES = (  # of columns, as they are told
    *("text", "prompt", "conversation", "prompt and recorded answer", "earlier turns"),
    *("system turn", "recorded answer", "reference and recorded answer", "reasoning", "reference"),
)
UNUSED = "unused"
TOOL = "tool"  # a call of a tool, or what one returned
ROLES = {
    name: role
    for role, names in (
        ("system", "system developer"),
        ("user", "user human prompter"),
        ("assistant", "assistant gpt model bot ai chatbot chatgpt"),
        (TOOL, "tool function observation ipython tool_response function_response"),
        (TOOL, "tool_call tool_calls function_call"),
    )
    for name in names.split()
}
TURNS_AS_TEXT = re.compile(r"""\s*+\[?\s*+\{\s*+['"](?:role|from|content|value)['"]\s*:""")
TRANSCRIPT = re.compile(r"\n\n(Human|Assistant): ?")  # of Anthropic's preference rows


class LeftOut(ValueError):
    """Why a well-formed row cannot be used; it does not count as a bad one."""


class Turn(NamedTuple):
    """A turn as it came."""

    role: str
    text: object
    reasoning: str | None = None


class Reading:
    """What the rows were read as: how many of each shape, and what became of their columns."""

    def __init__(self) -> None:
        self.rows, self.omitted = Counter[str](), Counter[str]()
        self.uses: dict[str, dict[str, str]] = {}  # by shape and column

    def add(self, shape: str, row: Mapping[str, object], uses: Mapping[str, str]) -> None:
        """Count a row whose columns became what `uses` says."""
        self.rows[shape] += 1
        unused = {name: UNUSED for name in row if name not in uses and _holds(row[name])}
        self.uses[shape] = unused | self.uses.get(shape, {}) | dict(uses)

    def lines(self) -> list[str]:
        """Return a line for each shape, and one for each kind of turn that was left out."""
        lines = []
        for shape, count in self.rows.items():
            became = dict[str, list[str]]()
            for column, use in self.uses[shape].items():
                became.setdefault(use, []).append(column)
            unused = [f"`{name[:40]}`" for name in became.pop(UNUSED, ())]
            order = sorted(filter(None, became), key=lambda use: USES.index(use.partition(",")[0]))
            parts = [f"{' + '.join(became[use])} → {use}" for use in order]
            line = f"{count:,} row{'s' * (count > 1)} as {shape}: {', '.join(parts)}"
            if unused:
                more = f" and {len(unused) - 8} more" if len(unused) > 8 else ""
                line += f"; column{'s' * (len(unused) > 1)} {', '.join(unused[:8])}{more} not used"
            lines.append(line)
        return lines + [f"{what} left out: {n:,}" for what, n in self.omitted.items() if n]


def interpret(
    row: Mapping[str, object],
    where: str,
    columns: Columns | None = None,
    form: str = "auto",
    pattern: str | None = None,
    reading: Reading | None = None,
) -> Document:
    """Read a row as a document; `form` is auto, documents or prompts.

    Raises ValueError with the reason where it is neither, and LeftOut where it cannot be used.
    """
    columns, reading = columns or Columns(), reading or Reading()
    text_column = columns.text or next((n for n in TEXT_COLUMNS if row.get(n) is not None), None)
    shape = _shape(row, columns)
    if form == "documents" or (form == "auto" and (columns.text or not shape)):
        if text_column is None or text_column not in row:
            raise ValueError(f"no column {columns.text or 'of text'} among: {_names(row)}")
        meta = _other(row, columns, {text_column})
        document = Document.make(normalise(row[text_column]), where, meta)
        reading.add("documents", row, {text_column: "text", columns.id or "id": ""})
        return document
    if shape is None:
        raise ValueError(f"no column {columns.prompt or 'with a prompt'} among: {_names(row)}")
    uses = {columns.id or "id": "", **dict.fromkeys(STATED, "")}
    meta = _prompt(row, columns, shape, pattern, uses, reading.omitted)
    messages = meta["messages"]
    text = messages[0]["content"]
    if len(messages) > 1:
        text = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)
    reading.add(shape.name, row, uses)
    return Document.make(text, where, meta)


def _shape(row: Mapping[str, object], columns: Columns) -> Shape | None:
    """Return the first shape whose columns the row has; `corpus.columns.prompt` makes its own."""
    if columns.prompt:
        names = (columns.prompt,) if isinstance(columns.prompt, str) else columns.prompt
        shape = Shape("prompts", names[:1], names, tuple(ANY_ANSWER.split()))
        return shape if names[0] in row else None
    fitting = [
        shape
        for shape in SHAPES
        if row.get(shape.known_by[0]) is not None
        and all(name in row for name in shape.known_by)
        and (shape.known_by != ("data",) or _are_texts(row["data"]))
    ]
    filled = (shape for shape in fitting if _holds(row[shape.known_by[0]]))
    return next(filled, fitting[0] if fitting else None)


def _prompt(
    row: Mapping[str, object],
    columns: Columns,
    shape: Shape,
    pattern: str | None,
    uses: dict[str, str],
    omitted: Counter[str],
) -> dict[str, Any]:
    """Return the meta of a row that holds a prompt, and note in `uses` what its columns became."""

    def take(use: str, *names: str | None) -> object:
        name = next((name for name in names if name and _holds(row.get(name))), None)
        uses.update({name: use} if name else {})
        return row[name] if name else None

    turns, texts = list[Turn](), list[str]()
    if isinstance(exchanges := take("earlier turns", HISTORY), list):
        turns = [turn for pair in exchanges for turn in read_turns(pair)]
    for name in shape.prompt:
        value = _parsed(row.get(name))
        if isinstance(value, list | dict):
            turns += read_turns(value)
        elif _holds(value) or (len(shape.prompt) == 1 and name in shape.known_by):
            texts.append(normalise(value))
        if name in row:
            uses[name] = "conversation" if isinstance(value, list | dict) else "prompt"
    turns += [Turn("user", "\n\n".join(texts))] if texts else []
    system = take("system turn", columns.system, *SYSTEM)
    right_columns = ("reference",) if "answer" in shape.answer else ("reference", "answer")
    reference = take("reference", columns.reference, *right_columns)
    column = "recorded answer"
    answer = _parsed(take(column, columns.answer, *shape.answer))
    if answer is None and columns.reference:
        column = "reference and recorded answer"
        answer = take(column, columns.reference)

    answers = list[Turn]()
    if _are_turns(answer):
        more = read_turns(answer)
        # a chosen conversation repeats its prompt, or goes on from it
        turns = more if any(turn.role == "user" for turn in more) else turns + more
    elif isinstance(answer, str) and not turns:
        parts = TRANSCRIPT.split(answer)
        pairs = zip(parts[1::2], parts[2::2], strict=True)
        turns = [Turn(ROLES[who.lower()], text) for who, text in pairs]
    else:
        answers = [Turn("assistant", text) for text in read_answers(answer)]
    messages, last = _arrange(turns, system, omitted)
    stated = read_answers(reference) or [turn.text for turn in answers]
    if last and (answers or answer is None):
        # the conversation ends with its answer: a text beside it is what is right
        ends = {"conversation": "prompt and recorded answer", column: "reference"}
        uses |= {name: ends.get(use, use) for name, use in uses.items()}
    if last:
        if not stated and (pattern or answer is not None):
            stated = [last.text]
        answers = [last]
    if answers and (thought := take("reasoning", *REASONING)):
        answers[0] = answers[0]._replace(reasoning=answers[0].reasoning or str(thought))
    right = split_reasoning(str(stated[0]))[0] if stated else ""
    right = normalise(right) if right.strip() else None
    if pattern is None and right and (final := right.rpartition("\n")[2]).startswith("####"):
        right = final[4:].strip() or right
        uses |= {n: f"{use}, after #### reference" for n, use in uses.items() if use == column}
    right = extract(right, pattern)

    hidden = {name for name, use in uses.items() if use not in ("prompt", "system turn")}
    meta = _other(row, columns, {*hidden, *shape.known_by[:1]}) | {"messages": messages}
    if right is not None:
        meta["reference"] = right
    if answers:
        kept = [
            {"text": turn.text} | ({"reasoning": turn.reasoning} if turn.reasoning else {})
            for turn in answers
        ]
        for text in (text for answer in kept for text in answer.values()):
            normalise(
                text
            )  # raises where it cannot be stored; what is stored is the text as it came
        meta["recorded_answer"] = kept if len(kept) > 1 or len(kept[0]) > 1 else kept[0]["text"]
    return meta | {key: row[name] for name, key in STATED.items() if _is_plain(row.get(name))}


def _arrange(
    turns: list[Turn], system: object, omitted: Counter[str]
) -> tuple[list[dict[str, str]], Turn | None]:
    """Return the turns to answer, one system turn before them, and the answer after them, if any.

    Turns of tools are left out, and an assistant's before the first user turn. Raises ValueError
    where nothing is asked, and LeftOut where the answer cannot be had without tools.
    """
    asked = [number for number, turn in enumerate(turns) if turn.role == "user"]
    if not asked:
        raise ValueError("the conversation has no last user turn to answer")
    if any(turn.role == TOOL for turn in turns[asked[-1] :]):
        raise LeftOut("the answer calls a tool, or rests on what a tool returned")
    opening, rest = turns[: asked[0]], turns[asked[0] :]
    omitted["tool turns"] += sum(turn.role == TOOL for turn in turns)
    omitted["assistant turns before the first user turn"] += sum(
        turn.role == "assistant" for turn in opening
    )
    rest = [turn for turn in rest if turn.role != TOOL]
    last = rest.pop() if rest[-1].role == "assistant" else None
    if rest[-1].role != "user":
        raise LeftOut("the conversation has no last user turn to answer")
    orders = [system, *(turn.text for turn in opening if turn.role == "system")]
    texts = dict.fromkeys(normalise(text) for text in orders if _holds(text))
    head = [{"role": "system", "content": "\n\n".join(texts)}] if texts else []
    messages = [{"role": turn.role, "content": normalise(turn.text)} for turn in rest]
    return head + messages, last if last and _holds(last.text) else None


def read_turns(value: object) -> list[Turn]:
    """Read a conversation in any of the usual forms; raises ValueError with the reason."""
    if isinstance(value, dict):
        lists = [one for one in value.values() if isinstance(one, list)]
        if lists and len(lists) == len(value):  # a table of turns, as `datasets` writes them
            value = [dict(zip(value, one, strict=False)) for one in zip(*lists, strict=False)]
        else:
            value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError("a conversation must be a list of turns")
    if _are_texts(value):
        return [Turn(("user", "assistant")[n % 2], text) for n, text in enumerate(value)]
    turns = list[Turn]()
    for turn in value:
        if not isinstance(turn, dict):
            raise ValueError("a turn must have a role and a text")
        role = turn.get("role", turn.get("from"))
        if role is None and turn and ROLES.keys() >= turn.keys():  # a turn a key
            turns += [Turn(ROLES[name], text) for name, text in turn.items() if _holds(text)]
            continue
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise ValueError(f"unknown role {str(role)[:40]!r}")
        role, text = ROLES[role.lower()], turn.get("content", turn.get("value"))
        thought = next((turn[name] for name in REASONING if _holds(turn.get(name))), None)
        if turn.get("tool_calls") or turn.get("function_call"):
            role = TOOL
        elif isinstance(text, list):
            role, text, thoughts = _join_parts(text, role)
            thought = thought or thoughts
        elif text is None and role == "assistant":
            text = ""
        turns.append(Turn(role, text, thought if isinstance(thought, str) else None))
    return turns


def _join_parts(parts: list[Any], role: str) -> tuple[str, str, str]:
    """Return the role, the text and the reasoning of a turn whose content is a list of parts."""
    texts, thoughts = list[str](), list[str]()
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind in ("tool_use", "tool_call", "tool_result"):
            role = TOOL
        elif kind in ("thinking", "reasoning"):
            value = next((part[key] for key in (kind, "text") if _holds(part.get(key))), "")
            thoughts.append(_join_parts(value, role)[1] if isinstance(value, list) else str(value))
        elif kind in ("text", "input_text", "output_text", "refusal"):
            text = part.get("text", part.get(kind))
            if not isinstance(text, str):
                raise ValueError(f"the text is {type(text).__name__}, not text")
            texts.append(text)
        elif kind != "redacted_thinking":
            raise LeftOut(f"a turn holds a part of type {str(kind)[:40]}, which is no text")
    return role, "\n".join(texts), "\n".join(thoughts)


def read_answers(value: object) -> list[str]:
    """Return the answers in a column: a text as it is, a number or JSON as text, each of a list."""
    if isinstance(value, dict) and "answer_start" in value:  # of SQuAD
        value = value.get("text")
    if not _holds(value):
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(
        isinstance(one, str | int | float) or (isinstance(one, dict) and "answer_start" in one)
        for one in value
    ):
        return list(dict.fromkeys(text for one in value for text in read_answers(one)))
    return [json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)]


def _parsed(value: object) -> object:
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
        return result if listed or _are_turns(result) else value
    if TURNS_AS_TEXT.match(value):
        raise ValueError("looks like a list of turns and is neither JSON nor a Python literal")
    return value


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


def _other(row: Mapping[str, object], columns: Columns, used: Iterable[str]) -> dict[str, Any]:
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


def _holds(value: object) -> bool:
    """Tell whether a value is neither missing (None, NaN) nor empty."""
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and value != [] and value != {} and value == value


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def _are_turns(value: object) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, dict) or not {"content", "value", "tool_calls"} & first.keys():
        return False
    return isinstance(first.get("role", first.get("from")), str)


def _names(row: Mapping[str, object]) -> str:
    return ascii(", ".join(row)[:120]) + " (see corpus.columns)"

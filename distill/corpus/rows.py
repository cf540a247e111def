"""What a row means: a document, or a prompt with, perhaps, its reference and recorded answers.

`SHAPES` says which columns of the sets that people use hold what; one more set is one more line.
The columns of a prompt are joined by blank lines, in the order of the training code or harness that
the set is known by: Alpaca and Dolly the instruction first, SQuAD the passage first.

A prompt becomes a document whose `meta["messages"]` holds the conversation to answer. The last user
turn is answered; what answers it is kept as it came, to the space, in `meta["recorded_answer"]`.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import regex

from distill.config.tree import Columns
from distill.corpus.clean import normalise
from distill.corpus.turns import (
    REASONING,
    TOOL,
    LeftOut,
    RowTurn,
    are_texts,
    are_turns,
    holds,
    parsed,
    read_answers,
    read_transcript,
    read_turns,
)
from distill.reasoning import split_reasoning
from distill.records import Document

SECONDS = 2.0  # that finding a reference in one answer may take
TEXT_COLUMNS = ("text", "content", "document", "passage", "body")


class RowShape(NamedTuple):
    """A kind of row: the columns by which it is known, those of its prompt, those of its answer.

    The first of `known_by` holds something. Of `answer`, the first counts that holds something.
    """

    name: str
    known_by: tuple[str, ...]
    prompt: tuple[str, ...]
    answer: tuple[str, ...]


ANY_ANSWER = "answer completion response output chosen answers completions responses outputs"
ANY_PROMPT = "conversations prompt instruction question query input"
SHAPES = tuple(
    RowShape(name, *(tuple(columns.split()) for columns in table))
    for name, *table in (
        ("preference rows", "chosen rejected", ANY_PROMPT, "chosen"),
        ("UltraChat", "messages prompt_id", "messages", ANY_ANSWER),
        ("OpenAI messages", "messages", "messages", ANY_ANSWER),
        ("OpenHermes", "conversations system_prompt", "conversations", ANY_ANSWER),
        ("ShareGPT", "conversations", "conversations", ANY_ANSWER),
        ("conversations", "conversation", "conversation", ANY_ANSWER),
        ("UltraChat's list form", "data", "data", ANY_ANSWER),
        ("TRL prompt/completion", "prompt completion", "prompt", "completion"),
        # before `prompt`, in which some Alpaca sets repeat the whole exchange, answer included
        ("Alpaca", "instruction output", "instruction input", "output"),
        ("Dolly", "instruction response", "instruction context", "response"),
        ("prompts", "prompt", "prompt input context", ANY_ANSWER),
        ("Open-Orca", "question system_prompt response", "question", "response"),
        ("SQuAD", "question context answers", "context question", "answers"),
        ("problems", "question solution", "context question", "solution"),
        ("GSM8K", "question answer", "context passage question", "answer"),
        ("questions", "question", "context passage question", ANY_ANSWER),
        ("instructions", "instruction", "instruction input context", ANY_ANSWER),
        ("queries", "query response", "query", "response"),
        ("queries", "query answer", "query", "answer"),
        ("problems", "problem solution", "problem", "solution"),
        ("problems", "problem generated_solution", "problem", "generated_solution"),
        ("pairs", "input output", "input", "output"),
        ("pairs", "inputs targets", "inputs", "targets"),
        ("pairs", "human assistant", "human", "assistant"),
        ("pairs", "user assistant", "user", "assistant"),
    )
)
SYSTEM = ("system", "system_prompt", "system_message")
REFERENCE = ("reference", "expected_answer")
HISTORY = "history"  # LLaMA-Factory's earlier exchanges, in pairs
KNOWN = {
    *(name for shape in SHAPES for names in shape[1:] for name in names),
    *(*TEXT_COLUMNS, *ANY_ANSWER.split(), *SYSTEM, *REASONING, *REFERENCE),
}
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


class Reading:
    """What the rows were read as: how many of each shape, and what became of their columns."""

    def __init__(self) -> None:
        self.rows, self.omitted = Counter[str](), Counter[str]()
        self.uses: dict[str, dict[str, str]] = {}  # by shape and column

    def add(self, shape: str, row: Mapping[str, object], uses: Mapping[str, str]) -> None:
        """Count a row whose columns became what `uses` says."""
        self.rows[shape] += 1
        unused = {name: UNUSED for name in row if name not in uses and holds(row[name])}
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
    if (names := _usual_names(tuple(row))) and columns == Columns():
        row = dict(zip(names, row.values(), strict=True))
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
    if shape.prompt == ("prompt",) and row.get("label") is False:  # TRL's unpaired preferences
        raise LeftOut("its label says that the completion is not wanted")
    uses = {columns.id or "id": "", **dict.fromkeys(STATED, "")}
    meta = _prompt(row, columns, shape, pattern, uses, reading.omitted)
    messages = meta["messages"]
    text = messages[0]["content"]
    if len(messages) > 1:
        text = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)
    reading.add(shape.name, row, uses)
    return Document.make(text, where, meta)


@lru_cache(100)
def _usual_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of columns, ` Question` as `question`; nothing where they are usual ones."""
    result = [] if {*names} & {*TEXT_COLUMNS} else list(names)
    for place, name in enumerate(result):
        if (usual := name.strip().lower().replace(" ", "_")) in KNOWN and usual not in result:
            result[place] = usual
    return tuple(result) if tuple(result) != names else ()


@lru_cache(100)
def _shapes_of(names: tuple[str, ...]) -> list[RowShape]:
    return [shape for shape in SHAPES if {*shape.known_by} <= {*names}]


def _shape(row: Mapping[str, object], columns: Columns) -> RowShape | None:
    """Return the first shape whose columns the row has; `corpus.columns.prompt` makes its own."""
    if columns.prompt:
        names = (columns.prompt,) if isinstance(columns.prompt, str) else columns.prompt
        shape = RowShape("prompts", names[:1], names, tuple(ANY_ANSWER.split()))
        return shape if names[0] in row else None
    fitting = [
        shape
        for shape in _shapes_of(tuple(row))
        if row[shape.known_by[0]] is not None
        and (shape.known_by != ("data",) or are_texts(row["data"]))
    ]
    filled = (shape for shape in fitting if holds(row[shape.known_by[0]]))
    return next(filled, fitting[0] if fitting else None)


def _prompt(
    row: Mapping[str, object],
    columns: Columns,
    shape: RowShape,
    pattern: str | None,
    uses: dict[str, str],
    omitted: Counter[str],
) -> dict[str, Any]:
    """Return the meta of a row that holds a prompt, and note in `uses` what its columns became."""

    def take(use: str, *names: str | None) -> object:
        name = next((name for name in names if name and holds(row.get(name))), None)
        uses.update({name: use} if name else {})
        return row[name] if name else None

    turns, texts = list[RowTurn](), list[str]()
    if isinstance(exchanges := take("earlier turns", HISTORY), list):
        turns = [turn for pair in exchanges for turn in read_turns(pair)]
    for name in shape.prompt:
        value = parsed(row.get(name))
        if isinstance(value, dict) and isinstance(value.get("text"), str) and not are_turns(value):
            value = value["text"]  # a question of Natural Questions, beside its tokens
        if isinstance(value, list | dict) and name not in shape.known_by and not are_turns(value):
            if not are_texts(value):
                continue
            value = "\n\n".join(value)  # passages
        if isinstance(value, str) and value.startswith("\n\nHuman:"):
            value = read_transcript(value)
            turns += value
        elif isinstance(value, list | dict):
            turns += read_turns(value)
        elif holds(value) or (len(shape.prompt) == 1 and name in shape.known_by):
            texts.append(normalise(value))
        if name in row:
            uses[name] = "conversation" if isinstance(value, list | dict) else "prompt"
    turns += [RowTurn("user", "\n\n".join(texts))] if texts else []
    system = take("system turn", columns.system, *SYSTEM)
    right_columns = REFERENCE if "answer" in shape.answer else (*REFERENCE, "answer")
    reference = take("reference", columns.reference, *right_columns)
    column = "recorded answer"
    answer = parsed(take(column, columns.answer, *shape.answer))
    if answer is None and columns.reference:
        column = "reference and recorded answer"
        answer = take(column, columns.reference)

    answers = list[RowTurn]()
    if are_turns(answer):
        more = read_turns(answer)
        # a chosen conversation repeats its prompt, or goes on from it
        turns = more if any(turn.role == "user" for turn in more) else turns + more
    elif isinstance(answer, str) and not turns:
        turns = read_transcript(answer)
    else:
        answers = read_answers(answer)
    messages, last = _arrange(turns, system, omitted)
    stated = [turn.text for turn in read_answers(reference) or answers]
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
            {"text": turn.text}
            | ({"reasoning": turn.reasoning} if turn.reasoning else {})
            | ({"model": turn.model} if turn.model else {})
            for turn in answers
        ]
        for text in (text for answer in kept for text in answer.values()):
            normalise(text)  # raises where it cannot be stored, and changes nothing
        meta["recorded_answer"] = kept if len(kept) > 1 or len(kept[0]) > 1 else kept[0]["text"]
    return meta | {key: row[name] for name, key in STATED.items() if _is_plain(row.get(name))}


def _arrange(
    turns: list[RowTurn], system: object, omitted: Counter[str]
) -> tuple[list[dict[str, str]], RowTurn | None]:
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
    rest, last = [turn for turn in rest if turn.role != TOOL], None
    while rest[-1].role == "assistant":  # several in a row are one answer
        before = rest.pop()
        if last is None or not holds(last.text):
            last = before
        elif holds(before.text):
            last = before._replace(text=f"{before.text}\n\n{last.text}")
    if rest[-1].role != "user":
        raise LeftOut("the conversation has no last user turn to answer")
    orders = [system, *(turn.text for turn in opening if turn.role == "system")]
    texts = dict.fromkeys(normalise(text) for text in orders if holds(text))
    head = [{"role": "system", "content": "\n\n".join(texts)}] if texts else []
    messages = [{"role": turn.role, "content": normalise(turn.text)} for turn in rest]
    return head + messages, last if last and holds(last.text) else None


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


def _names(row: Mapping[str, object]) -> str:
    return ascii(", ".join(row)[:120]) + " (see corpus.columns)"

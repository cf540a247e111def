"""What a row means: a document, or a prompt with, perhaps, its reference and recorded answers.

configs/tables/row_shapes.yaml says which columns of the usual sets hold what. Of a prompt the last
user turn is answered: `meta["messages"]` is the conversation to answer, `meta["recorded_answer"]`
what answers it, as it came, to the space.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

import regex

from distill.config.tree import Columns
from distill.corpus.clean import normalise
from distill.corpus.turns import (
    FIRST_TURN,
    NEXT_TURN,
    REASONING,
    TABLE,
    TOOL,
    LeftOut,
    RowTurn,
    are_texts,
    are_turns,
    holds,
    parsed,
    read_answers,
    read_turns,
)
from distill.reasoning import split_reasoning
from distill.records import Document

SECONDS = 2.0  # that finding a reference in one answer may take
TREE = {"message_id", "parent_id", "role"}  # columns of the messages of OASST's trees


class RowShape(NamedTuple):
    """A kind of row: the columns by which it is known, those of its prompt, those of its answer."""

    name: str
    known_by: tuple[str, ...]
    prompt: tuple[str, ...]
    answer: tuple[str, ...]


TEXT_COLUMNS, ANY_ANSWER, SYSTEM, REFERENCE = (
    tuple[str, ...](TABLE[name].split()) for name in ("text", "answer", "system", "reference")
)
SHAPES = [
    RowShape(row["name"], *(tuple(columns.split()) for columns in texts))
    for row in TABLE["shapes"]
    for texts in [(row["known_by"], row["prompt"], row.get("answer", TABLE["answer"]))]
]
KNOWN = {
    *(name for shape in SHAPES for names in shape[1:] for name in names),
    *(*TEXT_COLUMNS, *ANY_ANSWER, *SYSTEM, *REASONING, *REFERENCE),
}
STATED = {"model": "recorded_model", "dollars": "recorded_dollars", "cost": "recorded_dollars"}
STATED |= dict.fromkeys(("license", "licence"), "recorded_license")
UNUSED, ANSWER = "unused", "recorded answer"  # uses of columns


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
            parts = [f"{' + '.join(names)} → {use}" for use, names in became.items() if use]
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
    names, shapes = _plan(tuple(row))
    if columns == Columns():
        row = dict(zip(names, row.values(), strict=True))
    text_column = columns.text or next((n for n in TEXT_COLUMNS if row.get(n) is not None), None)
    if columns.prompt:
        names = (columns.prompt,) if isinstance(columns.prompt, str) else columns.prompt
        shapes = [RowShape("prompts", names[:1], names, ANY_ANSWER)]
    shapes = [
        shape
        for shape in shapes
        if row.get(first := shape.known_by[0]) is not None
        and (first != "data" or are_texts(row["data"]))
    ]
    filled = (shape for shape in shapes if holds(row[shape.known_by[0]]))
    shape = next(filled, shapes[0] if shapes else None)
    listed = f"among: {', '.join(row)[:120]!a} (see corpus.columns)"
    if form == "documents" or (form == "auto" and (columns.text or not shape)):
        if text_column is None or text_column not in row:
            raise ValueError(f"no column {columns.text or 'of text'} {listed}")
        if row.keys() >= TREE and not columns.text:
            raise ValueError("a message of a tree: join each thread to `messages`")
        meta = _other(row, columns, {text_column})
        document = Document.make(normalise(row[text_column]), where, meta)
        reading.add("documents", row, {text_column: "text", columns.id or "id": ""})
        return document
    if shape is None:
        raise ValueError(f"no column {columns.prompt or 'with a prompt'} {listed}")
    if shape.prompt == ("prompt",) and row.get("label") is False:  # TRL's unpaired preferences
        raise LeftOut("its label says that the completion is not wanted")
    uses = {columns.id or "id": "", **dict.fromkeys(STATED, "")}
    messages, meta = _prompt(row, columns, shape, pattern, uses, reading.omitted)
    text = messages[0]["content"]
    if len(messages) > 1:
        text = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)
    reading.add(shape.name, row, uses)
    return Document.make(text, where, meta)


@lru_cache(100)
def _plan(names: tuple[str, ...]) -> tuple[tuple[str, ...], list[RowShape]]:
    """Return columns by their usual names, ` Question` as `question`, and the shapes they fit."""
    result = list(names)
    for place, name in enumerate(names):
        usual = name.strip().lower().replace(" ", "_")
        if usual in KNOWN and usual not in result and not {*names} & {*TEXT_COLUMNS}:
            result[place] = usual
    return tuple(result), [shape for shape in SHAPES if {*shape.known_by} <= {*result}]


def _prompt(
    row: Mapping[str, object],
    columns: Columns,
    shape: RowShape,
    pattern: str | None,
    uses: dict[str, str],
    omitted: Counter[str],
) -> tuple[list[dict[str, str]], dict[str, object]]:
    """Return the turns and the meta of a row that holds a prompt; `uses` gets its columns' uses."""

    def take(use: str, *names: str | None) -> object:
        name = next((name for name in names if name and holds(row.get(name))), None)
        uses.update({name: use} if name else {})
        return row[name] if name else None

    turns, texts = list[RowTurn](), list[str]()
    if isinstance(pairs := take("earlier turns", "history"), list):  # of LLaMA-Factory
        turns = [turn for pair in pairs for turn in read_turns(pair)]
    for name in shape.prompt:
        value, defining = parsed(row.get(name)), name in shape.known_by
        if are_texts(value) and not defining:
            value = "\n\n".join(value)  # passages
        if isinstance(value, list | dict):
            if not defining and not are_turns(value):
                continue
            turns += read_turns(value)
        elif holds(value) or (defining and len(shape.prompt) == 1):
            texts.append(normalise(value))
        if name in row:
            uses[name] = "conversation" if isinstance(value, list | dict) else "prompt"
    turns += [RowTurn("user", "\n\n".join(texts))] if texts else []
    system = take("system turn", columns.system, *SYSTEM)
    right_columns = REFERENCE if "answer" in shape.answer else (*REFERENCE, "answer")
    reference = take("reference", columns.reference, *right_columns)
    answer = parsed(take(ANSWER, columns.answer, *shape.answer))
    alone = [answer] if isinstance(answer, str) and not turns else texts
    # a passage beside a question may be one
    if len(alone) == 1 and FIRST_TURN.match(alone[0]) and NEXT_TURN.search(alone[0]):
        raise ValueError("a transcript in one text: write its turns to `messages`")

    answers = list[RowTurn]()
    if are_turns(answer):
        more = read_turns(answer)
        if turns[-len(more) :] == more:  # TRL's completion beside the conversation that it ends
            answer = None
            uses.update((name, "") for name, use in [*uses.items()] if use == ANSWER)
        # a chosen conversation repeats its prompt, or goes on from it
        elif any(turn.role == "user" for turn in more):
            turns = more
        else:
            turns += more
    else:
        answers = read_answers(answer)
    messages, last = _arrange(turns, system, omitted)
    stated = [turn.text for turn in read_answers(reference) or answers]
    if last and (answers or answer is None):
        # the conversation ends with its answer: a text beside it is what is right
        ends = {"conversation": "prompt and recorded answer", ANSWER: "reference"}
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
        uses |= {n: f"{use}, after #### reference" for n, use in uses.items() if use == ANSWER}
    elif pattern and right:
        try:
            match = regex.search(pattern, right, timeout=SECONDS)
        except TimeoutError:
            raise ValueError("corpus.reference_pattern takes too long on the answer") from None
        if match is None or match[1] is None:
            raise ValueError("corpus.reference_pattern is not found in the answer")
        right = match[1].strip()

    hidden = {name for name, use in uses.items() if use not in ("prompt", "system turn")}
    meta = _other(row, columns, {*hidden, *shape.known_by[:1]}) | {"messages": messages}
    if right is not None:
        meta["reference"] = right
    elif not holds(meta.get("reference")):  # an empty column is no reference
        meta.pop("reference", None)
    if answers:
        records = [
            {key: text for key in ("text", "reasoning", "model") if (text := getattr(turn, key))}
            for turn in answers
        ]
        for text in (text for record in records for text in record.values()):
            normalise(text)  # raises where it cannot be stored, and changes nothing
        alone = len(records) == len(records[0]) == 1
        meta["recorded_answer"] = records[0]["text"] if alone else records
    plain = {key: row[name] for name, key in STATED.items() if _is_plain(row.get(name))}
    return messages, meta | plain


def _arrange(
    turns: list[RowTurn], system: object, omitted: Counter[str]
) -> tuple[list[dict[str, str]], RowTurn | None]:
    """Return the turns to answer, one system turn before them, and the answer after them, if any.

    Turns of tools are left out, and an assistant's before the first user turn.
    """
    questions = [number for number, turn in enumerate(turns) if turn.role == "user"]
    if not questions:
        raise ValueError("the conversation has no last user turn to answer")
    if any(turn.role == TOOL for turn in turns[questions[-1] :]):
        raise LeftOut("the answer calls a tool, or rests on what a tool returned")
    opening, rest = turns[: questions[0]], turns[questions[0] :]
    omitted["tool turns"] += sum(turn.role == TOOL for turn in turns)
    early = sum(turn.role == "assistant" for turn in opening)
    omitted["assistant turns before the first user turn"] += early
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


def _other(row: Mapping[str, object], columns: Columns, used: Iterable[str]) -> dict[str, object]:
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

"""How models mark their reasoning in a text: configs/tables/reasoning.yaml has the marks.

A template may write the opening mark into the prompt; a model that is cut off never closes. Marks
in quotes, code or a sentence are what an answer speaks of. Time is linear in the text.
"""

import re
from collections.abc import Iterator

from distill import shipped_table

TABLE = shipped_table("reasoning.yaml")
PAIRS: list[tuple[str, str]] = [*map(tuple, TABLE["pairs"])]
SENTENCES: list[tuple[str, str]] = [*map(tuple, TABLE["sentences"])]
ANSWERS: list[tuple[str, str]] = [*map(tuple, TABLE["answers"])]
BLOCKS = 16  # of thought, one behind the other; more are a loop of the model's
QUOTES = "`'\"“”‘’«»"
OPENING_OF = {closing: opening for opening, closing in PAIRS}
MARK = re.compile("|".join(re.escape(mark) for pair in PAIRS for mark in pair))


def split_reasoning(text: str) -> tuple[str, str | None]:
    """Return an answer, empty if its thought never ends, and the reasoning before it, or None."""
    thoughts: list[str] = []
    while len(thoughts) < BLOCKS and (block := _first_block(text, lone=not thoughts)) is not None:
        thought, text = block
        for tail in TABLE["tails"]:
            thought = thought.strip().removesuffix(tail)
        thoughts.append(thought.strip())
    if not thoughts:
        return text, None
    for opening, closing in ANSWERS:
        if closing in text and text.startswith(opening):
            inside = text.removeprefix(opening).rstrip().removesuffix(closing)
            text = inside.strip() if closing not in inside else text
        elif opening and text.startswith(opening):  # cut off
            text = text.removeprefix(opening).lstrip()
    return text, "\n\n".join(thought for thought in thoughts if thought)


def join_thought(text: str, thought: str) -> str:
    """Return an answer as the dataset holds it where its thought is kept."""
    return f"<think>\n{thought}\n</think>\n\n{text}"


def split_thought(text: str, thought: str | None) -> tuple[str | None, str]:
    """Return the thought and the answer of what `join_thought` wrote, or None and the text."""
    if thought and text.startswith(block := join_thought("", thought)):
        return thought, text.removeprefix(block)
    return None, text


def marked(text: str) -> bool:
    """Tell whether a mark of reasoning stands in a text that has been split."""
    return next(_marks(text), None) is not None


def _first_block(text: str, lone: bool) -> tuple[str, str] | None:
    """Return the thought with which a text begins and what follows it, or None; with `lone`, a
    closing mark that nothing before it opens ends one too."""
    start = text.lstrip()
    for opening, closing in PAIRS:
        if start.startswith(opening):
            body = start.removeprefix(opening)
            places = (mark.start() for mark in _marks(body) if mark[0] == closing)
            if (place := next(places, body.find(closing))) < 0:
                return body, ""
            return body[:place], body[place + len(closing) :].lstrip()
    for opening, closing in SENTENCES:
        if start.startswith(opening) and closing in start:
            thought, _, answer = start.removeprefix(opening).partition(closing)
            return thought, answer.lstrip()
    first = {opening: text.find(opening) for opening, _ in PAIRS} if lone else {}
    for mark in _marks(text) if lone else ():
        place, end = mark.span()
        # a sentence that speaks of a mark: a word before it, a small letter or a stop behind
        spoken = re.fullmatch(r"[\w,:(] ", text[max(0, place - 2) : place])
        spoken = spoken and re.match(r"[.,;:)?]| [^\W\d_A-Z]", text[end : end + 2])
        opening = OPENING_OF.get(mark[0])
        if opening and not spoken and not 0 <= first[opening] < place:
            return text[:place], text[end:].lstrip()
    return None


def _marks(text: str) -> Iterator[re.Match[str]]:
    """Yield the marks that stand outside of quotes and code."""
    fences, before = 0, 0
    for mark in MARK.finditer(text):
        fences += text.count("```", before, mark.start())
        before = mark.start()
        around = (text[before - 1 : before], text[mark.end() : mark.end() + 1])
        if fences % 2 == 0 and not all(c and c in QUOTES for c in around):
            yield mark

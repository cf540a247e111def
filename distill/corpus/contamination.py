"""Contamination: what is evaluated must not stand in what is trained on.

An item is looked for by the words that are its own: what the student is asked without the sentences
of the task's template, and its reference, where that has four words (a number, a name, a class are
no evidence). Other words for the same thing are not found: `NOT_FOUND` stands beside every figure.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

from jinja2 import nodes

from distill.corpus.ngrams import EvaluatedText, Index
from distill.records import Document, Item, Pair, Prompt
from distill.tasks.task import ENVIRONMENT, shipped

KINDS = ("corpus", "prompt", "answer")  # of texts
PlacedText = tuple[str, str]  # a place, and the text that stands there

NOT_FOUND = (
    "Found are 13 words in a row, case, punctuation and spacing aside (shorter items: the whole "
    "item). A paraphrase or a translation is not found."
)
MIN_SENTENCE = 6  # characters of a template's sentence that is cut out of a question


class Match(NamedTuple):
    """A match of an item: in what kind of text, where, and the words."""

    item: str
    kind: str
    place: str
    phrase: str


def of_item(item: Item, template: str | None = None) -> EvaluatedText:
    """Return an item as text; `template` is that of its task, where the task has no file."""
    return EvaluatedText(item.id, item.cluster, own_parts(item.prompt, template), item.reference)


def own_parts(prompt: Prompt, template: str | None = None) -> tuple[str, ...]:
    """Return what a prompt asks the student, in pieces, without the sentences of its template."""
    pieces = [turn.content for turn in prompt.messages if turn.role != "system"]
    if template is None:
        task = shipped(prompt.task)
        template = task.student.user if task else ""
    for sentence in sentences(template):
        pieces = [part for piece in pieces for part in piece.split(sentence)]
    return tuple(piece for piece in map(str.strip, pieces) if piece)


@cache
def sentences(template: str) -> tuple[str, ...]:
    """Return the sentences of a template itself, the longest first."""
    parts = ENVIRONMENT.parse(template).find_all(nodes.TemplateData)
    texts = [part.data.strip() for part in parts]
    return tuple(sorted((t for t in texts if len(t) >= MIN_SENTENCE), key=len, reverse=True))


def flag(items: Index, *texts: Iterable[PlacedText]) -> dict[str, list[Match]]:
    """Return, by item id, the first match in each kind of text: documents, prompts, answers."""
    matches: dict[str, dict[str, Match]] = {}
    for kind, placed in zip(KINDS, texts, strict=False):
        for item, place, phrase in items.find(placed):
            match = Match(item.id, kind, place, phrase)
            matches.setdefault(item.id, {}).setdefault(kind, match)
    return {item: [*by_kind.values()] for item, by_kind in matches.items()}


def flag_training(
    items: Sequence[EvaluatedText], documents: Iterable[Document], pairs: Sequence[Pair]
) -> tuple[dict[str, list[Match]], set[str]]:
    """Look for items in documents that are not held out and in pairs; return matches by item id,
    and the ids of items without words of their own to look for."""
    index = Index(items)
    questions = ((pair.prompt.id, "\n".join(own_parts(pair.prompt))) for pair in pairs)
    answers = ((pair.prompt.id, pair.response.text) for pair in pairs)
    matches = flag(index, trained_on(documents), questions, answers)
    return matches, {item.id for item in items} - {item.id for item in index.searchable}


def trained_on(documents: Iterable[Document]) -> Iterator[PlacedText]:
    """Yield the texts of documents that are not held out, with the answers recorded with them."""
    for document in documents:
        if document.split != "heldout":
            parts = [document.text]
            for answer in document.recorded_answers:
                parts += [answer.get("reasoning", ""), answer["text"]]
            yield document.id, "\n".join(filter(None, parts))


def contaminated(texts: Iterable[PlacedText], held_out: Iterable[Prompt]) -> set[str]:
    """Return the places of the texts that hold something of a held-out prompt."""
    items = {prompt.id: of_item(Item.make(prompt)) for prompt in held_out}
    return {place for _, place, _ in Index([*items.values()]).find(texts)}

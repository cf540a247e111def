"""Contamination: what is evaluated must not stand in what is trained on.

An item is looked for by the words that are its own: what the student is asked without the
sentences of the task's template, without phrases that many items share, and its reference answer.
Thirteen of them in a row are a match; a shorter item is looked for in full, and one of under eight
words only where it stands alone, as a text or a line. Answers of under four words (a number, a
name, a class) are no evidence. Other words for the same thing are not found: `NOT_FOUND` stands
beside every figure.

Before money is spent, the corpus stage leaves out what shares text with a held-out document, and
never the held-out one: which documents are held out follows from their content, and an item that
were dropped for being easy to find elsewhere would change what is measured.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from jinja2 import nodes

from distill.corpus import readers
from distill.corpus.ngrams import EvaluatedText, Index
from distill.corpus.rows import interpret
from distill.errors import DistillError, Exit
from distill.records import Document, Item, Pair, Prompt
from distill.tasks.task import ENVIRONMENT, load_task, task_path

TextKind = Literal["corpus", "prompt", "answer"]
KINDS: tuple[TextKind, ...] = ("corpus", "prompt", "answer")
PlacedText = tuple[str, str]  # a place, and the text that stands there

NOT_FOUND = (
    "Found are 13 words in a row, case, punctuation and spacing aside (shorter items: the whole "
    "item). A paraphrase or a translation is not found."
)
MIN_SENTENCE = 6  # characters of a template's sentence that is cut out of a question


class Match(NamedTuple):
    """A match of an item: in what kind of text, where, and the words."""

    item: str
    kind: TextKind
    place: str
    phrase: str


def of_item(item: Item, template: str | None = None) -> EvaluatedText:
    """Return an item as text; `template` is that of its task, where the task has no file."""
    return EvaluatedText(item.id, item.cluster, own_parts(item.prompt, template), item.reference)


def own_parts(prompt: Prompt, template: str | None = None) -> tuple[str, ...]:
    """Return what a prompt asks the student, in pieces, without the sentences of its template."""
    pieces = [turn.content for turn in prompt.messages if turn.role != "system"]
    for sentence in sentences(template_of(prompt.task) if template is None else template):
        pieces = [part for piece in pieces for part in piece.split(sentence)]
    return tuple(piece for piece in map(str.strip, pieces) if piece)


@cache
def template_of(task: str) -> str:
    """Return the template of a task's user turn; nothing where the task has no file."""
    return load_task(task).student.user if task_path(task).is_file() else ""


@cache
def sentences(template: str) -> tuple[str, ...]:
    """Return the sentences of a template itself, the longest first."""
    parts = ENVIRONMENT.parse(template).find_all(nodes.TemplateData)
    texts = [part.data.strip() for part in parts]
    return tuple(sorted((t for t in texts if len(t) >= MIN_SENTENCE), key=len, reverse=True))


def flag(
    items: Index | Sequence[EvaluatedText],
    documents: Iterable[PlacedText] = (),
    prompts: Iterable[PlacedText] = (),
    answers: Iterable[PlacedText] = (),
) -> dict[str, list[Match]]:
    """Return, by item id, the first match of each kind; an item without a match is left out."""
    index, matches = items if isinstance(items, Index) else Index(items), dict[str, list[Match]]()
    for kind, texts in zip(KINDS, (documents, prompts, answers), strict=True):
        for item, place, phrase in index.find(texts):
            of_item = matches.setdefault(item.id, [])
            if all(match.kind != kind for match in of_item):
                of_item.append(Match(item.id, kind, place, phrase))
    return matches


def flag_training(
    items: Sequence[EvaluatedText], documents: Iterable[Document], pairs: Sequence[Pair]
) -> tuple[dict[str, list[Match]], set[str]]:
    """Look for items in documents that are not held out and in the pairs that are trained on.

    Returns the matches by item id, and the ids of items without words of their own to look for.
    """
    index = Index(items)
    questions = ((pair.prompt.id, "\n".join(own_parts(pair.prompt))) for pair in pairs)
    answers = ((pair.prompt.id, pair.response.text) for pair in pairs)
    matches = flag(index, _trained_on(documents), questions, answers)
    searchable = {item.id for item in index.searchable}
    return matches, {item.id for item in items} - searchable


def _trained_on(documents: Iterable[Document]) -> Iterator[PlacedText]:
    """Yield the texts of documents that are not held out, with the answers recorded with them."""
    for document in documents:
        if document.split != "heldout":
            yield document.id, full_text(document)


def full_text(document: Document) -> str:
    """Return a document with the answers that were recorded with it."""
    texts = (answer.get(k) for answer in document.recorded_answers for k in ("reasoning", "text"))
    return "\n".join(filter(None, (document.text, *texts)))


def contaminated_documents(documents: Sequence[Document]) -> dict[str, tuple[Document, str]]:
    """Return, by the id of a document, the held-out one that it shares text with, and the text."""
    held_out, items = dict[str, Document](), list[EvaluatedText]()
    for document in (document for document in documents if document.split == "heldout"):
        cluster, reference = document.meta.get("parent"), document.meta.get("reference")
        cluster = str(cluster or document.id)
        items.append(EvaluatedText(document.id, cluster, (document.text,), reference))
        held_out[document.id] = document
    matches: dict[str, tuple[Document, str]] = {}
    for item, place, phrase in Index(items).find(_trained_on(documents)):
        matches.setdefault(place, (held_out[item.id], phrase))
    return matches


def contaminated_pairs(pairs: Iterable[Pair], held_out: Iterable[Prompt]) -> set[str]:
    """Return the ids of the responses whose prompt or text holds something of a held-out prompt."""
    items = {prompt.id: Item.make(prompt) for prompt in held_out}
    texts = ((p.response.id, "\n".join([*own_parts(p.prompt), p.response.text])) for p in pairs)
    return {place for _, place, _ in Index([of_item(i) for i in items.values()]).find(texts)}


def read_texts(path: Path) -> Iterator[Document]:
    """Yield the rows of a file or folder; raises DistillError (exit 3) at a bad one."""
    for file in readers.list_files(path)[0]:
        for row in readers.read_file(file, str(file)):
            try:
                if isinstance(row, readers.Reject):
                    raise ValueError(row.reason)
                yield interpret(row.value, row.where)
            except ValueError as error:
                fix = "correct the row, or take it out"
                raise DistillError(Exit.INPUT, row.where, str(error), fix) from None


def compare_files(items: Path, corpus: Path) -> tuple[int, dict[str, list[Match]]]:
    """Look for the items of one file in the texts of another, or of a folder.

    Returns how many items there are, and the matches by `file:line`.
    """
    texts: dict[str, EvaluatedText] = {}
    for document in read_texts(items):
        recorded = next((answer["text"] for answer in document.recorded_answers), None)
        answer = document.meta.get("reference") or recorded
        item = EvaluatedText(document.source, document.source, (document.text,), answer)
        texts.setdefault(document.id, item)
    matches = flag([*texts.values()], ((d.source, full_text(d)) for d in read_texts(corpus)))
    return len(texts), matches

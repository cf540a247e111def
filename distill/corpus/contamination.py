"""Contamination: what is evaluated must not stand in what is trained on.

An item is looked for by the words that are its own: what the student is asked without the sentences of the task's
template, without phrases that many items share, and its reference answer. Thirteen of them in a row are a match; a
shorter item is looked for whole, and one of under eight words only where it stands alone, as a text or a line. Answers
of under four words (a number, a name, a class) are no evidence. Other words for the same thing are not found: see
`NOT_FOUND`, which stands beside every figure.

Before money is spent, the corpus stage leaves out what shares text with a held-out document, and never the held-out
one: which documents are held out follows from their content, and an item that were dropped for being easy to find
elsewhere would change what is measured. At the end, `flag` tells what is still there.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from jinja2 import nodes

from distill.corpus import readers
from distill.corpus.ngrams import Found, Index, Wanted
from distill.corpus.rows import interpret
from distill.errors import DistillError, Exit
from distill.records import Document, Item, Pair, Prompt
from distill.tasks.task import ENVIRONMENT, load_task, task_path

Kind = Literal["corpus", "prompt", "answer"]
KINDS: tuple[Kind, ...] = ("corpus", "prompt", "answer")
Text = tuple[str, str]  # where it stands, and what it says

NOT_FOUND = (
    "Found are 13 words in a row, case, punctuation and spacing aside (shorter items: the whole "
    "item). A paraphrase or a translation is not found."
)
TELLING = 4  # words of an answer that may be evidence
CUT = 6  # characters of a template's sentence that is cut out of a question


class Match(NamedTuple):
    """What was found of an item: in what kind of text, where, and the words."""

    item: str
    kind: Kind
    place: str
    phrase: str


class Eval(NamedTuple):
    """What is evaluated, as text: its id, its cluster, the question without its template, and the reference."""

    id: str
    cluster: str
    question: tuple[str, ...]
    reference: str | None = None


def of_item(item: Item, template: str | None = None) -> Eval:
    """Return an item as text; `template` is that of its task, where the task has no file."""
    return Eval(item.id, item.cluster, own_parts(item.prompt, template), item.reference)


def of_document(document: Document) -> Eval:
    """Return a document that is held out as text."""
    cluster, reference = document.meta.get("parent"), document.meta.get("reference")
    return Eval(document.id, str(cluster or document.id), (document.text,), reference)


def own_parts(prompt: Prompt, template: str | None = None) -> tuple[str, ...]:
    """Return what a prompt asks the student, in pieces, without the sentences of its task's template."""
    pieces = [turn.content for turn in prompt.messages if turn.role != "system"]
    for sentence in sentences(template_of(prompt.task) if template is None else template):
        pieces = [part for piece in pieces for part in piece.split(sentence)]
    return tuple(piece for piece in map(str.strip, pieces) if piece)


@cache
def template_of(task: str) -> str:
    """Return what the student is asked by a task, with its blanks; nothing where the task has no file."""
    return load_task(task).student.user if task_path(task).is_file() else ""


@cache
def sentences(template: str) -> tuple[str, ...]:
    """Return what a template itself says, the longest first."""
    said = [data.data.strip() for data in ENVIRONMENT.parse(template).find_all(nodes.TemplateData)]
    return tuple(sorted((text for text in said if len(text) >= CUT), key=len, reverse=True))


def index(items: Sequence[Eval]) -> Index:
    """Return the items as an index; an owner in it is the place of an item here."""
    wanted = []
    for owner, item in enumerate(items):
        wanted.append(Wanted(owner, item.cluster, item.question))
        if item.reference:
            wanted.append(Wanted(owner, item.cluster, (item.reference,), TELLING))
    return Index(wanted)


def flag(
    items: Sequence[Eval],
    documents: Iterable[Text] = (),
    prompts: Iterable[Text] = (),
    answers: Iterable[Text] = (),
) -> dict[str, list[Match]]:
    """Return, by item id, the first match of each kind; an item without one is not in it."""
    looked_for, matches = index(items), dict[str, dict[Kind, Match]]()
    for kind, texts in zip(KINDS, (documents, prompts, answers), strict=True):
        for owner, place, phrase, _ in looked_for.find(texts):
            found = Match(items[owner].id, kind, place, phrase)
            matches.setdefault(found.item, {}).setdefault(kind, found)
    return {item: list(found.values()) for item, found in matches.items()}


def unsearchable(items: Sequence[Eval]) -> set[str]:
    """Return the ids of the items that have no words of their own to look for."""
    checked = index(items).checked
    return {item.id for owner, item in enumerate(items) if owner not in checked}


def trained_on(documents: Iterable[Document]) -> Iterator[Text]:
    """Yield the texts of documents that are not held out, recorded answers too."""
    for document in documents:
        if document.split != "heldout":
            yield document.id, whole_text(document)


def whole_text(document: Document) -> str:
    """Return a document with the answer that was recorded with it."""
    return "\n".join(filter(None, (document.text, document.meta.get("recorded_answer"))))


def asked(pairs: Iterable[Pair]) -> Iterator[Text]:
    """Yield what training pairs ask the student."""
    return ((pair.prompt.id, "\n".join(own_parts(pair.prompt))) for pair in pairs)


def answered(pairs: Iterable[Pair]) -> Iterator[Text]:
    """Yield what training pairs answer."""
    return ((pair.prompt.id, pair.response.text) for pair in pairs)


def leaking(documents: Sequence[Document]) -> dict[str, tuple[Document, Found]]:
    """Return which documents share text with a held-out one and are not held out, by id: that one, and the text."""
    held_out = [document for document in documents if document.split == "heldout"]
    looked_for, leaks = index([of_document(document) for document in held_out]), {}
    for found in looked_for.find(trained_on(documents)):
        leaks.setdefault(found.place, (held_out[found.owner], found))
    return leaks


def leaking_pairs(pairs: Iterable[Pair], held_out: Iterable[Prompt]) -> set[str]:
    """Return the ids of the responses whose prompt or text holds something of a held-out prompt."""
    asked_of = {prompt.id: Item.make(prompt) for prompt in held_out}
    looked_for = index([of_item(item) for item in asked_of.values()])
    texts = ((p.response.id, "\n".join([*own_parts(p.prompt), p.response.text])) for p in pairs)
    return {found.place for found in looked_for.find(texts)}


def read_texts(path: Path) -> Iterator[Document]:
    """Yield the rows of a file or folder as documents; raises DistillError (exit 3) at one that cannot be read."""
    files, _ = readers.list_files(path)
    for file in files:
        for row in readers.read_file(file, str(file)):
            try:
                if isinstance(row, readers.Reject):
                    raise ValueError(row.reason)
                yield interpret(row.value, row.where)
            except ValueError as error:
                fix = "correct the row, or take it out"
                raise DistillError(Exit.INPUT, row.where, str(error), fix) from None


def compare_files(items: Path, corpus: Path) -> tuple[list[Eval], dict[str, list[Match]]]:
    """Look for the items of one file in the texts of another, or of a folder; places are `file:line`."""
    looked_for: dict[str, Eval] = {}
    for document in read_texts(items):
        answer = document.meta.get("reference") or document.meta.get("recorded_answer")
        item = Eval(document.source, document.source, (document.text,), answer)
        looked_for.setdefault(document.id, item)
    evals = list(looked_for.values())
    return evals, flag(evals, ((d.source, whole_text(d)) for d in read_texts(corpus)))

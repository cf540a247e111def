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
from distill.corpus.ngrams import Index, PhraseMatch, Query
from distill.corpus.rows import interpret
from distill.errors import DistillError, Exit
from distill.records import Document, Item, Pair, Prompt
from distill.tasks.task import ENVIRONMENT, load_task, task_path

Kind = Literal["corpus", "prompt", "answer"]
KINDS: tuple[Kind, ...] = ("corpus", "prompt", "answer")
PlacedText = tuple[str, str]  # a place, and the text that stands there

NOT_FOUND = (
    "Found are 13 words in a row, case, punctuation and spacing aside (shorter items: the whole "
    "item). A paraphrase or a translation is not found."
)
MIN_ANSWER_WORDS = 4  # of an answer that may be evidence
MIN_SENTENCE = 6  # characters of a template's sentence that is cut out of a question


class Match(NamedTuple):
    """A match of an item: in what kind of text, where, and the words."""

    item: str
    kind: Kind
    place: str
    phrase: str


class EvaluatedText(NamedTuple):
    """An item that is evaluated, as text: id, cluster, question without its template, and reference."""

    id: str
    cluster: str
    question: tuple[str, ...]
    reference: str | None = None


def of_item(item: Item, template: str | None = None) -> EvaluatedText:
    """Return an item as text; `template` is that of its task, where the task has no file."""
    return EvaluatedText(item.id, item.cluster, own_parts(item.prompt, template), item.reference)


def of_document(document: Document) -> EvaluatedText:
    """Return a document that is held out as text."""
    cluster, reference = document.meta.get("parent"), document.meta.get("reference")
    return EvaluatedText(document.id, str(cluster or document.id), (document.text,), reference)


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
    """Return the sentences of a template itself, the longest first."""
    parts = ENVIRONMENT.parse(template).find_all(nodes.TemplateData)
    texts = [part.data.strip() for part in parts]
    return tuple(
        sorted((text for text in texts if len(text) >= MIN_SENTENCE), key=len, reverse=True)
    )


def index(items: Sequence[EvaluatedText]) -> Index:
    """Return the items as an index; an owner in it is the position of an item here."""
    queries = []
    for owner, item in enumerate(items):
        queries.append(Query(owner, item.cluster, item.question))
        if item.reference:
            queries.append(Query(owner, item.cluster, (item.reference,), MIN_ANSWER_WORDS))
    return Index(queries)


def flag(
    items: Sequence[EvaluatedText],
    documents: Iterable[PlacedText] = (),
    prompts: Iterable[PlacedText] = (),
    answers: Iterable[PlacedText] = (),
) -> dict[str, list[Match]]:
    """Return, by item id, the first match of each kind; an item without a match is left out."""
    queries, matches = index(items), dict[str, dict[Kind, Match]]()
    for kind, texts in zip(KINDS, (documents, prompts, answers), strict=True):
        for owner, place, phrase, _ in queries.find(texts):
            match = Match(items[owner].id, kind, place, phrase)
            matches.setdefault(match.item, {}).setdefault(kind, match)
    return {item: list(of_item.values()) for item, of_item in matches.items()}


def unsearchable(items: Sequence[EvaluatedText]) -> set[str]:
    """Return the ids of the items that have no words of their own to look for."""
    searchable = index(items).searchable
    return {item.id for owner, item in enumerate(items) if owner not in searchable}


def trained_on(documents: Iterable[Document]) -> Iterator[PlacedText]:
    """Yield the texts of documents that are not held out, recorded answers too."""
    for document in documents:
        if document.split != "heldout":
            yield document.id, full_text(document)


def full_text(document: Document) -> str:
    """Return a document with the answer that was recorded with it."""
    return "\n".join(filter(None, (document.text, document.meta.get("recorded_answer"))))


def questions_of(pairs: Iterable[Pair]) -> Iterator[PlacedText]:
    """Yield the questions that training pairs ask the student."""
    return ((pair.prompt.id, "\n".join(own_parts(pair.prompt))) for pair in pairs)


def answers_of(pairs: Iterable[Pair]) -> Iterator[PlacedText]:
    """Yield the answers of training pairs."""
    return ((pair.prompt.id, pair.response.text) for pair in pairs)


def contaminated_documents(
    documents: Sequence[Document],
) -> dict[str, tuple[Document, PhraseMatch]]:
    """Return, by the id of a document that shares text with a held-out one, that one and the match."""
    held_out = [document for document in documents if document.split == "heldout"]
    queries, matches = index([of_document(document) for document in held_out]), {}
    for match in queries.find(trained_on(documents)):
        matches.setdefault(match.place, (held_out[match.owner], match))
    return matches


def contaminated_pairs(pairs: Iterable[Pair], held_out: Iterable[Prompt]) -> set[str]:
    """Return the ids of the responses whose prompt or text holds something of a held-out prompt."""
    items = {prompt.id: Item.make(prompt) for prompt in held_out}
    queries = index([of_item(item) for item in items.values()])
    texts = ((p.response.id, "\n".join([*own_parts(p.prompt), p.response.text])) for p in pairs)
    return {match.place for match in queries.find(texts)}


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


def compare_files(items: Path, corpus: Path) -> tuple[list[EvaluatedText], dict[str, list[Match]]]:
    """Look for the items of one file in the texts of another, or of a folder; places are `file:line`."""
    texts: dict[str, EvaluatedText] = {}
    for document in read_texts(items):
        answer = document.meta.get("reference") or document.meta.get("recorded_answer")
        item = EvaluatedText(document.source, document.source, (document.text,), answer)
        texts.setdefault(document.id, item)
    evals = list(texts.values())
    return evals, flag(evals, ((d.source, full_text(d)) for d in read_texts(corpus)))

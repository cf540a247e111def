"""How much work a config means: documents, prompts of each split, the size of a prompt.

Documents and prompts are the run's, where it has made them. Else they are really made, in a folder
that is thrown away, unless the corpus is on the Hub or large; then its bytes and the caps of the
config stand in.
"""

import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from distill.config.tree import Config
from distill.corpus import corpus as corpus_stage
from distill.corpus import prompts as prompts_stage
from distill.corpus.prompts import asked, drawn
from distill.errors import DistillError, Exit
from distill.evaluation.suites import origins_of
from distill.generation.filters import checked_prompts
from distill.generation.generate import useful_prompts
from distill.pipeline import STAGES
from distill.records import SPLITS, Document, Message, Prompt
from distill.responders.token_counts import token_counter
from distill.storage.files import read_records
from distill.storage.progress import console
from distill.storage.run_folder import Run

LARGE = 50_000_000  # bytes of corpus above which it is not read for a plan; a second a megabyte
HEAD = 1_000_000  # bytes of a large file that are read
UNREAD_BYTES = 1500  # of a document on the Hub
BYTES_A_TOKEN = 4.0  # of English and code, where no tokenizer is at hand
COUNTED = 300  # texts whose tokens are counted, for the rate of all
TEMPLATE = 27  # tokens that the chat templates of the quickstart's two models add to a prompt


class TextSize(NamedTuple):
    """A text on average: its bytes, and how many of them make a token of a model."""

    bytes: float
    bytes_a_token: float = BYTES_A_TOKEN

    @classmethod
    def of(cls, texts: Sequence[str], model: str = "") -> "TextSize":
        """Measure texts, with the model's tokenizer where the cache has it."""
        size = sum(len(text.encode()) for text in texts) / max(1, len(texts))
        counter = token_counter(model) if model else None
        sample = texts[:: len(texts) // COUNTED + 1]
        tokens = sum(map(counter, sample)) if counter else 0
        read = sum(len(text.encode()) for text in sample)
        return cls(size, read / tokens if tokens else BYTES_A_TOKEN)

    @property
    def tokens(self) -> float:
        """Return the tokens of a prompt of this size, those of the chat template included."""
        return self.bytes / self.bytes_a_token + TEMPLATE


class Work(NamedTuple):
    """The amount of work; `texts` are the documents and prompts, where they were read."""

    documents: float
    prompts: dict[str, float]  # of each split
    teacher: TextSize
    student: TextSize
    text_bytes: float  # of all documents
    answer_tokens: float | None = None  # of one that the corpus brings
    texts: tuple[Sequence[Document], Sequence[Prompt]] | None = None
    pool: int | None = None  # prompts for training to choose from, where they were read
    unasked: int = 0  # validation prompts that the teacher is not asked, and not among the texts
    checked: Sequence[str] = ()  # the documents of those that a checker can judge

    @property
    def all_prompts(self) -> float:
        """Return the prompts of all splits."""
        return sum(self.prompts.values())


def text_of(messages: Sequence[Message]) -> str:
    """Return what all turns of a prompt say."""
    return "".join(turn.content for turn in messages)


def count_work(run: Run, large: int = LARGE) -> Work:
    """Return the amount of work of a run; a corpus of over `large` bytes is not read."""
    corpus = run.config.corpus
    with suppress(DistillError):  # of an input that is not there: making it says what is wrong
        if all(run.state(stage)[0] == "done" for stage in STAGES[:2]):
            return _count(run)
    files = [corpus.path, *corpus.path.rglob("*")] if corpus.path else []
    size = sum(file.stat().st_size for file in files if file.is_file())
    on_hub = corpus.path is None and not str(corpus.dataset).startswith(("./", "/"))
    if corpus.source != "python-docs" and (on_hub or size > large):
        return _from_caps(run.config, size)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Run(run.config.model_copy(update={"runs": Path(folder)}))
        scratch.folder.mkdir(parents=True)
        console.quiet, before = True, console.quiet
        try:
            corpus_stage.main(scratch)
            prompts_stage.main(scratch)
        finally:
            console.quiet = before
        return _count(scratch)


def _count(run: Run) -> Work:
    """Count what a run's stages made, and all questions that the teacher is yet to write."""
    config, counts = run.config, Counter[str]()
    documents = read_records(run.path("documents.jsonl"), Document)
    prompts = asked(run)
    splits = {document.id: document.split or "train" for document in documents}
    for prompt in prompts:
        counts[splits[prompt.document_id]] += 1
    if questions := config.prompts.questions:
        for split in splits.values():
            counts[split] += questions.per_document
    by_id = {document.id: document for document in documents}
    useful = useful_prompts(run, prompts, by_id)
    student, teacher = config.student.model, config.teacher.model
    passages = [document.text for document in documents]
    brought = [answer["text"] for document in documents for answer in document.recorded_answers]
    answer = TextSize.of(brought, student)
    return Work(
        documents=len(documents),
        prompts={split: float(counts[split]) for split in SPLITS},
        teacher=TextSize.of([text_of(p.asked_of_teacher()) for p in prompts] or passages, teacher),
        student=TextSize.of([text_of(p.messages) for p in prompts] or passages, student),
        text_bytes=sum(len(text.encode()) for text in passages),
        answer_tokens=answer.bytes / answer.bytes_a_token if brought else None,
        texts=(documents, useful),
        unasked=len(prompts) - len(useful),
        pool=len(drawn(run)),
        checked=origins_of(checked_prompts(run), documents) if config.recipe.mode == "auto" else (),
    )


def _from_caps(config: Config, size: int) -> Work:
    """Return what bytes and caps mean, unread; raises DistillError (exit 3) without any limit."""
    corpus, settings, length = config.corpus, config.prompts, float(config.corpus.chunk.max_chars)
    if corpus.path and corpus.path.suffix == ".jsonl" and corpus.path.is_file():
        with corpus.path.open("rb") as file:
            head = file.read(HEAD)
        length = min(length, len(head) / max(1, head.count(b"\n")))  # a row's mean
    documents = min(size / length or math.inf, corpus.limit or math.inf)
    tasks = max(1, len(settings.tasks)) if settings.per_document == "each" else 1
    questions, counts = settings.questions.per_document if settings.questions else 0, {}
    held = {split: getattr(corpus.split, split) for split in SPLITS[1:]}
    shares = {"train": max(0.1, 1 - sum(part for part in held.values() if part < 1)), **held}
    for split, share in shares.items():
        part = share < 1 or split == "train"  # a count else
        of_split, cap = documents * share if part else share, getattr(settings, split)
        counts[split] = min(tasks * of_split, math.inf if cap is None else cap)
        counts[split] += questions * of_split if questions else 0  # which no cap holds
    if math.inf in counts.values():
        what = "is not read for a plan: it is on the Hub, and nothing caps it"
        raise DistillError(Exit.INPUT, "corpus", what, "set prompts.train or corpus.limit")
    if not size:
        documents = min(documents, sum(counts.values()) / tasks)
        length = min(length, UNREAD_BYTES)
    return Work(documents, counts, TextSize(length), TextSize(length), documents * length)

"""How much work a config means: documents, prompts of each split, the size of a prompt.

Documents and prompts are the run's, where it has made them. Else they are really made, in a folder
that is thrown away, unless the corpus is on the Hub or large; then its bytes and the caps of the
config stand in. Tokens are counted by the models' own tokenizers, where the cache has them.
"""

import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from distill.config.tree import Corpus, Prompts
from distill.corpus import corpus as corpus_stage
from distill.corpus import prompts as prompts_stage
from distill.errors import DistillError, Exit
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
COUNTED = 300  # prompts whose tokens are counted, for the rate of all
TEMPLATE = 27  # tokens that the chat templates of the quickstart's two models add to a prompt


class PromptSize(NamedTuple):
    """A prompt as one side sees it, on average: its bytes, and how many of them make a token."""

    bytes: float
    bytes_a_token: float = BYTES_A_TOKEN

    @classmethod
    def of(cls, model: str, prompts: Sequence[Sequence[Message]]) -> "PromptSize":
        """Measure prompts, with the model's tokenizer where the cache has it."""
        counter = token_counter(model) if model else None
        some = prompts[:: -(-len(prompts) // COUNTED) or 1]
        tokens = sum(counter(turn.content) for prompt in some for turn in prompt) if counter else 0
        rate = mean_bytes(some) * len(some) / tokens if tokens else BYTES_A_TOKEN
        return cls(mean_bytes(prompts), rate)

    @property
    def tokens(self) -> float:
        """Return the tokens of a prompt, those of the chat template included."""
        return self.bytes / self.bytes_a_token + TEMPLATE


class Work(NamedTuple):
    """The amount of work; `texts` are the documents and prompts, where they were read."""

    documents: float
    prompts: dict[str, float]  # of each split
    teacher: PromptSize
    student: PromptSize
    text_bytes: float  # of all documents
    answer_tokens: float | None = None  # of one that the corpus brings
    texts: tuple[Sequence[Document], Sequence[Prompt]] | None = None

    @property
    def all_prompts(self) -> float:
        """Return the prompts of all splits."""
        return sum(self.prompts.values())

    def scaled(self, share: float) -> "Work":
        """Return a share of it, at least one prompt of a split that has any."""
        fewer = {s: float(max(min(n, 1), round(share * n))) for s, n in self.prompts.items()}
        return self._replace(documents=share * self.documents, prompts=fewer, texts=None)


def count_work(run: Run, large: int = LARGE) -> Work:
    """Return the amount of work of a run; a corpus of over `large` bytes is not read."""
    config, corpus = run.config, run.config.corpus
    with suppress(DistillError):  # of an input that is not there: making it says what is wrong
        if all(run.state(stage)[0] == "done" for stage in STAGES[:2]):
            return _count(run)
    on_hub = corpus.path is None and not str(corpus.dataset).startswith(("./", "/"))
    if corpus.source != "python-docs" and (on_hub or _bytes(corpus.path) > large):
        return _from_caps(corpus, config.prompts)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Run(config.model_copy(update={"runs": Path(folder)}))
        scratch.folder.mkdir(parents=True)
        console.quiet, before = True, console.quiet
        try:
            corpus_stage.main(scratch)
            prompts_stage.main(scratch)
        finally:
            console.quiet = before
        return _count(scratch)


def mean_bytes(prompts: Sequence[Sequence[Message]]) -> float:
    """Return the bytes of a prompt on average."""
    size = sum(len(message.content.encode()) for prompt in prompts for message in prompt)
    return size / max(1, len(prompts))


def _bytes(path: Path | None) -> int:
    """Return the bytes of a file or of a folder's files; 0 for none."""
    files = [path, *path.rglob("*")] if path else []
    return sum(file.stat().st_size for file in files if file.is_file())


def _count(run: Run) -> Work:
    """Count what a run's stages made, and all questions that the teacher is yet to write."""
    config = run.config
    documents = read_records(run.path("documents.jsonl"), Document)
    prompts = read_records(run.path("prompts.jsonl"), Prompt)
    splits = {document.id: document.split or "train" for document in documents}
    counts: dict[str, float] = dict.fromkeys(SPLITS, 0.0)
    for prompt in prompts:
        counts[splits[prompt.document_id]] += 1
    if questions := config.prompts.questions:
        for split in splits.values():
            counts[split] += questions.per_document

    def turns(texts: Sequence[str]) -> list[tuple[Message, ...]]:
        return [(Message(role="user", content=text),) for text in texts]

    student, teacher = config.student.model, config.teacher.model
    brought = [answer["text"] for d in documents for answer in d.recorded_answers]
    answers = PromptSize.of(student, turns(brought))
    passages = [] if prompts else turns([document.text for document in documents])
    return Work(
        documents=len(documents),
        prompts=counts,
        teacher=PromptSize.of(teacher, [p.asked_of_teacher() for p in prompts] or passages),
        student=PromptSize.of(student, [prompt.messages for prompt in prompts] or passages),
        text_bytes=sum(len(document.text.encode()) for document in documents),
        answer_tokens=answers.bytes / answers.bytes_a_token if brought else None,
        texts=(documents, prompts),
    )


def _from_caps(corpus: Corpus, settings: Prompts) -> Work:
    """Return what bytes and caps mean, unread; raises DistillError (exit 3) without any limit."""
    endless, size, length = float("inf"), _bytes(corpus.path), float(corpus.chunk.max_chars)
    if corpus.path and corpus.path.suffix == ".jsonl" and corpus.path.is_file():
        with corpus.path.open("rb") as file:
            head = file.read(HEAD)
        length = min(length, len(head) / max(1, head.count(b"\n")))  # a row's mean
    documents = min(size / length if size else endless, corpus.limit or endless)
    tasks = max(1, len(settings.tasks)) if settings.per_document == "each" else 1
    held = {split: getattr(corpus.split, split) for split in SPLITS[1:]}
    shares = {"train": max(0.1, 1 - sum(part for part in held.values() if part < 1)), **held}
    more, counts = settings.questions.per_document if settings.questions else 0, {}
    for split, share in shares.items():
        of_split = documents * share if share < 1 else share
        cap = getattr(settings, split)  # which holds no questions
        counts[split] = min(tasks * of_split, endless if cap is None else cap)
        counts[split] += more * of_split if more else 0
    if endless in counts.values():
        what = "is not read for a plan: it is on the Hub, and nothing caps it"
        raise DistillError(Exit.INPUT, "corpus", what, "set prompts.train or corpus.limit")
    if not size:
        documents = min(documents, sum(counts.values()) / tasks)
        length = min(length, UNREAD_BYTES)
    view = PromptSize(length)
    return Work(documents, counts, view, view, documents * length)

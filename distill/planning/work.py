"""How much work a config means: documents, prompts of each split, the size of a prompt, before anything runs.

Documents and prompts are the run's, where it has made them. Else they are really made, in a folder that is thrown away,
unless the corpus is on the Hub or large; then its bytes and the caps of the config stand in. Tokens are counted by the
models' own tokenizers, where the cache has them.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from distill.config import Config
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
UNREAD = 1500  # bytes of a document on the Hub
BYTES_A_TOKEN = 4.0  # of English and code, where no tokenizer is at hand
COUNTED = 300  # prompts whose tokens are counted, for the rate of all
TEMPLATE = 27  # tokens that the chat templates of the quickstart's two models add to a prompt


class PromptSize(NamedTuple):
    """A prompt as one side sees it, on average: its bytes, and how many of them its tokenizer takes for a token."""

    bytes: float
    bytes_a_token: float = BYTES_A_TOKEN

    def tokens_of(self, size: float) -> float:
        """Return the tokens of a prompt of `size` bytes, those of the chat template included."""
        return size / self.bytes_a_token + TEMPLATE

    @property
    def tokens(self) -> float:
        """Return the tokens of a prompt on average."""
        return self.tokens_of(self.bytes)


@dataclass(frozen=True)
class Work:
    """The amount of work; `texts` are the documents and prompts where they were read, `seconds` what making them takes."""

    documents: float
    prompts: dict[str, float]  # of each split
    teacher: PromptSize
    student: PromptSize
    text_bytes: float  # of all documents
    seconds: float
    answer_tokens: float | None = None  # of one that the corpus brings
    texts: tuple[Sequence[Document], Sequence[Prompt]] | None = None

    @property
    def all_prompts(self) -> float:
        """Return the prompts of all splits."""
        return sum(self.prompts.values())

    def scaled(self, share: float) -> "Work":
        """Return a share of the prompts, at least one of a split that has any."""
        fewer = {s: float(max(min(n, 1), round(share * n))) for s, n in self.prompts.items()}
        return replace(self, prompts=fewer, texts=None)


def count_work(run: Run, large: int = LARGE) -> Work:
    """Return the amount of work of a run; a corpus of more than `large` bytes is not read for it."""
    config, corpus = run.config, run.config.corpus
    try:
        if all(run.state(stage)[0] == "done" for stage in STAGES[:2]):
            return _count(config, run, 0.0)
    except DistillError:  # of an input that is not there: making it says what is wrong
        pass
    on_hub = corpus.path is None and not str(corpus.dataset).startswith(("./", "/"))
    if corpus.source != "python-docs" and (on_hub or _bytes(corpus.path) > large):
        return _from_caps(config)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Run(config.model_copy(update={"runs": Path(folder)}))
        scratch.folder.mkdir(parents=True)
        console.quiet, before = True, console.quiet
        try:
            corpus_stage.main(config, scratch)
            prompts_stage.main(config, scratch)
        finally:
            console.quiet = before
        return _count(config, scratch, time.monotonic() - started)


def _bytes(path: Path | None) -> int:
    """Return the bytes of a file or of a folder's files; 0 for none."""
    files = [path, *path.rglob("*")] if path else []
    return sum(file.stat().st_size for file in files if file.is_file())


def _count(config: Config, run: Run, seconds: float) -> Work:
    """Count what a run's stages made; questions that the teacher is yet to write count as all that it is asked for."""
    documents = read_records(run.path("documents.jsonl"), Document)
    prompts = read_records(run.path("prompts.jsonl"), Prompt)
    splits = {document.id: document.split or "train" for document in documents}
    counts: dict[str, float] = dict.fromkeys(SPLITS, 0.0)
    for prompt in prompts:
        counts[splits[prompt.document_id]] += 1
    if questions := config.prompts.questions:
        for split in splits.values():
            counts[split] += questions.per_document
    brought = [d.meta["recorded_answer"] for d in documents if "recorded_answer" in d.meta]
    answers = _prompt_size(
        config.student.model, [(Message(role="user", content=a),) for a in brought]
    )
    passages = [(Message(role="user", content=document.text),) for document in documents]
    return Work(
        documents=len(documents),
        prompts=counts,
        teacher=_prompt_size(
            config.teacher.model, [p.asked_of_teacher() for p in prompts] or passages
        ),
        student=_prompt_size(
            config.student.model, [prompt.messages for prompt in prompts] or passages
        ),
        text_bytes=sum(len(document.text.encode()) for document in documents),
        seconds=seconds,
        answer_tokens=answers.bytes / answers.bytes_a_token if brought else None,
        texts=(documents, prompts),
    )


def mean_bytes(prompts: Sequence[Sequence[Message]]) -> float:
    """Return the bytes of a prompt on average."""
    size = sum(len(message.content.encode()) for prompt in prompts for message in prompt)
    return size / max(1, len(prompts))


def _prompt_size(model: str, prompts: Sequence[Sequence[Message]]) -> PromptSize:
    """Return the size of prompts, and the rate of the model's tokenizer where the cache has it."""
    counter = token_counter(model) if model else None
    some = prompts[:: -(-len(prompts) // COUNTED) or 1]
    tokens = sum(counter(turn.content) for prompt in some for turn in prompt) if counter else 0
    rate = mean_bytes(some) * len(some) / tokens if tokens else BYTES_A_TOKEN
    return PromptSize(mean_bytes(prompts), rate)


def _from_caps(config: Config) -> Work:
    """Return what bytes and caps mean, unread; raises DistillError (exit 3) where nothing limits it."""
    corpus, settings, endless = config.corpus, config.prompts, float("inf")
    size, length = _bytes(corpus.path), float(corpus.chunk.max_chars)
    if corpus.path and corpus.path.suffix == ".jsonl" and corpus.path.is_file():
        with corpus.path.open("rb") as file:
            head = file.read(HEAD)
        length = min(length, len(head) / max(1, head.count(b"\n")))  # a row's mean
    documents = min(size / length if size else endless, corpus.limit or endless)
    tasks = max(1, len(settings.tasks)) if settings.per_document == "each" else 1
    held = {split: getattr(corpus.split, split) for split in ("validation", "heldout")}
    shares = {"train": max(0.1, 1 - sum(part for part in held.values() if part < 1)), **held}
    of_split = {s: documents * share if share < 1 else share for s, share in shares.items()}
    caps = {s: endless if (cap := getattr(settings, s)) is None else cap for s in SPLITS}
    counts = {split: min(tasks * of_split[split], caps[split]) for split in SPLITS}
    if settings.questions:  # which no cap holds
        more = settings.questions.per_document
        counts = {split: many + more * of_split[split] for split, many in counts.items()}
    if endless in counts.values():
        what = "is not read for a plan: it is on the Hub, and nothing caps it"
        raise DistillError(Exit.INPUT, "corpus", what, "set prompts.train or corpus.limit")
    if not size:
        documents, length = min(documents, sum(counts.values()) / tasks), min(length, UNREAD)
    view, text = PromptSize(length), documents * length
    return Work(documents, counts, view, view, text, text / 1e6)

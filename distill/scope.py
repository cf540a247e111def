"""How much work a config means: documents, prompts of each split, and their sizes, before anything runs.

Documents and prompts are the run's, where it has made them. Else they are really made, in a folder that is thrown away,
unless the corpus is on the Hub or large; then its bytes and the caps of the config stand in, as ranges.
"""

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.config import Config
from distill.corpus import corpus as corpus_stage
from distill.corpus import prompts as prompts_stage
from distill.errors import DistillError, Exit
from distill.estimates import NOTHING, Span, total
from distill.progress import console
from distill.records import SPLITS, Document, Prompt
from distill.run import Run, Stage
from distill.stages import STAGES
from distill.store import read_records

HEAD = 1_000_000  # bytes of a large file that are read
LARGE = 50_000_000  # bytes of corpus above which it is not read for a plan


@dataclass(frozen=True)
class Scope:
    """The amount of work: documents, prompts by split, characters of a prompt on each side, seconds to make them.

    `texts` are the documents and prompts themselves, where they were read.
    """

    documents: Span
    prompts: dict[str, Span]
    teacher: Span
    student: Span
    text: Span
    seconds: Span
    texts: tuple[Sequence[Document], Sequence[Prompt]] | None = None

    @property
    def asked(self) -> Span:
        """Return the prompts of all splits."""
        return total(self.prompts.values())


def scope(config: Config, folder: Path | None = None) -> Scope:
    """Return the amount of work: the run's prompts, or those made in a scratch folder, or what the caps allow.

    `folder` is the run's, where that is not the one that its config names.
    """
    own = Run(config, folder)
    if all(_is_done(own, stage) for stage in STAGES[:2]):
        return _counted(config, *_texts(own), NOTHING)
    if _is_large(config):
        return _capped(config)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(config.model_copy(update={"runs": Path(scratch)}))
        run.folder.mkdir(parents=True)
        console.quiet, before = True, console.quiet
        try:
            corpus_stage.main(config, run)
            prompts_stage.main(config, run)
        finally:
            console.quiet = before
        texts = _texts(run)
    seconds = time.monotonic() - started
    return _counted(config, *texts, Span(seconds, 3 * seconds + 5))


def _is_done(run: Run, stage: Stage) -> bool:
    """Tell whether the run has what a stage makes, from these settings."""
    try:
        return run.state(stage)[0] == "done"
    except DistillError:  # of an input that is not there; making it says what is wrong
        return False


def _texts(run: Run) -> tuple[list[Document], list[Prompt]]:
    """Read a run's documents and prompts."""
    documents = read_records(run.path("documents.jsonl"), Document)
    return documents, read_records(run.path("prompts.jsonl"), Prompt)


def _is_large(config: Config) -> bool:
    """Tell whether the corpus is on the Hub, or of many bytes."""
    corpus = config.corpus
    on_hub = corpus.path is None and not str(corpus.dataset).startswith(("./", "/"))
    return corpus.source != "python-docs" and (on_hub or _bytes(corpus.path) > LARGE)


def _bytes(path: Path | None) -> int:
    """Return the bytes of a file or of a folder's files; 0 for none."""
    files = [path, *path.rglob("*")] if path else []
    return sum(file.stat().st_size for file in files if file.is_file())


def _bytes_of_a_row(path: Path | None) -> float:
    """Return the mean bytes of the first rows of a file of JSON lines; no limit for anything else."""
    if path is None or path.suffix != ".jsonl" or not path.is_file():
        return math.inf
    with path.open("rb") as file:
        head = file.read(HEAD)
    return len(head) / max(1, head.count(b"\n"))


def _counted(
    config: Config, documents: Sequence[Document], prompts: Sequence[Prompt], seconds: Span
) -> Scope:
    splits = {d.id: d.meta["split"] for d in documents}
    counts: dict[str, Span] = dict.fromkeys(SPLITS, NOTHING)
    for prompt in prompts:
        counts[splits[prompt.document_id]] += Span(1, 1)
    for document in documents if config.prompts.questions else ():
        counts[document.meta["split"]] += questions_written(config, 1)
    caps = {split: getattr(config.prompts, split) for split in SPLITS}
    for split, cap in caps.items():
        if cap is not None:
            counts[split] = Span(min(counts[split].low, cap), min(counts[split].high, cap))
    texts = [sum(len(m.content.encode()) for m in p.asked_of_teacher()) for p in prompts]
    shown = [sum(len(m.content.encode()) for m in p.messages) for p in prompts]
    size = sum(len(d.text.encode()) for d in documents)
    return Scope(
        documents=Span(len(documents), len(documents)),
        prompts=counts,
        teacher=_mean(texts or [size / max(1, len(documents))]),
        student=_mean(shown or [size / max(1, len(documents))]),
        text=Span(size, size),
        seconds=seconds,
        texts=(documents, prompts),
    )


def questions_written(config: Config, documents: float) -> Span:
    """Return how many questions the teacher may write about documents."""
    questions = config.prompts.questions
    return Span(0, documents * questions.per_document) if questions else NOTHING


def _mean(values: Sequence[float]) -> Span:
    mean = sum(values) / max(1, len(values))
    return Span(mean, mean)


def _capped(config: Config) -> Scope:
    """Return what bytes and caps allow, unread; raises DistillError (exit 3) where nothing limits it."""
    corpus, asked = config.corpus, config.prompts
    chars = min(corpus.chunk.max_chars, _bytes_of_a_row(corpus.path))
    found = _bytes(corpus.path) / chars
    documents = Span(found / 3, 3 * found) if found else Span(0, corpus.limit or float("inf"))
    tasks = max(1, len(asked.tasks)) if asked.per_document == "each" else 1
    held = {split: getattr(corpus.split, split) for split in ("validation", "heldout")}
    left = max(0.1, 0.999 - sum(size for size in held.values() if size < 1))
    shares = {"train": left, **held}
    counts = {}
    for split, share in shares.items():
        many = documents * (tasks * share) if share < 1 else Span(share * tasks, share * tasks)
        cap = getattr(asked, split) or float("inf")
        counts[split] = Span(min(many.low or cap / 2, cap), min(many.high, cap))
    if counts["train"].high == float("inf"):
        what = "is not read for a plan: it is on the Hub, and nothing caps it"
        raise DistillError(Exit.INPUT, "corpus", what, "set prompts.train or corpus.limit")
    most = total(counts.values()) * (1 / tasks)
    documents = Span(min(documents.low or most.low, most.low), min(documents.high, most.high))
    view = Span(chars / 3, 1.2 * chars) if found else Span(100, min(1500, chars))
    return Scope(documents, counts, view, view, documents * view, Span(5, 600))

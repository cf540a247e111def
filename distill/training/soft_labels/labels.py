"""Soft labels: the teacher's distributions beside the examples that are trained on.

They are cached, or made at every step by a teacher in memory, over its entire vocabulary: for one
epoch, or where the disk is dear. Of a cache the run's signals.json says which rows of the shared
cache belong to its answers. Whatever does not fit (another teacher or setting than the config's,
answers that were dropped or added since, other tokens, a damaged file) ends the training before its
first step, with the file and the reason. The teacher reads each prompt in its own view.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from distill.config.learning import Loss
from distill.config.teachers import EndpointTeacher, LocalTeacher, Teacher
from distill.config.tree import Config
from distill.config.values import SAFE
from distill.errors import DistillError, Exit
from distill.models import loading, registry
from distill.models.chat_template import template_hash, vocabulary_hash
from distill.models.devices import pick_dtype, send
from distill.records import Pair, digest
from distill.responders.terms import require_terms
from distill.storage.files import read_json, read_records
from distill.storage.progress import say
from distill.storage.run_folder import MODEL_FILE, Run, differences, unnamed
from distill.training.batches import Example
from distill.training.divergences import Live, SoftTargets
from distill.training.encode import encode_pair
from distill.training.soft_labels.cache import (
    FORMAT,
    STEPS,
    TEXT_ONLY,
    KeyedExample,
    Signal,
    SignalCache,
    SignalKey,
    supervised_ids,
)
from distill.training.student import StudentModel, make_student

AGAIN = "distill signals CONFIG --redo captures what is missing"


@dataclass(frozen=True)
class CachedLabels:
    """Signals by answer; `tails_row` is the row of the temperature's tails."""

    signals: Mapping[str, Signal]
    digest: str
    settings: Loss
    tails_row: int | None

    def targets(self, answers: Sequence[str], device: torch.device | str) -> SoftTargets:
        """Lay the answers' lists end to end."""
        signals = [self.signals[name] for name in answers]
        signal = Signal.join(signals) if signals else IDLE
        tail_N = None
        if self.tails_row is not None:
            tail_N = signal.tails_TN[self.tails_row] if signals else np.log(signal.tail_mass_N)
        offsets_N1 = np.concatenate([[0], np.cumsum(signal.counts_N, dtype=np.int64)])
        return SoftTargets(
            ids_M=send(torch.tensor(signal.ids_E.astype(np.int64)), device),
            logprobs_M=send(torch.tensor(signal.logs()), device),
            offsets_N1=torch.tensor(offsets_N1),
            tail_mass_N=send(torch.tensor(signal.tail_mass_N), device),
            tail_N=None if tail_N is None else send(torch.tensor(tail_N), device),
        )


IDLE = Signal(  # a position that weighs nothing: one token, half of the mass
    *(np.ones(1, np.uint16), np.zeros(1, np.uint32), np.zeros(1, np.uint8)),
    *(np.full(1, 0.5, np.float32), np.zeros((0, 1), np.float32)),
)


@dataclass(frozen=True)
class LiveLabels:
    """A teacher and its view of the examples, by answer; `vocabulary` is the tokenizer's size."""

    teacher: StudentModel
    examples: Mapping[str, Example]
    vocabulary: int
    digest: str
    settings: Loss

    @torch.no_grad()
    def targets(self, answers: Sequence[str], device: torch.device | str) -> Live:
        """Return the teacher's hidden states at the answers' supervised positions, and its head."""
        batch = self.teacher.batch([self.examples[name] for name in answers])
        hidden_ND = self.teacher.hidden(batch)[batch.indices_S]
        head_VD, bias_V = self.teacher.head()
        return Live(hidden_ND.to(device), head_VD, self.vocabulary, bias_V)


def load_labels(run: Run, examples: Sequence[Example], vocabulary: int) -> CachedLabels:
    """Read the signals of `examples`, under their ids, for a head of `vocabulary` rows.

    Raises DistillError: exit 7 where signals.json does not fit the config or the examples, 5 where
    a file is damaged.
    """
    path, loss, store = run.path("signals.json"), run.config.train.loss, run.config.store_folder()
    if not path.exists():
        what, fix = "is missing, and train.loss has soft parts", "make it: distill signals CONFIG"
        raise DistillError(Exit.TRAINING, path, what, fix)
    record = read_json(path)
    try:
        facts, name = record["teacher"], record["cache"]
        rows = {answer: SignalKey(*row) for answer, row in record["rows"].items()}
        if cache_name(facts) != name:
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DistillError(Exit.STATE, path, "is damaged", AGAIN) from None
    _, current = open_teacher(run.config)
    facts = {**unnamed(facts, current), **facts}
    changes = differences({**facts, "dtype": ""}, {**current, "dtype": ""})
    if changes:  # not the dtype, which `auto` chooses by the machine
        what = f"was made by another teacher or setting than the config names: {'; '.join(changes)}"
        raise DistillError(Exit.TRAINING, path, what, AGAIN)
    require_same(path, rows, examples, run)
    cache = SignalCache.open(store, name)
    signals = cache.read([rows[example.response_id] for example in examples])
    if (largest := max(int(signal.ids_E.max()) for signal in signals.values())) >= vocabulary:
        what = f"name token {largest}, and the student's head has {vocabulary} rows"
        raise DistillError(Exit.TRAINING, cache.folder, what, TEXT_ONLY)
    by_answer = {e.response_id: signals[rows[e.response_id].example] for e in examples}
    hashes = sorted({cache.index[row.example][0].header["body"] for row in rows.values()})
    tails = run.config.signals.temperatures
    tails_row = None if loss.temperature == 1 else tails.index(loss.temperature)
    return CachedLabels(by_answer, digest([name, hashes]), loss, tails_row)


def require_same(
    path: Path, rows: Mapping[str, SignalKey], examples: Sequence[Example], run: Run
) -> None:
    """Raise DistillError (exit 7) where rows and examples are of other answers or tokens."""
    for example in examples:
        row, ids = rows.get(example.response_id), supervised_ids(example)
        if row is None:
            what = f"has no signal of answer {example.response_id}"
            raise DistillError(Exit.TRAINING, path, what, AGAIN)
        if (row.tokens, row.length) != (digest(ids), len(ids)):
            what = f"was made for other tokens of answer {example.response_id}"
            raise DistillError(Exit.TRAINING, path, what, AGAIN)
    spare = rows.keys() - {example.response_id for example in examples}
    if spare and (gone := sorted(spare - {pair.response.id for pair in read_pairs(run)})):
        what = f"was made for {len(gone)} answers that the filters have dropped since: {gone[0]}"
        raise DistillError(Exit.TRAINING, path, what, AGAIN)


def load_live(run: Run, examples: Sequence[Example]) -> LiveLabels:
    """Load the teacher beside the student; its labels are by the ids of the examples' answers.

    Raises DistillError as `teacher_view` and `load_reader` do.
    """
    tokenizer, facts, texts = teacher_view(run, examples)
    reader = load_reader(run.config.soft_teacher(), texts)
    by_answer = {text.example.response_id: text.example for text in texts}
    # a folder's files are compared by name, in the facts of the training
    shaping = {key: value for key, value in facts.items() if not MODEL_FILE.fullmatch(key)}
    pinned = digest(["live", {**shaping, "p": None, "k": None, "temperatures": None}])
    return LiveLabels(reader, by_answer, len(tokenizer), pinned, run.config.train.loss)


def teacher_view(
    run: Run, examples: Sequence[Example]
) -> tuple[PreTrainedTokenizerBase, dict[str, Any], list[KeyedExample]]:
    """Return the tokenizer and facts of `open_teacher`, and the examples as the teacher reads them.

    Raises DistillError: exit 2 where the tokenizers differ, 7 where an answer has other tokens
    under the teacher's template, 10 where the teacher's terms forbid it.
    """
    config = run.config
    require_terms(config.soft_teacher(), config.terms.basis)
    tokenizer, facts = open_teacher(config)
    pairs = {pair.response.id: pair for pair in read_pairs(run)}
    date = config.template_date
    texts = [read_as_teacher(tokenizer, pairs[e.response_id], e, date) for e in examples]
    return tokenizer, facts, texts


def load_reader(teacher: Teacher, texts: Sequence[KeyedExample]) -> StudentModel:
    """Load the teacher; raises DistillError (exit 3) where a text is longer than its context."""
    assert isinstance(teacher, LocalTeacher)
    model = loading.load_model(teacher.model, teacher.dtype, teacher.revision)
    reader, notes = make_student(model.requires_grad_(False))
    for note in notes:
        say(f"teacher: {note}")
    limit = loading.context_length(model.config)
    for length, text in ((len(text.example.input_ids), text.example) for text in texts):
        if length > limit:
            what = f"{length} tokens as the teacher is asked it, whose context is {limit}"
            fix = "make corpus.chunk.max_chars smaller, or lower train.max_length"
            raise DistillError(Exit.INPUT, f"answer {text.response_id}", what, fix)
    return reader


def read_pairs(run: Run) -> list[Pair]:
    """Return the pairs that training and validation use."""
    paths = [run.path(f"dataset/{split}.jsonl") for split in ("train", "validation")]
    return [pair for path in paths if path.exists() for pair in read_records(path, Pair)]


def read_as_teacher(
    tokenizer: PreTrainedTokenizerBase, pair: Pair, example: Example, date: str
) -> KeyedExample:
    """Encode a pair in the teacher's view; DistillError (exit 7) if its answer has other tokens."""
    prompt = pair.prompt.model_copy(update={"messages": pair.prompt.asked_of_teacher()})
    text = encode_pair(tokenizer, pair.model_copy(update={"prompt": prompt}), date)
    ids = supervised_ids(example)
    if supervised_ids(text) != ids:
        what = "has other tokens under the teacher's chat template than under the student's"
        raise DistillError(Exit.TRAINING, f"answer {pair.response.id}", what, TEXT_ONLY)
    return KeyedExample(text, SignalKey(text.id, digest(ids), len(ids)))


def open_teacher(config: Config) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    """Return the tokenizer of the teacher that reads, and the facts that name its signals.

    Those are what shapes them, the tokenizer, and the model: its weights and precision, or where it
    is served and as what. Raises DistillError (exit 2) where its vocabulary is not the student's.
    """
    teacher, student, settings = config.soft_teacher(), config.student, config.signals
    trust = student.trust if config.reader()[0] == student.model else SAFE
    own = (
        teacher.chat_template_kwargs if isinstance(teacher, LocalTeacher | EndpointTeacher) else {}
    )
    if not own and config.reader()[0] == student.model:
        own = student.chat_template_kwargs
    tokenizer = loading.load_tokenizer(*config.reader(), trust, own, config.reasoning)
    other = loading.load_tokenizer(student.model, student.revision, student.trust)
    vocabulary = vocabulary_hash(tokenizer)
    if vocabulary != vocabulary_hash(other):
        where = f"teacher {teacher.model} and student {student.model}"
        what = "have different tokenizers: distributions of one mean nothing to the other"
        raise DistillError(Exit.CONFIG, where, what, TEXT_ONLY)
    if isinstance(teacher, EndpointTeacher):
        body = teacher.extra_body if settings.endpoint or settings.from_answers else {}
        reader: dict[str, Any] = {"endpoint": teacher.base_urls[0], "served": teacher.model}
        reader |= {"from_answers": True} if settings.from_answers else {}
        reader |= {"revision": teacher.revision, "extra_body": body}
    else:
        assert isinstance(teacher, LocalTeacher)
        dtype = str(pick_dtype(teacher.dtype)).removeprefix("torch.")
        reader = {"weights": registry.identity(teacher.model, teacher.revision)}
        reader |= {**registry.folder_facts("weights", teacher.model), "dtype": dtype}
    template = template_hash(tokenizer, config.template_date)
    return tokenizer, {**settings.shape, **reader, "template": template, "vocabulary": vocabulary}


def cache_name(facts: Mapping[str, Any]) -> str:
    """Return the digest of what shapes a teacher's signals, with the format."""
    return digest({"format": FORMAT, "steps": STEPS, **facts})

"""Soft labels: the teacher's distributions beside the examples that are trained on.

They are cached, or made at every step by a teacher in memory, over its entire vocabulary. Of a
cache the run's signals.json says which rows belong to its answers. Whatever does not fit (another
teacher or setting than the config's, answers that were added since, other tokens, a damaged file)
ends the training before its first step, with the file and the reason.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

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
from distill.storage.run_folder import MODEL_FILE, Run, differences
from distill.training.batches import Example
from distill.training.encode import SPLITS, encode_pair, encode_split
from distill.training.losses import Live, SoftTargets
from distill.training.soft_labels import cache
from distill.training.soft_labels.cache import TEXT_ONLY, Signal, SignalKey, supervised_ids
from distill.training.student import StudentModel, make_student

Facts: TypeAlias = dict[str, Any]  # what names a teacher's signals, as signals.json holds it
AGAIN = "distill signals CONFIG --redo captures what is missing"


@dataclass(frozen=True)
class CachedLabels:
    """Signals by answer; `tails_row` is the row of the temperature's tails."""

    signals: Mapping[str, Signal]
    digest: str
    settings: Loss
    tails_row: int | None

    def targets(self, answers: Sequence[str], device: torch.device | str) -> SoftTargets:
        """Lay the answers' lists end to end; of none, a position that will weigh nothing."""
        if not answers:
            half = torch.full((1,), 0.5, device=device)
            zero = torch.zeros(1, dtype=torch.long, device=device)
            return SoftTargets(zero, half.log(), torch.arange(2), half, half.log())
        signal, row = Signal.join([self.signals[name] for name in answers]), self.tails_row
        offsets_N1 = np.concatenate([[0], np.cumsum(signal.counts_N, dtype=np.int64)])
        return SoftTargets(
            ids_M=send(torch.tensor(signal.ids_E.astype(np.int64)), device),
            logprobs_M=send(torch.tensor(signal.logs()), device),
            offsets_N1=torch.tensor(offsets_N1),
            tail_mass_N=send(torch.tensor(signal.tail_mass_N), device),
            tail_N=None if row is None else send(torch.tensor(signal.tails_TN[row]), device),
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
    path, loss = run.path("signals.json"), run.config.train.loss

    def misfit(what: str) -> DistillError:
        return DistillError(Exit.TRAINING, path, what, AGAIN)

    if not path.exists():
        raise misfit("is missing, and train.loss has soft parts")
    record = read_json(path)
    try:
        facts, name = record["teacher"], record["cache"]
        rows = {answer: SignalKey(*row) for answer, row in record["rows"].items()}
        if cache_name(facts) != name:
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DistillError(Exit.STATE, path, "is damaged", AGAIN) from None
    _, current = open_teacher(run.config)
    # but for the dtype, which `auto` chooses by the machine
    if changes := differences({**facts, "dtype": ""}, {**current, "dtype": ""}):
        changed = "; ".join(changes)
        raise misfit(f"was made by another teacher or setting than the config names: {changed}")
    for example in examples:
        row = rows.get(example.response_id)
        if row is None or row._replace(example=example.id) != SignalKey.of(example):
            raise misfit(f"has no signal of answer {example.response_id} with its tokens")
    stored = cache.SignalCache(run.config.store_folder(), name)
    signals = stored.read(list(rows.values()))
    if (largest := max(int(signal.ids_E.max()) for signal in signals.values())) >= vocabulary:
        what = f"name token {largest}, and the student's head has {vocabulary} rows"
        raise DistillError(Exit.TRAINING, stored.folder, what, TEXT_ONLY)
    by_answer = {e.response_id: signals[rows[e.response_id].example] for e in examples}
    hashes = sorted({stored.index[row.example][0].header["body"] for row in rows.values()})
    tails = run.config.signals.temperatures
    tails_row = None if loss.temperature == 1 else tails.index(loss.temperature)
    return CachedLabels(by_answer, digest([name, hashes]), loss, tails_row)


def load_live(run: Run, examples: Sequence[Example]) -> LiveLabels:
    """Load the teacher beside the student; its labels are by the ids of the examples' answers.

    Raises DistillError as `teacher_view` and `load_reader` do.
    """
    tokenizer, facts, texts = teacher_view(run, examples)
    reader = load_reader(run.config.soft_teacher(), texts)
    # a folder's files are compared by name, in the facts of the training
    shaping = {key: value for key, value in facts.items() if not MODEL_FILE.fullmatch(key)}
    pinned = digest(["live", {**shaping, "p": None, "k": None, "temperatures": None}])
    by_answer = {text.response_id: text for text in texts}
    return LiveLabels(reader, by_answer, len(tokenizer), pinned, run.config.train.loss)


def read_pairs(run: Run) -> list[Pair]:
    """Return the pairs that training and validation use."""
    paths = [run.path(f"dataset/{split}.jsonl") for split in SPLITS]
    return [pair for path in paths if path.exists() for pair in read_records(path, Pair)]


def student_view(run: Run) -> list[Example]:
    """Return the examples of training and validation as the student is trained on them."""
    tokenizer = loading.student_tokenizer(run.config.student, run.config.reasoning)
    limit = run.config.train.max_length
    return [e for split in SPLITS for e in encode_split(tokenizer, run, split, limit)]


def teacher_view(
    run: Run, examples: Sequence[Example], pairs: Iterable[Pair] | None = None
) -> tuple[PreTrainedTokenizerBase, Facts, list[Example]]:
    """Return the tokenizer and facts of `open_teacher`, and the examples as the teacher reads them.

    `pairs` are the run's unless given. Raises DistillError: exit 2 where the tokenizers differ, 7
    where an answer has other tokens under the teacher's template, 10 where the teacher's terms
    forbid it.
    """
    config = run.config
    require_terms(config.soft_teacher(), config.terms.basis)
    tokenizer, facts = open_teacher(config)
    by_answer = {pair.response.id: pair for pair in (read_pairs(run) if pairs is None else pairs)}
    texts = list[Example]()
    for example in examples:
        pair = by_answer[example.response_id]
        prompt = pair.prompt.model_copy(update={"messages": pair.prompt.asked_of_teacher()})
        pair = pair.model_copy(update={"prompt": prompt})
        texts.append(encode_pair(tokenizer, pair, config.template_date))
        if supervised_ids(texts[-1]) != supervised_ids(example):
            what = "has other tokens under the teacher's chat template than under the student's"
            raise DistillError(Exit.TRAINING, f"answer {pair.response.id}", what, TEXT_ONLY)
    return tokenizer, facts, texts


def load_reader(teacher: Teacher, texts: Sequence[Example]) -> StudentModel:
    """Load the teacher; raises DistillError (exit 3) where a text is longer than its context."""
    assert isinstance(teacher, LocalTeacher)
    model = loading.load_model(teacher.model, teacher.dtype, teacher.revision)
    reader, notes = make_student(model.requires_grad_(False))
    for note in notes:
        say(f"teacher: {note}")
    limit = loading.context_length(model.config)
    longest = max(texts, key=lambda text: len(text.input_ids))
    if (length := len(longest.input_ids)) > limit:
        what = f"{length} tokens as the teacher is asked it, whose context is {limit}"
        fix = "make corpus.chunk.max_chars smaller, or lower train.max_length"
        raise DistillError(Exit.INPUT, f"answer {longest.response_id}", what, fix)
    return reader


def open_teacher(config: Config) -> tuple[PreTrainedTokenizerBase, Facts]:
    """Return the tokenizer of the teacher that reads, and the facts that name its signals.

    Those are what shapes them, the tokenizer, and the model: its weights and precision, or where it
    is served and as what. Raises DistillError (exit 2) where its vocabulary is not the student's.
    """
    teacher, student, settings = config.soft_teacher(), config.student, config.signals
    same = config.reader()[0] == student.model
    trust, variables = student.trust if same else SAFE, getattr(teacher, "chat_template_kwargs", {})
    if same and not variables:
        variables = student.chat_template_kwargs
    tokenizer = loading.load_tokenizer(*config.reader(), trust, variables, config.reasoning)
    other = loading.load_tokenizer(student.model, student.revision, student.trust)
    vocabulary = vocabulary_hash(tokenizer)
    if vocabulary != vocabulary_hash(other):
        where = f"teacher {teacher.model} and student {student.model}"
        what = "have different tokenizers: distributions of one mean nothing to the other"
        raise DistillError(Exit.CONFIG, where, what, TEXT_ONLY)
    facts: Facts = dict(settings.shape)
    if isinstance(teacher, EndpointTeacher):
        facts |= {"endpoint": teacher.base_urls[0], "served": teacher.model}
        facts |= {"from_answers": True} if settings.from_answers else {}
        body = teacher.extra_body if settings.endpoint or settings.from_answers else {}
        facts |= {"revision": teacher.revision, "extra_body": body}
    else:
        assert isinstance(teacher, LocalTeacher)
        facts["weights"] = registry.identity(teacher.model, teacher.revision)
        facts |= registry.folder_facts("weights", teacher.model)
        facts["dtype"] = str(pick_dtype(teacher.dtype)).removeprefix("torch.")
    template = template_hash(tokenizer, config.template_date)
    return tokenizer, {**facts, "template": template, "vocabulary": vocabulary}


def cache_name(facts: Facts) -> str:
    """Return the digest of what shapes a teacher's signals, with the format."""
    return digest({"format": cache.FORMAT, "steps": cache.STEPS, **facts})

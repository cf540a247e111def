"""The signals stage: the teacher reads the dataset's answers once, and what it would have said at each token is kept.

One forward pass over the answers as they stand, whoever wrote them, with the prompt as the teacher is asked it. What
the store holds is not read again; a chunk is written when its last token was read, so a kill costs one chunk's work.
The vocabulary must be the student's to the last token, and the answers' ids the same under both templates.

Shape suffixes: S supervised positions, K entries of the longest list, E the columns of the head, V the vocabulary, T temperatures.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.config import Config, EndpointTeacher, LocalTeacher, Signals
from distill.errors import DistillError, Exit
from distill.models import loading
from distill.records import Example, Pair
from distill.responders.terms import require_terms
from distill.storage.files import disk_errors, write_json
from distill.storage.locks import FolderLock, sweep
from distill.storage.progress import say, tracking
from distill.storage.run_folder import Run
from distill.training.batches import micro_batches, padded_batches
from distill.training.encode import encode_pair, encode_pairs
from distill.training.soft_labels import answer_logprobs, prompt_logprobs
from distill.training.soft_labels.cache import (
    TEXT_ONLY,
    Signal,
    SignalCache,
    SignalKey,
    as_captured,
    codes,
    describe,
    expected_bytes,
    open_teacher,
    starts,
    supervised_ids,
    token_hash,
)
from distill.training.soft_labels.labels import read_pairs
from distill.training.student import Batch, StudentModel, make_student

CHUNK_TOKENS = 4096  # supervised tokens of a chunk: what a kill can cost
PASS_TOKENS = 2048  # tokens that the teacher reads at once
HEAD_BYTES = 32 * 2**20  # of float32 logits at a time: small enough to stay in a CPU's cache


@dataclass(frozen=True)
class Read:
    """An answer as the teacher reads it: the example in its own view, and the row that its signal is kept under."""

    example: Example
    row: SignalKey


def main(config: Config, run: Run) -> None:
    """Fill the cache with what it lacks of the run's dataset, and write signals.json.

    Raises DistillError: exit 2 where the tokenizers differ, 5 where the disk is too small or a chunk is damaged, 10
    where the teacher's terms forbid it.
    """
    teacher = config.soft_teacher()
    require_terms(teacher, config.terms.basis)
    tokenizer, facts = open_teacher(config)
    facts = as_captured(config.store_folder(), facts)
    pairs, examples = supervised(config, run)
    reads = [read_as_teacher(tokenizer, p, e, config) for p, e in zip(pairs, examples, strict=True)]
    cache = SignalCache.open(config.store_folder(), describe(facts))
    with FolderLock(cache.folder):
        sweep(cache.folder)
        missing = [read for read in reads if read.row.example not in cache.index]
        require_room(cache.folder, missing, config)
        texts = [(read.example, read.row) for read in missing]
        if missing and config.signals.from_answers:
            answer_logprobs.fill(cache, tokenizer, texts, config)
        elif missing and isinstance(teacher, EndpointTeacher):
            prompt_logprobs.fill(cache, tokenizer, texts, config, run)
        elif missing:
            assert isinstance(teacher, LocalTeacher)
            model = loading.load_model(teacher.model, teacher.dtype, teacher.revision)
            fill(cache, model, len(tokenizer), missing, config.signals, run)
    cache.check([read.row for read in reads])
    rows = {e.response_id: read.row for e, read in zip(examples, reads, strict=True)}
    write_json(run.path("signals.json"), {"teacher": facts, "cache": cache.teacher, "rows": rows})
    tokens, fresh = (sum(read.row.count for read in some) for some in (reads, missing))
    run.note("signals", {"model": teacher.model, "tokens": tokens, **facts})
    say(f"signals: {tokens:,} tokens of {len(rows):,} answers, {fresh:,} of them read now")


def supervised(config: Config, run: Run) -> tuple[list[Pair], list[Example]]:
    """Return the pairs that training and validation use, and their examples as the student sees them."""
    student = config.student
    tokenizer = loading.load_tokenizer(student.model, student.revision, student.trust_remote_code)
    pairs, date, limit = read_pairs(run), config.template_date, config.train.max_length
    examples = encode_pairs(tokenizer, pairs, date, limit, run.path("dataset"))
    fitting = {example.response_id for example in examples}
    return [pair for pair in pairs if pair.response.id in fitting], examples


def read_as_teacher(tokenizer: Any, pair: Pair, example: Example, config: Config) -> Read:
    """Encode a pair as the teacher is asked it; raises DistillError (exit 7) where its answer has other tokens."""
    prompt = pair.prompt.model_copy(update={"messages": pair.prompt.asked_of_teacher()})
    seen = encode_pair(tokenizer, pair.model_copy(update={"prompt": prompt}), config.template_date)
    ids = supervised_ids(example)
    if supervised_ids(seen) != ids:
        what = "has other tokens under the teacher's chat template than under the student's"
        raise DistillError(Exit.TRAINING, f"answer {pair.response.id}", what, TEXT_ONLY)
    return Read(seen, SignalKey(seen.id, token_hash(ids), len(ids)))


def require_room(folder: Path, reads: Sequence[Read], config: Config) -> None:
    """Stop where the signals, and the replies of a server, will not fit on the disk; raises DistillError (exit 5)."""
    with disk_errors(folder):
        free = shutil.disk_usage(folder).free
    tokens, settings = sum(read.row.count for read in reads), config.signals
    needed = expected_bytes(tokens, settings)
    if config.buys_signals:
        needed += prompt_logprobs.expected_bytes(
            sum(len(r.example.input_ids) for r in reads), settings.k
        )
    if needed > free:
        what = f"signals of {tokens:,} tokens take about {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free"
        fix = "free space, set store=FOLDER on another disk, or lower signals.p"
        raise DistillError(Exit.STATE, folder, what, fix)


def fill(
    cache: SignalCache,
    model: Any,
    vocabulary: int,
    reads: Sequence[Read],
    settings: Signals,
    run: Run,
) -> None:
    """Read answers a chunk at a time and append each to the cache."""
    student, notes = make_student(model)
    for note in notes:
        say(f"teacher: {note}")
    require_context(reads, loading.context_length(model.config))
    total = sum(read.row.count for read in reads)
    with tracking("signals", total, "tokens") as tracker:
        for part in chunked(reads):
            signal = capture(student, vocabulary, [read.example for read in part], settings)
            cache.append([read.row for read in part], signal)
            run.ledger.spend(input_tokens=sum(len(read.example.input_ids) for read in part))
            tracker.advance(sum(read.row.count for read in part))


def require_context(reads: Sequence[Read], limit: int) -> None:
    """Stop where an answer with its prompt is longer than the teacher can see; raises DistillError (exit 3)."""
    for read in reads:
        if len(read.example.input_ids) > limit:
            what = f"{len(read.example.input_ids)} tokens as the teacher is asked it, which sees {limit}"
            fix = "make corpus.chunk.max_chars smaller, or lower train.max_length"
            raise DistillError(Exit.INPUT, f"answer {read.example.response_id}", what, fix)


def chunked(reads: Sequence[Read]) -> list[list[Read]]:
    """Cut answers, in their order, into chunks of about CHUNK_TOKENS; what is left after a kill is cut the same."""
    parts: list[list[Read]] = []
    filled = CHUNK_TOKENS
    for read in reads:
        if filled >= CHUNK_TOKENS:
            parts.append([])
            filled = 0
        parts[-1].append(read)
        filled += read.row.count
    return parts


@torch.inference_mode()
def capture(
    student: StudentModel, vocabulary: int, examples: Sequence[Example], settings: Signals
) -> Signal:
    """Return the distributions of the examples' supervised tokens, end to end, over the first `vocabulary` ids."""
    lengths = [len(example.input_ids) for example in examples]
    deal = micro_batches if student.packing else padded_batches
    signals: dict[int, Signal] = {}
    for samples in deal(range(len(examples)), lengths, PASS_TOKENS):
        batch = student.batch([examples[i] for i in samples])
        counts = [len(supervised_ids(examples[i])) for i in samples]
        offsets = [starts(examples[i].id, count) for i, count in zip(samples, counts, strict=True)]
        starts_S, parts = torch.tensor(np.concatenate(offsets)), list[Signal]()
        for part, logs_SV in read_head(student, batch, vocabulary):
            parts.append(keep(logs_SV, starts_S[part], settings))
        signals |= dict(zip(samples, Signal.join(parts).split(counts), strict=True))
    return Signal.join([signals[i] for i in range(len(examples))])


def read_head(
    student: StudentModel, batch: Batch, vocabulary: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the log-probabilities (S, V) of a batch's supervised positions, with which they are, some at a time."""
    hidden_SE, (head_VE, bias_V) = student.states(batch), student.head()
    head_VE, bias_V = head_VE[:vocabulary], None if bias_V is None else bias_V[:vocabulary]
    rows = max(16, HEAD_BYTES // (4 * len(head_VE)))
    for start in range(0, len(hidden_SE), rows):
        part = slice(start, start + rows)
        logits_SV = torch.nn.functional.linear(hidden_SE[part], head_VE, bias_V)
        yield part, torch.log_softmax(logits_SV, -1, dtype=torch.float32)


def keep(logs_SV: Tensor, starts_S: Tensor, settings: Signals) -> Signal:
    """Keep of each row what the settings say; `logs_SV` is used up."""
    if settings.method == "sampled":
        return draw(logs_SV, starts_S, settings.samples)
    return nucleus(logs_SV, settings.p, settings.k, settings.temperatures)


def nucleus(logs_SV: Tensor, p: float, k: int, temperatures: Sequence[float] = ()) -> Signal:
    """Keep the likeliest ids of each row until they hold `p` of its mass, at most `k`; `logs_SV` is used up."""
    top_SK, ids_SK = logs_SV.topk(min(k, logs_SV.shape[1]))
    mass_SK = top_SK.exp()
    listed_SK = mass_SK.cumsum(1) - mass_SK < p
    listed_SK[:, 0] = True
    unlisted_SV = logs_SV.scatter_(1, ids_SK, top_SK.masked_fill(listed_SK, float("-inf")))
    tails = [torch.logsumexp(unlisted_SV / t, 1) for t in temperatures]
    rest_S = unlisted_SV.exp_().sum(1)
    counts_S = listed_SK.sum(1).cpu().numpy().astype(np.uint16)
    logs_E = top_SK[listed_SK].cpu().numpy()
    return Signal(
        counts_S,
        ids_SK[listed_SK].cpu().numpy().astype(np.uint32),
        codes(logs_E, counts_S),
        rest_S.cpu().numpy(),
        np.stack([tail.cpu().numpy() for tail in tails])
        if tails
        else np.zeros((0, len(counts_S)), np.float32),
    )


def draw(logs_SV: Tensor, starts_S: Tensor, samples: int) -> Signal:
    """Keep of each row the ids of `samples` draws, and how often each came up; `logs_SV` is used up.

    An id of probability p comes up p · samples times in the mean, as in arXiv 2503.16870 with proposals at temperature
    1. The draws lie at equal distances along the sum of probabilities, from a point in the first distance on
    (systematic sampling): so the number is p · samples rounded up or down, which is nearer than by drawing each alone.
    """
    sums_SV = logs_SV.exp_().cumsum(1, dtype=torch.float64)
    steps_N = torch.arange(samples, dtype=torch.float64)
    points_SN = ((starts_S[:, None] + steps_N) / samples).to(sums_SV.device) * sums_SV[:, -1:]
    ids_SN = torch.searchsorted(sums_SV, points_SN, right=True).cpu().numpy()
    new_SN = np.diff(ids_SN, axis=1, prepend=-1) != 0
    firsts_E = np.flatnonzero(new_SN)
    return Signal(
        new_SN.sum(1).astype(np.uint16),
        ids_SN[new_SN].astype(np.uint32),
        np.diff(firsts_E, append=ids_SN.size).astype(np.uint8),
        np.zeros(len(ids_SN), np.float32),
        np.zeros((0, len(ids_SN)), np.float32),
    )

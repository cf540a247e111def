"""The signals stage: the teacher reads the dataset's answers once, and its distributions are kept.

One forward pass over the answers as they stand, whoever wrote them, with the prompt as the teacher
is asked it. What the store holds is not read again; a kill costs one chunk's work.

Shape suffixes: S supervised positions, K entries of the longest list, E the
entries of all lists, V the vocabulary, N samples, T temperatures.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.config.learning import Signals
from distill.config.teachers import EndpointTeacher
from distill.models.arithmetic import CAPTURE_BYTES, READ_TOKENS, logit_rows
from distill.storage.files import folder_lock, read_json, write_json
from distill.storage.progress import say, tracking
from distill.storage.run_folder import MODEL_FILE, Run
from distill.training.batches import Example
from distill.training.soft_labels import labels, server_logprobs
from distill.training.soft_labels.cache import (
    Signal,
    SignalCache,
    SignalKey,
    codes,
    sample_offsets,
    supervised_ids,
)
from distill.training.student import Batch, Passes, StudentModel


def main(run: Run) -> None:
    """Fill the cache with what it lacks of the run's dataset, and write signals.json.

    Raises DistillError: exit 2 where the tokenizers differ, 5 where the disk is too small or a
    chunk is damaged, 10 where the teacher's terms forbid it.
    """
    config = run.config
    teacher, examples = config.soft_teacher(), labels.student_view(run)
    tokenizer, facts, texts = labels.teacher_view(run, examples)
    facts = as_captured(config.store_folder(), facts)
    cache = SignalCache(config.store_folder(), labels.cache_name(facts))
    with folder_lock(cache.folder):
        missing = [text for text in texts if text.id not in cache.index]
        if missing and isinstance(teacher, EndpointTeacher):
            server_logprobs.fill(cache, tokenizer, missing, config, run)
        elif missing:
            reader = labels.load_reader(teacher, missing)
            fill(cache, reader, len(tokenizer), missing, config.signals, run)
    rows = {text.response_id: SignalKey.of(text) for text in texts}
    write_json(run.path("signals.json"), {"teacher": facts, "cache": cache.teacher, "rows": rows})
    tokens, fresh = (sum(len(supervised_ids(t)) for t in some) for some in (texts, missing))
    run.note("signals", {"model": teacher.model, "tokens": tokens, **facts})
    say(f"signals: {tokens:,} tokens of {len(rows):,} answers, {fresh:,} of them read now")


def as_captured(store: Path, facts: labels.Facts) -> labels.Facts:
    """Return the facts under which the store keeps the signals that these facts name.

    An earlier distill knew a model in a folder by its weights alone. Its cache goes on as that of
    the first model that uses it (`adopted.json` there), until a file of that folder changes.
    """
    former = {key: value for key, value in facts.items() if not MODEL_FILE.fullmatch(key)}
    folder = store / "signals" / labels.cache_name(former)
    if former == facts or not folder.is_dir():
        return facts
    adopted = folder / "adopted.json"
    if not adopted.exists():
        write_json(adopted, facts)
        what = "is named by the hash of the teacher's weights alone"
        say(f"signals: {folder} {what}, and counts as that of the model as it is now")
    return former if read_json(adopted) == facts else facts


def fill(
    cache: SignalCache,
    reader: StudentModel,
    vocabulary: int,
    texts: Sequence[Example],
    settings: Signals,
    run: Run,
) -> None:
    """Read answers here and append their signals to the cache; on a GPU in passes that fit."""
    passes = Passes("signals")

    def read(examples: Sequence[Example]) -> list[Signal]:
        signals = passes.attempt(partial(capture, reader, vocabulary, examples, settings))
        run.ledger.spend(input_tokens=sum(len(example.input_ids) for example in examples))
        tracker.advance(sum(map(len, signals)))
        return signals

    tokens = sum(len(supervised_ids(text)) for text in texts)
    with tracking("signals", tokens, "tokens") as tracker:
        cache.fill(texts, read)


@torch.inference_mode()
def capture(
    reader: StudentModel,
    vocabulary: int,
    examples: Sequence[Example],
    settings: Signals,
    pass_tokens: int = READ_TOKENS,
) -> list[Signal]:
    """Return each example's distributions over the first `vocabulary` ids."""
    signals: dict[int, Signal] = {}
    for samples in reader.deal(examples, range(len(examples)), pass_tokens):
        batch = reader.batch([examples[i] for i in samples])
        counts = [len(supervised_ids(examples[i])) for i in samples]
        pairs = zip(samples, counts, strict=True)
        offsets_S = np.concatenate([sample_offsets(examples[i].id, count) for i, count in pairs])
        parts = [
            select(logs_SV, torch.tensor(offsets_S[part]), settings)
            for part, logs_SV in read_head(reader, batch, vocabulary)
        ]
        signal = to_signal(torch.cat(parts), settings)
        signals |= dict(zip(samples, signal.split(counts), strict=True))
    return [signals[i] for i in range(len(examples))]


def read_head(
    reader: StudentModel, batch: Batch, vocabulary: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of a batch's supervised positions, and their log-probabilities (S, V)."""
    hidden_SD, (head_VD, bias_V) = reader.states(batch), reader.head()
    head_VD, bias_V = head_VD[:vocabulary], None if bias_V is None else bias_V[:vocabulary]
    rows = logit_rows(CAPTURE_BYTES, 4, vocabulary, head_VD.device.type)
    for start in range(0, len(hidden_SD), rows):
        part = slice(start, start + rows)
        logits_SV = torch.nn.functional.linear(hidden_SD[part], head_VD, bias_V)
        yield part, torch.log_softmax(logits_SV, -1, dtype=torch.float32)


def select(logs_SV: Tensor, offsets_S: Tensor, settings: Signals) -> Tensor:
    """Return what the settings keep of each row, for `to_signal`; `logs_SV` is used up.

    Of a nucleus that is the log-probabilities of its top ids, the ids (-1 for what is not listed,
    and exact, for ids have three bytes), the tail mass, and the tail at each temperature.

    Of samples it is their ids (S, N), in order. An id of probability p comes up p · samples times
    in expectation, as in arXiv 2503.16870 with proposals at temperature 1. The samples lie at equal
    distances along the cumulative probability, from an offset within the first distance on: so the
    count is p · samples rounded up or down, nearer than independent samples come.
    """
    if settings.method == "sampled":
        sums_SV = logs_SV.exp_().cumsum(1, dtype=torch.float64)
        points_SN = offsets_S[:, None] + torch.arange(settings.samples, dtype=torch.float64)
        points_SN = (points_SN / settings.samples).to(sums_SV.device) * sums_SV[:, -1:]
        return torch.searchsorted(sums_SV, points_SN, right=True)
    top_SK, ids_SK = logs_SV.topk(min(settings.k, logs_SV.shape[1]))
    mass_SK = top_SK.exp()
    listed_SK = mass_SK.cumsum(1) - mass_SK < settings.p
    listed_SK[:, 0] = True
    unlisted_SV = logs_SV.scatter_(1, ids_SK, top_SK.masked_fill(listed_SK, float("-inf")))
    tails = [torch.logsumexp(unlisted_SV / t, 1)[:, None] for t in settings.temperatures]
    tail_mass_S1 = unlisted_SV.exp_().sum(1)[:, None]
    return torch.cat([top_SK, ids_SK.masked_fill(~listed_SK, -1), tail_mass_S1, *tails], 1)


def to_signal(selected: Tensor, settings: Signals) -> Signal:
    """Return the signal of what `select` chose, after one copy from the device."""
    rows = selected.cpu().numpy()
    if settings.method == "sampled":
        new_SN = np.diff(rows, axis=1, prepend=-1) != 0
        codes_E = np.diff(np.flatnonzero(new_SN), append=rows.size).astype(np.uint8)
        zeros_S, none_TS = np.zeros(len(rows), np.float32), np.zeros((0, len(rows)), np.float32)
        counts_S, ids_E = new_SN.sum(1).astype(np.uint16), rows[new_SN].astype(np.uint32)
        return Signal(counts_S, ids_E, codes_E, zeros_S, none_TS)
    listed = (rows.shape[1] - 1 - len(settings.temperatures)) // 2
    top_SK, ids_SK, tails_ST = np.split(rows, [listed, 2 * listed], 1)
    counts_S = (ids_SK >= 0).sum(1).astype(np.uint16)
    codes_E, ids_E = codes(top_SK[ids_SK >= 0], counts_S), ids_SK[ids_SK >= 0].astype(np.uint32)
    return Signal(counts_S, ids_E, codes_E, tails_ST[:, 0], tails_ST[:, 1:].T)

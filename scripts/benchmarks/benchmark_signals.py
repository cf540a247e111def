"""Measure the signal cache: bytes a token, and how far what is read back lies from the teacher, for
several p and k.

    python scripts/benchmarks/benchmark_signals.py RUN --tokens 20000 --json signals.json

RUN is a run's folder (or config) that has its responses: the teacher of its config reads its own
answers once, and each setting is cut from that reading as the stage would, written as chunks and
read back. KL is KL(teacher ‖ cache) a token, in nats: with the rest spread evenly over all unlisted
ids, and with the rest as one bucket. Bytes are those of the chunk files, with index and checksums.
"capped": tokens whose k likeliest ids hold less than p; "one id": those whose likeliest holds p
alone.
"""

import argparse
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from distill.config.teachers import LocalTeacher
from distill.formatting import table
from distill.models import loading
from distill.models.arithmetic import READ_TOKENS
from distill.records import Pair, Prompt, Response, digest
from distill.storage.environment import environment
from distill.storage.files import read_records, write_json
from distill.storage.progress import tracking
from distill.storage.run_folder import Run, open_run
from distill.training.batches import Example, micro_batches
from distill.training.encode import encode_pair
from distill.training.soft_labels.cache import (
    CHUNK_TOKENS,
    Signal,
    SignalKey,
    codes,
    encode_chunk,
    supervised_ids,
)
from distill.training.soft_labels.capture import read_head
from distill.training.student import StudentModel, make_student

LISTED = 256  # ids of each token that are kept of the one reading


class Reading(NamedTuple):
    """The likeliest ids of N tokens with their log-probabilities, and of all others the sums of p
    and of p log p."""

    ids_NK: NDArray[np.uint32]
    logs_NK: NDArray[np.float64]
    mass_N: NDArray[np.float64]
    entropy_N: NDArray[np.float64]


class Settings(NamedTuple):
    """A setting of the cache."""

    p: float
    k: int


def read_rows(logs_SV: torch.Tensor) -> Reading:
    """Return the reading of rows of log-probabilities (S, V)."""
    top_SK, ids_SK = logs_SV.topk(min(LISTED, logs_SV.shape[1]))
    probs_SV = logs_SV.exp().scatter_(1, ids_SK, 0)
    entropy_S = torch.linalg.vecdot(probs_SV, logs_SV)
    arrays = (top_SK.double(), probs_SV.sum(1).double(), entropy_S.double())
    logs, mass, entropy = (array.cpu().numpy() for array in arrays)
    return Reading(ids_SK.cpu().numpy().astype(np.uint32), logs, mass, entropy)


def join(parts: Sequence[Reading]) -> Reading:
    """Lay readings end to end."""
    return Reading(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


@torch.inference_mode()
def read(
    student: StudentModel, examples: Sequence[Example], vocabulary: int, limit: int, seconds: float
) -> Reading:
    """Let the teacher read the first `limit` supervised tokens of the examples, or what `seconds`
    allow."""
    end = time.monotonic() + seconds
    lengths = [len(example.input_ids) for example in examples]
    found, done = list[Reading](), 0
    with tracking("reading", limit, "tokens") as tracker:
        for samples in micro_batches(range(len(examples)), lengths, READ_TOKENS):
            batch = student.batch([examples[i] for i in samples])
            for _, logs_SV in read_head(student, batch, vocabulary):
                found.append(read_rows(logs_SV))
                tracker.advance(len(logs_SV))
                done += len(logs_SV)
            if done >= limit or time.monotonic() > end:
                break
    return join(found)


def cut(reading: Reading, settings: Settings) -> Signal:
    """Cut a setting's signal from the reading, as `capture.nucleus` would."""
    probs_NK = np.exp(reading.logs_NK[:, : settings.k])
    listed_NK = np.cumsum(probs_NK, 1) - probs_NK < settings.p
    listed_NK[:, 0] = True
    counts_N = listed_NK.sum(1).astype(np.uint16)
    every_NK = np.exp(reading.logs_NK)
    every_NK[:, : settings.k][listed_NK] = 0
    rest_N = (every_NK.sum(1) + reading.mass_N).astype(np.float32)
    logs_E = reading.logs_NK[:, : settings.k][listed_NK].astype(np.float32)
    none_TN = np.zeros((0, len(counts_N)), np.float32)
    ids_E = reading.ids_NK[:, : settings.k][listed_NK]
    return Signal(counts_N, ids_E, codes(logs_E, counts_N), rest_N, none_TN)


def divergences(reading: Reading, signal: Signal, vocabulary: int) -> tuple[float, float]:
    """Return the mean KL(teacher ‖ cache) a token: the rest spread evenly over unlisted ids, and as
    one bucket."""
    counts_N, width = signal.counts_N.astype(np.int64), reading.logs_NK.shape[1]
    listed_NK = np.arange(width) < counts_N[:, None]
    probs_NK, own_NK = np.exp(reading.logs_NK), np.zeros_like(reading.logs_NK)
    own_NK[listed_NK] = signal.logs()
    inside_N = np.where(listed_NK, probs_NK * (reading.logs_NK - own_NK), 0).sum(1)
    others_NK = np.where(listed_NK, 0, probs_NK)
    rest_N = others_NK.sum(1) + reading.mass_N
    kept_N = np.maximum(signal.tail_mass_N.astype(np.float64), 1e-300)
    entropy_N = (others_NK * reading.logs_NK).sum(1) + reading.entropy_N
    even_N = entropy_N - rest_N * np.log(kept_N / (vocabulary - counts_N))
    bucket_N = np.where(rest_N > 0, rest_N * np.log(np.maximum(rest_N, 1e-300) / kept_N), 0)
    return float((inside_N + even_N).mean()), float((inside_N + bucket_N).mean())


def size(signal: Signal, examples: Sequence[Example]) -> int:
    """Return the bytes of the chunks that hold a signal, its rows being the examples' tokens."""
    counts, left = [], len(signal)
    for example in examples:
        counts.append(min(left, len(supervised_ids(example))))
        left -= counts[-1]
    rows = [
        SignalKey(example.id, digest(list(example.input_ids)), count)
        for example, count in zip(examples, counts, strict=True)
        if count
    ]
    total, chunk, parts = (
        0,
        list[tuple[SignalKey, Signal]](),
        signal.split([row.length for row in rows]),
    )
    for row, part in zip(rows, parts, strict=True):
        chunk.append((row, part))
        if sum(r.length for r, _ in chunk) >= CHUNK_TOKENS or row is rows[-1]:
            named, signals = zip(*chunk, strict=True)
            total += len(encode_chunk("0" * 32, named, Signal.join(signals)))
            chunk = []
    return total


def measure(
    reading: Reading, examples: Sequence[Example], settings: Settings, vocabulary: int
) -> dict[str, Any]:
    """Return the figures of a setting."""
    signal = cut(reading, settings)
    even, bucket = divergences(reading, signal, vocabulary)
    return {
        **settings._asdict(),
        "bytes_a_token": size(signal, examples) / len(signal),
        "ids_a_token": float(signal.counts_N.mean()),
        "capped": float((signal.tail_mass_N > 1 - settings.p).mean()),
        "single": float((signal.counts_N == 1).mean()),
        "rest": float(signal.tail_mass_N.mean()),
        "kl_even": even,
        "kl_bucket": bucket,
    }


def answers(run: Run, tokenizer: Any) -> list[Example]:
    """Return the run's answers as its teacher reads them."""
    prompts = {prompt.id: prompt for prompt in read_records(run.path("prompts.jsonl"), Prompt)}
    found = []
    for response in read_records(run.path("responses.jsonl"), Response):
        prompt = prompts[response.prompt_id]
        seen = prompt.model_copy(update={"messages": prompt.asked_of_teacher()})
        if response.text:
            pair = Pair(prompt=seen, response=response)
            found.append(encode_pair(tokenizer, pair, run.config.template_date))
    return found


def show(rows: Sequence[dict[str, Any]], title: str) -> None:
    """Print the table."""
    shown = table(
        title, ">p", ">k", ">bytes/token", ">ids/token", ">capped", ">one id", ">KL even", ">bucket"
    )
    for row in rows:
        shown.add_row(
            f"{row['p']:g}",
            str(row["k"]),
            f"{row['bytes_a_token']:.1f}",
            f"{row['ids_a_token']:.1f}",
            f"{row['capped']:.1%}",
            f"{row['single']:.0%}",
            f"{row['kl_even']:.5f}",
            f"{row['kl_bucket']:.1e}",
        )
    Console(width=110).print(shown)


def main() -> None:
    """Measure, print and write what was found."""
    parser = argparse.ArgumentParser(description="Measure the signal cache.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument(
        "--p", type=float, nargs="+", default=[0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999]
    )
    parser.add_argument("--k", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop reading then")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    run, started = open_run(chosen.run), time.perf_counter()
    teacher = run.config.soft_teacher()
    assert isinstance(teacher, LocalTeacher)
    tokenizer = loading.load_tokenizer(teacher.model, teacher.revision)
    model = loading.load_model(teacher.model, teacher.dtype, teacher.revision)
    student, _ = make_student(model)
    examples = answers(run, tokenizer)
    lengths = [len(example.input_ids) for example in examples]
    order = [i for s in micro_batches(range(len(examples)), lengths, READ_TOKENS) for i in s]
    examples = [examples[i] for i in order]
    reading = read(student, examples, len(tokenizer), chosen.tokens, chosen.seconds)
    seconds = time.perf_counter() - started
    settings = [Settings(p, k) for p, k in product(chosen.p, chosen.k)]
    rows = [measure(reading, examples, setting, len(tokenizer)) for setting in settings]
    count = len(reading.mass_N)
    show(rows, f"{count:,} tokens of {teacher.model}'s own text, {model.dtype}")
    facts = {"model": teacher.model, "tokens": count, "vocabulary": len(tokenizer)}
    facts |= {"dtype": str(model.dtype), "seconds": seconds, "environment": environment()}
    if chosen.json:
        write_json(chosen.json, {**facts, "rows": rows})


if __name__ == "__main__":
    main()

"""Measure signals that are draws beside signals that are nuclei: bytes a token, and how wrong the
gradient is with them.

    python scripts/benchmarks/benchmark_sampled.py RUN --foreign data/gsm8k/sample.jsonl \\
        --tokens 1024 --json sampled.json

RUN is a run's folder (or config) that names teacher and student. Two texts: the answers of FILE,
rows of question and answer, which are not the teacher's own; and the run's own responses, where it
has any. The gradient is that of forward KL by the B of an adapter on the student's head (rank 16, A
drawn at random), summed over tokens; its error is that of the cached signals against the live
teacher's whole vocabulary, as a share of its norm, at all tokens and in the mean of eighths of
them. What is common to the tokens' gradients grows with their number and the noise of draws with
its root; what a nucleus leaves out may be common to them.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from benchmark_signals import answers, size
from rich.console import Console
from torch import Tensor

from distill.config.learning import Signals
from distill.config.teachers import LocalTeacher
from distill.config.tree import Config
from distill.formatting import table
from distill.models import loading
from distill.models.arithmetic import READ_TOKENS
from distill.records import Message, Pair, Prompt, Response
from distill.storage.environment import environment
from distill.storage.files import write_json
from distill.storage.progress import tracking
from distill.storage.run_folder import open_run
from distill.training.batches import Example, micro_batches
from distill.training.encode import encode_pair
from distill.training.losses import Live, SoftTargets, soft_measure
from distill.training.soft_labels.cache import Signal, sample_offsets, supervised_ids
from distill.training.soft_labels.capture import read_head, select, to_signal
from distill.training.soft_labels.labels import CachedLabels
from distill.training.student import StudentModel, make_student

RANK, PARTS, ROWS = 16, 8, 32


class Reading(NamedTuple):
    """What both models make of a text: their states at N supervised positions, and the tokens that
    follow."""

    teacher_ND: Tensor
    student_ND: Tensor
    targets_N: Tensor


def foreign(path: Path, tokenizer: Any, config: Config) -> list[Example]:
    """Return the rows of a file as examples whose answers are supervised."""
    found = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        asked = (Message(role="user", content=row["question"]),)
        prompt = Prompt.make(messages=asked, document_id="", task="")
        named = {"id": "", "request_key": "", "sample": 0, "prompt_id": prompt.id, "model": ""}
        response = Response(**named, text=row["answer"], stop="end")
        pair = Pair(prompt=prompt, response=response)
        found.append(encode_pair(tokenizer, pair, config.template_date))
    return found


def first(examples: Sequence[Example], tokens: int) -> list[Example]:
    """Return as many examples as hold `tokens` supervised tokens, or all."""
    ends = np.cumsum([len(supervised_ids(example)) for example in examples])
    return list(examples[: int(np.searchsorted(ends, tokens)) + 1])


@torch.inference_mode()
def read(
    student: StudentModel,
    examples: Sequence[Example],
    vocabulary: int,
    settings: Sequence[Signals] = (),
) -> tuple[Tensor, Tensor, list[Signal]]:
    """Return a model's states at the supervised positions, in the examples' order, the tokens that
    follow, and a signal for each setting."""
    lengths, found = [len(example.input_ids) for example in examples], dict[int, Any]()
    for samples in micro_batches(range(len(examples)), lengths, READ_TOKENS):
        batch = student.batch([examples[i] for i in samples])
        counts = [len(supervised_ids(examples[i])) for i in samples]
        pairs = zip(samples, counts, strict=True)
        offsets = [sample_offsets(examples[i].id, count) for i, count in pairs]
        offsets_S = torch.tensor(np.concatenate(offsets))
        kept: list[list[Signal]] = [[] for _ in settings]
        for part, logs_SV in read_head(student, batch, vocabulary) if settings else ():
            for signals, setting in zip(kept, settings, strict=True):
                selected = select(logs_SV.clone(), offsets_S[part], setting)
                signals.append(to_signal(selected, setting))
        split = [Signal.join(signals).split(counts) for signals in kept]
        columns = (student.states(batch).split(counts), batch.targets_S.split(counts), *split)
        found |= dict(zip(samples, zip(*columns, strict=True), strict=True))
    hidden, targets, *split = zip(*(found[i] for i in range(len(examples))), strict=True)
    joined = [Signal.join(signals) for signals in split]
    return torch.cat(hidden).clone(), torch.cat(targets).clone(), joined


def gradient(reading: Reading, head_VD: Tensor, soft: SoftTargets | Live, part: slice) -> Tensor:
    """Return the gradient (V, R) of an adapter's B on the student's head, summed over a part of the
    tokens."""
    make = torch.Generator().manual_seed(0)
    down = torch.randn(reading.student_ND.shape[1], RANK, generator=make)
    hidden_SD, up_VR = reading.student_ND[part].float(), torch.zeros(len(head_VD), RANK)
    measure = soft_measure(soft, reading.targets_N[part], {"forward_kl": 1.0})
    for start in range(0, len(hidden_SD), ROWS):
        rows = slice(start, min(start + ROWS, len(hidden_SD)))
        logits_RV = torch.nn.functional.linear(hidden_SD[rows], head_VD)
        teacher_RV = soft.logits(rows) if isinstance(soft, Live) else logits_RV
        measure(rows, logits_RV, teacher_RV)  # leaves the gradient in the place of the logits
        up_VR += logits_RV.t() @ (hidden_SD[rows] @ down)
    return up_VR


def targets(signal: Signal) -> SoftTargets:
    """Return a signal as the loss takes it."""
    named = CachedLabels({"": signal}, "", Config.model_fields["train"].default.loss, None)
    return named.targets([""], "cpu")


def errors(
    reading: Reading, heads: tuple[Tensor, Tensor], signals: Sequence[Signal]
) -> list[tuple[float, float]]:
    """Return each signal's relative error of the gradient: the mean of the parts', and that of the
    whole."""
    teacher_VD, student_VD = heads
    count = len(reading.targets_N)
    bounds = np.linspace(0, count, PARTS + 1).astype(int)
    lengths = np.diff(bounds).tolist()
    cut = [list(signal.split(lengths)) for signal in signals]
    whole_VR = torch.zeros(len(student_VD), RANK)
    wrong, found = [whole_VR.clone() for _ in signals], [list[float]() for _ in signals]
    with tracking("gradients", PARTS, "parts") as tracker:
        for number, (start, end) in enumerate(itertools.pairwise(bounds)):
            part = slice(int(start), int(end))
            live = Live(reading.teacher_ND[part], teacher_VD, len(student_VD))
            exact_VR = gradient(reading, student_VD, live, part)
            whole_VR += exact_VR
            for place, parts in enumerate(cut):
                off_VR = gradient(reading, student_VD, targets(parts[number]), part) - exact_VR
                found[place].append(float(off_VR.norm() / exact_VR.norm()))
                wrong[place] += off_VR
            tracker.advance(1)
    totals = [float(off_VR.norm() / whole_VR.norm()) for off_VR in wrong]
    return [(float(np.mean(parts)), total) for parts, total in zip(found, totals, strict=True)]


def load(reference: str, dtype: str, revision: str | None) -> StudentModel:
    """Load a model to read with."""
    return make_student(loading.load_model(reference, dtype, revision).requires_grad_(False))[0]


def measure(
    name: str,
    examples: list[Example],
    both: tuple[StudentModel, StudentModel],
    settings: list[Signals],
    V: int,
) -> list[dict[str, Any]]:
    """Return the figures of a text, a row for each setting."""
    teacher, student = both
    teacher_ND, targets_N, signals = read(teacher, examples, V, settings)
    student_ND, *_ = read(student, examples, V)
    heads = (teacher.head()[0][:V], student.head()[0][:V].float())
    off = errors(Reading(teacher_ND, student_ND, targets_N), heads, signals)
    return [
        {
            "text": name,
            "tokens": len(signal),
            **setting.shape,
            "bytes_a_token": size(signal, examples) / len(signal),
            "ids_a_token": float(signal.counts_N.mean()),
            "rest": float(signal.tail_mass_N.mean()),
            "error_of_an_eighth": parts,
            "error": total,
        }
        for setting, signal, (parts, total) in zip(settings, signals, off, strict=True)
    ]


def show(rows: Sequence[dict[str, Any]], title: str) -> None:
    """Print the table."""
    columns = (">bytes/token", ">ids/token", ">rest", ">error, an eighth", ">error, all")
    shown = table(title, "text", ">tokens", "kept", *columns)
    for row in rows:
        nucleus = "p" in row
        kept = f"p {row['p']:g}, k {row['k']}" if nucleus else f"{row['samples']} draws"
        shown.add_row(
            *(row["text"], f"{row['tokens']:,}", kept, f"{row['bytes_a_token']:.1f}"),
            *(f"{row['ids_a_token']:.1f}", f"{row['rest']:.2%}"),
            *(f"{row['error_of_an_eighth']:.1%}", f"{row['error']:.1%}"),
        )
    Console(width=110).print(shown)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print and write what was found."""
    parser = argparse.ArgumentParser(description="Measure sampled signals beside nuclei.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--foreign", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--samples", type=int, nargs="+", default=[12, 50, 100])
    parser.add_argument("--k", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(words)
    run = open_run(chosen.run)
    config, own = run.config, run.config.soft_teacher()
    assert isinstance(own, LocalTeacher)
    tokenizer = loading.load_tokenizer(own.model, own.revision)
    both = (
        load(own.model, own.dtype, own.revision),
        load(config.student.model, config.student.dtype, config.student.revision),
    )
    settings = [Signals(k=k) for k in chosen.k]
    settings += [Signals(method="sampled", samples=n) for n in chosen.samples]
    texts = {"foreign": foreign(chosen.foreign, tokenizer, config)}
    if run.path("responses.jsonl").exists():
        texts["its own"] = answers(run, tokenizer)
    rows = []
    for name, examples in texts.items():
        some = first(examples, chosen.tokens)
        rows += measure(name, some, both, settings, len(tokenizer))
    show(rows, f"{own.model} into {config.student.model}")
    if chosen.json:
        facts = {"teacher": own.model, "student": config.student.model}
        write_json(chosen.json, {**facts, "environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()

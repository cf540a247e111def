"""Measure whole training steps with soft labels: their speed, what they cost beside plain text, and
what a cache changes.

    python -m venv --system-site-packages TRL && TRL/bin/pip install 'trl==1.16.*'
    python scripts/benchmarks/benchmark_soft_labels.py speed RUN --trl-python TRL/bin/python \\
        --json speed.json
    python scripts/benchmarks/benchmark_soft_labels.py overhead RUN --json overhead.json
    python scripts/benchmarks/benchmark_soft_labels.py parity RUN --json parity.json

RUN is a run's folder with a dataset, whose config names teacher and student; signals that its store
lacks are captured first. All sides train the same LoRA (r 32, alpha 64, all-linear) on the same
token ids, in the machine's own type.

speed: `cached` trains from the signals on disk, `live` with the teacher in memory, `capture` is the
teacher's one reading. TRL is `GKDTrainer` with lmbda 0 and beta 0 (forward KL), on samples in the
order of their length. Its batch sizes, with and without mixed precision, are tried on a few
samples; the best goes on, with gradient checkpointing too. Every figure comes from a process of its
own, the sides taking turns; a rate counts real tokens only. overhead: the same student takes the
same steps with soft labels and with cross-entropy, in turn. parity: the same steps from the cache,
with a live teacher, and with a live teacher and a plain loss (all logits at once, float32,
autograd); then each student's divergence from the teacher over the whole vocabulary on samples held
out. What the JSON file has of the same settings is not done again.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmark_losses import resident
from benchmark_train import ALPHA, BATCH, RANK, RATE, Ours, Side
from peft import LoraConfig
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from distill.config.teachers import LocalTeacher
from distill.formatting import table
from distill.models import loading
from distill.records import Pair
from distill.storage.environment import environment
from distill.storage.files import folder_lock, read_json, read_records, write_json
from distill.storage.progress import console, say
from distill.storage.run_folder import Run, open_run
from distill.training.batches import Example, learning_rate, micro_batches, plan_steps
from distill.training.encode import encode_pairs
from distill.training.soft_labels.cache import SignalCache, SignalKey
from distill.training.soft_labels.capture import capture, fill
from distill.training.soft_labels.labels import (
    CachedLabels,
    LiveLabels,
    cache_name,
    load_live,
    load_reader,
    teacher_view,
)

ROOT = Path(__file__).resolve().parent.parent.parent
MIX = "train.loss={ce: 0.5, forward_kl: 0.5}"
WARM = 4  # samples before the clock starts
BATCHES = (1, 2, 4)  # of TRL: larger ones take more than 24 GB at these vocabularies
EPOCHS = (1, 2, 3)
HELD_TOKENS = 2048  # in a batch that is only measured
WARMUP = 0.05  # share of the steps over which the learning rate rises
PARTS = ("ce", "forward_kl")


def load(asked: argparse.Namespace, count: int) -> tuple[Run, list[Example]]:
    """Return the run, with the default mix as its loss, and its first training samples."""
    run = open_run(asked.run, [MIX])
    tokenizer = loading.load_tokenizer(run.config.student.model, run.config.student.revision)
    pairs = read_records(run.path("dataset/train.jsonl"), Pair)[:count]
    limit, date = run.config.train.max_length, run.config.template_date
    examples = encode_pairs(tokenizer, pairs, date, limit, asked.run)
    if len(examples) < count:
        raise SystemExit(f"{asked.run}: {len(examples)} training samples, {count} are asked for")
    return run, examples


class Signals:
    """The examples as the teacher reads them, and the cache of its signals, which has them all once
    this is made."""

    def __init__(
        self, run: Run, examples: Sequence[Example], given: Iterable[Pair] | None = None
    ) -> None:
        rows = read_records(run.path("dataset/train.jsonl"), Pair) if given is None else given
        tokenizer, facts, texts = teacher_view(run, examples, rows)
        self.config, self.vocabulary = run.config, len(tokenizer)
        self.reads: dict[str, Example] = {text.response_id: text for text in texts}
        self.cache = SignalCache(run.config.store_folder(), cache_name(facts))
        with folder_lock(self.cache.folder):
            left = [text for text in texts if text.id not in self.cache.index]
            if left:
                reader = load_reader(run.config.soft_teacher(), left)
                fill(self.cache, reader, self.vocabulary, left, run.config.signals, run)

    def labels(self, examples: Sequence[Example]) -> CachedLabels:
        """Read the signals of examples from the disk."""
        reads = [self.reads[example.response_id] for example in examples]
        found = self.cache.read([SignalKey.of(read) for read in reads])
        named = {read.response_id: found[read.id] for read in reads}
        return CachedLabels(named, self.cache.teacher, self.config.train.loss, None)


# Speed


class Task(NamedTuple):
    """What one process measures: a side, on how many samples; of TRL's, its flags."""

    side: str
    samples: int
    batch: int = 1
    mixed: bool = False
    checkpointing: bool = False

    def __str__(self) -> str:
        if self.side != "GKD":
            return self.side
        flags = ["mixed precision"] * self.mixed + ["checkpointing"] * self.checkpointing
        return ", ".join([f"GKD, batches of {self.batch}", *flags])


def cached(run: Run, examples: Sequence[Example]) -> Side:
    """Return our training from the cache; reading it is part of the time."""
    signals, ours = Signals(run, examples), Ours(loading.load_model(run.config.student.model))

    def train(samples: Sequence[Example]) -> float:
        start = time.perf_counter()
        ours.student.labels = signals.labels(samples)
        ours(samples)
        return time.perf_counter() - start

    return train


def live(run: Run, examples: Sequence[Example]) -> Side:
    """Return our training with the teacher in memory."""
    ours = Ours(loading.load_model(run.config.student.model))
    ours.student.labels = load_live(run, examples)
    return ours


def reading(run: Run, examples: Sequence[Example]) -> Side:
    """Return the teacher's reading of the samples into a cache."""
    signals = Signals(run, examples)
    reader = load_reader(run.config.soft_teacher(), list(signals.reads.values()))

    def read(samples: Sequence[Example]) -> float:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=signals.cache.folder.parent) as folder:
            made = SignalCache(Path(folder), signals.cache.teacher)
            texts, settings = [signals.reads[e.response_id] for e in samples], run.config.signals
            made.fill(texts, lambda part: capture(reader, signals.vocabulary, part, settings))
        return time.perf_counter() - start

    return read


OURS = {"cached": cached, "live": live, "capture": reading}


def gkd(run: Run, task: Task) -> Side:
    """Return TRL's GKDTrainer over the same ids, its own set-up left out of the time."""
    from datasets import Dataset
    from trl.experimental.gkd import (  # pyright: ignore[reportMissingImports]
        GKDConfig,
        GKDTrainer,
    )

    config = run.config
    tokenizer = loading.load_tokenizer(config.student.model)
    own = config.soft_teacher()
    assert isinstance(own, LocalTeacher)
    teacher = loading.load_model(own.model, own.dtype, own.revision)

    def train(examples: Sequence[Example]) -> float:
        with tempfile.TemporaryDirectory() as folder:
            settings = GKDConfig(
                output_dir=folder,
                lmbda=0.0,
                beta=0.0,
                num_train_epochs=1,
                per_device_train_batch_size=task.batch,
                gradient_accumulation_steps=BATCH // task.batch,
                train_sampling_strategy="sequential",
                gradient_checkpointing=task.checkpointing,
                max_length=config.train.max_length,
                learning_rate=RATE,
                use_cpu=not torch.cuda.is_available(),
                bf16=task.mixed,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                logging_strategy="no",
            )
            trainer = GKDTrainer(
                model=loading.load_model(config.student.model),
                teacher_model=teacher,
                args=settings,
                train_dataset=Dataset.from_list(list(map(trl_row, by_length(examples)))),
                processing_class=tokenizer,
                peft_config=LoraConfig(
                    r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
                ),
            )
            return float(trainer.train().metrics["train_runtime"])

    return train


def by_length(examples: Sequence[Example]) -> list[Example]:
    """Return examples in the order of their length, which leaves the least padding."""
    return sorted(examples, key=lambda example: len(example.input_ids))


def trl_row(example: Example) -> dict[str, Any]:
    """Return an example as TRL's own collator takes one that has its ids."""
    mask = [int(weight) for weight in example.weights]
    return {"prompt": "", "input_ids": list(example.input_ids), "completion_mask": mask}


def child(asked: argparse.Namespace) -> None:
    """Measure one side in this process, and print its figures as JSON."""
    task = Task(*asked.child)
    run, examples = load(asked, task.samples + WARM)
    samples, warm = examples[: task.samples], examples[task.samples :] or examples[:WARM]
    side = gkd(run, task) if task.side == "GKD" else OURS[task.side](run, examples)
    side(warm)
    seconds, tokens = side(samples), sum(len(example.input_ids) for example in samples)
    found = {"seconds": seconds, "tokens": tokens, "rate": tokens / seconds}
    if task.side == "GKD":
        found["trl"] = version("trl")
    print(json.dumps({**found, "bytes": resident("VmHWM")}))


def confine() -> None:
    """Let this process take the memory that is free and no more: it fails before others are
    killed."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    most = int(0.95 * free)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def spawn(asked: argparse.Namespace, task: Task) -> dict[str, Any] | None:
    """Measure one side in a process of its own; None where that fails, as for want of memory."""
    python = asked.trl_python if task.side == "GKD" else sys.executable
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [str(python), __file__, *sys.argv[1:], "--child", json.dumps(task)]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": path, "TRL_EXPERIMENTAL_SILENCE": "1"},
        stdout=subprocess.PIPE,
        preexec_fn=confine,
    )
    found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    say(f"{task}: {found or f'failed with status {done.returncode}'}")
    return found


def best_flags(asked: argparse.Namespace) -> tuple[list[Task], dict[str, Any]]:
    """Try TRL's batch sizes and types on a few samples; returns the best, with and without
    checkpointing, and all."""
    if asked.trl_python is None:
        return [], {}
    tasks = [Task("GKD", asked.trial, n, mixed) for n in BATCHES for mixed in (False, True)]
    found = {task: spawn(asked, task) for task in tasks}
    rates = {task: row["rate"] for task, row in found.items() if row}
    if not rates:
        raise SystemExit("TRL failed with every batch size")
    best = max(rates, key=lambda task: rates[task])._replace(samples=asked.samples)
    named = {str(task): row for task, row in found.items()}
    return [best, best._replace(checkpointing=True)], named


def speed(asked: argparse.Namespace) -> dict[str, Any]:
    """Measure every side in turn, as often as asked; returns the raw figures and the ratios."""
    run, examples = load(asked, max(asked.samples, asked.trial) + WARM)
    Signals(run, examples)
    others, trials = best_flags(asked)
    tasks = [*(Task(name, asked.samples) for name in OURS), *others]
    rows: dict[str, list[dict[str, Any]]] = {str(task): [] for task in tasks}
    for _ in range(asked.repeats):
        for task in tasks:
            if found := spawn(asked, task):
                rows[str(task)].append(found)
    rows = {name: found for name, found in rows.items() if found}
    ratios = against(rows, [str(task) for task in others if str(task) in rows])
    console.print(speed_table(rows))
    console.print(ratio_table(ratios))
    return {"trials": trials, "sides": rows, "ratios": ratios}


def median(rows: Sequence[Mapping[str, float]], key: str) -> float:
    """Return the median of a figure."""
    return statistics.median(row[key] for row in rows)


def against(
    rows: Mapping[str, Sequence[Mapping[str, float]]], others: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Return how many times as long as ours each other takes: training alone, and with capture for
    so many epochs."""
    own, once = median(rows["cached"], "seconds"), median(rows["capture"], "seconds")
    found = {}
    for name in others:
        theirs = median(rows[name], "seconds")
        whole = {f"{n} with capture": n * theirs / (once + n * own) for n in EPOCHS}
        found[name] = {"training": theirs / own, **whole}
    return found


def spread(values: Sequence[float], form: str) -> str:
    """Write a median and a range."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):{form}} ({low:{form}} to {high:{form}})"


def speed_table(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> Table:
    """Return the rates and peaks of memory as a table."""
    shown = table("training", "side", ">real tokens/s", ">GiB at most", ">cached is")
    own = median(rows["cached"], "rate")
    for name, found in rows.items():
        times = f"{own / median(found, 'rate'):.2f} times"
        peak = f"{max(row['bytes'] for row in found) / 2**30:.1f}"
        shown.add_row(name, spread([row["rate"] for row in found], ".0f"), peak, times)
    return shown


def ratio_table(ratios: Mapping[str, Mapping[str, float]]) -> Table:
    """Return how much faster training from the cache is, with the capture in and out."""
    heads = [f">{n} epoch{'s' * (n > 1)}, with capture" for n in EPOCHS]
    shown = table("cached against TRL", "side", ">capture left out", *heads)
    for name, found in ratios.items():
        shown.add_row(name, *(f"{value:.2f}" for value in found.values()))
    return shown


# Overhead


def overhead(asked: argparse.Namespace) -> dict[str, Any]:
    """Train the same student on the same samples with soft labels and without, in turn; the first
    round warms up."""
    run, examples = load(asked, asked.samples)
    ours = Ours(loading.load_model(run.config.student.model))
    kinds = {"cached": Signals(run, examples).labels(examples), "cross-entropy": None}
    rounds: list[dict[str, float]] = []
    for number in range(asked.repeats + 1):
        seconds = {}
        for name in sorted(kinds, reverse=number % 2 == 1):
            ours.student.labels = kinds[name]
            seconds[name] = ours(examples)
        rounds.append({**seconds, "ratio": seconds["cached"] / seconds["cross-entropy"]})
        say(f"round {number}: {rounds[-1]}")
    shown = table("soft labels beside plain text", "", ">seconds")
    for name in kinds:
        shown.add_row(name, spread([row[name] for row in rounds[1:]], ".2f"))
    shown.add_row("ratio", spread([row["ratio"] for row in rounds[1:]], ".3f"))
    console.print(shown)
    tokens = sum(len(example.input_ids) for example in examples)
    return {"tokens": tokens, "rounds": rounds[1:]}


# Parity


class Plain(Ours):
    """The same loop with a loss that a textbook would have: all logits at once, in float32, by
    autograd."""

    def loss(self, examples: Sequence[Example]) -> Tensor:
        """Return half of the cross-entropy and half of KL(teacher || student), summed over the
        supervised tokens."""
        batch = self.student.batch(examples)
        soft: Any = batch.soft
        head, bias = (None if t is None else t.float() for t in self.student.head())
        states = self.student.hidden(batch)[batch.indices_S].float()
        logits = functional.linear(states, head, bias)  # pyright: ignore[reportArgumentType]
        known = functional.log_softmax(logits[:, : soft.vocabulary], -1)
        teacher = functional.linear(soft.hidden_ND.float(), soft.head_VD.float(), soft.bias_V)
        wanted = functional.log_softmax(teacher[:, : soft.vocabulary], -1)
        hard = functional.cross_entropy(logits, batch.targets_S, reduction="sum")
        return 0.5 * hard + 0.5 * functional.kl_div(known, wanted, reduction="sum", log_target=True)


@torch.no_grad()
def judge(ours: Ours, teacher: LiveLabels, examples: Sequence[Example]) -> dict[str, float]:
    """Return the student's cross-entropy and forward KL over the whole vocabulary, in nats a token,
    and their mix."""
    before, ours.student.labels = ours.student.labels, teacher
    lengths = [len(example.input_ids) for example in examples]
    total = torch.zeros(1 + len(PARTS))
    for samples in micro_batches(range(len(examples)), lengths, HELD_TOKENS):
        total += ours.student(ours.student.batch([examples[i] for i in samples]))
    ours.student.labels = before
    values = total / sum(sum(example.weights) for example in examples)
    return dict(zip(("loss", *PARTS), values.tolist(), strict=True))


def train_side(
    side: str,
    seed: int,
    asked: argparse.Namespace,
    run: Run,
    examples: Sequence[Example],
    teacher: LiveLabels,
) -> dict[str, Any]:
    """Train one student, on samples in the seed's order; returns its losses of all steps, and of
    the held-out samples."""
    student = loading.load_model(run.config.student.model)
    ours = (Plain if side == "live, plain loss" else Ours)(student)
    learned, held = examples[: asked.samples], examples[asked.samples :]
    cached_too = side == "cached"
    ours.student.labels = Signals(run, learned).labels(learned) if cached_too else teacher
    lengths = [len(example.input_ids) for example in learned]
    plan = plan_steps(lengths, seed, asked.step_tokens, 1, asked.steps)
    peak = run.config.train.learning_rate
    before, losses = judge(ours, teacher, held), []
    for number, step in enumerate(plan):
        ours.set_rate(learning_rate(number, len(plan), peak, "cosine", WARMUP))
        losses.append(ours.step([learned[i] for i in step.samples]))
        if number % 10 == 9:
            say(f"{side}: step {number + 1} of {len(plan)}, loss {losses[-1]:.4f}")
    return {"before": before, "after": judge(ours, teacher, held), "losses": losses}


PARITY = ("cached", "live", "live, plain loss")


def parity(asked: argparse.Namespace) -> dict[str, Any]:
    """Train a student on each side, or take what an earlier call has measured; returns their
    losses."""
    run, examples = load(asked, asked.samples + asked.held)
    teacher = load_live(run, examples)
    teacher = replace(teacher, settings=run.config.train.loss)
    settings = {name: getattr(asked, name) for name in ("samples", "held", "steps", "step_tokens")}
    settings |= {"data": [example.id for example in examples]}
    kept = read_json(asked.json) if asked.json and asked.json.exists() else {}
    found = kept.get("sides", {}) if kept.get("settings") == settings else {}
    students = [(seed, side) for seed in range(asked.seeds) for side in asked.sides]
    for seed, side in students:
        if (name := named(side, seed)) not in found:
            found[name] = train_side(side, seed, asked, run, examples, teacher)
            keep(asked, {"settings": settings, "sides": found})
    console.print(parity_table(found))
    return {"settings": settings, "sides": found}


def named(side: str, seed: int) -> str:
    """Return the name of a side's student of a seed."""
    return f"{side}; seed {seed}" if seed else side


def parity_table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the losses on held-out samples, and how far each lies from the live teacher's
    student."""
    shown = table(
        "nats a token of the held-out samples, over the whole vocabulary",
        *("trained", ">mixed loss", ">cross-entropy", ">forward KL"),
    )
    names, sides = ("loss", *PARTS), list(found)
    if not found:
        return shown
    shown.add_row("not at all", *(f"{found[sides[0]]['before'][name]:.4f}" for name in names))
    for side in sides:
        cells = [f"{found[side]['after'][name]:.4f}" for name in names]
        same = "; ".join(["live", *side.split("; ")[1:]])
        if side != same and same in found:
            pairs = [(found[side]["after"][n], found[same]["after"][n]) for n in names]
            cells = [f"{c} ({a / b - 1:+.2%})" for c, (a, b) in zip(cells, pairs, strict=True)]
        shown.add_row(side, *cells)
    return shown


def keep(asked: argparse.Namespace, found: Mapping[str, Any]) -> None:
    """Write what was measured, where a file is named."""
    if asked.json:
        write_json(asked.json, {"environment": environment(), **found})


def parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    modes = made.add_subparsers(required=True)
    for mode, samples in ((speed, 16), (overhead, 16), (parity, 256)):
        own = modes.add_parser(mode.__name__, help=(mode.__doc__ or "").split(";")[0])
        own.set_defaults(mode=mode, child=None)
        own.add_argument("run", type=Path)
        own.add_argument("--samples", type=int, default=samples, help="trained on")
        own.add_argument("--json", type=Path)
        if mode is not parity:
            own.add_argument("--repeats", type=int, default=5)
    own = modes.choices["speed"]
    own.add_argument("--trl-python", type=Path, help="of an environment with TRL 1.16")
    own.add_argument("--trial", type=int, default=4, help="samples on which TRL's flags are tried")
    own.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    own = modes.choices["parity"]
    own.add_argument("--steps", type=int, default=200)
    own.add_argument("--step-tokens", type=int, default=256)
    own.add_argument("--held", type=int, default=64, help="samples that follow those trained on")
    own.add_argument("--sides", nargs="+", choices=PARITY, default=PARITY)
    own.add_argument("--seeds", type=int, default=1, help="orders of the samples")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments, measure, and show and store the result; or be a side's process."""
    asked = parser().parse_args(arguments)
    torch.set_flush_denormal(True)  # as training does
    if asked.child:
        child(asked)
    else:
        keep(asked, asked.mode(asked))


if __name__ == "__main__":
    main()

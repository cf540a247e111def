"""Measure the training loop against plain PEFT, and against TRL's SFTTrainer where that is
installed.

    python scripts/benchmarks/benchmark_train.py RUN --model smollm2-135m-instruct --repeats 5 \\
        --json train.json

RUN is a run's folder with a dataset. All sides train the same LoRA (r 32, alpha 64, all-linear) in
the machine's own type on the same samples, interleaved; a rate counts real tokens only, never
padding. A side's first round warms it up and is left out. `plain` is the loop of
scripts/benchmarks/plain_baseline.py: padded batches of 8; `sorted` gives it its best flag, batches
of similar length; `trl` is SFTTrainer without gradient checkpointing, `trl packing` its best flags.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.table import Table

from distill.models import loading
from distill.models.arithmetic import MICRO_BATCH_TOKENS
from distill.records import Example, Pair
from distill.storage.environment import environment
from distill.storage.files import read_records, write_json
from distill.storage.progress import console, say
from distill.training import adapters
from distill.training.batches import micro_batches
from distill.training.encode import encode_pairs
from distill.training.student import make_student

RANK, ALPHA, RATE, BATCH, DATE = 32, 64, 1e-4, 8, "2026-01-01"
STEP_TOKENS = 2048
Side = Callable[[Sequence[Example]], float]  # trains on samples, returns seconds


def since(start: float) -> float:
    """Return the seconds since `start`, after what a GPU has left to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Ours:
    """Our loop: steps and micro-batches of about so many tokens, by default as `distill train`
    takes them."""

    def __init__(
        self, reference: str, step_tokens: int = STEP_TOKENS, limit: int = MICRO_BATCH_TOKENS
    ) -> None:
        self.step_tokens, self.limit = step_tokens, limit
        model = adapters.inject(
            loading.load_model(reference), RANK, ALPHA, 0.0, "all-linear", seed=0
        )
        self.student, _ = make_student(model.train(), fused=True)
        self.named = adapters.parameters(model)
        weights = list(self.named.values())
        self.optimizer = torch.optim.AdamW(weights, weight_decay=0.0, fused=True)
        self.set_rate(RATE)

    def set_rate(self, rate: float) -> None:
        """Choose the learning rate of the steps to come."""
        self.optimizer.param_groups[0]["lr"] = rate

    def loss(self, examples: Sequence[Example]) -> torch.Tensor:
        """Return the loss summed over a micro-batch."""
        return self.student(self.student.batch(examples)).reshape(-1)[0]

    def step(self, examples: Sequence[Example]) -> float:
        """Take one optimizer step; returns its loss, in nats a supervised token."""
        count, total = sum(sum(example.weights) for example in examples), 0.0
        lengths = [len(example.input_ids) for example in examples]
        for samples in micro_batches(range(len(examples)), lengths, self.limit):
            loss = self.loss([examples[i] for i in samples]) / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.named.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def __call__(self, examples: Sequence[Example]) -> float:
        """Train on samples; returns seconds."""
        lengths, start = [len(e.input_ids) for e in examples], time.perf_counter()
        for step in micro_batches(range(len(examples)), lengths, self.step_tokens):
            self.step([examples[i] for i in step])
        return since(start)


def padded(rows: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Pad a batch on the right, with labels on the answers only."""
    width = max(len(e.input_ids) for e in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, example in enumerate(rows):
        row, weights = torch.tensor(example.input_ids), torch.tensor(example.weights)
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
        labels[i, : len(row)] = torch.where(weights > 0, row, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain(reference: str, by_length: bool, batch: int = BATCH) -> Side:
    """Return the plain loop: transformers' loss over padded batches, PEFT's own forward."""
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(loading.load_model(reference), lora).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)

    def train(examples: Sequence[Example]) -> float:
        order = sorted(examples, key=lambda e: len(e.input_ids)) if by_length else list(examples)
        start = time.perf_counter()
        for place in range(0, len(order), batch):
            rows = padded(order[place : place + batch])
            model(**{name: t.to(model.device) for name, t in rows.items()}).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return since(start)

    return train


def trl(reference: str, packing: bool, batch: int | None = None) -> Side:
    """Return TRL's SFTTrainer over the same ids, its own set-up left out of the time."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    tokenizer = loading.load_tokenizer(reference)

    def train(examples: Sequence[Example]) -> float:
        rows = {
            "input_ids": [list(e.input_ids) for e in examples],
            "completion_mask": [[int(w) for w in e.weights] for e in examples],
        }
        with tempfile.TemporaryDirectory() as folder:
            settings = SFTConfig(
                output_dir=folder,
                num_train_epochs=1,
                per_device_train_batch_size=batch or (2 if packing else BATCH),
                packing=packing,
                max_length=1024,
                learning_rate=RATE,
                gradient_checkpointing=False,
                use_cpu=not torch.cuda.is_available(),
                bf16=True,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                logging_strategy="no",
            )
            trainer = SFTTrainer(
                model=loading.load_model(reference),
                args=settings,
                train_dataset=Dataset.from_dict(rows),
                processing_class=tokenizer,
                peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"),
            )
            return float(trainer.train().metrics["train_runtime"])

    return train


def measure(
    sides: dict[str, Side], rounds: list[list[Example]]
) -> dict[str, list[dict[str, float]]]:
    """Train every side on every round, interleaved; the first round of each is a warm-up and is
    left out."""
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number, samples in enumerate(rounds):
        tokens = sum(len(e.input_ids) for e in samples)
        for name, train in sides.items():
            seconds = train(samples)
            if number:
                rows[name].append({"tokens": tokens, "seconds": seconds, "rate": tokens / seconds})
            say(f"round {number}, {name}: {tokens / seconds:.0f} tokens/s")
    return rows


def table(rows: dict[str, list[dict[str, float]]]) -> Table:
    """Return the medians, ranges and ratios as a table."""
    shown = Table("side", "tokens/s, median", "range", "ours is")
    median = {name: statistics.median(row["rate"] for row in found) for name, found in rows.items()}
    for name, found in rows.items():
        rates = [row["rate"] for row in found]
        spread = f"{min(rates):.0f} to {max(rates):.0f}"
        shown.add_row(
            name, f"{median[name]:.0f}", spread, f"{median['ours'] / median[name]:.2f} times"
        )
    return shown


def main() -> None:
    """Read the arguments, measure, and show and store the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samples", type=int, default=16, help="samples a round")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    pairs = read_records(asked.run / "dataset/train.jsonl", Pair)
    examples = encode_pairs(loading.load_tokenizer(asked.model), pairs, DATE, 1024, asked.run)
    count = asked.samples
    rounds = [examples[n * count : (n + 1) * count] for n in range(asked.repeats + 1)]
    sides: dict[str, Side] = {"ours": Ours(asked.model), "plain": plain(asked.model, False)}
    sides["sorted"] = plain(asked.model, True)
    if importlib.util.find_spec("trl"):
        sides |= {"trl": trl(asked.model, False), "trl packing": trl(asked.model, True)}
        say(f"trl {version('trl')}")
    torch.set_flush_denormal(True)
    rows = measure(sides, [samples for samples in rounds if samples])
    console.print(table(rows))
    if asked.json:
        write_json(asked.json, {"environment": environment(), "rounds": rows})


if __name__ == "__main__":
    main()

"""Measure the training loop against plain PEFT, and against TRL's SFTTrainer where it is installed.

    python scripts/benchmarks/benchmark_train.py RUN --model smollm2-135m-instruct --repeats 5 \\
        --json train.json

RUN is a run's folder with a dataset. All sides train the same LoRA (r 32, alpha 64, all-linear) in
the machine's own type on the same samples, interleaved; a rate counts real tokens only, never
padding. A side's first round warms it up and is left out. `ours` is what `distill train` does.
`plain` is the loop of scripts/benchmarks/plain_baseline.py: padded batches of 8; `sorted` gives it
its best flag, batches of similar length; `trl` is SFTTrainer without gradient checkpointing, in
mixed precision where the machine computes in its type, `trl packing` its best flags.
"""

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from distill.models.arithmetic import MICRO_BATCH_TOKENS
from distill.models.devices import pick_dtype
from distill.training import adapters
from distill.training.batches import Example, micro_batches
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
    """What `distill train` does with a model: its adapter and student, its steps."""

    def __init__(
        self, model: Any, step_tokens: int = STEP_TOKENS, limit: int = MICRO_BATCH_TOKENS
    ) -> None:
        self.step_tokens, self.limit = step_tokens, limit
        adapted = adapters.adapt(adapters.inject(model, RANK, ALPHA, 0.0, "all-linear", 0))
        self.student, _ = make_student(adapted, fused=True)
        self.named = adapters.parameters(adapted)
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
        count = sum(sum(example.weights) for example in examples)
        lengths = [len(example.input_ids) for example in examples]
        sums = torch.zeros((), dtype=torch.float64, device=self.student.device)
        half = self.student.model.dtype == torch.float16  # see `Loop._accumulate`
        with adapters.cast_once(self.student.model):
            for samples in micro_batches(range(len(examples)), lengths, self.limit):
                loss = self.loss([examples[i] for i in samples])
                (loss if half else loss * (1 / count)).backward()
                sums += loss.detach()
        for parameter in self.named.values() if half else ():
            if parameter.grad is not None:
                parameter.grad.mul_(1 / count)
        torch.nn.utils.clip_grad_norm_(self.named.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sums.item() / count

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


def plain(model: Any, by_length: bool, batch: int = BATCH) -> Side:
    """Return the plain loop: transformers' loss over padded batches, PEFT's own forward."""
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped: Any = get_peft_model(model, lora).train()
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=RATE)

    def train(examples: Sequence[Example]) -> float:
        order = sorted(examples, key=lambda e: len(e.input_ids)) if by_length else list(examples)
        start = time.perf_counter()
        for place in range(0, len(order), batch):
            rows = padded(order[place : place + batch])
            wrapped(**{name: t.to(wrapped.device) for name, t in rows.items()}).loss.backward()
            torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return since(start)

    return train


def precision() -> dict[str, bool]:
    """Return TRL's flags of mixed precision: the type that this machine computes in, if any."""
    dtype = pick_dtype()
    return {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}


def trl(
    make_model: Callable[[], Any], tokenizer: Any, packing: bool, batch: int | None = None
) -> Side:
    """Return TRL's SFTTrainer over the same ids, its own set-up left out of the time."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

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
                **precision(),
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                logging_strategy="no",
            )
            trainer = SFTTrainer(
                model=make_model(),
                args=settings,
                train_dataset=Dataset.from_dict(rows),
                processing_class=tokenizer,
                peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"),
            )
            return float(trainer.train().metrics["train_runtime"])

    return train


def measure(
    sides: Mapping[str, Side], rounds: Sequence[Sequence[Example]]
) -> dict[str, list[dict[str, float]]]:
    """Train every side on every round, interleaved, and leave out the first, a warm-up."""
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number, samples in enumerate(rounds):
        tokens = sum(len(e.input_ids) for e in samples)
        for name, train in sides.items():
            seconds = train(samples)
            if number:
                rows[name].append({"tokens": tokens, "seconds": seconds, "rate": tokens / seconds})
            print(f"round {number}, {name}: {tokens / seconds:.0f} tokens/s", file=sys.stderr)
    return rows


def main() -> None:
    """Read the arguments, measure, and show and store the result."""
    from rich.table import Table

    from distill.models import loading
    from distill.records import Pair
    from distill.storage.environment import environment
    from distill.storage.files import read_records, write_json
    from distill.storage.progress import console
    from distill.training.encode import encode_pairs

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samples", type=int, default=16, help="samples a round")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tokenizer = loading.load_tokenizer(options.model)
    pairs = read_records(options.run / "dataset/train.jsonl", Pair)
    examples, count = encode_pairs(tokenizer, pairs, DATE, 1024, options.run), options.samples
    rounds = [examples[n * count : (n + 1) * count] for n in range(options.repeats + 1)]

    def model() -> Any:
        return loading.load_model(options.model)

    sides: dict[str, Side] = {"ours": Ours(model()), "plain": plain(model(), False)}
    sides["sorted"] = plain(model(), True)
    if importlib.util.find_spec("trl"):
        sides |= {"trl": trl(model, tokenizer, False), "trl packing": trl(model, tokenizer, True)}
        print(f"trl {version('trl')}", file=sys.stderr)
    torch.set_flush_denormal(True)
    rows = measure(sides, [samples for samples in rounds if samples])
    table = Table("side", "tokens/s, median", "range", "ours is")
    median = {name: statistics.median(row["rate"] for row in side) for name, side in rows.items()}
    for name, side in rows.items():
        rates = [row["rate"] for row in side]
        spread, times = f"{min(rates):.0f} to {max(rates):.0f}", median["ours"] / median[name]
        table.add_row(name, f"{median[name]:.0f}", spread, f"{times:.2f} times")
    console.print(table)
    if options.json:
        write_json(options.json, {"environment": environment(), "rounds": rows})


if __name__ == "__main__":
    main()

"""What a training run is made of, before any process meets another: model, examples and steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from distill.config.learning import Student, Train
from distill.config.tree import Config
from distill.errors import DistillError, Exit
from distill.models import loading, registry
from distill.models.chat_template import template_hash
from distill.records import Example, Pair, digest
from distill.storage.environment import LIBRARIES, installed
from distill.storage.files import read_records, sha256_file
from distill.storage.run_folder import Run, flatten
from distill.training import adapters, sharding
from distill.training.batches import (
    MICRO_BATCH_TOKENS,
    OptimizerStep,
    micro_batches,
    padded_batches,
    plan_steps,
)
from distill.training.encode import encode_pairs
from distill.training.soft_labels.labels import load_labels, load_live
from distill.training.student import StudentModel, make_student

UNPINNED = ("logging_steps", "save_steps", "save_total_limit", "report_to", "num_processes")


@dataclass
class Parts:
    """The parts of a run; `model` is the adapted model inside `student`."""

    tokenizer: Any
    model: PeftModel
    student: StudentModel
    examples: list[Example]
    validation: list[Example]
    plan: list[OptimizerStep]
    facts: dict[str, Any]
    limit: int
    notes: list[str]

    def batches(
        self, examples: Sequence[Example], samples: Sequence[int] | None = None
    ) -> list[list[int]]:
        """Deal samples (None: all) into micro-batches of the run's size."""
        lengths = [len(e.input_ids) for e in examples]
        deal = micro_batches if self.student.packing else padded_batches
        return deal(range(len(lengths)) if samples is None else samples, lengths, self.limit)


def prepare(config: Config, run: Run, start: Path | None = None) -> Parts:
    """Load the student with the adapter in `start` or a fresh one, encode the data, plan the steps.

    Raises DistillError (exit 7) where that cannot be.
    """
    base, settings = config.student, config.train
    tokenizer = loading.load_tokenizer(base.model, base.revision, base.trust)
    model = load_adapted(base, settings, config.train_seed)
    max_length = min(settings.max_length, loading.context_length(model.config))
    examples, validation = (
        encode_split(tokenizer, run, split, config.template_date, max_length)
        for split in ("train", "validation")
    )
    student, notes = make_student(model, settings.packing, fused=not sharding.enabled())
    facts = pinned_facts(config, tokenizer, model, examples, validation)
    if settings.loss.soft:
        both = [*examples, *validation]
        if settings.loss.teacher == "live":
            student.labels = load_live(config, run, both)
            facts |= registry.folder_facts("teacher", config.soft_teacher().model)
        else:
            student.labels = load_labels(config, run, both, len(student.head()[0]))
        facts["signals"] = student.labels.digest
    if start:
        path = start / adapters.WEIGHTS
        adapters.restore(model, adapters.read_tensors(path), path)
        facts["start"] = sha256_file(path)
    lengths = [len(e.input_ids) for e in examples]
    amount = (settings.tokens_per_step, settings.num_train_epochs, settings.max_steps)
    plan = plan_steps(lengths, config.train_seed, *amount)
    limit = settings.micro_batch_tokens or MICRO_BATCH_TOKENS
    return Parts(tokenizer, model, student, examples, validation, plan, facts, limit, notes)


def load_adapted(student: Student, train: Train, seed: int) -> PeftModel:
    """Load the student and wrap it with a fresh adapter drawn from `seed`."""
    dtype = "bfloat16" if train.bf16 else "float32"
    if train.bf16 == "auto":
        dtype = student.dtype
    elif train.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        what, fix = "this GPU has no bfloat16", "set train.bf16: false"
        raise DistillError(Exit.TRAINING, "train.bf16", what, fix)
    four_bit = student.load_in_4bit
    model = loading.load_model(student.model, dtype, student.revision, student.trust, four_bit)
    lora = train.lora
    wrapped = adapters.inject(model, lora.r, lora.alpha, lora.dropout, lora.target_modules, seed)
    adapters.use_working_copies(wrapped)
    if train.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return wrapped.train()


def encode_split(tokenizer: Any, run: Run, split: str, date: str, limit: int) -> list[Example]:
    """Encode a split of the run's dataset; validation may be empty, training may not."""
    path = run.path(f"dataset/{split}.jsonl")
    pairs = read_records(path, Pair) if path.exists() else []
    if not pairs and split == "validation":
        return []
    return encode_pairs(tokenizer, pairs, date, limit, path)


def pinned_facts(
    config: Config,
    tokenizer: Any,
    model: Any,
    examples: Sequence[Example],
    validation: Sequence[Example],
) -> dict[str, Any]:
    """Return what a resumed run must share with the one it continues, as flat JSON."""
    resolved = config.resolved()
    return flatten(
        {
            "student": resolved["student"],
            "train": {k: v for k, v in resolved["train"].items() if k not in UNPINNED},
            "seed": config.train_seed,
            "template_date": config.template_date,
            "data": digest([[e.id for e in examples], [e.id for e in validation]]),
            "base": registry.identity(config.student.model, config.student.revision),
            **registry.folder_facts("base", config.student.model),
            "template": template_hash(tokenizer, config.template_date),
            "device": model.device.type,
            "dtype": str(model.dtype).removeprefix("torch."),
            "libraries": {name: installed(name) for name in LIBRARIES[:6]},
        }
    )

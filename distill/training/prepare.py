"""What a training run is made of, before any process meets another: model, examples, and the plan of its steps."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distill.config import Config
from distill.errors import DistillError, Exit
from distill.models import loading, registry
from distill.models.chat_template import template_hash
from distill.records import Example, Pair, digest
from distill.storage.environment import LIBRARIES, installed
from distill.storage.files import read_records, sha256_file
from distill.storage.fingerprints import flatten
from distill.storage.run_folder import Run
from distill.training import adapters, sharding
from distill.training.batches import (
    MICRO_BATCH_TOKENS,
    OptimizerStep,
    micro_batches,
    padded_batches,
    plan_steps,
)
from distill.training.encode import encode_pairs
from distill.training.soft_labels.labels import load_labels
from distill.training.soft_labels.live_teacher import load_live
from distill.training.student import StudentModel, make_student

UNSEEN = ("logging_steps", "save_steps", "save_total_limit", "report_to", "num_processes")


@dataclass
class Parts:
    """The parts of a run; `model` is the adapted model inside `student`."""

    tokenizer: Any
    model: Any
    student: StudentModel
    examples: list[Example]
    validation: list[Example]
    plan: list[OptimizerStep]
    facts: dict[str, Any]
    limit: int
    notes: list[str] = field(default_factory=list)

    def batches(
        self, examples: Sequence[Example], samples: Sequence[int] | None = None
    ) -> list[list[int]]:
        """Deal samples (all, where none are named) into micro-batches of the run's size."""
        lengths = [len(e.input_ids) for e in examples]
        deal = micro_batches if self.student.packing else padded_batches
        return deal(range(len(lengths)) if samples is None else samples, lengths, self.limit)


def prepare(config: Config, run: Run, start: Path | None = None) -> Parts:
    """Load the student with the adapter in `start` or a fresh one, encode the dataset and plan the steps.

    Raises DistillError (exit 7) where that cannot be.
    """
    tokenizer = loading.load_tokenizer(
        config.student.model, config.student.revision, config.student.trust_remote_code
    )
    model, settings = load_adapted(config), config.train
    limit = min(settings.max_length, loading.context_length(model.config))
    examples = encode_split(tokenizer, config, run, "train", limit)
    validation = encode_split(tokenizer, config, run, "validation", limit)
    student, notes = make_student(model, settings.packing, fused=not sharding.asked())
    pinned = facts(config, tokenizer, model, examples, validation)
    if settings.loss.soft:
        both, live = [*examples, *validation], settings.loss.teacher == "live"
        rows = len(student.head()[0])
        student.labels = (
            load_live(config, run, both) if live else load_labels(config, run, both, rows)
        )
        pinned["signals"] = student.labels.digest
        pinned |= registry.folder_facts("teacher", config.soft_teacher().model) if live else {}
    if start:
        pinned["start"] = restore_from(model, start)
    plan = plan_steps(
        [len(e.input_ids) for e in examples],
        config.train_seed,
        settings.tokens_per_step,
        settings.num_train_epochs,
        settings.max_steps,
    )
    return Parts(
        tokenizer,
        model,
        student,
        examples,
        validation,
        plan,
        pinned,
        settings.micro_batch_tokens or MICRO_BATCH_TOKENS,
        notes,
    )


def load_adapted(config: Config) -> Any:
    """Load the student and wrap it with a fresh adapter, drawn from the run's seed."""
    student, settings = config.student, config.train
    model = loading.load_model(
        student.model,
        dtype_name(config),
        student.revision,
        student.allow_pickle,
        student.trust_remote_code,
        student.load_in_4bit,
    )
    lora = settings.lora
    wrapped = adapters.inject(
        model, lora.r, lora.alpha, lora.dropout, lora.target_modules, config.train_seed
    )
    adapters.use_working_copies(wrapped)
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return wrapped.train()


def restore_from(model: Any, folder: Path) -> str:
    """Put a saved adapter into the model; returns the hash of its file."""
    path = folder / adapters.WEIGHTS
    adapters.restore(model, adapters.read_tensors(path), path)
    return sha256_file(path)


def dtype_name(config: Config) -> str:
    """Return the type that the model computes in, by `train.bf16` and `student.dtype`."""
    if config.train.bf16 == "auto":
        return config.student.dtype
    if config.train.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise DistillError(
            Exit.TRAINING, "train.bf16", "this GPU has no bfloat16", "set train.bf16: false"
        )
    return "bfloat16" if config.train.bf16 else "float32"


def encode_split(tokenizer: Any, config: Config, run: Run, split: str, limit: int) -> list[Example]:
    """Encode a split of the run's dataset; validation may be empty, training may not."""
    path = run.path(f"dataset/{split}.jsonl")
    pairs = read_records(path, Pair) if path.exists() else []
    if not pairs and split == "validation":
        return []
    return encode_pairs(tokenizer, pairs, config.template_date, limit, path)


def facts(
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
            "train": {k: v for k, v in resolved["train"].items() if k not in UNSEEN},
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

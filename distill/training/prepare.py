"""What a training run is made of, before any process meets another: model, examples and steps."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from distill.config.learning import Student, Train
from distill.config.teachers import LocalTeacher
from distill.config.tree import Config
from distill.errors import DistillError
from distill.models import loading, registry
from distill.models.arithmetic import MICRO_BATCH_TOKENS, LoraTraining, Towards, weight_bytes
from distill.models.chat_template import template_hash
from distill.records import digest
from distill.storage.environment import LIBRARIES, installed, processor
from distill.storage.files import sha256_file
from distill.storage.run_folder import MEMORY, Run, flatten
from distill.tasks.scoring import answer_limit
from distill.training import adapters, processes
from distill.training.batches import Example, plan_steps
from distill.training.checked import validation_prompts
from distill.training.encode import SPLITS, encode_split
from distill.training.soft_labels.labels import load_labels, load_live
from distill.training.student import attention_notes, make_student

HARDWARE = ("processor", "instructions", "threads", "gpu", "cuda")
SAME = {  # what processes that share a step must have in common, with what makes it so
    "dtype": "train.bf16=false, which is float32 on all of them",
    "packing": "train.packing=false",
}
UNPINNED = ("logging_steps", "save_steps", "save_total_limit", "report_to", "num_processes")
UNPINNED += ("self_answers",)  # which what follows reads
IDLE = 0.1  # of the passes of several processes may hold no sample, without a word about it


class Preparation:
    """The parts of a run; `model` is the adapted model inside `student`.

    `facts` are what a resumed run must share with the one it continues, `memory` the settings that
    may differ; a micro-batch has about `limit` tokens.
    """

    def __init__(self, run: Run, world: int = 1, start: Path | None = None) -> None:
        """Load the student with the adapter in `start` or a fresh one, encode the data, plan steps.

        Raises DistillError (exit 7) where that cannot be.
        """
        config, base, settings = run.config, run.config.student, run.config.train
        self.tokenizer = loading.student_tokenizer(base, config.reasoning)
        self.model = load_adapted(base, settings, config.train_seed)
        most = min(settings.max_length, loading.context_length(self.model.config))
        train, validation = (encode_split(self.tokenizer, run, split, most) for split in SPLITS)
        self.examples, self.validation, self.world = train, validation, world
        shards = processes.sharded()
        self.student, self.notes = make_student(self.model, settings.packing, fused=not shards)
        if shards and self.student.packing:  # the student is in main memory until it is cut
            self.notes += attention_notes(loading.device(), self.model)
        facts = pinned_facts(config, self.tokenizer, str(self.model.dtype), train, validation)
        self.memory = {name: facts.pop(name) for name in MEMORY if name in facts}
        mine = {name: facts[name] for name in ("dtype", *HARDWARE) if name in facts}
        shared = processes.agree({**mine, "packing": self.student.packing}, world, SAME)
        self.facts = facts | {**{name: shared[name] for name in mine}, "world_size": world}
        if settings.loss.soft:
            both = [*train, *validation]
            if settings.loss.teacher == "live":
                self.student.labels = load_live(run, both)
                self.facts |= registry.folder_facts("teacher", config.soft_teacher().model)
            else:
                self.student.labels = load_labels(run, both, len(self.student.head()[0]))
            self.facts["signals"] = self.student.labels.digest
        if start:
            path = start / adapters.WEIGHTS
            adapters.restore(self.model, load_file(path), path)
            self.facts["start"] = sha256_file(path)
        by_checker = settings.metric_for_best_model == "checker"
        self.validation_prompts = validation_prompts(run) if by_checker and not shards else []
        if by_checker:
            names = [prompt.id for prompt in self.validation_prompts]
            self.facts["validation_prompts"] = digest([answer_limit(config), names])
            why = "it is in shards" if shards else "no prompt has a checker and what that needs"
            how = f"the checker, on {len(names)} prompts after each epoch; eval_steps is ignored"
            self.notes.append(f"validation by {how if names else f'loss, if at all: {why}'}")
        if shards:
            self.facts["sharded"] = True
            self.notes.append(f"sharded over {world} processes (FSDP2)")
        amount = (settings.tokens_per_step, settings.num_train_epochs, settings.max_steps)
        self.plan = plan_steps([len(e.input_ids) for e in train], config.train_seed, *amount)
        self.limit = settings.micro_batch_tokens or micro_batch_tokens(config, self.model, world)
        if world > 1:
            dealt = [len(self.batches(train, step.samples)) for step in self.plan]
            idle = 1 - sum(dealt) / sum(math.ceil(n / world) * world for n in dealt)
            if idle > IDLE:
                what = f"{idle:.0%} of the passes of {world} processes hold no sample"
                self.notes.append(f"{what}: raise train.tokens_per_step, or start fewer")

    def batches(
        self, examples: Sequence[Example], samples: Sequence[int] | None = None
    ) -> list[list[int]]:
        """Deal samples (None: all) into micro-batches of the run's size."""
        samples = range(len(examples)) if samples is None else samples
        return self.student.deal(examples, samples, self.limit, self.world)


def micro_batch_tokens(config: Config, model: PeftModel, world: int = 1) -> int:
    """Return the tokens of a micro-batch where the config says none; each of `world` must call.

    On a GPU they follow from shapes and its memory, not from what is free now, so that a resumed
    run has the same. Of several the smallest decides: all processes deal the same micro-batches.
    """
    train, device = config.train, loading.device()
    if device.type == "cpu":
        return MICRO_BATCH_TOKENS
    try:
        shape = registry.shape_from_config(model.config.to_dict())
    except DistillError:  # another kind of decoder
        return MICRO_BATCH_TOKENS
    towards: Towards = "cached" if train.loss.soft else "tokens"
    teacher = 0.0
    if train.loss.soft and train.loss.teacher == "live":
        towards, reader = "live", config.soft_teacher()
        if isinstance(reader, LocalTeacher):  # in its own type
            width = loading.pick_dtype(reader.dtype).itemsize
            teacher = weight_bytes(registry.shape_of(reader.model), width)
    training = LoraTraining(
        *(shape, train.lora.r, train.lora.target_modules, "cuda", model.dtype.itemsize),
        *(config.student.load_in_4bit, train.gradient_checkpointing, towards, teacher),
        dropout=train.lora.dropout,
        shards=world if processes.sharded() else 1,
    )
    memory = torch.cuda.get_device_properties(device).total_memory
    if world > 1:
        memory = min(gather_object([memory]))
    return training.micro_batch(memory, train.tokens_per_step)


def load_adapted(student: Student, train: Train, seed: int) -> PeftModel:
    """Load the student and wrap it with a fresh adapter drawn from `seed`."""
    types = {"auto": student.dtype, True: "bfloat16", False: "float32"}
    dtype, four_bit = types[train.bf16], student.load_in_4bit
    model = loading.load_model(
        *(student.model, dtype, student.revision, student.trust, four_bit),
        on_cpu=processes.sharded() and not four_bit,  # a device gets its shards alone
    )
    lora = (train.lora.r, train.lora.alpha, train.lora.dropout, train.lora.target_modules)
    return adapters.adapt(adapters.inject(model, *lora, seed), train.gradient_checkpointing)


def pinned_facts(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    examples: Sequence[Example],
    validation: Sequence[Example],
) -> dict[str, Any]:
    """Return a run's facts, and its settings of memory among them, as flat JSON."""
    resolved, device = config.resolved(), loading.device()
    # whose kernels, and order of additions, are its own
    hardware: dict[str, Any] = {"processor": processor(), "threads": torch.get_num_threads()}
    hardware["instructions"] = torch.backends.cpu.get_cpu_capability()
    if device.type == "cuda":
        hardware = {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return flatten(
        {
            "student": resolved["student"],
            "train": {k: v for k, v in resolved["train"].items() if k not in UNPINNED},
            "seed": config.train_seed,
            "template_date": config.template_date,
            "data": digest(
                [[e.id + "*" * e.only_signals for e in s] for s in (examples, validation)]
            ),
            "base": registry.identity(config.student.model, config.student.revision),
            **registry.folder_facts("base", config.student.model),
            "template": template_hash(tokenizer, config.template_date),
            "device": device.type,
            "dtype": dtype.removeprefix("torch."),
            "libraries": {name: installed(name) for name in LIBRARIES[:6]},
            **hardware,
        }
    )

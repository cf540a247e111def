"""Train the student's adapter: our own loop on Accelerate, exact to the bit when resumed, the same on any number of processes.

`distill run CONFIG`, `python scripts/train.py CONFIG` and `accelerate launch scripts/train.py CONFIG` all come here.
A step's loss is the sum over its supervised tokens divided once by their number over all micro-batches and processes.
Where the run stands is one number, its step: the order of samples and the random numbers of a step follow from the
seed and that number. Only the main process writes.
"""

import importlib.util
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from distill import models
from distill.config import Config
from distill.environment import LIBRARIES, installed
from distill.errors import DistillError, Exit
from distill.progress import Tracker, say, tracking
from distill.records import Example, Pair, digest
from distill.run import Run, differences, flatten
from distill.store import read_records, sha256_file, write_json
from distill.template import template_hash
from distill.training import adapters, checkpoint
from distill.training.batches import Step, micro_batches, plan_steps, share
from distill.training.encode import encode_pairs, show
from distill.training.optimizer import (
    learning_rate,
    make_adamw,
    optimizer_tensors,
    restore_optimizer,
    warmup_count,
)
from distill.training.processes import (
    Interrupt,
    check_world,
    die_with_parent,
    interruptible,
    launcher_command,
)
from distill.training.student import Batch, Student, answer_loss, make_student

__all__ = ["answer_loss", "main"]

MICRO_BATCH_TOKENS = 1024  # measured best on CPUs: what a layer computes stays in the cache
TIMEOUT = timedelta(minutes=10)  # for a process that waits for another
UNSEEN = ("logging_steps", "save_steps", "save_total_limit", "report_to", "num_processes")


@dataclass
class Progress:
    """What has happened so far; part of every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    best_step: int | None = None
    best_loss: float | None = None
    worse: int = 0  # validations in a row that were not the best
    stopped_early: bool = False


def main(config: Config, run: Run, allow_inexact: bool = False) -> None:
    """Train, or continue training, and write adapter/, checkpoints/ and training.json.

    Raises DistillError (exit 7) for whatever keeps the training from being what was asked; `allow_inexact` lets a
    resume under other data, settings, libraries or processes pass, and records that it did.
    """
    train_file = run.path("dataset/train.jsonl")
    if not train_file.exists():
        fix = "make it: distill filter CONFIG, or all at once: distill run CONFIG"
        raise DistillError(Exit.TRAINING, train_file, "there is no dataset", fix)
    accelerator = start_processes(config, run)
    torch.set_flush_denormal(True)
    with interruptible() as interrupt:
        loop = Loop(config, run, accelerator, interrupt)
        loop.resume(allow_inexact)
        loop.train()
        if accelerator.is_main_process:
            loop.finish()
        accelerator.wait_for_everyone()
        accelerator.end_training()


def start_processes(config: Config, run: Run) -> Accelerator:
    """Return the Accelerator of this process, after checking that as many came as were asked."""
    tracker = config.train.report_to
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        what, fix = f"{tracker} is not installed", "pip install 'distill[tracking]'"
        raise DistillError(Exit.TRAINING, "train.report_to", what, fix)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        log_with=None if tracker == "none" else tracker,
        project_dir=run.path("tracking"),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
    )
    check_world(config.train.num_processes, launcher_command(), accelerator.num_processes)
    if accelerator.num_processes > 1:
        die_with_parent()
    return accelerator


def read_pairs(run: Run, split: str) -> list[Pair]:
    """Read a split of the run's dataset; a missing file is an empty one."""
    path = run.path(f"dataset/{split}.jsonl")
    return read_records(path, Pair) if path.exists() else []


def dtype_of(config: Config) -> str:
    """Return the type that the model computes in, by `train.bf16` and `student.dtype`."""
    if config.train.bf16 == "auto":
        return config.student.dtype
    if config.train.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise DistillError(
            Exit.TRAINING, "train.bf16", "this GPU has no bfloat16", "set train.bf16: false"
        )
    return "bfloat16" if config.train.bf16 else "float32"


class Loop:
    """A run of training: its parts, made once from the config."""

    def __init__(
        self, config: Config, run: Run, accelerator: Accelerator, interrupt: Interrupt
    ) -> None:
        self.config, self.settings, self.run = config, config.train, run
        self.accelerator, self.interrupt = accelerator, interrupt
        self.progress, self.notes = Progress(), []
        self.started = time.monotonic()
        self.best: dict[str, torch.Tensor] = {}
        self.tokenizer = models.load_tokenizer(
            config.student.model, config.student.revision, config.student.trust_remote_code
        )
        self.model = self._load_model()
        self.examples = self._encode("train")
        self.checks = self._encode("validation") if self._validates() else []
        self.lengths = [len(e.input_ids) for e in self.examples]
        self.plan = plan_steps(
            self.lengths,
            config.seed,
            self.settings.tokens_per_step,
            self.settings.num_train_epochs,
            self.settings.max_steps,
        )
        student, notes = make_student(self.model, self.settings.packing, fused=True)
        self.notes += notes
        if accelerator.is_main_process:
            for note in notes:
                say(note)
        self.student: Student = accelerator.prepare(student)
        self.named = adapters.parameters(self.model)
        betas = (self.settings.adam_beta1, self.settings.adam_beta2)
        self.optimizer = make_adamw(self.named, betas, self.settings.weight_decay)
        self.folder = run.path("checkpoints")

    def _load_model(self) -> Any:
        student, lora = self.config.student, self.settings.lora
        model = models.load_model(
            student.model,
            dtype_of(self.config),
            student.revision,
            student.allow_pickle,
            student.trust_remote_code,
            student.load_in_4bit,
        )
        model.config.use_cache = False
        wrapped = adapters.inject(
            model, lora.r, lora.alpha, lora.dropout, lora.target_modules, self.config.seed
        )
        adapters.use_working_copies(wrapped)
        if self.settings.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        return wrapped.train()

    def _validates(self) -> bool:
        path = self.run.path("dataset/validation.jsonl")
        return path.exists() and path.stat().st_size > 0

    def _encode(self, split: str) -> list[Example]:
        limit = min(self.settings.max_length, models.context_length(self.model.config))
        path = self.run.path(f"dataset/{split}.jsonl")
        return encode_pairs(
            self.tokenizer, read_pairs(self.run, split), self.config.template_date, limit, path
        )

    def facts(self) -> dict[str, Any]:
        """Return what a resumed run must share with the one it continues, as flat JSON."""
        resolved = self.config.resolved()
        settings = {k: v for k, v in resolved["train"].items() if k not in UNSEEN}
        student = self.config.student
        return flatten(
            {
                "student": resolved["student"],
                "train": settings,
                "seed": self.config.seed,
                "template_date": self.config.template_date,
                "data": digest([[e.id for e in self.examples], [e.id for e in self.checks]]),
                "base": models.identity(student.model, student.revision),
                "template": template_hash(self.tokenizer, self.config.template_date),
                "world_size": self.accelerator.num_processes,
                "device": self.accelerator.device.type,
                "dtype": str(self.model.dtype),
                "libraries": {name: installed(name) for name in LIBRARIES[:6]},
            }
        )

    def resume(self, allow_inexact: bool) -> None:
        """Continue from the newest whole checkpoint, where there is one."""
        if self.accelerator.is_main_process:
            checkpoint.sweep(self.folder)
        self.accelerator.wait_for_everyone()
        saved = checkpoint.latest(self.folder)
        if saved is None:
            return
        self._check_same(saved, allow_inexact)
        adapters.restore(self.model, saved.tensors("adapter"), saved.folder)
        restore_optimizer(self.optimizer, self.named, saved.tensors("optimizer"), saved.folder)
        self.progress = Progress(**saved.state())
        self.best = saved.tensors("best")
        self.started = time.monotonic() - self.progress.seconds
        if self.accelerator.is_main_process:
            say(f"train: continuing after step {self.progress.step} of {len(self.plan)}")

    def _check_same(self, saved: checkpoint.Checkpoint, allow_inexact: bool) -> None:
        changes = differences(saved.facts["run"], self.facts())
        if not changes:
            return
        what = "not what the run was begun with: " + "; ".join(changes[:8])
        if not allow_inexact:
            fix = "restore them, --redo train, or --allow-inexact, which the card will say"
            raise DistillError(Exit.TRAINING, saved.folder, what, fix)
        self.notes.append(f"resumed inexactly at step {saved.facts['step']}: {what}")

    def train(self) -> None:
        """Do the steps that are left."""
        if self.accelerator.is_main_process and self.progress.step == 0:
            first = self._micro_batches(self.plan[0])[0]
            show(self.tokenizer, [self.examples[i] for i in first])
        with tracking("train", len(self.plan), "steps") as tracker:
            tracker.done = self.progress.step
            while self.progress.step < len(self.plan) and not self.progress.stopped_early:
                self._advance(tracker)

    def _advance(self, tracker: Tracker) -> None:
        """Do one step and what is due after it."""
        step = self.plan[self.progress.step]
        row, interrupted = self._step(step)
        self._record(row, tracker)
        done, last = self.progress.step, self.progress.step == len(self.plan)
        if self.checks and (last or _due(done, self.settings.eval_steps)):
            self._validate()
            last = last or self.progress.stopped_early
        if last or interrupted or _due(done, self.settings.save_steps):
            self._save(step)
        if interrupted and not last:
            what, fix = f"stopped after step {done}, checkpoint saved", "the same command continues"
            raise DistillError(Exit.INTERRUPTED, self.run.folder, what, fix)

    def _micro_batches(self, step: Step) -> list[list[int]]:
        limit = self.settings.micro_batch_tokens or MICRO_BATCH_TOKENS
        return micro_batches(step.samples, self.lengths, limit)

    def _batch(self, examples: Sequence[Example]) -> Batch:
        device = self.accelerator.device
        return Batch.make(examples, device) if examples else Batch.idle(device)

    def _step(self, step: Step) -> tuple[dict[str, Any], bool]:
        """Take one optimizer step; returns its row of the history, and whether a process was asked to stop."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        torch.manual_seed(int(digest([self.config.seed, self.progress.step, rank])[:15], 16))
        count = sum(sum(self.examples[i].weights) for i in step.samples)
        mine = share(self._micro_batches(step), rank, world)
        loss = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for number, samples in enumerate(mine, 1):
            alone = nullcontext() if number == len(mine) else self.accelerator.no_sync(self.student)
            with alone:
                part = self.student(self._batch([self.examples[i] for i in samples]))
                self.accelerator.backward(part * (world / count))  # DDP averages over processes
            loss += part.detach()
        asked = torch.tensor(float(self.interrupt.asked), dtype=torch.float64, device=loss.device)
        sums: Any = self.accelerator.reduce(torch.stack([loss, asked]))
        norm = self._update(step, float(sums[0]) / count)
        row = {"loss": float(sums[0]) / count, "grad_norm": norm, "tokens": self._tokens(step)}
        return row, bool(sums[1])

    def _tokens(self, step: Step) -> int:
        return sum(self.lengths[i] for i in step.samples)

    def _update(self, step: Step, loss: float) -> float:
        """Clip and apply the gradient; returns its norm before. Raises DistillError (exit 7) where it is not finite."""
        settings, done = self.settings, self.progress.step
        if done == 0:
            adapters.check_gradients(self.model)
        norm = float(torch.nn.utils.clip_grad_norm_(self.named.values(), settings.max_grad_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            named = ", ".join(self.examples[i].response_id for i in step.samples)
            what = f"loss {loss}, gradient norm {norm} over samples {named}"
            fix = "look at these samples, or lower train.learning_rate; the last checkpoint is kept"
            raise DistillError(Exit.TRAINING, f"step {done + 1}", what, fix)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(done)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _rate(self, step: int) -> float:
        settings, total = self.settings, len(self.plan)
        warmup = warmup_count(settings.warmup_steps, total)
        return learning_rate(
            step, total, settings.learning_rate, settings.lr_scheduler_type, warmup
        )

    def _record(self, row: dict[str, Any], tracker: Tracker) -> None:
        """Count the step, and log it where that is due."""
        progress = self.progress
        rate, epoch = self._rate(progress.step), self.plan[progress.step].epoch
        progress.step += 1
        progress.tokens += row["tokens"]
        progress.seconds = time.monotonic() - self.started
        speed = progress.tokens / progress.seconds
        if _due(progress.step, self.settings.logging_steps):
            place = {"step": progress.step, "epoch": epoch, "learning_rate": rate}
            progress.history.append({**place, **row, "seconds": progress.seconds})
            self.accelerator.log({"learning_rate": rate, **row}, step=progress.step)
        if self.accelerator.is_main_process:
            tracker.advance(1, f"{speed:.0f} tokens/s, loss {row['loss']:.3f}")

    @torch.no_grad()
    def _validate(self) -> None:
        """Measure the validation loss, keep the best adapter, and decide whether to stop early."""
        progress, limit = self.progress, self.settings.micro_batch_tokens or MICRO_BATCH_TOKENS
        lengths = [len(e.input_ids) for e in self.checks]
        batches = micro_batches(range(len(lengths)), lengths, limit)
        mine = batches[self.accelerator.process_index :: self.accelerator.num_processes]
        total = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        student = self.accelerator.unwrap_model(self.student)
        student.eval()
        for samples in mine:
            total += student(self._batch([self.checks[i] for i in samples]))
        student.train()
        count = sum(sum(e.weights) for e in self.checks)
        reduced: Any = self.accelerator.reduce(total)
        loss = float(reduced) / count
        progress.validation.append({"step": progress.step, "loss": loss})
        self.accelerator.log({"validation_loss": loss}, step=progress.step)
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.worse = loss, progress.step, 0
            self.best = adapters.tensors(self.model)
        else:
            progress.worse += 1
        patience = self.settings.early_stopping_patience
        progress.stopped_early = patience is not None and progress.worse >= patience
        if self.accelerator.is_main_process:
            say(f"validation loss {loss:.4f} after step {progress.step}")

    def _save(self, step: Step) -> None:
        """Write a checkpoint, on the main process only."""
        if not self.accelerator.is_main_process:
            return
        groups = {
            "adapter": adapters.tensors(self.model),
            "optimizer": optimizer_tensors(self.optimizer, self.named),
            **({"best": self.best} if self.best else {}),
        }
        facts = {
            "run": self.facts(),
            "epoch": step.epoch,
            "cursor": step.cursor + len(step.samples),
        }
        checkpoint.save(
            self.folder,
            self.progress.step,
            groups,
            asdict(self.progress),
            facts,
            self.settings.save_total_limit,
        )

    def finish(self) -> None:
        """Write the adapter (the best, where that is asked) and training.json."""
        chosen = self.progress.step
        if self.settings.load_best_model_at_end and self.best:
            adapters.restore(self.model, self.best, "best checkpoint")
            chosen = self.progress.best_step
        student, folder = self.config.student, self.run.path("adapter")
        adapters.save_adapter(self.model, folder, models.hub_id(student.model))
        base = models.record_base(folder, student.model, student.revision)
        progress, facts = asdict(self.progress), self.facts()
        write_json(
            self.run.path("training.json"),
            {
                **{key: progress[key] for key in ("history", "validation", "best_step")},
                **{key: progress[key] for key in ("tokens", "seconds", "stopped_early")},
                "steps": progress["step"],
                "adapter_step": chosen,
                "examples": len(self.examples),
                "tokens_per_second": progress["tokens"] / max(progress["seconds"], 1e-9),
                "adapter_sha256": sha256_file(folder / "adapter_model.safetensors"),
                "dtype": facts["dtype"].removeprefix("torch."),
                "world_size": facts["world_size"],
                "base": {**base, "template_hash": facts["template"]},
                "notes": self.notes,
            },
        )


def _due(step: int, every: int | None) -> bool:
    return bool(every) and step % every == 0

"""Train the student's adapter: our own loop on Accelerate, exact to the bit when resumed, the same on any number of processes.

`distill run CONFIG`, `python scripts/train.py CONFIG` and `accelerate launch scripts/train.py CONFIG` all come here.
A step's loss is the sum over its supervised tokens, divided once by their number over all micro-batches and processes.
Where the run stands is one number, its step: the order of samples and the random numbers of a step follow from the
seed and that number. Only the main process writes.
"""

import gc
import importlib.util
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from distill.config import Config
from distill.errors import DistillError, Exit
from distill.models import registry
from distill.records import Example, digest
from distill.storage.files import sha256_file, write_json
from distill.storage.fingerprints import differences, flatten, unnamed
from distill.storage.processes import (
    Interrupt,
    asked_of_launcher,
    check_world,
    die_with_parent,
    interruptible,
    launcher_command,
)
from distill.storage.progress import Tracker, say, tracking
from distill.storage.run_folder import Run
from distill.training import adapters, checkpoint, sharding
from distill.training.batches import OptimizerStep, share
from distill.training.encode import show
from distill.training.merge import write_merged
from distill.training.optimizer import (
    learning_rate,
    make_adamw,
    optimizer_tensors,
    restore_optimizer,
    warmup_count,
)
from distill.training.prepare import Parts, prepare
from distill.training.student import answer_loss

__all__ = ["answer_loss", "main"]

TIMEOUT = timedelta(minutes=10)  # for a process that waits for another


@dataclass
class Progress:
    """What has happened so far; part of every checkpoint. Seconds are those of the steps alone."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    best_step: int | None = None
    best_loss: float | None = None
    worse: int = 0  # validations in a row that were not the best
    stopped_early: bool = False
    notes: list[str] = field(default_factory=list)


def main(config: Config, run: Run, allow_inexact: bool = False, start: Path | None = None) -> None:
    """Train, or continue training, and write adapter/, checkpoints/, training.json and merged/.

    The first step begins with the adapter in `start`, or with a fresh one. Raises DistillError (exit 7) for whatever
    keeps the training from being what was asked; `allow_inexact` lets a resume under other data, settings, libraries or
    processes pass, and records that it did.
    """
    train_file = run.path("dataset/train.jsonl")
    if not train_file.exists():
        fix = "make it: distill filter CONFIG, or all at once: distill run CONFIG"
        raise DistillError(Exit.TRAINING, train_file, "there is no dataset", fix)
    sharding.asked()  # for what is wrong with that, before accelerate ends over it
    accelerator = start_processes(config, run)
    with interruptible() as interrupt, flushing_denormals():
        loop = Loop(config, run, accelerator, interrupt, start)
        loop.resume(allow_inexact)
        try:
            loop.train()
        except torch.OutOfMemoryError as error:
            what = f"out of GPU memory: {str(error).splitlines()[0]}"
            fix = "lower train.micro_batch_tokens, or set train.gradient_checkpointing: true"
            raise DistillError(Exit.TRAINING, run.folder, what, fix) from None
        loop.finish()
        loop.close()
        merges = accelerator.is_main_process and not config.on_policy.rounds
        del loop  # the model that was trained makes room for the one that is merged
        gc.collect()
    if merges:  # else the rounds that follow are trained on
        write_merged(config.student, run.path("adapter"), run.path("merged"))


@contextmanager
def flushing_denormals() -> Iterator[None]:
    """Compute with denormal numbers as zeros, which a CPU does many times faster; what follows is left as it was."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


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
    expected = {
        "train.num_processes": config.train.num_processes,
        "launcher": asked_of_launcher(launcher_command()),
    }
    check_world(expected, accelerator.num_processes, "scripts/train.py", Exit.TRAINING)
    if accelerator.num_processes > 1:
        die_with_parent()
    if tracker != "none":
        settings = {key: str(value) for key, value in flatten(config.resolved()).items()}
        accelerator.init_trackers(config.name, settings)
    return accelerator


class Loop:
    """A run of training on this process."""

    def __init__(
        self,
        config: Config,
        run: Run,
        accelerator: Accelerator,
        interrupt: Interrupt,
        start: Path | None = None,
    ) -> None:
        self.config, self.settings, self.run = config, config.train, run
        self.accelerator, self.interrupt = accelerator, interrupt
        self.parts: Parts = prepare(config, run, start)
        self.facts = {**self.parts.facts, "world_size": accelerator.num_processes}
        if sharding.asked():
            self.facts["sharded"] = True
            self.parts.notes.append(f"sharded over {accelerator.num_processes} processes (FSDP2)")
        self.progress = Progress(notes=self.parts.notes)
        self.student: Any = sharding.wrap(accelerator, self.parts.student)
        self.named = adapters.parameters(self.parts.model)
        betas = (self.settings.adam_beta1, self.settings.adam_beta2)
        self.optimizer = make_adamw(self.named, betas, self.settings.weight_decay)
        self.best: dict[str, torch.Tensor] = {}
        self.folder = run.path("checkpoints")
        for note in self.parts.notes:
            self._say(note)

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            say(text)

    def resume(self, allow_inexact: bool) -> None:
        """Continue from the newest whole checkpoint, where there is one."""
        if self.accelerator.is_main_process:
            checkpoint.sweep(self.folder)
        self.accelerator.wait_for_everyone()
        saved = checkpoint.latest(self.folder)
        if saved is None:
            return
        changes = self._changes(saved, allow_inexact)
        adapter, progress = saved.tensors("adapter"), Progress(**saved.state())
        best, step = saved.tensors("best"), progress.best_step
        # Once a CPU's snapshot of the best step shared memory with the weights, and moved with them.
        moved = bool(best) and step != progress.step
        if moved and all(torch.equal(best[name], value) for name, value in adapter.items()):
            what = f"the best weights, of step {step}, are lost: those of step {progress.step} stand there"
            raise DistillError(Exit.TRAINING, saved.folder, what, "--redo train")
        adapters.restore(self.parts.model, adapter, saved.folder)
        restore_optimizer(self.optimizer, self.named, saved.tensors("optimizer"), saved.folder)
        self.progress, self.best = progress, best
        self.progress.notes += changes
        self._say(f"train: continuing after step {self.progress.step} of {len(self.parts.plan)}")

    def _changes(self, saved: checkpoint.Checkpoint, allow_inexact: bool) -> list[str]:
        """Return, as notes, what differs from the run that saved; raises DistillError (exit 7) unless that is allowed."""
        facts = saved.facts["run"]
        if added := unnamed(facts, self.facts):
            self._say(
                f"train: {saved.folder} knows a model's folder by its weights, which are the same"
            )
        changes = differences({**added, **facts}, self.facts)
        what = "not what the run was begun with: " + "; ".join(changes[:8])
        if changes and not allow_inexact:
            fix = "restore them, --redo train, or --allow-inexact, which the card will say"
            raise DistillError(Exit.TRAINING, saved.folder, what, fix)
        return [f"resumed inexactly at step {saved.facts['step']}: {what}"] if changes else []

    def train(self) -> None:
        """Do the steps that are left, after showing the next batch."""
        plan, progress = self.parts.plan, self.progress
        if self.accelerator.is_main_process and progress.step < len(plan):
            first = self._micro_batches(plan[progress.step])[0]
            show(self.parts.tokenizer, [self.parts.examples[i] for i in first])
        with tracking("train", len(plan), "steps") as tracker:
            tracker.done = progress.step
            while progress.step < len(plan) and not progress.stopped_early:
                self._advance(plan[progress.step], tracker)

    def _advance(self, step: OptimizerStep, tracker: Tracker) -> None:
        """Do one step and what is due after it."""
        row, interrupted = self._step(step)
        self._record(step, row, tracker)
        done = self.progress.step
        last = done == len(self.parts.plan)
        if self.parts.validation and (last or _due(done, self.settings.eval_steps)):
            self._validate()
            last = last or self.progress.stopped_early
        if last or interrupted or _due(done, self.settings.save_steps):
            self._save(step)
        if interrupted and not last:
            what, fix = f"stopped after step {done}, checkpoint saved", "the same command continues"
            raise DistillError(Exit.INTERRUPTED, self.run.folder, what, fix)

    def _micro_batches(self, step: OptimizerStep) -> list[list[int]]:
        return self.parts.batches(self.parts.examples, step.samples)

    def _step(self, step: OptimizerStep) -> tuple[dict[str, Any], bool]:
        """Take one optimizer step; returns its row of the history, and whether any process was asked to stop."""
        started, rank = time.monotonic(), self.accelerator.process_index
        torch.manual_seed(int(digest([self.config.train_seed, self.progress.step, rank])[:15], 16))
        samples = [self.parts.examples[i] for i in step.samples]
        count = sum(sum(example.weights) for example in samples)
        losses = self._backward(step, count)
        stopping = losses.new_full((1,), float(self.interrupt.asked))
        sums: Any = self.accelerator.reduce(torch.cat([losses, stopping]))
        row = {**self._named(sums[:-1] / count), "learning_rate": self._rate()}
        row["grad_norm"] = self._update(row, samples)
        row["tokens"] = sum(len(example.input_ids) for example in samples)
        return {**row, "seconds": time.monotonic() - started}, bool(sums[-1])

    def _named(self, losses: torch.Tensor) -> dict[str, Any]:
        """Return a loss and its parts by their names."""
        return dict(zip(("loss", *self._parts()), losses.tolist(), strict=True))

    def _backward(self, step: OptimizerStep, count: float) -> torch.Tensor:
        """Gather this process's part of the step's gradient; returns the sums of its loss and of the loss's parts.

        DDP averages, so the loss is scaled up.
        """
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        mine, student = share(self._micro_batches(step), rank, world), self.parts.student
        total = self._no_loss()
        for number, samples in enumerate(mine, 1):
            last = number == len(mine)
            with nullcontext() if last else sharding.no_sync(self.accelerator, self.student):
                losses = self.student(student.batch([self.parts.examples[i] for i in samples]))
                losses = losses.reshape(-1)
                self.accelerator.backward(losses[0] * (world / count))
            total += losses.detach()
        return total

    def _no_loss(self) -> torch.Tensor:
        """Return zeros for the loss and its parts."""
        zeros = torch.zeros(1 + len(self._parts()), dtype=torch.float64)
        return zeros.to(self.accelerator.device)

    def _parts(self) -> dict[str, float]:
        """Return the weights of the loss's parts, where it is mixed."""
        return self.settings.loss.parts if self.parts.student.labels else {}

    def _update(self, row: dict[str, Any], samples: Sequence[Example]) -> float:
        """Clip and apply the gradient; returns its norm before. Raises DistillError (exit 7) where it is not finite."""
        if self.progress.step == 0:
            adapters.check_gradients(self.parts.model)
        limit = self.settings.max_grad_norm
        norm = float(sharding.whole(torch.nn.utils.clip_grad_norm_(self.named.values(), limit)))
        if not (math.isfinite(row["loss"]) and math.isfinite(norm)):
            names = ", ".join(example.response_id for example in samples)
            what = f"loss {row['loss']}, gradient norm {norm} over samples {names}"
            fix = "look at these samples, or lower train.learning_rate; the last checkpoint is kept"
            raise DistillError(Exit.TRAINING, f"step {self.progress.step + 1}", what, fix)
        for group in self.optimizer.param_groups:
            group["lr"] = row["learning_rate"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _rate(self) -> float:
        settings, total = self.settings, len(self.parts.plan)
        warmup = warmup_count(settings.warmup_steps, total)
        kind = settings.lr_scheduler_type
        return learning_rate(self.progress.step, total, settings.learning_rate, kind, warmup)

    def _record(self, step: OptimizerStep, row: dict[str, Any], tracker: Tracker) -> None:
        """Count the step, and log it where that is due."""
        progress = self.progress
        progress.step += 1
        progress.tokens += row["tokens"]
        progress.seconds += row["seconds"]
        self.run.ledger.spend(input_tokens=row["tokens"])
        if _due(progress.step, self.settings.logging_steps):
            progress.history.append({"step": progress.step, "epoch": step.epoch, **row})
            self.accelerator.log(row, step=progress.step)
        if self.accelerator.is_main_process:
            speed = row["tokens"] / row["seconds"]
            tracker.advance(1, f"{speed:.0f} tokens/s, loss {row['loss']:.3f}")

    def _validate(self) -> None:
        """Measure the validation loss, keep the best adapter, and decide whether to stop early."""
        progress, losses = self.progress, self._validation_losses()
        loss = losses["loss"]
        progress.validation.append({"step": progress.step, **losses})
        self.accelerator.log({"validation_loss": loss}, step=progress.step)
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.worse = loss, progress.step, 0
            self.best = adapters.tensors(self.parts.model)
        else:
            progress.worse += 1
        patience = self.settings.early_stopping_patience
        progress.stopped_early = patience is not None and progress.worse >= patience
        self._say(f"validation loss {loss:.4f} after step {progress.step}")

    @torch.no_grad()
    def _validation_losses(self) -> dict[str, float]:
        """Return the mean loss of a supervised validation token, in nats, and its parts."""
        accelerator, examples = self.accelerator, self.parts.validation
        student = self.parts.student
        total = self._no_loss()
        student.eval()
        batches = self.parts.batches(examples)
        for samples in share(batches, accelerator.process_index, accelerator.num_processes):
            total += student(student.batch([examples[i] for i in samples])).reshape(-1)
        student.train()
        reduced: Any = accelerator.reduce(total)
        return self._named(reduced / sum(sum(e.weights) for e in examples))

    def _save(self, step: OptimizerStep) -> None:
        """Write a checkpoint, on the main process only; where the student is in shards, all gather it."""
        groups = {
            "adapter": adapters.tensors(self.parts.model),
            "optimizer": optimizer_tensors(self.optimizer, self.named),
        }
        if self.best:
            groups["best"] = self.best
        if not self.accelerator.is_main_process:
            return
        cursor = step.cursor + len(step.samples)
        facts = {"run": self.facts, "epoch": step.epoch, "cursor": cursor}
        state, keep = asdict(self.progress), self.settings.save_total_limit
        checkpoint.save(self.folder, self.progress.step, groups, state, facts, keep)

    def finish(self) -> None:
        """Write the adapter (the best, where that is asked) and training.json, on the main process only."""
        weights = adapters.tensors(self.parts.model)
        step, student = self.progress.step, self.config.student
        if self.settings.load_best_model_at_end and self.best:
            weights, step = self.best, self.progress.best_step
        if not self.accelerator.is_main_process:
            return
        folder = self.run.path("adapter")
        adapters.save_adapter(self.parts.model, weights, folder, registry.hub_id(student.model))
        base = registry.record_base(folder, student.model, student.revision)
        fields = (
            "history",
            "validation",
            "best_step",
            "tokens",
            "seconds",
            "stopped_early",
            "notes",
        )
        progress = asdict(self.progress)
        summary = {
            **{name: progress[name] for name in fields},
            "steps": self.progress.step,
            "adapter_step": step,
            "adapter_sha256": sha256_file(folder / adapters.WEIGHTS),
            "examples": len(self.parts.examples),
            "tokens_per_second": self.progress.tokens / max(self.progress.seconds, 1e-9),
            "dtype": self.facts["dtype"],
            "world_size": self.facts["world_size"],
            "base": {**base, "template_hash": self.facts["template"]},
        }
        if parts := self._parts():
            summary |= {"loss": parts, "labels": self.settings.loss.teacher}
        write_json(self.run.path("training.json"), summary)

    def close(self) -> None:
        """Wait for the others, then let go of the wrapped model before the group of processes.

        The other way round the group ends inside this thread, and can wait for ever for one of its own.
        """
        self.accelerator.wait_for_everyone()
        del self.student
        self.accelerator.free_memory()
        gc.collect()
        self.accelerator.end_training()


def _due(step: int, every: int | None) -> bool:
    return bool(every) and step % every == 0

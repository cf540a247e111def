"""Train the student's adapter: our own loop on Accelerate, on a CPU exact to the bit when resumed.

A step's loss is the sum over its supervised tokens, divided once by their number over all
micro-batches and processes, so any number of processes takes the same steps. That number is the
same for each part: tokens of soft labels alone count in it, with a cross-entropy of 0. Where the
run stands is one number, its step: the order and the random numbers follow from it and the seed.
"""

import math
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from distill.errors import DistillError, Exit
from distill.models import registry
from distill.models.devices import release_memory
from distill.records import Item, Score, digest
from distill.storage.environment import Interrupt, interruptible
from distill.storage.files import sha256_file, write_json, write_records
from distill.storage.progress import say, tracking
from distill.storage.run_folder import Run, differences, flatten
from distill.training import adapters, checkpoint, processes
from distill.training.batches import Example, OptimizerStep, learning_rate, share
from distill.training.checked import check_student, checked_values
from distill.training.encode import show
from distill.training.inner_run import InnerRun
from distill.training.prepare import Preparation

SKIPS = 10  # steps in a row whose gradients float16 cannot hold: then the training ends
SUMMARY = ("history", "validation", "best_step", "tokens", "seconds", "stopped_early", "notes")


@dataclass
class Progress:
    """What has happened so far; part of every checkpoint. Seconds are those of the steps alone."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    best_step: int | None = None
    best_loss: float | None = None  # by the checker, the share that does not pass
    checks: list[dict[str, Any]] = field(default_factory=list)  # of the adapter that is kept
    worse: int = 0  # validations in a row that were not the best
    stopped_early: bool = False
    notes: list[str] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)  # steps that float16 could not hold


def main(run: Run, allow_inexact: bool = False, start: Path | None = None) -> None:
    """Train, or continue, and write adapter/, checkpoints/, training.json and merged/.

    The first step begins with the adapter in `start`, or with a fresh one. Raises DistillError
    (exit 7) for whatever keeps the training from being what the config says; `allow_inexact` lets
    a resume under other data, settings, libraries or processes pass, and records that it did.
    """
    config = run.config
    train_file = run.path("dataset/train.jsonl")
    if not train_file.exists():
        fix = "make it: distill filter CONFIG, or all at once: distill run CONFIG"
        raise DistillError(Exit.TRAINING, train_file, "there is no dataset", fix)
    tracker = config.train.report_to
    accelerator = processes.start(tracker, config.train.num_processes, run.path("tracking"))
    if tracker != "none":
        settings = {key: str(value) for key, value in flatten(config.resolved()).items()}
        accelerator.init_trackers(config.name, settings)
    with interruptible() as interrupt:
        torch.set_flush_denormal(True)  # a CPU computes zeros many times faster than denormals
        try:
            loop = Loop(run, accelerator, interrupt, start)
            loop.resume(allow_inexact)
            loop.train()
            loop.finish()
            # The wrapped model goes before the group of processes, which else would end inside this
            # thread, and can wait for ever for one of its own; and it makes room for the merged one
            accelerator.wait_for_everyone()
            del loop
            accelerator.free_memory()
            release_memory()
            accelerator.end_training()
        finally:
            torch.set_flush_denormal(False)
    trained_on = config.refines or isinstance(run, InnerRun)
    if accelerator.is_main_process and not trained_on:
        adapter, merged = run.path("adapter"), run.path("merged")
        adapters.write_merged(config.student, adapter, merged, config.reasoning)


class Loop:
    """A run of training on this process; only the main process writes."""

    def __init__(
        self, run: Run, accelerator: Accelerator, interrupt: Interrupt, start: Path | None = None
    ) -> None:
        self.run, self.accelerator, self.interrupt = run, accelerator, interrupt
        self.settings, self.world = run.config.train, accelerator.num_processes
        self.parts = Preparation(run, self.world, start)
        self.progress = Progress(notes=self.parts.notes)
        self.student: Any = processes.wrap(accelerator, self.parts.student)
        self.named = adapters.parameters(self.parts.model)
        # Decoupled weight decay (arXiv 1711.05101); the learning rate is set step by step.
        betas = (self.settings.adam_beta1, self.settings.adam_beta2)
        weights, decay = list(self.named.values()), self.settings.weight_decay
        self.optimizer = torch.optim.AdamW(weights, 0.0, betas, weight_decay=decay, fused=True)
        self.best: dict[str, torch.Tensor] = {}
        self.halved = False
        self.mix = self.settings.loss.parts if self.parts.student.labels else {}
        self.losses = ("loss", *self.mix)  # what the student's forward returns
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if precision != "no":
            ours = "train.bf16 and student.dtype decide, and here it is"
            what = f"accelerate's mixed_precision: {precision} is not used"
            say(f"{what}: {ours} {self.parts.facts['dtype']}")
        for note in self.parts.notes:
            say(note)

    def resume(self, allow_inexact: bool) -> None:
        """Continue from the newest intact checkpoint, where there is one.

        Raises DistillError (exit 7) where it was saved under other facts, unless that is allowed.
        """
        parts, saved = self.parts, checkpoint.latest(self.run.path("checkpoints"))
        if saved is None:
            return
        changes = differences(saved.facts["run"], parts.facts)
        what = "not what the run was begun with: " + "; ".join(changes[:8])
        if changes and not allow_inexact:
            fix = "restore them, --redo train, or --allow-inexact, which the card will say"
            raise DistillError(Exit.TRAINING, saved.folder, what, fix)
        progress = Progress(**saved.state())
        adapters.restore(parts.model, saved.tensors("adapter"), saved.folder)
        if len(progress.skipped) < progress.step:  # else the optimizer has not begun
            adapters.restore_optimizer(self.optimizer, self.named, saved.tensors("optimizer"))
        self.progress, self.best = progress, saved.tensors("best")
        if changes:
            progress.notes.append(f"resumed inexactly at step {progress.step}: {what}")
        if others := differences(saved.facts["memory"], parts.memory):
            what = f"from step {progress.step} on {'; '.join(others)}"
            progress.notes.append(f"{what}: equal but for rounding, and for dropout")
        say(f"train: continuing after step {progress.step} of {len(parts.plan)}")

    def train(self) -> None:
        """Do the steps that are left, and after each what is due, after showing the next batch."""
        parts, progress, settings = self.parts, self.progress, self.settings
        total = len(parts.plan)
        if progress.step < total:
            first = parts.batches(parts.examples, parts.plan[progress.step].samples)[0]
            show(parts.tokenizer, [parts.examples[i] for i in first])
        with tracking("train", total, "steps") as tracker:
            tracker.done = progress.step
            while progress.step < total and not progress.stopped_early:
                step = parts.plan[progress.step]
                row, interrupted = self._step(step)
                progress.step += 1
                progress.tokens += row["tokens"]
                progress.seconds += row["seconds"]
                self.run.ledger.spend(input_tokens=row["tokens"])
                skipped = progress.step in progress.skipped[-1:]  # its loss may be no number
                if progress.step % settings.logging_steps == 0 and not skipped:
                    progress.history.append({"step": progress.step, "epoch": step.epoch, **row})
                    self.accelerator.log(row, step=progress.step)
                speed = row["tokens"] / row["seconds"]
                tracker.advance(1, f"{speed:.0f} tokens/s, loss {row['loss']:.3f}")
                last = progress.step == total
                due = last or self._due(settings.eval_steps)
                if parts.validation_prompts:
                    due = last or parts.plan[progress.step].epoch > step.epoch
                if due and (parts.validation or parts.validation_prompts):
                    self._validate(step.epoch + 1)
                    last = last or progress.stopped_early
                if last or interrupted or self._due(settings.save_steps):
                    self._save(step)
                if interrupted and not last:
                    what = f"stopped after step {progress.step}, checkpoint saved"
                    fix = "the same command continues"
                    raise DistillError(Exit.INTERRUPTED, self.run.folder, what, fix)

    def _due(self, every: int | None) -> bool:
        return bool(every) and self.progress.step % every == 0

    def _step(self, step: OptimizerStep) -> tuple[dict[str, Any], bool]:
        """Take one optimizer step, or skip one that overflows in float16, as a GradScaler does.

        Returns its row of the history, and whether any process received a signal to stop. Raises
        DistillError (exit 7) where the loss or the gradient's norm is not finite in another type,
        or in too many steps in a row.
        """
        parts, settings, number = self.parts, self.settings, self.progress.step
        started = time.monotonic()
        samples = [parts.examples[i] for i in step.samples]
        count = sum(sum(example.weights) for example in samples)
        try:
            sums = self._accumulate(step.samples, count)
        except torch.OutOfMemoryError:
            if self.world > 1 or self.halved:  # the other processes wait for this one's gradients
                raise
            sums = None
        if sums is None:  # the error is gone, and with it what its frames held
            self._halve(step)
            sums = self._accumulate(step.samples, count)
        stopping = sums.new_full((1,), float(self.interrupt.asked))
        reduced: Any = self.accelerator.reduce(torch.cat([sums, stopping]))
        row = dict(zip(self.losses, (reduced[:-1] / count).tolist(), strict=True))
        rate = (settings.learning_rate, settings.lr_scheduler_type, settings.warmup_steps)
        row["learning_rate"] = learning_rate(number, len(parts.plan), *rate)
        if number == 0:
            adapters.check_gradients(parts.model)
        norm = torch.nn.utils.clip_grad_norm_(self.named.values(), settings.max_grad_norm)
        row["grad_norm"] = float(processes.full_tensor(norm))
        if math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]):
            for group in self.optimizer.param_groups:
                group["lr"] = row["learning_rate"]
            self.optimizer.step()
        else:
            self._skip(number + 1, row, samples)
        self.optimizer.zero_grad()
        row["tokens"] = sum(len(example.input_ids) for example in samples)
        return {**row, "seconds": time.monotonic() - started}, bool(reduced[-1])

    def _skip(self, number: int, row: dict[str, Any], samples: Sequence[Example]) -> None:
        """Count a step that overflowed in float16; raises DistillError where that does not help."""
        names = ", ".join(example.response_id for example in samples)
        what = f"loss {row['loss']}, gradient norm {row['grad_norm']} over samples {names}"
        fix = "look at these samples, or lower train.learning_rate; the last checkpoint is kept"
        if self.parts.model.dtype == torch.float16:
            skipped = self.progress.skipped
            skipped.append(number)
            bound = skipped[-SKIPS:] == list(range(number - SKIPS + 1, number + 1))
            if not bound and len(skipped) < len(self.parts.plan):
                say(f"step {number} overflowed in float16 and was skipped")
                return
            what = f"float16 overflowed in {len(skipped)} steps, in this one with {what}"
            fix = "train.bf16=false, which computes in float32, with --redo train"
        raise DistillError(Exit.TRAINING, f"step {number}", what, fix)

    def _halve(self, step: OptimizerStep) -> None:
        """Halve the micro-batches, once in a run of this process, and make room for them."""
        parts, self.halved = self.parts, True
        dealt = parts.batches(parts.examples, step.samples)
        largest = max(sum(len(parts.examples[i].input_ids) for i in batch) for batch in dealt)
        parts.limit = max(1, largest // 2)
        what = f"out of GPU memory in step {self.progress.step + 1}: micro-batches from there on"
        note = f"{what} of {parts.limit} tokens (train.micro_batch_tokens)"
        self.progress.notes.append(note)
        say(note)
        self.optimizer.zero_grad()
        release_memory()

    def _accumulate(self, samples: Sequence[int], count: float) -> torch.Tensor:
        """Add up the gradients of a step's samples, each token's share one in `count`.

        Returns the sums of this process's losses.
        """
        parts, rank = self.parts, self.accelerator.process_index
        seed = digest([self.run.config.train_seed, self.progress.step, rank])
        torch.manual_seed(int(seed[:15], 16))
        sums = self._zeros()
        mine = share(parts.batches(parts.examples, samples), rank, self.world)
        # In float16 the gradients of a mean would be zeros: those of the sum are made, then scaled.
        scale, half = self.world / count, parts.model.dtype == torch.float16
        with adapters.cast_once(parts.model):
            for micro, indices in enumerate(mine, 1):
                last = micro == len(mine)
                with nullcontext() if last else processes.no_sync(self.accelerator, self.student):
                    batch = parts.student.batch([parts.examples[i] for i in indices])
                    losses = self.student(batch).reshape(-1)
                    # DDP averages over processes
                    (losses[0] if half else losses[0] * scale).backward()
                sums += losses.detach()
        for parameter in self.named.values() if half else ():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        return sums

    def _zeros(self) -> torch.Tensor:
        return torch.zeros(len(self.losses), dtype=torch.float64).to(self.accelerator.device)

    def _validate(self, epoch: int) -> None:
        """Measure the loss, or by the checker what is right; keep the best adapter, maybe stop."""
        progress, parts, row = self.progress, self.parts, dict[str, Any]()
        if parts.validation:
            row = self._validation_loss()
            say(f"validation loss {row['loss']:.4f} after step {progress.step}")
        loss, scores = row.get("loss", 1.0), list[Score]()
        if prompts := parts.validation_prompts:
            mine = prompts[self.accelerator.process_index :: self.world]
            scores = check_student(self.run, mine, parts.student, parts.tokenizer)
            by_id = {score.item_id: score for score in gather_object(scores)}
            scores = [by_id[Item.make(prompt).id] for prompt in prompts]
            values = checked_values(scores)
            row |= {"checker": sum(values) / len(values), "n": len(values)}
            loss = 1 - row["checker"]
            say(f"validation: {sum(values):g} of {len(values)} right after epoch {epoch}")
        progress.validation.append({"step": progress.step, **row})
        shown = {f"validation_{name}": row[name] for name in ("loss", "checker") if name in row}
        self.accelerator.log(shown, step=progress.step)
        if better := progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.worse = loss, progress.step, 0
            self.best = adapters.tensors(parts.model)
        else:
            progress.worse += 1
        if better or not self.settings.load_best_model_at_end:
            progress.checks = [score.model_dump() for score in scores]
        patience = self.settings.early_stopping_patience
        progress.stopped_early = patience is not None and progress.worse >= patience

    @torch.no_grad()
    def _validation_loss(self) -> dict[str, float]:
        """Return the mean losses of a validation token."""
        examples, student = self.parts.validation, self.parts.student
        rank, sums = self.accelerator.process_index, self._zeros()
        student.eval()
        for indices in share(self.parts.batches(examples), rank, self.world):
            sums += student(student.batch([examples[i] for i in indices])).reshape(-1)
        student.train()
        reduced: Any = self.accelerator.reduce(sums)
        means = (reduced / sum(sum(e.weights) for e in examples)).tolist()
        return dict(zip(self.losses, means, strict=True))

    def _save(self, step: OptimizerStep) -> None:
        """Write a checkpoint on the main process; all gather a student in shards."""
        groups = {"adapter": adapters.tensors(self.parts.model)}
        groups["optimizer"] = adapters.optimizer_tensors(self.optimizer, self.named)
        if self.best:
            groups["best"] = self.best
        if self.accelerator.is_main_process:
            cursor, folder = step.cursor + len(step.samples), self.run.path("checkpoints")
            facts = {"run": self.parts.facts, "memory": self.parts.memory}
            facts |= {"epoch": step.epoch, "cursor": cursor}
            state, keep = asdict(self.progress), self.settings.save_total_limit
            checkpoint.save(folder, self.progress.step, groups, state, facts, keep)

    def finish(self) -> None:
        """Write the adapter (by the settings the best or the last) and training.json."""
        parts, progress, student = self.parts, self.progress, self.run.config.student
        weights, step = adapters.tensors(parts.model), progress.step
        if self.settings.load_best_model_at_end and self.best:
            weights, step = self.best, progress.best_step
        if not self.accelerator.is_main_process:
            return
        folder = self.run.path("adapter")
        adapters.save_adapter(parts.model, weights, folder, registry.hub_id(student.model))
        base = registry.record_base(folder, student.model, student.revision)
        summary = {
            **{name: getattr(progress, name) for name in SUMMARY},
            "steps": progress.step,
            "adapter_step": step,
            "adapter_sha256": sha256_file(folder / adapters.WEIGHTS),
            "examples": len(parts.examples),
            "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
            "dtype": parts.facts["dtype"],
            "world_size": self.world,
            "base": {**base, "template_hash": parts.facts["template"]},
        }
        if parts.model.dtype == torch.float16:
            summary["skipped"] = progress.skipped
        if self.mix:
            summary |= {"loss": self.mix, "labels": self.settings.loss.teacher}
        if progress.checks:
            scores = map(Score.model_validate, progress.checks)
            write_records(self.run.path("training_checks.jsonl"), scores)
        write_json(self.run.path("training.json"), summary)

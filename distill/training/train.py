"""Train the student's adapter: our own loop on Accelerate, exact to the bit when resumed.

`distill run CONFIG`, `python scripts/train.py CONFIG` and `accelerate launch scripts/train.py
CONFIG` all come here. A step's loss is the sum over its supervised tokens, divided once by their
number over all micro-batches and processes, so any number of processes takes the same steps. Where
the run stands is one number, its step: the order of samples and the random numbers of a step follow
from the seed and that number. Only the main process writes.
"""

import gc
import importlib.util
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from distill.config.tree import Config
from distill.errors import DistillError, Exit
from distill.models import registry
from distill.records import digest
from distill.storage.environment import (
    Interrupt,
    check_world,
    die_with_parent,
    interruptible,
)
from distill.storage.files import sha256_file, write_json
from distill.storage.progress import say, tracking
from distill.storage.run_folder import Run, differences, flatten, unnamed
from distill.training import adapters, checkpoint, sharding
from distill.training.batches import OptimizerStep, learning_rate, share
from distill.training.encode import show
from distill.training.prepare import Parts, prepare

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
    sharding.enabled()  # raises for what it does not support, before accelerate ends over it
    accelerator = start_processes(config, run)
    with interruptible() as interrupt:
        torch.set_flush_denormal(True)  # a CPU computes zeros many times faster than denormals
        try:
            loop = Loop(config, run, accelerator, interrupt, start)
            loop.resume(allow_inexact)
            loop.train()
            loop.finish()
            loop.close()
        except torch.OutOfMemoryError as error:
            what = f"out of GPU memory: {str(error).splitlines()[0]}"
            fix = "lower train.micro_batch_tokens, or set train.gradient_checkpointing: true"
            raise DistillError(Exit.TRAINING, run.folder, what, fix) from None
        finally:
            torch.set_flush_denormal(False)
        del loop  # the model that was trained makes room for the one that is merged
        gc.collect()
    if accelerator.is_main_process and not config.on_policy.rounds:  # else rounds train on
        adapters.write_merged(config.student, run.path("adapter"), run.path("merged"))


def start_processes(config: Config, run: Run) -> Accelerator:
    """Return the Accelerator of this process, after checking the number of processes."""
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
        if sharding.enabled():
            self.facts["sharded"] = True
            self.parts.notes.append(f"sharded over {accelerator.num_processes} processes (FSDP2)")
        self.progress = Progress(notes=self.parts.notes)
        self.student: Any = sharding.wrap(accelerator, self.parts.student)
        self.named = adapters.parameters(self.parts.model)
        # Decoupled weight decay (arXiv 1711.05101); the learning rate is set step by step.
        betas, decay = (
            (self.settings.adam_beta1, self.settings.adam_beta2),
            self.settings.weight_decay,
        )
        weights = list(self.named.values())
        self.optimizer = torch.optim.AdamW(weights, 0.0, betas, weight_decay=decay, fused=True)
        self.best: dict[str, torch.Tensor] = {}
        self.folder = run.path("checkpoints")
        self.mix = self.settings.loss.parts if self.parts.student.labels else {}
        self.losses = ("loss", *self.mix)  # what the student's forward returns
        for note in self.parts.notes:
            self._say(note)

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            say(text)

    def resume(self, allow_inexact: bool) -> None:
        """Continue from the newest intact checkpoint, where there is one.

        Raises DistillError (exit 7) where it was saved under other facts, unless that is allowed.
        """
        if self.accelerator.is_main_process:
            checkpoint.sweep(self.folder)
        self.accelerator.wait_for_everyone()
        saved = checkpoint.latest(self.folder)
        if saved is None:
            return
        facts = saved.facts["run"]
        if added := unnamed(facts, self.facts):
            what = "knows a model's folder by its weights, which are the same"
            self._say(f"train: {saved.folder} {what}")
        changes = differences({**added, **facts}, self.facts)
        what = "not what the run was begun with: " + "; ".join(changes[:8])
        if changes and not allow_inexact:
            fix = "restore them, --redo train, or --allow-inexact, which the card will say"
            raise DistillError(Exit.TRAINING, saved.folder, what, fix)
        adapter, progress = saved.tensors("adapter"), Progress(**saved.state())
        best, step = saved.tensors("best"), progress.best_step
        # Once a CPU's snapshot of the best step shared the weights' memory, and moved with them.
        moved = bool(best) and step != progress.step
        if moved and all(torch.equal(best[name], value) for name, value in adapter.items()):
            what = f"the best weights, of step {step}, are lost to those of step {progress.step}"
            raise DistillError(Exit.TRAINING, saved.folder, what, "--redo train")
        adapters.restore(self.parts.model, adapter, saved.folder)
        optimizer = saved.tensors("optimizer")
        adapters.restore_optimizer(self.optimizer, self.named, optimizer, saved.folder)
        self.progress, self.best = progress, best
        if changes:
            progress.notes.append(f"resumed inexactly at step {saved.facts['step']}: {what}")
        self._say(f"train: continuing after step {progress.step} of {len(self.parts.plan)}")

    def train(self) -> None:
        """Do the steps that are left, and after each what is due, after showing the next batch."""
        parts, progress, settings = self.parts, self.progress, self.settings
        if self.accelerator.is_main_process and progress.step < len(parts.plan):
            first = parts.batches(parts.examples, parts.plan[progress.step].samples)[0]
            show(parts.tokenizer, [parts.examples[i] for i in first])
        with tracking("train", len(parts.plan), "steps") as tracker:
            tracker.done = progress.step
            while progress.step < len(parts.plan) and not progress.stopped_early:
                step = parts.plan[progress.step]
                row, interrupted = self._step(step)
                progress.step += 1
                progress.tokens += row["tokens"]
                progress.seconds += row["seconds"]
                self.run.ledger.spend(input_tokens=row["tokens"])
                if progress.step % settings.logging_steps == 0:
                    progress.history.append({"step": progress.step, "epoch": step.epoch, **row})
                    self.accelerator.log(row, step=progress.step)
                if self.accelerator.is_main_process:
                    speed = row["tokens"] / row["seconds"]
                    tracker.advance(1, f"{speed:.0f} tokens/s, loss {row['loss']:.3f}")
                last = progress.step == len(parts.plan)
                if parts.validation and (last or _due(progress.step, settings.eval_steps)):
                    self._validate()
                    last = last or progress.stopped_early
                if last or interrupted or _due(progress.step, settings.save_steps):
                    self._save(step)
                if interrupted and not last:
                    what = f"stopped after step {progress.step}, checkpoint saved"
                    fix = "the same command continues"
                    raise DistillError(Exit.INTERRUPTED, self.run.folder, what, fix)

    def _step(self, step: OptimizerStep) -> tuple[dict[str, Any], bool]:
        """Take one optimizer step.

        Returns its row of the history, and whether any process received a signal to stop. Raises
        DistillError (exit 7) where the loss or the gradient's norm is not finite.
        """
        accelerator, parts, settings = self.accelerator, self.parts, self.settings
        rank, world, number = (
            accelerator.process_index,
            accelerator.num_processes,
            self.progress.step,
        )
        started = time.monotonic()
        torch.manual_seed(int(digest([self.config.train_seed, number, rank])[:15], 16))
        samples = [parts.examples[i] for i in step.samples]
        count = sum(sum(example.weights) for example in samples)
        sums = self._zeros()
        mine = share(parts.batches(parts.examples, step.samples), rank, world)
        for micro, indices in enumerate(mine, 1):
            last = micro == len(mine)
            with nullcontext() if last else sharding.no_sync(accelerator, self.student):
                batch = parts.student.batch([parts.examples[i] for i in indices])
                losses = self.student(batch).reshape(-1)
                accelerator.backward(losses[0] * (world / count))  # DDP averages over processes
            sums += losses.detach()
        stopping = sums.new_full((1,), float(self.interrupt.asked))
        reduced: Any = accelerator.reduce(torch.cat([sums, stopping]))
        row = dict(zip(self.losses, (reduced[:-1] / count).tolist(), strict=True))
        rate = (settings.learning_rate, settings.lr_scheduler_type, settings.warmup_steps)
        row["learning_rate"] = learning_rate(number, len(parts.plan), *rate)
        if number == 0:
            adapters.check_gradients(parts.model)
        norm = torch.nn.utils.clip_grad_norm_(self.named.values(), settings.max_grad_norm)
        row["grad_norm"] = float(sharding.full_tensor(norm))
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            names = ", ".join(example.response_id for example in samples)
            what = f"loss {row['loss']}, gradient norm {row['grad_norm']} over samples {names}"
            fix = "look at these samples, or lower train.learning_rate; the last checkpoint is kept"
            raise DistillError(Exit.TRAINING, f"step {number + 1}", what, fix)
        for group in self.optimizer.param_groups:
            group["lr"] = row["learning_rate"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        row["tokens"] = sum(len(example.input_ids) for example in samples)
        return {**row, "seconds": time.monotonic() - started}, bool(reduced[-1])

    def _zeros(self) -> torch.Tensor:
        return torch.zeros(len(self.losses), dtype=torch.float64).to(self.accelerator.device)

    @torch.no_grad()
    def _validate(self) -> None:
        """Measure the mean loss of a validation token, keep the best adapter, maybe stop early."""
        progress, examples, student = self.progress, self.parts.validation, self.parts.student
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        sums = self._zeros()
        student.eval()
        for indices in share(self.parts.batches(examples), rank, world):
            sums += student(student.batch([examples[i] for i in indices])).reshape(-1)
        student.train()
        reduced: Any = self.accelerator.reduce(sums)
        means = (reduced / sum(sum(e.weights) for e in examples)).tolist()
        progress.validation.append(
            {"step": progress.step, **dict(zip(self.losses, means, strict=True))}
        )
        self.accelerator.log({"validation_loss": means[0]}, step=progress.step)
        if progress.best_loss is None or means[0] < progress.best_loss:
            progress.best_loss, progress.best_step, progress.worse = means[0], progress.step, 0
            self.best = adapters.tensors(self.parts.model)
        else:
            progress.worse += 1
        patience = self.settings.early_stopping_patience
        progress.stopped_early = patience is not None and progress.worse >= patience
        self._say(f"validation loss {means[0]:.4f} after step {progress.step}")

    def _save(self, step: OptimizerStep) -> None:
        """Write a checkpoint on the main process; all gather a student in shards."""
        groups = {
            "adapter": adapters.tensors(self.parts.model),
            "optimizer": adapters.optimizer_tensors(self.optimizer, self.named),
        }
        if self.best:
            groups["best"] = self.best
        if self.accelerator.is_main_process:
            cursor = step.cursor + len(step.samples)
            facts = {"run": self.facts, "epoch": step.epoch, "cursor": cursor}
            state, keep = asdict(self.progress), self.settings.save_total_limit
            checkpoint.save(self.folder, self.progress.step, groups, state, facts, keep)

    def finish(self) -> None:
        """Write the adapter (by the settings the best or the last) and training.json."""
        weights = adapters.tensors(self.parts.model)
        step, student = self.progress.step, self.config.student
        if self.settings.load_best_model_at_end and self.best:
            weights, step = self.best, self.progress.best_step
        if not self.accelerator.is_main_process:
            return
        folder = self.run.path("adapter")
        adapters.save_adapter(self.parts.model, weights, folder, registry.hub_id(student.model))
        base = registry.record_base(folder, student.model, student.revision)
        progress = asdict(self.progress)
        names = (
            "history",
            "validation",
            "best_step",
            "tokens",
            "seconds",
            "stopped_early",
            "notes",
        )
        summary = {
            **{name: progress[name] for name in names},
            "steps": self.progress.step,
            "adapter_step": step,
            "adapter_sha256": sha256_file(folder / adapters.WEIGHTS),
            "examples": len(self.parts.examples),
            "tokens_per_second": self.progress.tokens / max(self.progress.seconds, 1e-9),
            "dtype": self.facts["dtype"],
            "world_size": self.facts["world_size"],
            "base": {**base, "template_hash": self.facts["template"]},
        }
        if self.mix:
            summary |= {"loss": self.mix, "labels": self.settings.loss.teacher}
        write_json(self.run.path("training.json"), summary)

    def close(self) -> None:
        """Wait for the others, then let go of the wrapped model before the group of processes.

        The other way round the group ends inside this thread, and can wait for ever for one of its
        own.
        """
        self.accelerator.wait_for_everyone()
        del self.student
        self.accelerator.free_memory()
        gc.collect()
        self.accelerator.end_training()


def _due(step: int, every: int | None) -> bool:
    return bool(every) and step % every == 0

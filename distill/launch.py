"""Generation or training as a program of its own, or one a process by `accelerate launch`.

The first process holds the run's lock and does the stage. The others join its work: in training
they take the same decisions, and in generation they answer what the first hands out.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from distill.cli import perform_alone
from distill.errors import DistillError, Exit, exit_code
from distill.models.devices import device
from distill.pipeline import STAGES
from distill.responders.local.workers import Workers
from distill.storage.progress import console
from distill.storage.run_folder import Run, Stage, open_run


def main(name: str, words: Sequence[str]) -> int:
    """Do a stage for `CONFIG [key=value ...] [--redo] [--allow-inexact] [--debug]`."""
    flags = {word for word in words if word.startswith("--")}
    config, *overrides = [word for word in words if word not in flags]
    stage = next(stage for stage in STAGES if stage.name == name)
    start = {"train": train, "generate": generate}[name]
    return exit_code(
        lambda: start(open_run(Path(config), overrides), stage, flags), "--debug" in flags
    )


def train(run: Run, stage: Stage, flags: set[str]) -> None:
    """Train on the first process, or join it on another."""
    from distill.training.train import main as work

    stage = replace(stage, main=partial(work, allow_inexact="--allow-inexact" in flags))
    if int(os.environ.get("RANK", "0")) == 0:
        perform_alone(run, stage, "--redo" in flags)
        return
    console.quiet = True
    if "--redo" in flags or run.checked_state(stage) != "done":
        run.work(stage)


def generate(run: Run, stage: Stage, flags: set[str]) -> None:
    """Ask the teacher on the first process, or answer for it on another."""
    from distill.generation.generate import join
    from distill.generation.generate import main as work

    device()  # raises where there are more processes than GPUs, before accelerate ends over it
    workers = Workers.meet()
    if len(workers.pids) == 1:
        perform_alone(run, stage, "--redo" in flags)
        return
    if not run.config.teacher.runs_here:
        what, fix = f"one process asks a {run.config.teacher.kind} teacher", "distill generate"
        raise DistillError(Exit.CONFIG, "teacher.kind", what, fix)
    workers.listen()
    if workers.rank == 0:

        def lead(run: Run) -> None:
            with workers.leading():
                work(run, workers)

        with workers.leading():
            perform_alone(run, replace(stage, main=lead), "--redo" in flags)
            workers.dismiss()
        return
    console.quiet = True
    with run.ledger.joining(stage.name):
        join(run, workers)

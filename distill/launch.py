"""The train stage started as a program of its own, by plain python or once a process by `accelerate launch`.

The first process holds the run's lock and does the stage, with all it records; the others look at the same state,
take the same decision, and join the work without writing anything.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from distill.cli import open_run, perform
from distill.errors import exit_code
from distill.progress import console
from distill.run import Run
from distill.stages import STAGES

TRAIN = next(stage for stage in STAGES if stage.name == "train")


def main(words: Sequence[str]) -> int:
    """Do the stage for `CONFIG [key=value ...] [--redo] [--allow-inexact] [--debug]`; returns the exit code."""
    flags = {word for word in words if word.startswith("--")}
    config, *overrides = [word for word in words if word not in flags]
    return exit_code(
        lambda: train(open_run(Path(config), overrides), flags), debug="--debug" in flags
    )


def train(run: Run, flags: set[str]) -> None:
    """Do the stage on the first process, or join it on another."""
    from distill.training.train import main as work

    stage = replace(TRAIN, main=partial(work, allow_inexact="--allow-inexact" in flags))
    if int(os.environ.get("RANK", "0")) == 0:
        perform(run, (stage,), (stage,) if "--redo" in flags else ())
        return
    console.quiet = True
    if "--redo" in flags or run.checked_state(stage) != "done":
        stage.main(run.config, run)

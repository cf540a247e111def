"""Training as a program of its own, or one a process by `accelerate launch`.

The first process holds the run's lock and does the stage; the others join its work, and take the
same decisions.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from distill.api import perform_alone
from distill.errors import exit_code
from distill.pipeline import STAGES
from distill.storage.progress import console
from distill.storage.run_folder import open_run


def main(words: Sequence[str]) -> int:
    """Train for `CONFIG [key=value ...] [--redo] [--allow-inexact] [--debug]`."""
    from distill.training.train import main as work

    flags = {word for word in words if word.startswith("--")}
    config, *overrides = [word for word in words if word not in flags]
    stage = next(stage for stage in STAGES if stage.name == "train")
    stage = replace(stage, main=partial(work, allow_inexact="--allow-inexact" in flags))

    def train() -> None:
        run = open_run(Path(config), overrides)
        if int(os.environ.get("RANK", "0")) == 0:
            perform_alone(run, stage, "--redo" in flags)
            return
        console.quiet = True
        if "--redo" in flags or run.checked_state(stage) != "done":
            run.work(stage)

    return exit_code(train, "--debug" in flags)

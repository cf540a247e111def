"""Train the student of a run: `python scripts/train.py CONFIG [key=value ...]`, or the same after
`accelerate launch`, with --redo, --allow-inexact or --debug as `distill train` has them.

The same stage as `distill train CONFIG`. With several processes the first holds the run's lock and
does the stage; the others join its work, and take the same decisions.
"""

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from distill.api import perform_alone
from distill.errors import DistillError, Exit, exit_code
from distill.pipeline import STAGES
from distill.storage.progress import console
from distill.storage.run_folder import open_run
from distill.training.train import main as work

flags = {word for word in sys.argv[1:] if word.startswith("--")}
words = [word for word in sys.argv[1:] if word not in flags]
stage = next(stage for stage in STAGES if stage.name == "train")
stage = replace(stage, main=partial(work, allow_inexact="--allow-inexact" in flags))


def train() -> None:
    """Do the stage, or join in."""
    if not words:
        fix = "python scripts/train.py CONFIG [key=value ...]"
        raise DistillError(Exit.CONFIG, "scripts/train.py", "no config is named", fix)
    run = open_run(Path(words[0]), words[1:])
    if int(os.environ.get("RANK", "0")) == 0:
        perform_alone(run, stage, "--redo" in flags)
        return
    console.quiet = True
    if "--redo" in flags or run.checked_state(stage) != "done":
        run.work(stage)


if __name__ == "__main__":
    sys.exit(exit_code(train, "--debug" in flags))

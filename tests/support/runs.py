"""Runs with the smallest config, for tests of one stage."""

from pathlib import Path
from typing import Any

from distill.config.tree import Config
from distill.storage.run_folder import Run


def make_run(folder: Path, **sections: Any) -> Run:
    """Return a run below a folder; its config has these sections, and the least of the others."""
    names = {"name": "r", "runs": folder / "runs"}
    least = {"corpus": {"path": "x"}, "teacher": {"model": "t"}, "student": {"model": "s"}}
    return Run(Config.model_validate(names | least | sections))

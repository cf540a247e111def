"""Make tests/fixtures/old: a store and finished runs as commit 07339c8 left them, which every later
commit must read.

    git worktree add --detach /tmp/old 07339c8
    python scripts/make_old_runs.py /tmp/old tests/fixtures/old

Each experiment of `scripts/tiny_runs.py` is run by that commit, and the first one is published. The
models are part of the fixture, since other processors compute other bits. Not needed unless the
fixture shall hold more: made again, it holds other times and seconds, and on another processor
other answers of the local models.
"""

import argparse
import shutil
import subprocess
from pathlib import Path

from scripts.tiny_runs import EXPERIMENTS, command, serve, write_files

PUBLISHED = ("chat",)


def main() -> None:
    """Make the fixture in an empty folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tree", type=Path, help="a checkout of the old commit")
    parser.add_argument(
        "folder", type=Path, help="where the fixture goes; what is there is removed"
    )
    arguments = parser.parse_args()
    tree, folder = arguments.tree.resolve(), arguments.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_files(folder)
    with serve():
        for name in EXPERIMENTS:
            _distill(tree, folder, "run", f"{name}.yaml")
        for name in PUBLISHED:
            _distill(tree, folder, "publish", f"runs/{name}")
    for lock in folder.rglob(".lock"):  # holds the id of a process
        lock.unlink()


def _distill(tree: Path, folder: Path, *words: str) -> None:
    run, environment = command(tree, folder, *words)
    subprocess.run(run, cwd=folder, env=environment, check=True)


if __name__ == "__main__":
    main()

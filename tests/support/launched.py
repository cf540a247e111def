"""Processes that `accelerate launch` starts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from distill.storage.run_folder import Run

ROOT = Path(__file__).resolve().parent.parent.parent


def write_config(run: Run, folder: Path) -> Path:
    """Write a run's config as a file for a command."""
    path = folder / f"{run.config.name}.yaml"
    path.write_text(yaml.safe_dump(run.config.resolved()), encoding="utf-8")
    return path


def launch(*words: str) -> subprocess.Popen[str]:
    """Start `accelerate launch WORDS` in a session of its own, on a free port."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    words = (*command, *words)
    return subprocess.Popen(words, cwd=ROOT, env=environment, start_new_session=True, **pipes)


def finished(process: subprocess.Popen[str], seconds: float = 150) -> str:
    """Wait for the end of a launcher, and return what was shown."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def wait_for_workers(launcher: int) -> list[int]:
    """Return the process ids of two workers once both have connected: then they hold the model."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        workers = [int(word) for word in children.read_text().split()]
        if len(workers) == 2 and all(sockets(pid) >= 3 for pid in workers):
            return workers
        time.sleep(0.2)
    raise AssertionError("the workers did not start")


def sockets(pid: int) -> int:
    """Return how many sockets a process holds."""
    try:
        links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return 0
    return sum(link.startswith("socket") for link in links)


def alive(pid: int) -> bool:
    """Tell whether a process is there, and no zombie."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False

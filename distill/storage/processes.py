"""Several processes as one: are there as many as were asked, do they end together, and who was interrupted.

`accelerate launch --cpu --num_processes 2` starts one process and says nothing; so what was asked is read from the
config and from the launcher's own command line, and compared with what is there.
"""

import ctypes
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from distill.errors import DistillError, Exit

ASKED = re.compile(r"--(?:num_processes|num-processes|nproc_per_node|nproc-per-node)[\0=](\d+)")


def launcher_command() -> str:
    """Return the parent's command line, its words separated by NUL; empty where the system does not tell."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""


def asked_of_launcher(command: str) -> int | None:
    """Return how many processes a launcher's command line asks for; None where it is no launcher's, or says nothing."""
    launcher = re.search(r"accelerate|torchrun|torch\.distributed", command)
    stated = ASKED.search(command) if launcher else None
    return int(stated[1]) if stated else None


def check_world(asked: Mapping[str, int | None], world: int, script: str, code: Exit) -> None:
    """Stop with `code` where `world` processes run, but a source of `asked` says another number."""
    for source, number in asked.items():
        if number and number != world:
            what = f"{number} processes were asked for, {world} came"
            fix = f"accelerate launch --multi_gpu --num_processes {number} {script} CONFIG"
            raise DistillError(code, source, what, fix)


def die_with_parent() -> None:
    """End this process when its launcher dies, so that no orphan trains on (Linux's PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Interrupt:
    """Whether somebody asked to stop: the step that runs is finished and saved first; a second signal stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Catch Ctrl-C and SIGTERM inside the block; outside the main thread signals are left alone."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, interrupt) for kind in kinds]
    try:
        yield interrupt
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)

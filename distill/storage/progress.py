"""Progress of long work: a bar on a terminal and in a notebook, plain lines elsewhere."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distill.formatting import visible

console = Console(stderr=True, highlight=False)
PLAIN_SECONDS = 10.0  # at most one plain line in this time


def say(text: str) -> None:
    """Print information for the user, on stderr, whatever a server or a file brought in."""
    console.print(visible(text), markup=False, soft_wrap=True)


class Tracker:
    """Counts finished work of one kind; `unit` names what is counted in the rate."""

    def __init__(self, title: str, total: int, unit: str, bar: Progress | None = None) -> None:
        self.title, self.total, self.unit, self.bar = title, total, unit, bar
        self.done, self.extra = 0, ""
        self.started = self.printed = time.monotonic()
        self.task = bar.add_task(title, total=total, rate="") if bar else None

    def advance(self, count: int = 1, extra: str = "") -> None:
        """Count `count` more as finished; `extra` is shown behind the rate."""
        self.done, self.extra, now = self.done + count, extra or self.extra, time.monotonic()
        elapsed = max(now - self.started, 1e-9)
        rate = f"{self.done / elapsed:.1f} {self.unit}/s {self.extra}".rstrip()
        if self.bar and self.task is not None:
            self.bar.update(self.task, completed=self.done, rate=rate)
        elif now - self.printed >= PLAIN_SECONDS or self.done == self.total:
            self.printed = now
            seconds = round(elapsed / max(self.done, 1) * (self.total - self.done))
            clock = timedelta(seconds=seconds)
            say(f"{self.title}: {self.done}/{self.total}, {rate}, {clock} left")


@contextmanager
def tracking(title: str, total: int, unit: str = "items") -> Iterator[Tracker]:
    """Show the progress of the work done inside the `with` block."""
    if console.is_jupyter:
        bars = find_spec("ipywidgets") is not None  # which rich draws a bar with there
    else:  # a command in a cell has a terminal on which a bar's steps stay as lines of their own
        bars = sys.stderr.isatty() and "JPY_PARENT_PID" not in os.environ
    if not bars:
        yield Tracker(title, total, unit)
        return
    texts = [TextColumn(text) for text in ("{task.description}", "{task.fields[rate]}")]
    columns = (texts[0], BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn(), texts[1])
    with Progress(*columns, console=console) as bar:
        yield Tracker(title, total, unit, bar)
        bar.refresh()  # in a notebook rich leaves the bar as it was last drawn

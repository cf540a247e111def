"""Progress of long work: a bar with rate and time left on a terminal, plain lines in a pipe."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

console = Console(stderr=True, highlight=False)
T = TypeVar("T")
PLAIN_SECONDS = 10.0  # at most one plain line in this time


# what a server or a file brought in may not steer the terminal
CONTROLS = {c: f"\\x{c:02x}" for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"}


def say(text: str) -> None:
    """Print information for the user, on stderr; control characters are shown, not sent to the terminal."""
    console.print(text.translate(CONTROLS), markup=False, soft_wrap=True)


class Tracker:
    """Counts finished work of one kind; `unit` names what is counted in the rate."""

    def __init__(self, title: str, total: int, unit: str = "items") -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done, self.extra = 0, ""
        self.started = self.printed = time.monotonic()

    def advance(self, count: int = 1, extra: str = "") -> None:
        """Count `count` more as finished; `extra` is shown behind the rate."""
        self.done += count
        self.extra = extra or self.extra
        self.show()

    def speed(self) -> str:
        """Return the rate so far as text."""
        elapsed = max(time.monotonic() - self.started, 1e-9)
        return f"{self.done / elapsed:.1f} {self.unit}/s"

    def rate(self) -> str:
        """Return the rate so far as text, and what is shown behind it."""
        return f"{self.speed()} {self.extra}".rstrip()

    def show(self) -> None:
        """Print a plain line when the last is old enough or the work is finished."""
        now = time.monotonic()
        if now - self.printed >= PLAIN_SECONDS or self.done == self.total:
            self.printed = now
            left = (now - self.started) / max(self.done, 1) * (self.total - self.done)
            clock = timedelta(seconds=round(left))
            say(f"{self.title}: {self.done}/{self.total}, {self.rate()}, {clock} left")


class _Display(Progress):
    """A bar with a line of text below it, so that a narrow terminal shows all of both."""

    below = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        if self.below:
            yield Text(f"  {self.below}")


class _Bar(Tracker):
    """The tracker of a terminal: moves a rich progress bar instead of printing lines."""

    def __init__(self, title: str, total: int, unit: str, bar: _Display) -> None:
        super().__init__(title, total, unit)
        self.bar, self.task = bar, bar.add_task(title, total=total, rate="")

    def show(self) -> None:
        self.bar.below = self.extra
        self.bar.update(self.task, completed=self.done, rate=self.speed())


@contextmanager
def tracking(title: str, total: int, unit: str = "items") -> Iterator[Tracker]:
    """Show the progress of the work done inside the `with` block."""
    if not sys.stderr.isatty():
        yield Tracker(title, total, unit)
        return
    columns = (
        *(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24)),
        *(MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[rate]}")),
    )
    with _Display(*columns, console=console) as bar:
        yield _Bar(title, total, unit, bar)


def track(items: Iterable[T], title: str, total: int, unit: str = "items") -> Iterator[T]:
    """Yield `items` while their progress is shown."""
    with tracking(title, total, unit) as tracker:
        for item in items:
            yield item
            tracker.advance()

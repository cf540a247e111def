"""Every test, and every process it starts, computes on one thread: tiny models gain nothing from
more, and waiting threads cost much on a busy machine."""

import gc
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Started in the background of a script, this process ignores Ctrl-C, and so would every process
# that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that have slow tests, so that no process ends with one, alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="session")
def frozen_imports() -> None:
    """Let later collections pass over what the imports have made: trainings collect garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where there is one, for tests that call fsync thousands of times."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as name:
        yield Path(name)

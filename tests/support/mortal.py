"""Processes that end as by kill -9 at a chosen call that changes the disk: at every moment.

Counted are the calls of `os` that write, sync, name or cut files, and what Python's own files
write: these are made to go through `os` as well. (Making a folder that is there changes nothing,
and is not counted.) To end before call n is to end after call n - 1; what that leaves out is a
write that is half done, so those are a count of their own.
"""

import io
import itertools
import os
import signal
from collections.abc import Callable
from typing import Any

from distill.errors import DistillError

WRITES = ("write", "pwrite")
CALLS = (*WRITES, "fsync", "replace", "rename", "truncate", "ftruncate", "mkdir", "unlink")
open_file = io.open


class CountedFile(io.FileIO):
    """A file whose writes are calls of `os.write`, so that they can be counted."""

    def write(self, data: Any) -> int:
        return os.write(self.fileno(), data)

    def truncate(self, size: int | None = None) -> int:
        length = self.tell() if size is None else size
        os.ftruncate(self.fileno(), length)
        return length


def open_counted(path: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
    """Open a file as `open` does, with writes that are counted."""
    if not set(mode) & set("wax+"):
        return open_file(path, mode, *rest, **named)
    raw = CountedFile(path, mode.replace("b", "").replace("t", ""))
    file = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
    if "b" in mode:
        return file
    return io.TextIOWrapper(file, named.get("encoding"), newline=named.get("newline"))


def die_at(count: int, half: bool = False) -> None:
    """Make this process kill itself before its `count`-th call (from 0), or within that write."""
    calls = itertools.count()
    for name in WRITES if half else CALLS:
        real = getattr(os, name)

        def call(*args: Any, real: Any = real, name: str = name, **named: Any) -> Any:
            if (name == "mkdir" and os.path.isdir(args[0])) or next(calls) != count:
                return real(*args, **named)
            if half:
                real(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(os, name, call)
    io.open = open_counted


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process; return its exit status, negative where a signal ended it."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            work()
            code = 0
        except DistillError as error:
            code = int(error.code)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at_every_call(work: Callable[[], object], check: Callable[[], None]) -> int:
    """Run `work` in children that die one call later each time, and `check`; return the deaths."""
    deaths = 0
    for half in (False, True):
        for count in itertools.count():
            status = in_child(lambda c=count, h=half: (die_at(c, h), work()))
            check()
            if status == 0:
                break
            assert status == -signal.SIGKILL
            deaths += 1
    return deaths

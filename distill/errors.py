"""The one exception of the project, and the exit codes of its commands: every error ends as one
line, `error: where: what (what to do)`, and one of these codes.
"""

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of the `distill` command; scripts may rely on them."""

    CONFIG = 2
    INPUT = 3
    TEACHER = 4
    STATE = 5
    BUDGET = 6
    TRAINING = 7
    EVALUATION = 8
    PUBLISH = 9
    TERMS = 10
    INTERRUPTED = 130


SIGPIPE = 141  # what a shell says of a program whose reader has gone
FIXES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free space; the same command continues"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "change its rights, or name another place"),
    errno.EROFS: "name another place",
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST), "check the path"),
    errno.EMFILE: "raise the limit, ulimit -n 4096, or lower teacher.concurrency",
}


class DistillError(Exception):
    """An error: where it is, what is wrong, and what to do about it."""

    def __init__(self, code: Exit, where: object, what: str, fix: str) -> None:
        self.code, self.where, self.what, self.fix = code, str(where), what, fix
        super().__init__(f"{self.where}: {what} ({fix})")


def one_line(error: BaseException) -> str:
    """Return the beginning of an error's message as one line, or its kind where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def system_error(error: OSError, where: object) -> DistillError:
    """Return what the system refuses as an error of ours: a full disk, a right, a limit."""
    fix = FIXES.get(error.errno or 0, "check the disk, or see --debug")
    what = error.strerror or str(error) or type(error).__name__
    return DistillError(Exit.STATE, error.filename or where, what, fix)


def exit_code(work: Callable[[], object], debug: bool = False) -> int:
    """Do `work`, return its exit code; an error is one line on stderr (`debug` raises it)."""
    try:
        code = _outcome(work, debug)
        sys.stdout.flush()
    except OSError as error:  # of what was printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else it would fail again at the exit
        if isinstance(error, BrokenPipeError):  # whoever read has gone: head, less
            return SIGPIPE
        return _complain(f"error: {system_error(error, 'standard output')}", Exit.STATE)
    return code


def _outcome(work: Callable[[], object], debug: bool) -> int:
    try:
        work()
    except KeyboardInterrupt:
        return _complain("interrupted (the same command continues)", Exit.INTERRUPTED)
    except BrokenPipeError:
        raise
    except Exception as error:  # the edge of the program: nothing above could handle it
        if debug:
            raise
        if isinstance(error, OSError):
            if error.filename is None:
                sys.stdout.flush()  # raises again where that is what cannot be written
            error = system_error(error, "the system")
        if not isinstance(error, DistillError):
            what = f"{type(error).__name__}: {one_line(error)}"
            return _complain(f"error: {what} (--debug shows where)", 1)
        for line in (error, *getattr(error, "__notes__", ())):  # all that was found at once
            _complain(f"error: {line}", error.code)
        return int(error.code)
    return 0


def _complain(line: str, code: int) -> int:
    """Print one line, whatever it holds: control characters are shown as escapes."""
    with suppress(OSError):  # of a full disk; the code says it too
        print("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line), file=sys.stderr)
    return int(code)

"""Whether a generated program passes its tests, found out where it can do no harm.

What holds, on Linux with user namespaces: the program has no network (nor sockets of any kind), no files but its own
empty folder and read-only system libraries, no environment, no /proc; it ends within its seconds, and all that it
started with it; memory, processes, files and CPU time are limited for all of it together; its output goes nowhere.
A pass cannot be faked: the verdict is written by a judge in a process of its own, which runs the tests, hands the
program nothing but the arguments of each call, takes nothing but plain data back, and signs with a nonce that the
program's memory never held (see `distill.tasks.sandbox.inside`). A pass means right answers, and at least one was asked for.

What does not hold: this is one kernel, so a fault of the kernel is a way out; a program may use a core until its
seconds are over; it may tell how long things take, and which libraries the system has. With `--unsafe-code` there are
limits, the judge and where possible the filter of system calls, but the program reads what its user reads, and writes.
Tests see plain data only: a class of the program's own, or a function as an argument, cannot be tested this way.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from distill.errors import DistillError, Exit
from distill.tasks.sandbox import messages

Permission = Literal["no", "sandbox", "unsafe"]
ROOT = Path(__file__).parents[3]
START = "import sys; sys.path.append(sys.argv.pop()); from distill.tasks.sandbox.inside import main; main()"
LATE = 1.5  # seconds after its time in which a sandbox ends by itself


class Limits(NamedTuple):
    """What a program may take: seconds on the clock, and megabytes for all of its processes together."""

    seconds: float = 10.0
    megabytes: int = 512


DEFAULT = Limits()


class Trial(NamedTuple):
    """What a program must pass: code that runs before, code that asserts, and the function that is the program's."""

    code: str
    setup: str = ""
    entry: str = ""


class Outcome(NamedTuple):
    """Whether the program passed, None where we could not find out, and why."""

    passed: bool | None
    reason: str


class _Allowed:
    """What the person at the machine has allowed; no config can."""

    permission: Permission = "no"


def allow(permission: Permission) -> None:
    """Allow programs to run, or no longer; raises DistillError (exit 2) where a sandbox is wanted and there is none."""
    if permission == "sandbox" and (why := unavailable()):
        fix = "see distill.tasks.sandbox.namespaces for what it needs; --unsafe-code runs code with limits only, on a machine that may be lost"
        raise DistillError(Exit.CONFIG, "--allow-code", f"no sandbox on this system: {why}", fix)
    _Allowed.permission = permission


def allowed() -> Permission:
    """Return what is allowed now."""
    return _Allowed.permission


@cache
def unavailable() -> str:
    """Return why there is no sandbox here, or nothing: by really running a program in one."""
    if sys.platform != "linux":
        return "it needs Linux"
    outcome = execute("def f(x):\n    return x + 1", Trial("assert f(1) == 2"), DEFAULT, True)
    return "" if outcome.passed else outcome.reason


def run_tests(code: str, tests: Trial, limits: Limits = DEFAULT) -> Outcome:
    """Run a program's tests; raises DistillError (exit 2) where nobody has allowed that."""
    permission = allowed()
    if permission == "no":
        raise DistillError(
            Exit.CONFIG, "generated code", "is not run unless asked", "add --allow-code"
        )
    return execute(code, tests, limits, permission == "sandbox")


def execute(code: str, tests: Trial, limits: Limits, walled: bool) -> Outcome:
    """Start a sandbox for one program and return what its judge says; all in it has ended by then."""
    nonce = secrets.token_hex(16)
    job = {"nonce": nonce, "setup": tests.setup, "tests": tests.code, "entry": tests.entry}
    sent = messages.framed(code) + messages.framed(job)
    settings = json.dumps([limits.seconds, limits.megabytes, walled])
    command = [sys.executable, "-I", "-S", "-X", "utf8", "-c", START, settings, str(ROOT)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
        cwd="/",
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(sent, limits.seconds + LATE * walled)
    except subprocess.TimeoutExpired:
        said = b""
    finally:
        _end(process)
    return read_verdict(said, nonce, limits)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a sandbox, also where we were interrupted."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def read_verdict(said: bytes, nonce: str, limits: Limits) -> Outcome:
    """Read what the judge wrote; without the nonce it is no verdict."""
    try:
        verdict = json.loads(said[8:])
        genuine = secrets.compare_digest(verdict["nonce"], nonce)
    except (ValueError, LookupError, TypeError):
        genuine, verdict = False, {}
    if not genuine:
        return Outcome(False, f"no verdict within {limits.seconds:g} seconds")
    passed = {"pass": True, "fail": False}.get(verdict["verdict"])
    return Outcome(passed, verdict["reason"])

"""Run the tests of a generated program in a sandbox, where the program can do no harm.

The program has no network, no files but its own empty folder and read-only system libraries, and
limits on time and memory (`namespaces`). A pass cannot be faked: a harness runs the tests and signs
with a nonce that the program's memory never held (`inside`). An error of the kernel is a way out.
With `--unsafe-code` there are limits and the harness, but the program reads what its user reads.
"""

import json
import os
import re
import secrets
import signal
import sys
from functools import cache
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired
from typing import Literal, NamedTuple

from distill.errors import DistillError, Exit
from distill.tasks.sandbox import messages

Permission = Literal["no", "sandbox", "unsafe"]
ROOT = Path(__file__).parents[3]
START = (
    "import sys; sys.path.append(sys.argv.pop()); "
    "from distill.tasks.sandbox.inside import main; main()"
)
GRACE = 1.5  # seconds after its time in which a sandbox ends by itself
BLOCK = re.compile(r"```[^\n`]*\n(.*?)\n?```", re.DOTALL)

_permission: Permission = "no"  # given by the person at the machine; no config can


class Limits(NamedTuple):
    """What a program may take: seconds on the clock, megabytes for all its processes together."""

    seconds: float = 10.0
    megabytes: int = 512


DEFAULT = Limits()


class ProgramTests(NamedTuple):
    """Code that asserts, code that runs before, and the program's functions, as asked for."""

    code: str
    setup: str = ""
    entries: tuple[str, ...] = ()


class ProgramResult(NamedTuple):
    """Whether the program passed, None where we could not find out, and why."""

    passed: bool | None
    reason: str


def permit(sandboxed: bool, unsafe: bool = False) -> None:
    """Allow what the flags of a command say; DistillError (exit 2) where there is no sandbox."""
    global _permission
    if sandboxed and not unsafe and (why := unavailable()):
        fix = "it needs Linux with user namespaces; --unsafe-code sets limits only"
        raise DistillError(Exit.CONFIG, "--allow-code", f"no sandbox on this system: {why}", fix)
    _permission = "unsafe" if unsafe else "sandbox" if sandboxed else "no"


def allowed() -> Permission:
    """Return the present permission."""
    return _permission


@cache
def unavailable() -> str:
    """Run a program in a sandbox; return why there is none here, or an empty text."""
    if sys.platform != "linux":
        return "it needs Linux"
    tests = ProgramTests("assert f(1) == 2")
    outcome = execute("def f(x):\n    return x + 1", tests, DEFAULT, isolated=True)
    return "" if outcome.passed else outcome.reason


def read_tests(reference: str) -> ProgramTests:
    """Read tests: lines of Python, or JSON with `test`, `entry_point` and perhaps `prompt`.

    Lines (MBPP's `test_list`) assert what the program's function returns: the one name that they
    call and nothing defines. The test of HumanEval's columns defines `check`; `entry_point` may be
    a list, whose first is checked.
    """
    try:
        row = json.loads(reference)
        names = row["entry_point"] if isinstance(row["entry_point"], list) else [row["entry_point"]]
        test, entries = f"{row['test']}\n\ncheck({names[0]})\n", tuple(map(str, names))
    except (ValueError, LookupError, TypeError, RecursionError):
        return ProgramTests(reference)
    return ProgramTests(test, str(row.get("prompt", "")), entries)


def program(text: str, tests: ProgramTests) -> str:
    """Return an answer's program: its first fenced block, or all of it, after the tests' setup.

    An answer that does not define the function goes on where the setup ends, as a completion.
    """
    block = BLOCK.search(text)
    code = block[1] if block else text
    name = re.escape(tests.entries[0]) if tests.entries else ""
    defined = rf"^(?:(?:async )?def|class) {name}\b|^{name}\s*[:=]"
    if name and not re.search(defined, code, re.MULTILINE):
        return f"{tests.setup.rstrip()}\n{code}"
    return f"{tests.setup}\n\n{code.strip()}" if code.strip() else ""


def run_tests(code: str, tests: ProgramTests, limits: Limits = DEFAULT) -> ProgramResult:
    """Run a program's tests; raises DistillError (exit 2) where nobody has allowed that."""
    if _permission == "no":
        what, fix = "is not run unless asked", "add --allow-code"
        raise DistillError(Exit.CONFIG, "generated code", what, fix)
    return execute(code, tests, limits, isolated=_permission == "sandbox")


def execute(code: str, tests: ProgramTests, limits: Limits, isolated: bool) -> ProgramResult:
    """Start a sandbox for one program; return its harness's result when all in it has ended."""
    nonce = secrets.token_hex(16)
    job = {"nonce": nonce, "setup": tests.setup, "tests": tests.code, "entries": tests.entries}
    request = messages.frame(code) + messages.frame(job)
    settings = json.dumps([limits.seconds, limits.megabytes, isolated])
    command = [sys.executable, "-I", "-S", "-X", "utf8", "-c", START, settings, str(ROOT)]
    process = Popen(
        command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env={}, cwd="/", start_new_session=True
    )
    try:
        reply, _ = process.communicate(request, limits.seconds + GRACE * isolated)
    except TimeoutExpired:
        reply = b""
    finally:  # also where we are interrupted
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    return read_verdict(reply, nonce, limits)


def read_verdict(reply: bytes, nonce: str, limits: Limits) -> ProgramResult:
    """Read the verdict that the harness wrote; without the nonce it is refused."""
    try:
        verdict = json.loads(reply[8:])
        genuine = secrets.compare_digest(verdict["nonce"], nonce)
    except (ValueError, LookupError, TypeError):
        genuine, verdict = False, {}
    if not genuine:
        return ProgramResult(False, f"no verdict within {limits.seconds:g} seconds")
    passed = {"pass": True, "fail": False}.get(verdict["verdict"])
    return ProgramResult(passed, verdict["reason"])

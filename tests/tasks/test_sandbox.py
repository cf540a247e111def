"""The sandbox: right programs pass, wrong ones fail, none runs unasked, no hostile one gets out.

`tests/hostile` holds the hostile programs. Those in `reach` and `fake` are also run without a
sandbox, where each does what it is there to do: so these tests would fail if the sandbox were taken
away. Those in `rights` and `flood` are not harmless enough for that, or need rights that a test
does not have.
"""

import errno
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.errors import DistillError
from distill.tasks.sandbox import namespaces
from distill.tasks.sandbox.programs import (
    DEFAULT,
    Limits,
    ProgramResult,
    ProgramTests,
    allowed,
    execute,
    permit,
    read_tests,
    read_verdict,
    run_tests,
    unavailable,
)

ROOT = Path(__file__).parent.parent.parent
HOSTILE = ROOT / "tests" / "hostile"
SECRET = "a-secret-of-the-host"
MARK = f"left-{os.getpid()}"[:15]
WHY = unavailable()
isolated = pytest.mark.skipif(bool(WHY), reason=f"no sandbox here: {WHY}")


def programs(*folders: str) -> list[Any]:
    paths = [path for folder in folders for path in sorted((HOSTILE / folder).glob("*.py"))]
    return [pytest.param(path, id=f"{path.parent.name}-{path.stem}") for path in paths]


def judged(
    code: str, tests: str, setup: str = "", entry: str = "", seconds: float = 10
) -> ProgramResult:
    return execute(
        code, ProgramTests(tests, setup, (entry,) * bool(entry)), Limits(seconds), isolated=True
    )


def bare(code: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Run code as anybody would without a sandbox."""
    script = "\n".join((code, *more))
    command = [sys.executable, "-I", "-c", script]
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=folder)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Offer what a hostile program could reach: servers, files, a secret, a process."""
    monkeypatch.setenv("DISTILL_TEST", SECRET)
    key = tmp_path / ".ssh" / "id_ed25519"
    key.parent.mkdir()
    key.write_text("OUT: a private key")
    with ExitStack() as stack:
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(("127.0.0.1", 0))
        threading.Thread(target=echo, args=(udp,), daemon=True).start()
        unix, path = stack.enter_context(socket.socket(socket.AF_UNIX)), tmp_path / "unix"
        unix.bind(str(path))
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind(f"\0distill-{os.getpid()}")
        for server in (unix, abstract):
            server.listen()
        neighbour = stack.enter_context(subprocess.Popen(["sleep", "600"]))
        stack.callback(neighbour.kill)
        yield {
            "tcp": tcp.getsockname()[1],
            "udp": udp.getsockname()[1],
            "unix": str(path),
            "abstract": f"distill-{os.getpid()}",
            "home": str(tmp_path),
            "outside": str(tmp_path / "outside"),
            "repository": str(ROOT),
            "secret": SECRET,
            "neighbour": neighbour.pid,
            "mark": MARK,
        }
        udp.sendto(b"end", udp.getsockname())


def echo(udp: socket.socket) -> None:
    """Answer datagrams until one says that it is the end."""
    while (got := udp.recvfrom(10))[0] != b"end":
        udp.sendto(b"OUT", got[1])


@pytest.mark.parametrize("path", programs("reach"))
def test_without_a_sandbox_it_gets_out(path, host):
    done = bare(path.read_text(), f"print(solve({host!r}))")
    assert "OUT" in done.stdout, done.stderr


@pytest.mark.parametrize("path", programs("fake"))
def test_without_a_judge_it_passes(path):
    check = "def check(candidate, wanted=42):\n    assert candidate({}) == 42"
    assert bare(path.read_text(), check, "check(solve)").returncode == 0


@isolated
@pytest.mark.parametrize("path", programs("reach", "rights"))
def test_it_does_not_get_out(path, host):
    outcome = judged(path.read_text(), f"assert solve({host!r}) == 42", seconds=3)
    assert outcome.passed is False and "OUT" not in outcome.reason, outcome.reason
    assert not Path(host["outside"]).exists()
    assert Path(f"/proc/{host['neighbour']}").exists()


@isolated
@pytest.mark.parametrize("path", programs("fake"))
def test_it_does_not_pass(path):
    check = "def check(candidate, wanted=42):\n    assert candidate({}) == 42\ncheck(solve)"
    outcome = judged(path.read_text(), check, entry="solve", seconds=3)
    assert outcome.passed is False, outcome.reason


@isolated
@pytest.mark.parametrize("path", programs("flood"))
def test_it_ends_in_time_and_leaves_nothing(path, host):
    started = time.monotonic()
    outcome = judged(path.read_text(), f"assert solve({host!r}) == 42", seconds=1)
    assert time.monotonic() - started < 3
    assert outcome.passed is False and "OUT" not in outcome.reason, outcome.reason
    assert MARK not in running()


@isolated
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_it_ends_with_the_command_that_started_it(number):
    code = (HOSTILE / "flood" / "daemon.py").read_text().replace("sleep(0.1)", "sleep(600)")
    tests = f"solve({{'mark': {MARK!r}}})"
    script = (
        "from distill.tasks.sandbox.programs import *\n"
        f"execute({code!r}, ProgramTests({tests!r}), Limits(60), True)"
    )
    command = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL, cwd=ROOT)
    assert soon(lambda: MARK in running())
    command.send_signal(number)
    command.wait(5)
    assert soon(lambda: MARK not in running())


def soon(condition: Callable[[], bool]) -> bool:
    """Tell whether a condition comes true within some seconds."""
    until = time.monotonic() + 10
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


def running() -> list[str]:
    """Return the names of the processes of this machine."""
    return [path.read_text().strip() for path in Path("/proc").glob("[0-9]*/comm") if path.exists()]


RIGHT, HOLLOW = yaml.safe_load((ROOT / "tests/fixtures/programs.yaml").read_text()).values()


@isolated
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_program_passes(name):
    outcome = judged(**RIGHT[name])
    assert outcome.passed, outcome.reason


@isolated
def test_several_functions_of_the_program_s_are_named():
    tests = "def check(f):\n    assert all(f(x) == g(x) + 1 for x in (1.5, 2.5))"
    code = "import math\ndef g(x):\n    return math.floor(x)\ndef f(x):\n    return g(x) + 1"
    for entry in (["f", "g"], "f"):
        named = read_tests(json.dumps({"test": tests, "entry_point": entry}))
        outcome = execute(code, named, DEFAULT, isolated=True)
        assert outcome.passed is (True if entry != "f" else None), outcome.reason


@isolated
@pytest.mark.parametrize("name", HOLLOW)
def test_what_proves_nothing_is_no_pass_and_no_gap(name):
    code, tests, reason = HOLLOW[name].values()
    tests = tests.replace("# and 20,000 lines\n", "x = 1\n" * 20_000)
    outcome = judged(code, tests, seconds=3)
    assert outcome.passed is False and reason in outcome.reason, outcome.reason


@isolated
@pytest.mark.parametrize("entry", ["", "f"])
def test_h22_a_helper_that_nobody_defined_is_not_the_program_s(entry):
    code = "def is_close(a, b):\n    return True\ndef f(x):\n    return 5"
    for tests in ("assert is_close(f(1), 3)", "x = f(1)\nassert is_close(x, 3)"):
        outcome = judged(code, tests, entry=entry)
        assert outcome.passed is None and "nor their setup define" in outcome.reason


WRONG = {
    "def f(x, y):\n    return 3": "AssertionError: two (last: f(1, 'a') gave 3)",
    "def f(x, y):\n    return x // 0": "ZeroDivisionError: integer division or modulo by zero "
    "(last: f(1, 'a'))",
    "def f(:": "SyntaxError: invalid syntax (answer, line 1)",
    "import numpy": "ModuleNotFoundError: No module named 'numpy'",
    "def g(x):\n    return 2": "NameError: name 'f' is not defined (last: f(1, 'a'))",
    "def f(x, y):\n    return f": "NotData: a value of type function",
    "x = '\ud800'": "UnicodeEncodeError",
    "def f(x, y):\n    raise StopIteration": "StopIteration",
    "def f(x, y):\n    exit(0)": "NameError",
}


@isolated
@pytest.mark.parametrize("code", WRONG)
def test_a_wrong_program_fails_with_its_reason(code):
    outcome = judged(code, "assert f(1, 'a') == 2, 'two'")
    assert outcome.passed is False and WRONG[code] in outcome.reason, outcome.reason


@isolated
@pytest.mark.parametrize(
    ("tests", "setup", "reason"),
    [
        ("assert f(", "", "SyntaxError"),
        ("assert True", "", "the tests call nothing"),
        ("assert f(1) == 1", "import nothing_like_this", "ModuleNotFoundError"),
        ("assert f(lambda: 1) == 1", "", "the tests hand a value of type function to f"),
    ],
)
def test_faulty_tests_are_no_failure_of_the_program(tests, setup, reason):
    outcome = judged("def f(x):\n    return x", tests, setup)
    assert outcome.passed is None and reason in outcome.reason


@isolated
def test_the_program_cannot_replace_what_the_tests_define():
    code = "set = sorted = len = abs = wanted = lambda *x: 1\ndef f(x):\n    return x"
    assert judged(code, "assert set(f([1])) == {2}").passed is False
    assert (
        judged(code, "assert wanted(f(1)) == 5", setup="def wanted(x):\n    return x").passed
        is False
    )


@isolated
def test_many_at_once_do_not_disturb_each_other():
    code = (
        "import threading, time\ndef f(n):\n"
        "    many = [threading.Thread(target=time.sleep, args=(0.1,)) for _ in range(n)]\n"
        "    [t.start() for t in many]\n    return len(many)"
    )
    bomb = (HOSTILE / "flood" / "fork_bomb.py").read_text()
    with ThreadPoolExecutor(8) as pool:
        bombs = [pool.submit(judged, bomb, "solve(1)", "", "", 1) for _ in range(2)]
        found = [pool.submit(judged, code, "assert f(20) == 20") for _ in range(6)]
        assert all(one.result().passed for one in found)
        assert not any(one.result().passed for one in bombs)


def test_a_verdict_without_the_nonce_is_none():
    for said in (b"", b"12345678", b'12345678{"verdict": "pass"}', b'12345678{"nonce": "x"}' * 2):
        assert read_verdict(said, "n", DEFAULT).passed is False
    assert read_verdict(b'12345678{"nonce": "x", "verdict": "pass"}', "n", DEFAULT).passed is False
    genuine = b'12345678{"nonce": "n", "verdict": "pass", "reason": ""}'
    assert read_verdict(genuine, "n", DEFAULT).passed is True


def decide(program: bytes, number: int, machine: str, flags: int = 0) -> int:
    """Run a filter as the kernel does, and return what it decides about a system call."""
    data = {0: number, 4: namespaces.AUDIT[machine], 16: flags}
    steps = list(struct.iter_unpack("HBBI", program))
    place, held = 0, 0
    while True:
        code, yes, no, value = steps[place]
        place += 1
        if code == namespaces.RETURN:
            return value
        if code == namespaces.LOAD:
            held = data[value]
            continue
        tests = {
            namespaces.EQUAL: held == value,
            namespaces.AT_LEAST: held >= value,
            namespaces.ANY_BIT: bool(held & value),
        }
        place += yes if tests[code] else no


@pytest.mark.parametrize(("column", "machine"), list(enumerate(namespaces.AUDIT)))
def test_the_filter_refuses_what_it_should_on_each_processor(column, machine):
    program = namespaces.filter_program(machine)
    refused = {pair[column] for pair in namespaces.REFUSED.values()} - {-1}
    usual = set(range(450)) - refused - {namespaces.CLONE3}
    assert all(decide(program, number, machine) & 0xFFFF == errno.EPERM for number in refused)
    assert all(decide(program, number, machine) == namespaces.ALLOW for number in usual)
    assert decide(program, namespaces.CLONE3, machine) & 0xFFFF == errno.ENOSYS
    clone = namespaces.CLONE[machine]
    assert decide(program, clone, machine, namespaces.NEWUSER | 17) & 0xFFFF == errno.EPERM
    assert decide(program, 41 | 0x40000000, machine) & 0xFFFF == errno.EPERM
    other = next(name for name in namespaces.AUDIT if name != machine)
    assert decide(program, 0, other) == namespaces.KILL


@pytest.fixture
def forgetful() -> Iterator[None]:
    yield
    permit(False)


def test_nothing_runs_unasked():
    assert allowed() == "no"
    with pytest.raises(DistillError, match="--allow-code"):
        run_tests("def f(x):\n    return x", ProgramTests("assert f(1) == 1"))


def test_where_there_is_no_sandbox_it_is_refused(monkeypatch, forgetful):
    monkeypatch.setattr(
        "distill.tasks.sandbox.programs.unavailable", lambda: "unshare: not permitted"
    )
    with pytest.raises(DistillError, match=r"unshare: not permitted.*--unsafe-code"):
        permit(True)
    assert allowed() == "no"


def test_a_sandbox_that_cannot_be_made_runs_nothing(monkeypatch):
    monkeypatch.setattr("distill.tasks.sandbox.programs.START", NO_MOUNTS)
    outcome = execute(
        "def f(x):\n    return x", ProgramTests("assert f(1) == 1"), DEFAULT, isolated=True
    )
    assert outcome.passed is None and "not today" in outcome.reason


NO_MOUNTS = """import sys; sys.path.append(sys.argv.pop())
from distill.tasks.sandbox import inside, namespaces
def refuse(seconds): raise OSError("not today")
namespaces.enter = refuse
inside.main()"""


def test_without_namespaces_there_are_still_limits_and_a_judge(forgetful):
    permit(False, unsafe=True)
    assert run_tests("def f(x):\n    return x", ProgramTests("assert f(1) == 1")).passed
    for name in ("exit_at_once", "equals_all", "read_the_caller", "patch_the_harness", "at_exit"):
        code = (HOSTILE / "fake" / f"{name}.py").read_text()
        assert run_tests(code, ProgramTests("assert solve({}) == 42")).passed is False
    for name in ("loop", "deaf"):
        code = (HOSTILE / "flood" / f"{name}.py").read_text()
        assert run_tests(code, ProgramTests("assert solve({}) == 42"), Limits(0.5)).passed is False

"""The two parts that live in a sandbox: the harness runs the tests, the program answers its calls.

    outside                    in the sandbox
    tasks.sandbox.programs  -  process 1: the harness  -  its child: the program, and what it starts
      code, then tests ->        calls, plain data ->
      <- verdict, nonce          <- result, plain data, or the name of an error

The program never sees the tests, the nonce, the verdict's pipe or the harness's memory: it is
forked before the harness reads them, and the harness can be neither traced nor, being process 1,
killed from inside. When the harness ends, the kernel ends all else. Standard library only.
"""

import ast
import builtins
import json
import os
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress
from types import ModuleType
from typing import Any, NoReturn

from distill.tasks.sandbox import messages, namespaces

TICK = 0.02  # seconds between looks at the memory in use
MAX_SHOWN = 100  # characters of a value in a reason
VERDICT = 1  # the descriptor that the verdict is written to
PAGE = os.sysconf("SC_PAGE_SIZE")


def main() -> NoReturn:
    """Read the code, enter the sandbox, start the program, read the tests and run them."""
    seconds, megabytes, isolated = json.loads(sys.argv[1])
    namespaces.die_with_parent()
    sys.path.pop()  # the package's folder, which the program has no business with
    os.environ.clear()
    sys.set_int_max_str_digits(0)
    code, failure, proc = messages.receive(0), "", None
    try:
        proc = namespaces.enter(seconds) if isolated else None
        namespaces.confine(seconds, megabytes)
    except OSError as error:
        failure = str(error)
    calls, answers = os.pipe(), os.pipe()
    if not failure and os.fork() == 0:
        run_program(code, calls[0], answers[1])
    os.close(calls[0])
    os.close(answers[1])
    job = messages.receive(0)
    harness = Harness(job["nonce"], answers[0], calls[1])
    if failure:
        harness.finish("broken", failure)
    harness.watch(proc, megabytes)
    harness.run(job)


class Guarded(ast.NodeTransformer):
    """Tests that notice where they prove nothing: assertions are counted, a loop goes over what
    there was when it began, and an order of NaN, which is always false, is an error."""

    def visit_Assert(self, node: ast.Assert) -> Any:
        """Count an assertion that holds; of one that fails, the tests may catch the error."""
        self.generic_visit(node)
        return [node, ast.Expr(_call("__asserted__"))]

    def visit_For(self, node: ast.For) -> Any:
        """Let a loop go over a copy."""
        self.generic_visit(node)
        node.iter = _call("__items__", node.iter)
        return node

    def visit_Compare(self, node: ast.Compare) -> Any:
        """Look at each side of a comparison by order."""
        self.generic_visit(node)
        if any(isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE) for op in node.ops):
            node.left = _call("__ordered__", node.left)
            node.comparators = [_call("__ordered__", side) for side in node.comparators]
        return node


def _call(name: str, *args: ast.expr) -> ast.expr:
    return ast.Call(ast.Name(name, ast.Load()), [*args], [])


class TestBuiltins(dict[str, object]):
    """The builtins of the tests: a name that nothing defines is a function of the program's, one
    where the tests do not say which."""

    def __init__(self, harness: "Harness", entries: list[str]) -> None:
        super().__init__(vars(builtins))
        self.harness, self.entries, self.stated = harness, entries, bool(entries)

    def __missing__(self, name: str) -> object:
        if name.startswith("__"):
            raise KeyError(name)
        if not self.stated and not self.entries:
            self.entries.append(name)
        if name not in self.entries:
            names = f"{name}, which neither they nor their setup define"
            more = "" if self.stated else f": is it {self.entries[0]} or {name} that is tested?"
            self.harness.finish("broken", f"the tests name {names}{more}")
        return lambda *args, **kwargs: self.harness.call(name, args, kwargs)


class Harness:
    """Runs the tests, has the program do what they call, and writes pass, fail or broken."""

    def __init__(self, nonce: str, read: int, write: int) -> None:
        self.nonce, self.read, self.write = nonce, read, write
        self.answered, self.asserted, self.last = 0, 0, ""
        self.emptied = list[object]()  # by the program, of the tests' own

    def finish(self, verdict: str, reason: str) -> NoReturn:
        """Write the verdict and end, with all in the sandbox; no test can catch it."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        messages.send(VERDICT, {"nonce": self.nonce, "verdict": verdict, "reason": reason[:1000]})
        os._exit(0)

    def guards(self) -> dict[str, object]:
        """Return what `Guarded` tests call, and `all`."""

        def count() -> None:
            self.asserted += 1

        def items(value: Any) -> Any:
            if any(value is one for one in self.emptied):
                what = "the program emptied what the tests go over"
                self.finish("fail", f"{what} (last: {self.last})")
            return value.copy() if type(value) in (list, dict, set) else value

        def ordered(value: object) -> object:
            if isinstance(value, float) and value != value:
                raise AssertionError("compares NaN")
            return value

        def every(values: Iterable[object]) -> bool:  # over nothing it asserts nothing
            number = 0
            for number, value in enumerate(values, 1):  # noqa: B007
                if not value:
                    return False
            self.asserted -= not number
            return True

        return {"__asserted__": count, "__items__": items, "__ordered__": ordered, "all": every}

    def run(self, job: dict[str, Any]) -> NoReturn:
        """Run the setup and the tests; a function that both define is the program's."""
        names = TestBuiltins(self, job["entries"])
        names |= self.guards()
        space: dict[str, object] = {"__name__": "tests", "__builtins__": names}
        try:
            setup = compile(job["setup"], "setup", "exec")
            tree = ast.parse(job["tests"], "tests")
            asserts = any(isinstance(node, ast.Assert) for node in ast.walk(tree))
            tests = compile(ast.fix_missing_locations(Guarded().visit(tree)), "tests", "exec")
            exec(setup, space)  # noqa: S102 - that is what a sandbox is for
        except Exception as error:  # the program did not cause it, but for a lack of memory
            verdict = "fail" if isinstance(error, MemoryError) else "broken"
            self.finish(verdict, f"the tests: {describe_error(error)}")
        for name in job["entries"]:
            space.pop(name, None)
        try:
            self.receive_answer()
            exec(tests, space)  # noqa: S102
        except BaseException as error:  # the tests may raise what they like: it is a failure
            last = f" (last: {self.last})" if self.last else ""
            self.finish("fail", describe_error(error) + last)
        if not self.answered:
            self.finish("broken", "the tests call nothing")
        if asserts and self.asserted < 1:
            self.finish("fail", f"no assertion held (last: {self.last})")
        self.finish("pass", f"passes: {self.answered} calls")

    def call(self, name: str, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """Call a function of the program; a list, dict or set that it changed changes here too."""
        self.last = f"{name}({shorten(args)[1:-1].rstrip(',')})"
        try:
            message = {"name": name, "args": messages.pack(args), "kwargs": messages.pack(kwargs)}
        except messages.NotData as error:
            self.finish("broken", f"the tests hand {error} to {name}")
        with suppress(BrokenPipeError):  # the program ended, as the next read reports
            messages.send(self.write, message)
        value, after = self.receive_answer()
        self.answered += 1
        for old, new in zip(args, after, strict=False):
            if old and isinstance(old, list | dict | set) and new is not None and not new:
                self.emptied.append(old)
            changed: Any = new
            if type(old) is type(new) and isinstance(old, list):
                old[:] = changed
            elif type(old) is type(new) and isinstance(old, dict | set):
                old.clear()
                old.update(changed)
        self.last += f" gave {shorten(value)}"
        return value

    def receive_answer(self) -> tuple[object, list[Any]]:
        """Return what the program answers; raise its errors, under the same name if builtin."""
        try:
            reply = messages.receive(self.read)
            if "value" in reply:
                value, after = messages.unpack(reply["value"])
                return value, after
            name, text = str(reply["error"]), str(reply["text"])
        except EOFError:
            self.finish("fail", "the program ended" + (f" in {self.last}" if self.last else ""))
        except (messages.NotData, LookupError, TypeError, ValueError, RecursionError) as error:
            self.finish("fail", f"the program's answer is no data: {error}")
        self.answered += bool(self.last)
        kind = getattr(builtins, name, None)
        ends_loops = (StopIteration, StopAsyncIteration)
        if isinstance(kind, type) and issubclass(kind, Exception) and kind not in ends_loops:
            with suppress(TypeError):  # UnicodeDecodeError wants more than a text
                raise kind(text)
        raise Exception(f"{name}: {text}")

    def watch(self, proc: int | None, megabytes: int) -> None:
        """Measure the memory of all in the sandbox at every tick; above the limit, fail."""

        def measure(number: int, frame: object) -> None:
            if proc is not None and memory_in_use(proc) > megabytes << 20:
                self.finish("fail", f"took more than {megabytes} MB of memory")

        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, measure)
        signal.setitimer(signal.ITIMER_REAL, TICK, TICK)


def memory_in_use(proc: int) -> int:
    """Return the bytes in use by all processes of a /proc; what they share counts for each."""
    pages = 0
    for name in os.listdir(proc):
        if name.isdigit():
            with suppress(OSError):  # it has just ended
                file = os.open(f"{name}/statm", os.O_RDONLY, dir_fd=proc)
                pages += int(os.read(file, 200).split()[1])
                os.close(file)
    return pages * PAGE


def shorten(value: object) -> str:
    """Return a value as text for a reason."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def describe_error(error: BaseException) -> str:
    """Return an exception's name and message."""
    return f"{type(error).__name__}: {error}"[:300].removesuffix(": ")


def run_program(code: str, read: int, write: int) -> NoReturn:
    """Be the program: run the code, then answer calls until there are no more."""
    namespaces.die_with_parent()
    os.setsid()
    # all descriptors but the pipes, which become 3 and 4, are closed; the standard ones go nowhere
    nowhere = os.open("/dev/null", os.O_RDWR)
    for number in range(3):
        os.dup2(nowhere, number)
    high = [os.dup2(end, 50 + place) for place, end in enumerate((read, write))]
    os.closerange(3, 50)
    read, write = (os.dup2(end, 3 + place) for place, end in enumerate(high))
    os.closerange(5, namespaces.FILES)
    module = ModuleType("answer")
    sys.modules["answer"] = module
    try:
        exec(compile(code, "answer", "exec"), vars(module))  # noqa: S102
        messages.send(write, {"value": messages.pack((None, ()))})
        while True:
            perform(vars(module), messages.receive(read), write)
    except BaseException as error:  # SystemExit too: the harness decides
        with suppress(BaseException):
            messages.send(write, error_reply(error))
    os._exit(0)


def perform(space: dict[str, Any], call: dict[str, Any], write: int) -> None:
    """Perform one call and send its result, or its error."""
    try:
        if call["name"] not in space:
            raise NameError(f"name {call['name']!r} is not defined")
        args, kwargs = messages.unpack(call["args"]), messages.unpack(call["kwargs"])
        value = space[call["name"]](*args, **kwargs)
        # the call may have changed these in place
        after = [arg if isinstance(arg, list | dict | set) else None for arg in args]
        reply = {"value": messages.pack((value, after))}
    except Exception as error:
        reply = error_reply(error)
    messages.send(write, reply)


def error_reply(error: BaseException) -> dict[str, str]:
    """Return an error as the message that the harness receives."""
    return {"error": type(error).__name__, "text": str(error)[:300]}

"""Functions that a program brings to `distill.run`; a run records the hashes of their sources.

A checker is `f(prompt, text, **settings)` and returns True or False, a grade from 0 to 1 (1 passes)
or a `CheckResult`. A filter is `g(prompt, response)` and returns a reason to drop the answer, or
None. A responder is `h(messages)`, of dictionaries with role and content, and returns the answer.
"""

import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from distill.errors import DistillError, Exit

FunctionKind = Literal["checker", "filter", "responder"]
Functions = Mapping[str, Callable[..., Any]]
PROVIDED: dict[FunctionKind, Functions] = {"checker": {}, "filter": {}, "responder": {}}


@contextmanager
def provided(
    checkers: Functions, filters: Sequence[Callable[..., Any]], responders: Functions
) -> Iterator[None]:
    """Make functions known under their names, for as long as a run takes."""
    by_name = {getattr(f, "__name__", type(f).__name__): f for f in filters}
    if "<lambda>" in by_name or len(by_name) < len(filters):
        what, fix = "two have the same name, or one has none", "define each with def, by a name"
        raise DistillError(Exit.CONFIG, "distill.run: filters", what, fix)
    before = dict(PROVIDED)
    PROVIDED.update({"checker": checkers, "filter": by_name, "responder": responders})
    try:
        yield
    finally:
        PROVIDED.update(before)


def find(kind: FunctionKind, name: str) -> Callable[..., Any]:
    """Return a function; raises DistillError (exit 2) where this process was not given it."""
    if name not in PROVIDED[kind]:
        example = f"[{name}]" if kind == "filter" else f'{{"{name}": ...}}'
        fix = f"run it from Python: distill.run(..., {kind}s={example})"
        raise DistillError(Exit.CONFIG, f"{kind} {name}", "is not known to this process", fix)
    return PROVIDED[kind][name]


def source_hash(kind: FunctionKind, name: str) -> str:
    """Return the hash of a function's `version`, where it has one, else of its own source text.

    Raises DistillError (exit 2) where it has neither.
    """
    function = find(kind, name)
    text = getattr(function, "version", None)
    if text is None:
        code = function if inspect.isroutine(function) else type(function)
        try:
            if isinstance(function, functools.partial):  # its arguments are in no source text
                raise TypeError
            text = textwrap.dedent(inspect.getsource(code))
        except (OSError, TypeError):
            what, fix = "has no source text that could be hashed", f"set {name}.version = '1'"
            raise DistillError(Exit.CONFIG, f"{kind} {name}", what, fix) from None
    return hashlib.sha256(str(text).encode()).hexdigest()[:32]

"""The messages between the parts of a sandbox: plain data as JSON with its length, never pickles.

Only values that are data cross from a generated program to its harness: an object with an `__eq__`
of its own cannot. Every kind is rebuilt as exactly that kind; a subclass (Counter, an enumeration)
arrives as what it derives from, and an iterator as an iterator over its items.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Set
from itertools import islice
from typing import Any

MAX_BYTES = 16 << 20  # of one message
MAX_ITEMS = 100_000  # of an iterator; what follows is cut off
PLAIN = {"list": list, "tuple": tuple, "frozenset": frozenset}
PACKED: dict[str, type[Iterable[object]]] = {**PLAIN, "set": Set}  # views of keys too
UNPACKED: dict[str, Callable[[list[Any]], Any]] = {**PLAIN, "set": set, "iterator": iter}


class NotData(Exception):
    """A value or message that is not plain data."""


def frame(value: object) -> bytes:
    """Return one message; raises NotData where it is too long."""
    text = json.dumps(value).encode()
    if len(text) > MAX_BYTES:
        raise NotData("too much data")
    return len(text).to_bytes(8, "big") + text


def send(descriptor: int, value: object) -> None:
    """Write one message."""
    pending = memoryview(frame(value))
    while pending:
        pending = pending[os.write(descriptor, pending) :]


def receive(descriptor: int) -> Any:
    """Read one message and not a byte more; raises EOFError at its end, NotData for no message."""
    length = int.from_bytes(_read_exactly(descriptor, 8), "big")
    if length > MAX_BYTES:
        raise NotData("too much data")
    try:
        return json.loads(_read_exactly(descriptor, length))
    except (ValueError, RecursionError):
        raise NotData("not a message") from None


def _read_exactly(descriptor: int, length: int) -> bytes:
    parts = []
    while length:
        part = os.read(descriptor, min(length, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def pack(value: object) -> object:
    """Return a value as JSON can hold it; raises NotData for anything that is not data."""
    if value is None:
        return value
    for plain in (bool, int, float, str):
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, dict):
        return {"dict": [[pack(key), pack(item)] for key, item in value.items()]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    for name, plain in PACKED.items():
        if isinstance(value, plain):
            return {name: [pack(item) for item in value]}
    if isinstance(value, Iterator):
        return {"iterator": [pack(item) for item in islice(value, MAX_ITEMS)]}
    raise NotData(f"a value of type {type(value).__name__}")


def unpack(value: object) -> Any:
    """Rebuild what `pack` made; raises NotData where it did not make it."""
    if not isinstance(value, dict):
        return value
    try:
        ((kind, inside),) = value.items()
        if kind == "bytes":
            return bytes.fromhex(inside)
        if kind == "complex":
            return complex(*inside)
        if kind == "dict":
            return {unpack(key): unpack(item) for key, item in inside}
        if kind == "range":
            return range(*inside)
        return UNPACKED[kind]([unpack(item) for item in inside])
    except (KeyError, TypeError, ValueError, RecursionError):
        raise NotData("not a message") from None

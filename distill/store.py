"""What survives a crash: atomic files, locks, and append-only logs of checksummed records.

A log is a folder of segments; a line of a segment is `SHA256 KIND KEY JSON`, the hash covering the rest of the line.
`append` returns after fsync, so what it returned for is there after a kill or a power cut. A torn tail (a write that
was cut off) is moved to `torn/` when a writer opens the log; damage anywhere else stops with exit 5.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from pydantic import ValidationError

from distill.errors import DistillError, Exit
from distill.records import Record, canonical

R = TypeVar("R", bound=Record)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DistillError(
            Exit.STATE,
            path,
            f"could not be written: {error.strerror}",
            "free space, then run again",
        ) from None
    fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(
        path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n"
    )


def read_json(path: Path) -> Any:
    """Read a JSON file of ours; raises DistillError (exit 5) where it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DistillError(Exit.STATE, path, "is missing", "run the stage that makes it") from None
    except ValueError:
        raise DistillError(Exit.STATE, path, "is damaged", "remake it with --redo STAGE") from None


def write_records(path: Path, records: Iterable[Record]) -> int:
    """Write records as JSON lines, atomically, and return how many."""
    lines = [record.to_line() + "\n" for record in records]
    write_atomic(path, "".join(lines))
    return len(lines)


def read_records(path: Path, kind: type[R]) -> list[R]:
    """Read what `write_records` wrote; raises DistillError (exit 5) with the line of any damage."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise DistillError(Exit.STATE, path, "is missing", "run the stage that makes it") from None
    records = []
    for number, line in enumerate(lines, 1):
        if line:
            try:
                records.append(kind.from_line(line))
            except ValidationError:
                raise DistillError(
                    Exit.STATE, f"{path}:{number}", "is damaged", "remake it with --redo STAGE"
                ) from None
    return records


class FolderLock:
    """One process at a time may write in a folder; the lock of a dead process is free."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self.handle = -1

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(self.handle, 32).decode() or "unknown"
            os.close(self.handle)
            raise DistillError(
                Exit.STATE, self.path.parent, f"lock held by pid {pid}", "wait for it, or end it"
            ) from None
        os.ftruncate(self.handle, 0)
        os.pwrite(self.handle, str(os.getpid()).encode(), 0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self.handle)


class Place(NamedTuple):
    """Where a record lies: segment, first byte, length of the line without its newline."""

    segment: Path
    offset: int
    length: int


def encode_line(kind: str, key: str, body: Any) -> bytes:
    """Return the line of a record, newline included."""
    rest = b"%s %s %s" % (kind.encode(), key.encode(), canonical(body))
    return hashlib.sha256(rest).hexdigest().encode() + b" " + rest + b"\n"


def decode_line(line: bytes) -> tuple[str, str, bytes] | None:
    """Return kind, key and the JSON of a line without its newline, or None where the checksum fails."""
    checksum, _, rest = line.partition(b" ")
    if hashlib.sha256(rest).hexdigest().encode() != checksum:
        return None
    kind, _, rest = rest.partition(b" ")
    key, _, body = rest.partition(b" ")
    return kind.decode(), key.decode(), body


class Log:
    """An append-only folder of checksummed records, by kind and key; the first record of a key stays."""

    VERSION = 1

    def __init__(self, folder: Path, writable: bool = True) -> None:
        self.folder, self.writable = folder, writable
        self.index: dict[tuple[str, str], Place] = {}
        self.torn = 0
        self._handle = -1
        self._lock: FolderLock | None = None

    def __enter__(self) -> Self:
        if self.writable:
            self._lock = FolderLock(self.folder).__enter__()
        self._check_version()
        for segment in self.segments():
            self._read_segment(segment)
        if self.writable:
            self._open_segment()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        if self._lock:
            self._lock.__exit__(kind, error, trace)

    def segments(self) -> list[Path]:
        """Return the segments in order."""
        return sorted(self.folder.glob("[0-9]*.jsonl"))

    def _check_version(self) -> None:
        path = self.folder / "version.json"
        if path.exists():
            found = read_json(path).get("version")
            if found != self.VERSION:
                raise DistillError(
                    Exit.STATE,
                    path,
                    f"store version {found}, this is {self.VERSION}",
                    "use a newer distill",
                )
        elif self.writable:
            write_json(path, {"version": self.VERSION})

    def _read_segment(self, segment: Path) -> None:
        last, offset = segment == self.segments()[-1], 0
        with segment.open("rb") as file:
            for number, line in enumerate(file, 1):
                record = decode_line(line.rstrip(b"\n"))
                whole = record is not None and line.endswith(b"\n")
                if not whole and not (last and offset + len(line) == segment.stat().st_size):
                    raise DistillError(
                        Exit.STATE,
                        f"{segment}:{number}",
                        "damaged record",
                        f"distill repair {self.folder}",
                    )
                if record is None:
                    self._set_aside(segment, offset, line)
                    return
                if not whole and self.writable:
                    self._finish_line(segment)
                self.index.setdefault(
                    (record[0], record[1]), Place(segment, offset, len(line.rstrip(b"\n")))
                )
                offset += len(line)

    def _set_aside(self, segment: Path, offset: int, tail: bytes) -> None:
        self.torn += 1
        if self.writable:
            write_atomic(self.folder / "torn" / f"{segment.stem}-{offset}", tail)
            os.truncate(segment, offset)

    def _finish_line(self, segment: Path) -> None:
        with segment.open("ab") as file:
            file.write(b"\n")

    def _open_segment(self) -> None:
        existing = self.segments()
        self._segment = existing[-1] if existing else self.folder / "00000001.jsonl"
        self._handle = os.open(
            self._segment, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644
        )
        fsync_folder(self.folder)

    def append(self, records: Iterable[tuple[str, str, Any]]) -> int:
        """Store (kind, key, body) records durably in one write; those whose key is there are skipped. Return how many."""
        fresh = [record for record in records if record[:2] not in self.index]
        if not fresh:
            return 0
        lines = [encode_line(*record) for record in fresh]
        start = os.fstat(self._handle).st_size
        try:
            if os.write(self._handle, b"".join(lines)) != sum(map(len, lines)):
                raise OSError(28, "short write")
            os.fsync(self._handle)
        except OSError as error:
            os.ftruncate(self._handle, start)
            raise DistillError(
                Exit.STATE,
                self.folder,
                f"could not be written: {error.strerror}",
                "free space, run again",
            ) from None
        for (kind, key, _), line in zip(fresh, lines, strict=True):
            self.index[kind, key] = Place(self._segment, start, len(line) - 1)
            start += len(line)
        return len(fresh)

    def get(self, kind: str, key: str) -> Any | None:
        """Return the body stored under kind and key, or None; raises DistillError (exit 5) on damage."""
        place = self.index.get((kind, key))
        if place is None:
            return None
        with place.segment.open("rb") as file:
            file.seek(place.offset)
            record = decode_line(file.read(place.length))
        if record is None:
            raise DistillError(
                Exit.STATE, place.segment, "damaged record", f"distill repair {self.folder}"
            )
        return json.loads(record[2])

    def keys(self, kind: str) -> Iterator[str]:
        """Yield the keys of one kind in the order they were stored."""
        return (key for found, key in self.index if found == kind)

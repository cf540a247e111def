"""Append-only logs of checksummed records: what is paid for is on the disk before anything goes on.

A log is a folder of segments; a line of a segment is `SHA256 KIND KEY JSON`, where the hash covers
what follows it. Each writer appends to segments of its own (`00000001.jsonl`, `w2-00000001.jsonl`)
and readers take all, so several may write at once; of two records of one key the first counts.
"""

import asyncio
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import count, groupby
from pathlib import Path
from typing import Any, BinaryIO, Self

from distill.errors import DistillError, Exit
from distill.records import canonical
from distill.storage import files
from distill.storage.progress import say

BLOCK = 1 << 20  # bytes read at once
OFFSET = 40  # bits of a position that are the first byte; those above are the segment
WRITERS, CLAIMS = "writers", "claims.json"  # of each process that writes, in a folder of its own
CLAIMING = 60.0  # seconds to wait for others that are claiming
VERSION = 1  # of the lines that this code reads and writes
SEGMENT = re.compile(r"(?:(\w+)-)?(\d{8})\.jsonl", re.ASCII)
REPAIRED = ".repaired"  # ends the name of a repaired copy until it takes the original's place

NewRecord = tuple[str, str, object]  # kind, key, body
StoredRecord = tuple[str, str, bytes]  # kind, key, body as JSON


def encode_line(kind: str, key: str, body: object) -> bytes:
    """Return a record's line with its newline; `kind` and `key` are words, `body` is JSON."""
    text = b"%s %s %s" % (kind.encode(), key.encode(), canonical(body))
    return hashlib.sha256(text).hexdigest().encode() + b" " + text + b"\n"


def decode_line(line: bytes) -> StoredRecord | None:
    """Return the record of a line without its newline, or None where the checksum fails."""
    text = line[65:]
    if line[:65] != hashlib.sha256(text).hexdigest().encode() + b" ":
        return None
    kind, key, body = text.split(b" ", 2)
    return kind.decode(), key.decode(), body


def scan(segment: Path, offset: int = 0) -> Iterator[tuple[int, bytes, StoredRecord | None]]:
    """Yield each line from `offset` on: its first byte, its bytes, its record (None: damaged)."""
    with segment.open("rb", buffering=BLOCK) as file:
        file.seek(offset)
        for data in file:
            yield offset, data, decode_line(data.removesuffix(b"\n"))
            offset += len(data)


def writer_of(segment: Path) -> str:
    """Return the writer of a segment; the first has no name."""
    return segment.name.rpartition("-")[0]


def segments(folder: Path, check: bool = True) -> list[Path]:
    """Return a log's segments by name; with `check`, exit 5 where one is missing between them."""
    paths = sorted(path for path in folder.glob("*.jsonl") if SEGMENT.fullmatch(path.name))
    for writer, group in groupby(paths if check else (), writer_of):
        for number, path in enumerate(group, 1):
            if path.name != (name := segment_name(writer, number)):
                raise damaged(folder, folder, f"segment {name[:-6]} is missing")
    return paths


def segment_name(writer: str, number: int) -> str:
    """Return what a writer's segment of that number is called."""
    return f"{writer}-{number:08}.jsonl".removeprefix("-")


def has_version(folder: Path) -> bool:
    """Tell whether a log has the version that is read here; DistillError (exit 5) on a newer."""
    path, version = folder / "version.json", None
    with suppress(FileNotFoundError, ValueError, TypeError, KeyError):
        version = json.loads(path.read_bytes())["version"]
    if isinstance(version, int) and version > VERSION:
        what = f"store version {version}, newer than {VERSION}"
        raise DistillError(Exit.STATE, path, what, "use a newer distill")
    return version == VERSION


def damaged(where: object, folder: Path, what: str = "damaged record") -> DistillError:
    """Return the error of a log that is damaged, with the way out."""
    return DistillError(Exit.STATE, where, what, f"distill repair {folder}")


def refuse_half_copy(folder: Path) -> None:
    """Stop where a repair was killed between its renames: no empty log may take its place."""
    copy = folder.with_name(folder.name + REPAIRED)
    if copy.exists() and not folder.exists():
        what = "a copy was cut off before it took this name"
        raise DistillError(Exit.STATE, folder, what, f"mv {copy} {folder}")


@dataclass
class OpenSegment:
    """A segment's file, open to be read, and how many of its bytes were checked."""

    path: Path
    file: BinaryIO
    size: int = 0

    def is_current(self) -> bool:
        """Tell whether its path still leads to it: no copy, and nothing was taken back."""
        opened = os.fstat(self.file.fileno())
        same = self.path.exists() and os.path.samestat(self.path.stat(), opened)
        return same and opened.st_size >= self.size


class Log(ExitStack):
    """An append-only folder of checksummed records, by kind and key; any number of readers.

    Opening checks every line, and keeps in memory where each record lies. A log that was opened to
    be read can become the writer's for a while, and reads then only what others have added.
    """

    SEGMENT_BYTES = 256 << 20  # a segment that has reached this is followed by a new one

    def __init__(self, folder: Path, writable: bool = True) -> None:
        super().__init__()
        self.folder, self.writable, self.writer = folder, writable, ""
        self._shared, self.place = False, folder  # place: of the locks and claims of this writer
        self.index: dict[str, dict[str, int]] = {}  # kind to key to the record's position
        self._segments: list[OpenSegment] = []
        self._handle, self._number, self._current = -1, 0, 0  # of the segment that is written
        self._sound = False  # False from the start of a write until it is known to be on the disk

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            undo.callback(self.close)
            if self.writable:
                self.enter_context(self.writing())
            else:
                refuse_half_copy(self.folder)
                self._load()
            undo.pop_all()
        return self

    @contextmanager
    def writing(self, shared: bool = False) -> Iterator[None]:
        """Hold the writer's lock inside the block, and read first what was added since.

        With `shared` other processes write too, each under the first name that no other has.
        """
        refuse_half_copy(self.folder)
        with ExitStack() as locks:
            locks.enter_context(files.folder_lock(self.folder, shared))
            if shared:
                with files.folder_lock(self.folder / WRITERS, patience=CLAIMING):
                    places = ((n, self.folder / WRITERS / str(n)) for n in count(1))
                    number, self.place = next(one for one in places if not files.is_locked(one[1]))
                    locks.enter_context(files.folder_lock(self.place))
                    (self.place / CLAIMS).unlink(missing_ok=True)  # of a process that died
                self.writer = f"w{number}" if number > 1 else ""
            self.writable, self._shared = True, shared
            try:
                self._load()
                self._sound = True
                yield
            finally:
                if self._handle >= 0:
                    os.close(self._handle)
                self._handle, self._sound, self.writable = -1, False, False

    def claim(self, keys: Sequence[str]) -> set[str]:
        """Return those of `keys` that no other process has claimed: they are ours till the next."""
        with files.folder_lock(self.folder / WRITERS, patience=CLAIMING):
            self._load()
            ours = set(keys)
            for place in (self.folder / WRITERS).glob("[0-9]*"):
                if place != self.place and (place / CLAIMS).exists() and files.is_locked(place):
                    ours -= set(files.read_json(place / CLAIMS))
            files.write_json(self.place / CLAIMS, sorted(ours))
        return ours

    def _load(self) -> None:
        """Check the version and every line not checked yet, and open the writer's last segment."""
        with files.disk_errors(self.folder):
            paths = segments(self.folder)  # before the version, which a writer makes first
            version = has_version(self.folder)
            if paths and not version:
                raise damaged(self.folder / "version.json", self.folder, "no store version")
            if not version and self.writable:
                files.write_json(self.folder / "version.json", {"version": VERSION})
            if not all(segment.is_current() for segment in self._segments):
                self._segments, self.index = [], {}
            last = {writer_of(path): path for path in paths}
            for path in paths:
                self._index_segment(path, last[writer_of(path)] == path)
            if self.writable:
                self._append_to(max(1, sum(writer_of(path) == self.writer for path in paths)))

    def _open(self, path: Path) -> int:
        """Return the number of a segment, which is opened to be read the first time."""
        for number, segment in enumerate(self._segments):
            if segment.path == path:
                return number
        self._segments.append(OpenSegment(path, self.enter_context(path.open("rb"))))
        return len(self._segments) - 1

    def _index_segment(self, path: Path, last: bool) -> None:
        """Note where each record lies in what is new of a segment.

        Only the last line of a writer's last segment may lack its newline. Where its checksum fails
        it is torn, and moved to `torn/`; another's may be about to be written.
        """
        number = self._open(path)
        segment, writer = self._segments[number], writer_of(path)
        ours = self.writable and (not self._shared or writer == self.writer)
        for offset, data, record in scan(path, segment.size):
            complete, what = data.endswith(b"\n"), "damaged record"
            if record is None and last and not complete:
                if ours:
                    name = f"{path.stem}-{offset}-{hashlib.sha256(data).hexdigest()[:8]}"
                    files.write_atomic(self.folder / "torn" / name, data)
                    files.extend(path, b"", offset)
                    say(f"{path}: a record cut off while being written was moved to torn/")
                return
            if record is not None and (last or complete):
                position = number << OFFSET | offset
                kind, key, _ = record
                first = self.index.setdefault(kind, {}).setdefault(key, position)
                other = first != position and writer_of(self._segments[first >> OFFSET].path)
                what = f"{kind} {key} stands a second time" if other == writer else ""
            if what:
                line = path.read_bytes()[:offset].count(b"\n") + 1
                raise damaged(f"{path}:{line}", self.folder, what)
            if not complete:
                if ours:
                    files.extend(path, b"\n")
                    segment.size = offset + len(data) + 1
                return
            segment.size = offset + len(data)

    def _append_to(self, number: int) -> None:
        """Make the writer's segment `number` the one that is written; a new one is made durably."""
        if self._handle >= 0:
            os.close(self._handle)
        path = self.folder / segment_name(self.writer, number)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._handle, self._number = os.open(path, flags, 0o644), number
        self._current = self._open(path)
        files.fsync_folder(self.folder)

    def append(self, records: Iterable[NewRecord]) -> int:
        """Store records durably with one fsync but for keys that are there; return how many.

        Raises DistillError (exit 5) where the disk refuses. The log is then closed to writing, for
        nobody knows what the disk holds: the next opening checks every line again.
        """
        if not self._sound:
            what, fix = "not open for writing, or an earlier write failed", "run again"
            raise DistillError(Exit.STATE, self.folder, what, fix)
        fresh: dict[tuple[str, str], bytes] = {}
        for kind, key, body in records:
            if (kind, key) not in self and (kind, key) not in fresh:
                fresh[kind, key] = encode_line(kind, key, body)
        if not fresh:
            return 0
        self._sound = False
        with files.disk_errors(self.folder):
            if self._segments[self._current].size >= self.SEGMENT_BYTES:
                self._append_to(self._number + 1)
            segment, data = self._segments[self._current], memoryview(b"".join(fresh.values()))
            try:
                while data:
                    data = data[os.write(self._handle, data) :]
                os.fsync(self._handle)
            except OSError:
                with suppress(OSError):  # what stays is a torn tail, which the next opening moves
                    os.ftruncate(self._handle, segment.size)
                raise
        for (kind, key), line in fresh.items():
            self.index.setdefault(kind, {})[key] = self._current << OFFSET | segment.size
            segment.size += len(line)
        self._sound = True
        return len(fresh)

    def __contains__(self, record: tuple[str, str]) -> bool:
        kind, key = record
        return key in self.index.get(kind, ())

    def get(self, kind: str, key: str) -> Any | None:
        """Return a stored body, or None; raises DistillError (exit 5) on damage."""
        position = self.index.get(kind, {}).get(key)
        if position is None:
            return None
        file, offset = self._segments[position >> OFFSET].file, position & (1 << OFFSET) - 1
        with files.disk_errors(self.folder):
            file.seek(offset)
            record = decode_line(file.readline().removesuffix(b"\n"))
        if record is None or record[:2] != (kind, key):
            raise damaged(f"{file.name} at byte {offset}", self.folder)
        return json.loads(record[2])

    def keys(self, kind: str) -> Iterator[str]:
        """Yield the keys of one kind in the order they were stored."""
        return iter(self.index.get(kind, ()))


class LogWriter:
    """Durable writes from one event loop: what waits during an fsync shares the next one."""

    def __init__(self, log: Log) -> None:
        self.log, self._lock, self._waiting = log, asyncio.Lock(), list[NewRecord]()
        self._last: asyncio.Task[None] | None = None

    async def write(self, *records: NewRecord) -> None:
        """Return once the records are on the disk, also if cancelled; exit 5 where it refuses."""
        self._waiting += records
        self._last = asyncio.create_task(self._store())
        await asyncio.shield(self._last)

    async def _store(self) -> None:
        async with self._lock:
            group, self._waiting = self._waiting, []
            if group:
                await asyncio.to_thread(self.log.append, group)
            else:  # another has stored it, or could not, which raises here too
                self.log.append(())

    async def finished(self) -> None:
        """Return once nothing waits to be written."""
        if self._last is not None:
            await asyncio.wait([self._last])

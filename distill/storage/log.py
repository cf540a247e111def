"""Append-only logs of checksummed records: what is paid for is on the disk before anything goes on.

A log is a folder of segments; a line of a segment is `SHA256 KIND KEY JSON`, where the hash covers
what follows it. A writer appends to segments of its own, `00000001.jsonl` or `WRITER-00000001.jsonl`
and on, and readers take all segments: writers share no file, so nothing but the folder's lock keeps
them from writing at once. Where two writers stored one key, the first segment by name counts.

`append` returns after fsync, so what it returned for is there after a kill or a power cut. A torn
tail (a write that was cut off) is moved to `torn/` when a writer opens the log. Damage anywhere else
stops with exit 5 and names `distill repair` (storage/repair.py).
"""

import asyncio
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

from distill.errors import DistillError, Exit
from distill.records import canonical
from distill.storage.files import disk_errors, fsync_folder, write_atomic, write_json
from distill.storage.locks import FolderLock, sweep
from distill.storage.progress import say

BLOCK = 1 << 20  # bytes read at once
NEWLINE = ord("\n")
SEGMENT = re.compile(r"(?:(\w+)-)?(\d{8})\.jsonl", re.ASCII)

NewRecord = tuple[str, str, Any]  # kind, key, body


class StoredRecord(NamedTuple):
    """A record as a line holds it: its kind, its key, and its body as JSON."""

    kind: str
    key: str
    body: bytes


def encode_line(kind: str, key: str, body: Any) -> bytes:
    """Return a record's line, newline included; `kind` and `key` are words, `body` any JSON value."""
    if f"{kind} {key}".split() != [kind, key]:
        raise ValueError(f"kind and key must be words, not {kind!r} and {key!r}")
    text = b"%s %s %s" % (kind.encode(), key.encode(), canonical(body))
    return hashlib.sha256(text).hexdigest().encode() + b" " + text + b"\n"


def decode_line(line: bytes) -> StoredRecord | None:
    """Return the record of a line without its newline, or None where the checksum fails."""
    text = line[65:]
    if line[:65] != hashlib.sha256(text).hexdigest().encode() + b" ":
        return None
    kind, key, body = text.split(b" ", 2)
    return StoredRecord(kind.decode(), key.decode(), body)


VERSION = 1  # of the lines that this code writes
DECODERS: dict[int, Callable[[bytes], StoredRecord | None]] = {1: decode_line}


def scan(
    segment: Path, version: int = VERSION, offset: int = 0
) -> Iterator[tuple[int, int, bytes, StoredRecord | None]]:
    """Yield each line from `offset` on: number (from 1), first byte, bytes, record (None: damaged).

    Memory is bounded by the longest line.
    """
    decode = DECODERS[version]
    with segment.open("rb", buffering=BLOCK) as file:
        file.seek(offset)
        for number, data in enumerate(file, 1):
            yield number, offset, data, decode(data[:-1] if data[-1] == NEWLINE else data)
            offset += len(data)


def writer_of(segment: Path) -> str:
    """Return the writer of a segment; most have no name."""
    return segment.name.rpartition("-")[0]


def segments(folder: Path, check: bool = True) -> list[Path]:
    """Return a log's segments in order of their names, a writer's one after the other.

    With `check`, raises DistillError (exit 5) where one is missing between them.
    """
    paths = sorted(path for path in folder.glob("*.jsonl") if SEGMENT.fullmatch(path.name))
    number, writer = 0, ""
    for path in paths if check else ():
        number, writer = (number + 1 if writer_of(path) == writer else 1), writer_of(path)
        if int(path.stem[-8:]) != number:
            stem = f"{writer}-{number:08}".removeprefix("-")
            raise damaged(folder, folder, f"segment {stem} is missing")
    return paths


def read_version(folder: Path) -> int:
    """Return a log's version, 0 where it states none; raises DistillError (exit 5) on a newer one."""
    path = folder / "version.json"
    try:
        version = json.loads(path.read_bytes())["version"]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return 0
    if isinstance(version, int) and version > VERSION:
        what = f"store version {version}, newer than {VERSION}"
        raise DistillError(Exit.STATE, path, what, "use a newer distill")
    return version if version in DECODERS else 0


def damaged(where: object, folder: Path, what: str) -> DistillError:
    """Return the error of a log that is damaged, with the way out."""
    return DistillError(Exit.STATE, where, what, f"distill repair {folder}")


class Checked(NamedTuple):
    """How much of a segment was checked: its position among the files of the log, lines, bytes."""

    segment: int
    lines: int = 0
    size: int = 0


class Log:
    """An append-only folder of checksummed records, by kind and key; any number of readers.

    Opening checks every line, and keeps in memory where each record lies, not what it holds.
    `writer` names whose segments are appended to. A log that was opened to be read can become the
    writer's for a while (`writing`): it then reads no more than what others have added.
    """

    SEGMENT_BYTES = 256 << 20  # a segment that has reached this is followed by a new one

    def __init__(self, folder: Path, writable: bool = True, writer: str = "") -> None:
        self.folder, self.writable, self.writer = folder, writable, writer
        # kind to key to `segment << 40 | first byte`, a segment being a position in `_files`
        self.index: dict[str, dict[str, int]] = {}
        self.torn = 0
        self._files: list[BinaryIO] = []
        self._checked: dict[str, Checked] = {}  # by the name of the segment
        self._handle, self._name, self._number, self._size = -1, "", 0, 0
        self._sound = False  # False from the start of a write until it is known to be on the disk
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            undo.callback(self._close_files)
            if self.writable:
                undo.enter_context(self.writing())
            else:
                refuse_half_copy(self.folder)
                with disk_errors(self.folder):
                    self._load()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the writer's lock inside the block, after reading what was added since the opening."""
        refuse_half_copy(self.folder)
        with FolderLock(self.folder):
            sweep(self.folder)
            self.writable = True
            try:
                with disk_errors(self.folder):
                    self._load()
                yield
            finally:
                if self._handle >= 0:
                    os.close(self._handle)
                self._handle, self._sound, self.writable = -1, False, False

    def _close_files(self) -> None:
        for file in self._files:
            file.close()

    def _load(self) -> None:
        """Check the version and every line not checked yet, and open the writer's last segment."""
        paths = segments(self.folder)  # before the version, which a writer beside us makes first
        version = read_version(self.folder)
        if version != VERSION and (version or paths):
            what = f"store version {version or 'unknown'}, this is {VERSION}"
            raise damaged(self.folder / "version.json", self.folder, what)
        if not version and self.writable:
            write_json(self.folder / "version.json", {"version": VERSION})
        self.torn = 0
        if self._replaced():
            self._close_files()
            self._files, self._checked, self.index = [], {}, {}
        for path, following in zip_longest(paths, paths[1:]):
            if path.name not in self._checked:
                # opened now: a reader goes on in these files while a copy takes their place
                self._checked[path.name] = Checked(len(self._files))
                self._files.append(path.open("rb"))
            self._index_segment(path, not following or writer_of(following) != writer_of(path))
        if self.writable:
            mine = sum(writer_of(path) == self.writer for path in paths)
            self._open_segment(max(1, mine))
            self._sound = True
            if self.torn:
                what = f"{self.torn} record cut off while being written, moved to torn/"
                say(f"{self.folder}: {what}")

    def _replaced(self) -> bool:
        """Tell whether a copy took the place of what was read, or a writer took back what it wrote."""
        for name, (segment, _, size) in self._checked.items():
            opened = os.fstat(self._files[segment].fileno())
            path = self.folder / name
            if not path.exists() or not os.path.samestat(path.stat(), opened):
                return True
            if opened.st_size < size:
                return True
        return False

    def _index_segment(self, path: Path, last: bool) -> None:
        """Note where each record lies in what is new of a segment.

        Only the last line of a writer's last segment may lack its newline. Where its checksum fails
        it is torn, and moved to `torn/`, named by its position and content: a crash here only
        repeats the move. No line after it is read: a writer beside this reader may be adding some.
        """
        segment, before, start = self._checked[path.name]
        for line, offset, data, record in scan(path, offset=start):
            number, position = before + line, segment << 40 | offset
            complete = data[-1] == NEWLINE
            if record is None and last and not complete:
                self.torn += 1
                if self.writable:
                    name = f"{path.stem}-{offset}-{hashlib.sha256(data).hexdigest()[:8]}"
                    write_atomic(self.folder / "torn" / name, data)
                    os.truncate(path, offset)
                    _extend(path, b"")
                return
            if record is None or not (complete or last):
                raise damaged(f"{path}:{number}", self.folder, "damaged record")
            known = self.index.setdefault(record.kind, {}).setdefault(record.key, position)
            same_writer = writer_of(Path(self._files[known >> 40].name)) == writer_of(path)
            if known != position and same_writer:
                what = f"{record.kind} {record.key} stands a second time"
                raise damaged(f"{path}:{number}", self.folder, what)
            if not complete:
                if self.writable:
                    _extend(path, b"\n")
                    self._checked[path.name] = Checked(segment, number, offset + len(data) + 1)
                return
            self._checked[path.name] = Checked(segment, number, offset + len(data))

    def _open_segment(self, number: int) -> None:
        """Make the writer's segment `number` the one that is written; a new one is made durably."""
        if self._handle >= 0:
            os.close(self._handle)
        path = self.folder / f"{self.writer}-{number:08}.jsonl".removeprefix("-")
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._handle = os.open(path, flags, 0o644)
        self._name, self._number, self._size = path.name, number, os.fstat(self._handle).st_size
        if path.name not in self._checked:
            self._checked[path.name] = Checked(len(self._files))
            self._files.append(path.open("rb"))
        fsync_folder(self.folder)

    def append(self, records: Iterable[NewRecord]) -> int:
        """Store records durably with one fsync; skip a key that is there. Return how many were new.

        Raises DistillError (exit 5) where the disk refuses. The log is then closed to writing: after
        a failed fsync nobody knows what the disk holds, so the next opening checks every line again.
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
        with disk_errors(self.folder):
            if self._size >= self.SEGMENT_BYTES:
                self._open_segment(self._number + 1)
            data = memoryview(b"".join(fresh.values()))
            try:
                while data:
                    data = data[os.write(self._handle, data) :]
                os.fsync(self._handle)
            except OSError:
                with suppress(
                    OSError
                ):  # what stays is a torn tail: the next opening moves it aside
                    os.ftruncate(self._handle, self._size)
                raise
        segment, lines, _ = self._checked[self._name]
        for (kind, key), line in fresh.items():
            self.index.setdefault(kind, {})[key] = segment << 40 | self._size
            self._size += len(line)
        self._checked[self._name] = Checked(segment, lines + len(fresh), self._size)
        self._sound = True
        return len(fresh)

    def __contains__(self, record: tuple[str, str]) -> bool:
        kind, key = record
        return key in self.index.get(kind, ())

    def get(self, kind: str, key: str) -> Any | None:
        """Return the body stored under kind and key, or None; raises DistillError (exit 5) on damage."""
        position = self.index.get(kind, {}).get(key)
        if position is None:
            return None
        file, offset = self._files[position >> 40], position & (1 << 40) - 1
        with disk_errors(self.folder):
            file.seek(offset)
            record = decode_line(file.readline().removesuffix(b"\n"))
        if record is None or (record.kind, record.key) != (kind, key):
            raise damaged(f"{file.name} at byte {offset}", self.folder, "damaged record")
        return json.loads(record.body)

    def keys(self, kind: str) -> Iterator[str]:
        """Yield the keys of one kind in the order they were stored."""
        return iter(self.index.get(kind, ()))


def _extend(path: Path, data: bytes) -> None:
    """Add bytes at the end of a file and make them, and its length, durable."""
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


class LogWriter:
    """Durable writes from one event loop: what waits while one fsync runs is written by the next."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self._waiting: list[tuple[Sequence[NewRecord], asyncio.Future[None]]] = []
        self._task: asyncio.Task[None] | None = None

    async def write(self, *records: NewRecord) -> None:
        """Return once the records are on the disk, where they come also when the caller is cancelled.

        Raises DistillError (exit 5) where the disk refuses.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((records, done))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._flush())
        await done

    async def finished(self) -> None:
        """Return once nothing waits to be written."""
        if self._task is not None:
            await self._task

    async def _flush(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting, []
            refusal = None
            try:
                records = [record for records, _ in group for record in records]
                await asyncio.to_thread(self.log.append, records)
            except DistillError as error:
                refusal = error
            for _, done in group:
                if not done.done():
                    done.set_exception(refusal) if refusal else done.set_result(None)


class Tail:
    """Reads what other processes add to a log, each line once; they hold the lock, not the reader."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.offsets = folder, dict[Path, int]()

    def read(self) -> Iterator[NewRecord]:
        """Yield what was added since the last call; a line that is being written waits for the next.

        Raises DistillError (exit 5) on damage.
        """
        for path in segments(self.folder):
            for _, offset, data, record in scan(path, offset=self.offsets.get(path, 0)):
                if data[-1] != NEWLINE:
                    break
                if record is None:
                    raise damaged(f"{path} at byte {offset}", self.folder, "damaged record")
                self.offsets[path] = offset + len(data)
                yield record.kind, record.key, json.loads(record.body)


def copy(records: Iterable[NewRecord], log: Log) -> int:
    """Append records to a log, a thousand an fsync; return how many were new."""
    source, count = iter(records), 0
    while group := list(islice(source, 1000)):
        count += log.append(group)
    return count


# What the folder of a copy is called until the copy is complete and takes the original's name
UNFINISHED = {"repair": ".repaired", "compact": ".compacted"}


def beside(folder: Path, suffix: str) -> Path:
    """Return the folder of this name and a suffix."""
    return folder.with_name(folder.name + suffix)


def refuse_half_copy(folder: Path, but: str = "") -> None:
    """Stop where a copy was killed between its renames: no empty log may take the old one's place.

    The verb `but` goes on, for it finishes its own.
    """
    for verb, suffix in UNFINISHED.items():
        if verb != but and not folder.exists() and beside(folder, suffix).exists():
            what = f"`distill {verb}` was cut off"
            raise DistillError(Exit.STATE, folder, what, f"distill {verb} {folder}")

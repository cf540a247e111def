"""Append-only logs of checksummed records: what is paid for is on the disk before anything goes on.

A log is a folder of numbered segments; a line of a segment is `SHA256 KIND KEY JSON`, the hash covering the rest of
the line. `append` returns after fsync, so what it returned for is there after a kill or a power cut. A torn tail (a
write that was cut off) is moved to `torn/` when a writer opens the log; damage anywhere else stops with exit 5 and
names `distill repair`, which copies what is whole and keeps the original. `distill compact` copies too, leaves out what
nothing reads any more, and removes the original once the copy has been held against it.
"""

import asyncio
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

from distill.errors import DistillError, Exit
from distill.records import canonical
from distill.storage.files import disk_errors, fsync_folder, read_json, write_atomic, write_json
from distill.storage.locks import FolderLock, sweep
from distill.storage.progress import say

BLOCK = 1 << 20  # bytes read at once
NEWLINE = ord("\n")
SEGMENTS = "[0-9]" * 8 + ".jsonl"


def encode_line(kind: str, key: str, body: Any) -> bytes:
    """Return the line of a record, newline included; `kind` and `key` are words, `body` is any JSON value."""
    if f"{kind} {key}".split() != [kind, key]:
        raise ValueError(f"kind and key must be words, not {kind!r} and {key!r}")
    rest = b"%s %s %s" % (kind.encode(), key.encode(), canonical(body))
    return hashlib.sha256(rest).hexdigest().encode() + b" " + rest + b"\n"


Entry = tuple[str, str, bytes]  # kind, key, JSON


def decode_line(line: bytes) -> Entry | None:
    """Return the record of a line without its newline, or None where the checksum fails."""
    rest = line[65:]
    if line[:65] != hashlib.sha256(rest).hexdigest().encode() + b" ":
        return None
    kind, key, body = rest.split(b" ", 2)
    return kind.decode(), key.decode(), body


VERSION = 1  # of the lines that this code writes
DECODERS: dict[int, Callable[[bytes], Entry | None]] = {1: decode_line}


def scan(
    segment: Path, version: int = VERSION, offset: int = 0
) -> Iterator[tuple[int, int, bytes, Entry | None]]:
    """Yield number (from 1), first byte, bytes and record (None where damaged) of every line from `offset` on.

    Memory is bounded by the longest line.
    """
    decode = DECODERS[version]
    with segment.open("rb", buffering=BLOCK) as file:
        file.seek(offset)
        for number, data in enumerate(file, 1):
            yield number, offset, data, decode(data[:-1] if data[-1] == NEWLINE else data)
            offset += len(data)


def segments(folder: Path) -> list[Path]:
    """Return a log's segments in order; raises DistillError (exit 5) where one is missing between them."""
    found = sorted(folder.glob(SEGMENTS))
    for number, path in enumerate(found, 1):
        if int(path.stem) != number:
            raise damaged(folder, folder, f"segment {number:08} is missing")
    return found


def read_version(folder: Path) -> int:
    """Return the version that a log says it has, 0 where it says none; raises DistillError (exit 5) on a newer one."""
    path = folder / "version.json"
    try:
        found = json.loads(path.read_bytes())["version"]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return 0
    if isinstance(found, int) and found > VERSION:
        what = f"store version {found}, newer than {VERSION}"
        raise DistillError(Exit.STATE, path, what, "use a newer distill")
    return found if found in DECODERS else 0


def damaged(where: object, folder: Path, what: str) -> DistillError:
    """Return the error of a log that is damaged, with the way out."""
    return DistillError(Exit.STATE, where, what, f"distill repair {folder}")


class Log:
    """An append-only folder of checksummed records, by kind and key; one writer, any number of readers.

    Opening checks every line, and keeps in memory where each record lies, not what it holds.
    """

    SEGMENT_BYTES = 256 << 20  # a segment that has reached this is followed by a new one

    def __init__(self, folder: Path, writable: bool = True) -> None:
        self.folder, self.writable = folder, writable
        self.index: dict[str, dict[str, int]] = {}  # kind to key to segment << 40 | first byte
        self.torn = 0
        self._handle, self._size, self._segment = -1, 0, 0
        self._sound = False  # False from the start of a write until it is known to be on the disk
        self._readers: dict[int, BinaryIO] = {}
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            refuse_half_copy(self.folder)
            if self.writable:
                undo.enter_context(FolderLock(self.folder))
                sweep(self.folder)
            undo.callback(self._close)
            with disk_errors(self.folder):
                self._load()
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._undo.close()

    def _close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
        for file in self._readers.values():
            file.close()
        self._handle, self._sound = -1, False
        self._readers.clear()

    def _load(self) -> None:
        """Check the version and every line, and open the last segment for writing."""
        found = segments(self.folder)  # before the version, which a writer beside us makes first
        version = read_version(self.folder)
        if version != VERSION and (version or found):
            what = f"store version {version or 'unknown'}, this is {VERSION}"
            raise damaged(self.folder / "version.json", self.folder, what)
        if not version and self.writable:
            write_json(self.folder / "version.json", {"version": VERSION})
        for number, segment in enumerate(found, 1):
            self._reader(
                number
            )  # opened now: a reader goes on in these files while a copy takes their place
            self._index_segment(number, segment, number == len(found))
        if self.writable:
            self._open_segment(max(len(found), 1))
            self._sound = True
        if self.torn and self.writable:
            say(f"{self.folder}: {self.torn} record cut off while being written, moved to torn/")

    def _index_segment(self, number: int, segment: Path, last: bool) -> None:
        """Note where each record lies. Only the last line of the last segment may lack its newline: it is torn."""
        for line, offset, data, record in scan(segment):
            whole = data[-1] == NEWLINE
            if record is None and last and not whole:
                self._set_aside(segment, offset, data)
                return
            if record is None or not (whole or last):
                raise damaged(f"{segment}:{line}", self.folder, "damaged record")
            kind, key, _ = record
            places = self.index.setdefault(kind, {})
            if key in places:
                what = f"{kind} {key} stands a second time"
                raise damaged(f"{segment}:{line}", self.folder, what)
            places[key] = number << 40 | offset
            if not whole:  # and read no further: a writer beside this reader may be adding to it
                if self.writable:
                    _extend(segment, b"\n")
                return

    def _set_aside(self, segment: Path, offset: int, tail: bytes) -> None:
        """Move a torn tail to `torn/`, named by its place and content: a crash here only repeats the move."""
        self.torn += 1
        if self.writable:
            name = f"{segment.stem}-{offset}-{hashlib.sha256(tail).hexdigest()[:8]}"
            write_atomic(self.folder / "torn" / name, tail)
            os.truncate(segment, offset)
            _extend(segment, b"")

    def _open_segment(self, number: int) -> None:
        """Make segment `number` the one that is written, creating it durably where it is new."""
        if self._handle >= 0:
            os.close(self._handle)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._handle = os.open(self.folder / f"{number:08}.jsonl", flags, 0o644)
        self._segment, self._size = number, os.fstat(self._handle).st_size
        fsync_folder(self.folder)

    def append(self, records: Iterable[tuple[str, str, Any]]) -> int:
        """Store (kind, key, body) records durably with one fsync; a key that is there is skipped. Return how many.

        Raises DistillError (exit 5) where the disk refuses. The log is then closed to writing: after a failed fsync
        nobody knows what the disk holds, so the next opening checks every line again.
        """
        if not self._sound:
            what, fix = "not open for writing, or an earlier write failed", "run again"
            raise DistillError(Exit.STATE, self.folder, what, fix)
        fresh: dict[tuple[str, str], bytes] = {}
        for kind, key, body in records:
            if (kind, key) not in self and (kind, key) not in fresh:
                fresh[kind, key] = encode_line(kind, key, body)
        if fresh:
            self._sound = False
            with disk_errors(self.folder):
                self._write(b"".join(fresh.values()))
            self._note(fresh)
            self._sound = True
        return len(fresh)

    def _write(self, data: bytes) -> None:
        """Write at the end and wait for the disk; where it refuses, take back what was written."""
        if self._size >= self.SEGMENT_BYTES:
            self._open_segment(self._segment + 1)
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._handle, left) :]
            os.fsync(self._handle)
        except OSError:
            with suppress(OSError):  # what stays is a torn tail, which the next opening moves aside
                os.ftruncate(self._handle, self._size)
            raise

    def _note(self, lines: dict[tuple[str, str], bytes]) -> None:
        for (kind, key), line in lines.items():
            self.index.setdefault(kind, {})[key] = self._segment << 40 | self._size
            self._size += len(line)

    def __contains__(self, record: tuple[str, str]) -> bool:
        kind, key = record
        return key in self.index.get(kind, ())

    def get(self, kind: str, key: str) -> Any | None:
        """Return the body stored under kind and key, or None; raises DistillError (exit 5) on damage."""
        place = self.index.get(kind, {}).get(key)
        if place is None:
            return None
        number, offset = place >> 40, place & (1 << 40) - 1
        with disk_errors(self.folder):
            file = self._reader(number)
            file.seek(offset)
            record = decode_line(file.readline().removesuffix(b"\n"))
        if record is None or record[:2] != (kind, key):
            raise damaged(f"{file.name} at byte {offset}", self.folder, "damaged record")
        return json.loads(record[2])

    def _reader(self, number: int) -> BinaryIO:
        if number not in self._readers:
            self._readers[number] = (self.folder / f"{number:08}.jsonl").open("rb")
        return self._readers[number]

    def keys(self, kind: str) -> Iterator[str]:
        """Yield the keys of one kind in the order they were stored."""
        return iter(self.index.get(kind, ()))


def _extend(path: Path, data: bytes) -> None:
    """Add bytes at the end of a file and make them, and its length, durable."""
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


class Tail:
    """Reads what another process adds to a log, each record once; whose log it is holds the lock."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.segment, self.offset = folder, 1, 0

    def read(self) -> Iterator[tuple[str, str, Any]]:
        """Yield what was added since the last call; a line that is still being written is left for the next.

        Raises DistillError (exit 5) on damage.
        """
        while (path := self._path(self.segment)).exists():
            finished = self._path(self.segment + 1).exists()  # asked first: then no line is missed
            for _, offset, data, record in scan(path, offset=self.offset):
                if data[-1] != NEWLINE:
                    break
                if record is None:
                    raise damaged(f"{path} at byte {offset}", self.folder, "damaged record")
                self.offset = offset + len(data)
                yield record[0], record[1], json.loads(record[2])
            if not finished:
                return
            self.segment, self.offset = self.segment + 1, 0

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08}.jsonl"


def copy(records: Iterable[tuple[str, str, Any]], log: Log) -> int:
    """Append records to a log, a thousand an fsync; return how many were new."""
    left, count = iter(records), 0
    while group := list(islice(left, 1000)):
        count += log.append(group)
    return count


# what the folder of a copy is called until it takes its place
REPAIRED, COMPACTED = ".repaired", ".compacted"
VERBS = {REPAIRED: "repair", COMPACTED: "compact"}


def beside(folder: Path, suffix: str) -> Path:
    """Return the folder of this name and a suffix."""
    return folder.with_name(folder.name + suffix)


def refuse_half_copy(folder: Path, but: str = "") -> None:
    """Stop where a copy was killed between its two renames: an empty log must not take the old one's place.

    The verb `but` goes on, for it finishes its own.
    """
    for suffix, verb in VERBS.items():
        if verb != but and not folder.exists() and beside(folder, suffix).exists():
            what = f"`distill {verb}` was cut off"
            raise DistillError(Exit.STATE, folder, what, f"distill {verb} {folder}")


class Loss(NamedTuple):
    """A line that a repair left out: where it stood, its length in bytes, and why."""

    place: str
    length: int
    reason: str


class Repair(NamedTuple):
    """What a repair did: the records kept, what was left out, and the folder that holds the original."""

    kept: int
    losses: list[Loss]
    original: Path

    def explain(self) -> list[str]:
        """Return the outcome in lines for the user."""
        head = f"{self.kept} records are whole; the original is kept in {self.original}"
        return [head, *(f"{place}: {reason}, {n} bytes" for place, n, reason in self.losses)]


def _refuse_no_store(folder: Path) -> None:
    if not any(folder.glob(SEGMENTS)) and not (folder / "version.json").exists():
        raise DistillError(Exit.STATE, folder, "is no store", "check the path")


def _put_in_place(fresh: Path, folder: Path) -> None:
    """Give a finished copy its name, durably."""
    fresh.rename(folder)
    fsync_folder(folder.parent)


def repair(folder: Path) -> Repair:
    """Copy what is whole into a fresh log, keep the original as `FOLDER.damaged-N`, and put the fresh one in its place.

    A log of an older version is brought to this one in the same way. The list of what was left out is also kept, as
    `repair.json` in the fresh log. Raises DistillError (exit 5) where the folder is no log, or is being written.
    """
    fresh = beside(folder, REPAIRED)
    with disk_errors(folder):
        refuse_half_copy(folder, "repair")
        if folder.exists():
            _refuse_no_store(folder)
            with FolderLock(folder):
                number = 1 + len(list(folder.parent.glob(f"{folder.name}.damaged-*")))
                original = beside(folder, f".damaged-{number}")
                losses: list[Loss] = []
                kept = _copy(_whole_records(folder, losses), fresh)
                report = {"kept": kept, "losses": losses, "original": original.name}
                write_json(fresh / "repair.json", report)
                folder.rename(original)
        _put_in_place(fresh, folder)
    report = read_json(folder / "repair.json")
    losses = [Loss(*row) for row in report["losses"]]
    return Repair(report["kept"], losses, folder.with_name(report["original"]))


def _copy(entries: Iterable[Entry], fresh: Path) -> int:
    """Copy records into a new log, and read it again to see that it holds just these; return how many.

    Raises DistillError (exit 5) where it does not.
    """
    shutil.rmtree(fresh, ignore_errors=True)  # of a copy that was killed
    wanted, found = hashlib.sha256(), hashlib.sha256()

    def noted() -> Iterator[tuple[str, str, Any]]:
        for entry in entries:
            wanted.update(repr(entry).encode())
            yield entry[0], entry[1], json.loads(entry[2])

    with Log(fresh) as log:
        count = copy(noted(), log)
    for segment in segments(fresh):
        for *_, entry in scan(segment):
            found.update(repr(entry).encode())
    if found.digest() != wanted.digest():
        what, fix = "the copy differs from the original, which is kept", "check disk and memory"
        raise DistillError(Exit.STATE, fresh, what, fix)
    return count


class Compaction(NamedTuple):
    """What a compaction did: the records kept, how many of which kind were left out, bytes before and after."""

    kept: int
    left_out: dict[str, int]
    before: int
    after: int

    def explain(self) -> list[str]:
        """Return the outcome in lines for the user."""
        out = [f"{count} of kind {kind} left out" for kind, count in self.left_out.items()]
        return [
            "; ".join([f"{self.kept} records kept", *out]),
            f"{self.before:,} bytes before, {self.after:,} after",
        ]


Worth = Callable[[Log, str, bytes], bool]  # of a log, a record's kind and its JSON


def compact(folder: Path, worth_keeping: Worth) -> Compaction:
    """Copy what is worth keeping into a fresh log, put it in the place of the original, and remove that.

    Torn tails and the report of a repair are kept, and segments are filled up. Raises DistillError (exit 5) where the folder is no log, is damaged, or is being written.
    """
    fresh, original = beside(folder, COMPACTED), beside(folder, ".original")
    with disk_errors(folder):
        refuse_half_copy(folder, "compact")
        if not original.exists():  # else it was cut off when the copy was whole
            _refuse_no_store(folder)
            with Log(folder) as log:
                _write_compact(log, fresh, worth_keeping)
                folder.rename(original)
        if not folder.exists():
            _put_in_place(fresh, folder)
        report = read_json(folder / "compact.json")  # not there: this is not what was copied
        shutil.rmtree(original)
        fsync_folder(folder.parent)
    return Compaction(**report, after=_size(folder))


def _write_compact(log: Log, fresh: Path, worth_keeping: Worth) -> None:
    """Write the whole copy, with an account of what was left out."""
    left_out: dict[str, int] = {}

    def chosen() -> Iterator[Entry]:
        for entry in _entries(log.folder):
            kind, _, body = entry
            if worth_keeping(log, kind, body):
                yield entry
            else:
                left_out[kind] = left_out.get(kind, 0) + 1

    kept = _copy(chosen(), fresh)
    for path in [*log.folder.glob("torn/*"), *log.folder.glob("repair.json")]:
        write_atomic(fresh / path.relative_to(log.folder), path.read_bytes())
    before = _size(log.folder)
    write_json(fresh / "compact.json", {"kept": kept, "left_out": left_out, "before": before})


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _entries(folder: Path) -> Iterator[Entry]:
    """Yield every record of a log that has been checked; raises DistillError (exit 5) where one is damaged since."""
    for segment in segments(folder):
        for number, _, _, record in scan(segment):
            if record is None:
                raise damaged(f"{segment}:{number}", folder, "damaged record")
            yield record


def _whole_records(folder: Path, losses: list[Loss]) -> Iterator[Entry]:
    """Yield the first whole record of every key, and note in `losses` every line that is left out."""
    version, seen = read_version(folder) or VERSION, set()
    for segment in sorted(folder.glob(SEGMENTS)):
        for number, _, data, record in scan(segment, version):
            place = f"{segment.name}:{number}"
            if record is None:
                what = "damaged" if data[-1] == NEWLINE else "cut off while being written"
                losses.append(Loss(place, len(data), what))
            elif record[:2] in seen:
                what = f"{record[0]} {record[1]} a second time, the first is kept"
                losses.append(Loss(place, len(data), what))
            else:
                seen.add(record[:2])
                yield record


class LogWriter:
    """Writes to a log from one event loop; the log's writer is no other meanwhile."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self._waiting: list[tuple[Sequence[Entry], asyncio.Future[None]]] = []
        self._task: asyncio.Task[None] | None = None

    async def write(self, *entries: Entry) -> None:
        """Return once the entries are on the disk; they get there also when the caller is cancelled meanwhile.

        Raises DistillError (exit 5) where the disk refuses.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((entries, done))
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
            fault = None
            try:
                records = [entry for entries, _ in group for entry in entries]
                await asyncio.to_thread(self.log.append, records)
            except DistillError as error:
                fault = error
            for _, done in group:
                if not done.done():
                    done.set_exception(fault) if fault else done.set_result(None)

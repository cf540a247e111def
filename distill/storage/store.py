"""What survives a crash: atomic files, locks, and append-only logs of checksummed records.

A log is a folder of numbered segments; a line of a segment is `SHA256 KIND KEY JSON`, the hash covering the rest of
the line. `append` returns after fsync, so what it returned for is there after a kill or a power cut. A torn tail (a
write that was cut off) is moved to `torn/` when a writer opens the log; damage anywhere else stops with exit 5 and
names `distill repair`, which copies what is whole and keeps the original. `distill compact` copies too, leaves out what
nothing reads any more, and removes the original once the copy has been held against it.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeVar

from pydantic import ValidationError

from distill.errors import DistillError, Exit
from distill.records import Record, canonical
from distill.storage.progress import say

R = TypeVar("R", bound=Record)

BLOCK = 1 << 20  # bytes read at once
NEWLINE = ord("\n")
SEGMENTS = "[0-9]" * 8 + ".jsonl"
REMAKE = "remake it with --redo STAGE"
MAKE_WRITABLE, FREE_SPACE = "make it writable, then run again", "free space, then run again"
WAYS_OUT = {
    errno.ENOSPC: FREE_SPACE,
    errno.EDQUOT: FREE_SPACE,
    errno.EROFS: MAKE_WRITABLE,
    errno.EACCES: MAKE_WRITABLE,
    errno.EPERM: MAKE_WRITABLE,
    errno.EMFILE: "raise the limit of open files (ulimit -n), then run again",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "check the path",
}


@contextmanager
def disk_faults(where: Path) -> Iterator[None]:
    """Turn what the operating system refuses into one line with a way out (exit 5)."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        fix = WAYS_OUT.get(error.errno or 0, "check the disk, then run again")
        raise DistillError(Exit.STATE, error.filename or where, reason, fix) from None


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits; raises OSError where it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """Return the SHA-256 of a text's UTF-8 bytes: what `sha256_file` says of a file that holds it."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Hash files, and all files below folders, by their path below `folder`; what is not there is left out."""
    files = [p for name in names for p in sorted([folder / name, *(folder / name).rglob("*")])]
    return {p.relative_to(folder).as_posix(): sha256_file(p) for p in files if p.is_file()}


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part."""
    content = data.encode("utf-8") if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def sweep(folder: Path) -> None:
    """Remove what `write_atomic` left in a folder, and below it, in processes that were killed."""
    for path in folder.rglob(".*.tmp"):
        pid = path.stem.rpartition(".")[2]
        if pid.isdigit() and path.is_file() and not alive(int(pid)):
            path.unlink(missing_ok=True)


def as_json(value: Any) -> str:
    """Return the text of a JSON file of ours: indented, one trailing newline, no NaN."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, as_json(value))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DistillError(Exit.STATE, path, "is missing", "run the stage that makes it") from None


def read_json(path: Path) -> Any:
    """Read a JSON file of ours; raises DistillError (exit 5) where it is missing or damaged."""
    with disk_faults(path):
        try:
            return json.loads(_read(path))
        except ValueError:
            raise DistillError(Exit.STATE, path, "is damaged", REMAKE) from None


def write_records(path: Path, records: Iterable[Record]) -> int:
    """Write records as JSON lines, atomically, and return how many."""
    lines = [record.to_line() + "\n" for record in records]
    write_atomic(path, "".join(lines))
    return len(lines)


def read_records(path: Path, kind: type[R], torn: bool = False) -> list[R]:
    """Read records of one kind; raises DistillError (exit 5) with the line of any damage.

    With `torn`, a last line without its newline is not counted: `append_record` was cut off while it wrote it.
    """
    with disk_faults(path):
        lines = _read(path).split(b"\n")
    if torn:
        lines.pop()
    records = []
    for number, line in enumerate(lines, 1):
        if line:
            try:
                records.append(kind.from_line(line))
            except ValidationError:
                raise DistillError(Exit.STATE, f"{path}:{number}", "is damaged", REMAKE) from None
    return records


def append_record(path: Path, record: Record) -> None:
    """Add one record to a small file of lines, durably; a last line that a crash cut off goes first."""
    with disk_faults(path), path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(record.to_line().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


class FolderLock:
    """One process at a time may write in a folder; the lock of a dead process is free."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self.handle = -1

    def __enter__(self) -> Self:
        with disk_faults(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._take():
                os.close(self.handle)
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

    def _take(self) -> bool:
        """Lock the file, and say whether it is still the one at the path: a repair may have moved the folder."""
        self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = self._holder()
            os.close(self.handle)
            what, fix = f"lock held by pid {holder}", "wait for it, or end it"
            raise DistillError(Exit.STATE, self.path.parent, what, fix) from None
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self.handle), self.path.stat())
        return False

    def _holder(self) -> str:
        """Return the holder's pid; it writes it just after it locked, over a dead one's, so look for a moment."""
        pid = ""
        for _ in range(20):
            pid = os.pread(self.handle, 32, 0).decode("ascii", "replace")
            if pid.isdigit() and alive(int(pid)):
                break
            time.sleep(0.01)
        return pid or "unknown"


def alive(pid: int) -> bool:
    """Tell whether there is a process of that id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


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
            with disk_faults(self.folder):
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
            with disk_faults(self.folder):
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
        with disk_faults(self.folder):
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


def remove(folder: Path) -> None:
    """Remove a folder so that no crash leaves a part of it under its name."""
    gone = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)


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

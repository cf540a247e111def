"""Files that survive a crash: written atomically or not at all, read with the line of damage."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from safetensors import SafetensorError

from distill.errors import DistillError, Exit, system_error
from distill.records import Record
from distill.storage.progress import say

R = TypeVar("R", bound=Record)
REMAKE = "remake it with --redo STAGE"
# What a mounted drive answers that knows no locks, or no fsync of a folder
NOT_OFFERED = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn what the operating system refuses into one line with a way out (exit 5)."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and error.filename == str(where):
            what, fix = "is missing", "run the stage that makes it, or check the path"
            raise DistillError(Exit.STATE, where, what, fix) from None
        raise system_error(error, where) from None
    except SafetensorError as error:  # of a full disk too
        what, fix = f"could not be written: {error}", "free space, then run again"
        raise DistillError(Exit.STATE, where, what, fix) from None


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits; raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Hash files, and all files below folders, by their path below `folder`, where they exist."""
    files = [p for name in names for p in sorted([folder / name, *(folder / name).rglob("*")])]
    return {p.relative_to(folder).as_posix(): sha256_file(p) for p in files if p.is_file()}


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the file system can do that for a folder."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes | str | Iterable[bytes]) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part."""
    content = data.encode("utf-8") if isinstance(data, str) else data
    pieces = (content,) if isinstance(content, bytes) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:  # of the disk, or of what yields the pieces
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def as_json(value: object) -> str:
    """Return the text of a JSON file of ours: indented, one trailing newline, no NaN."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, as_json(value))


def read_json(path: Path) -> Any:
    """Read a JSON file of ours; raises DistillError (exit 5) where it is missing or damaged."""
    with disk_errors(path):
        try:
            return json.loads(path.read_bytes())
        except ValueError:
            raise DistillError(Exit.STATE, path, "is damaged", REMAKE) from None


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write records as JSON lines, one at a time, atomically."""
    write_atomic(path, (record.model_dump_json().encode() + b"\n" for record in records))


def read_records(path: Path, kind: type[R], torn: bool = False) -> list[R]:
    """Read records of one kind; raises DistillError (exit 5) with the line of any damage.

    With `torn`, a last line without its newline is not counted: `append_record` was cut off there.
    """
    records = list[R]()
    with disk_errors(path), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line == b"\n" or (torn and not line.endswith(b"\n")):
                continue
            try:
                records.append(kind.model_validate_json(line))
            except ValidationError:
                where = f"{path}:{number}"
                raise DistillError(Exit.STATE, where, "is damaged", REMAKE) from None
    return records


def extend(path: Path, data: bytes, size: int | None = None) -> None:
    """Add bytes to a file, behind its first `size` ones where that is given, and durably."""
    with path.open("ab") as file:
        if size is not None:
            file.truncate(size)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def append_record(path: Path, record: Record) -> None:
    """Add a record to a small file of lines, durably, in place of a line that a crash cut off."""
    with disk_errors(path):
        lines = path.read_bytes() if path.exists() else b""
        extend(path, record.model_dump_json().encode() + b"\n", lines.rfind(b"\n") + 1)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `folder`, complete or not at all."""
    work = folder.with_name(f".{folder.name}.{os.getpid()}")
    for old in folder.parent.glob(f".{folder.name}.*"):
        if old == work or not alive(int(old.suffix[1:])):
            shutil.rmtree(old)
    try:
        work.mkdir(parents=True)
        yield work
        for path in work.rglob("*"):
            if path.is_file():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
        fsync_folder(work)
        shutil.rmtree(folder, ignore_errors=True)
        work.replace(folder)
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def folder_lock(folder: Path, shared: bool = False, patience: float = 0.0) -> Iterator[None]:
    """Let one process at a time write in a folder; the lock of a dead process is free.

    With `shared` several hold it together, and keep out who wants it alone, who removes what
    `write_atomic` left there, and below, in processes that were killed. `patience` is in seconds.
    """
    path, end = folder / ".lock", time.monotonic() + patience
    with disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                held = _lock(folder, handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
                with suppress(FileNotFoundError):  # a repair has moved the folder since
                    if os.path.samestat(os.fstat(handle), path.stat()):
                        os.ftruncate(handle, 0)
                        os.pwrite(handle, str(os.getpid()).encode(), 0)
                        for stray in folder.rglob(".*.tmp") if held and not shared else ():
                            pid = stray.stem.rpartition(".")[2]
                            if pid.isdigit() and stray.is_file() and not alive(int(pid)):
                                stray.unlink(missing_ok=True)
                        break
            except BlockingIOError:
                holder = os.pread(handle, 32, 0).decode("ascii", "replace")
                # a new holder writes its pid over a dead one's just after it locked
                late = time.monotonic() >= end + (not holder.isdigit() or not alive(int(holder)))
                if late:
                    os.close(handle)
                    what, fix = f"lock held by pid {holder or 'unknown'}", "wait for it, or end it"
                    raise DistillError(Exit.STATE, folder, what, fix) from None
                time.sleep(0.01)
            os.close(handle)
    try:
        yield
    finally:
        os.close(handle)


def _lock(folder: Path, handle: int, kind: int) -> bool:
    """Lock a file, if its drive can; BlockingIOError where another process has it."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
        say(f"{folder}: its drive has no locks; see that nothing else writes there")
        return False
    return True


def is_locked(folder: Path) -> bool:
    """Tell whether a process holds the lock of a folder."""
    try:
        with (folder / ".lock").open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # where there is no such file, nobody has been there
        return isinstance(error, BlockingIOError)
    return False


def alive(pid: int) -> bool:
    """Tell whether there is a process of that id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True

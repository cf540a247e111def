"""One writer a folder: the lock that says so, and the removal of what killed writers left."""

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

from distill.errors import DistillError, Exit
from distill.storage.files import disk_errors


def sweep(folder: Path) -> None:
    """Remove what `write_atomic` left in a folder, and below it, in processes that were killed."""
    for path in folder.rglob(".*.tmp"):
        pid = path.stem.rpartition(".")[2]
        if pid.isdigit() and path.is_file() and not alive(int(pid)):
            path.unlink(missing_ok=True)


class FolderLock:
    """One process at a time may write in a folder; the lock of a dead process is free."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self.handle = -1

    def __enter__(self) -> Self:
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._take():
                os.close(self.handle)
            os.ftruncate(self.handle, 0)
            os.pwrite(self.handle, str(os.getpid()).encode(), 0)
        return self

    def __exit__(self, *error: object) -> None:
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

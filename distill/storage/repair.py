"""Repairs and compacts a log: copies what is whole, or worth keeping, into a fresh one that then takes its place.

The copy is read again and held against what was copied before it gets the name; a kill at any moment leaves the log
whole under one name or the other, and the same command goes on.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from distill.errors import DistillError, Exit
from distill.storage.store import (
    COMPACTED,
    NEWLINE,
    REPAIRED,
    SEGMENTS,
    VERSION,
    Entry,
    FolderLock,
    Log,
    beside,
    copy,
    damaged,
    disk_faults,
    fsync_folder,
    read_json,
    read_version,
    refuse_half_copy,
    scan,
    segments,
    write_atomic,
    write_json,
)


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
    with disk_faults(folder):
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
    with disk_faults(folder):
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

"""Repairs and compacts a log: copies what is intact, or worth keeping, into a fresh one.

The copy is compared with what was copied before it takes the original's name. A kill at any moment
leaves the log complete under one name or the other, and the same command goes on.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from distill.errors import DistillError, Exit
from distill.storage.files import (
    disk_errors,
    folder_lock,
    fsync_folder,
    read_json,
    write_atomic,
    write_json,
)
from distill.storage.log import (
    UNFINISHED,
    Log,
    NewRecord,
    StoredRecord,
    damaged,
    read_version,
    refuse_half_copy,
    scan,
    segments,
    writer_of,
)


def repair(folder: Path) -> list[str]:
    """Put what is intact into a fresh log, in the original's place; return lines to print.

    The original becomes `FOLDER.damaged-N`; `repair.json` in the fresh log lists what was left out.
    Raises DistillError (exit 5) where the folder is no log, or is being written.
    """
    fresh = folder.with_name(folder.name + UNFINISHED["repair"])
    with disk_errors(folder):
        refuse_half_copy(folder, "repair")
        if folder.exists():
            _refuse_no_store(folder)
            with folder_lock(folder):
                number = 1 + len(list(folder.parent.glob(f"{folder.name}.damaged-*")))
                original, losses = f"{folder.name}.damaged-{number}", list[str]()
                count = _copy(_intact(folder, losses), fresh)
                report = {"kept": count, "losses": losses, "original": original}
                write_json(fresh / "repair.json", report)
                folder.rename(folder.with_name(original))
        fresh.rename(folder)
        fsync_folder(folder.parent)
    report = read_json(folder / "repair.json")
    original = folder.with_name(report["original"])
    head = f"{report['kept']} records are intact; the original is kept in {original}"
    return [head, *map(str, report["losses"])]


def compact(folder: Path, worth_keeping: Callable[[Log, str, bytes], bool]) -> list[str]:
    """Put what is worth keeping into a fresh log in the original's place; return lines to print.

    `worth_keeping` takes a log, a record's kind and its JSON. Torn tails and the report of a repair
    are kept. Raises DistillError (exit 5) where the folder is no log, is damaged, or is written.
    """
    fresh = folder.with_name(folder.name + UNFINISHED["compact"])
    original = folder.with_name(f"{folder.name}.original")
    with disk_errors(folder):
        refuse_half_copy(folder, "compact")
        if not original.exists():  # else a compaction was cut off when the copy was complete
            _refuse_no_store(folder)
            with Log(folder) as log:
                losses = list[str]()
                records = _intact(folder, losses)
                count = _copy((r for r in records if worth_keeping(log, r[0], r[2])), fresh)
                if losses:  # damaged since the log was opened
                    raise damaged(folder / losses[0], folder)
                for path in [*folder.glob("torn/*"), *folder.glob("repair.json")]:
                    write_atomic(fresh / path.relative_to(folder), path.read_bytes())
                left_out = sum(map(len, log.index.values())) - count
                write_json(fresh / "compact.json", {"kept": count, "left_out": left_out})
                folder.rename(original)
        if not folder.exists():
            fresh.rename(folder)
            fsync_folder(folder.parent)
        report = read_json(folder / "compact.json")  # not there: this is not what was copied
        shutil.rmtree(original)
        fsync_folder(folder.parent)
    return [f"{report['kept']} records kept, {report['left_out']} left out"]


def _refuse_no_store(folder: Path) -> None:
    if not segments(folder, check=False) and not (folder / "version.json").exists():
        raise DistillError(Exit.STATE, folder, "is no store", "check the path")


def _copy(records: Iterable[StoredRecord], fresh: Path) -> int:
    """Copy records into a new log, and read it again to see that it holds just these; count them.

    Raises DistillError (exit 5) where it does not.
    """
    shutil.rmtree(fresh, ignore_errors=True)  # of a copy that was killed
    source, target = hashlib.sha256(), hashlib.sha256()

    def hashed() -> Iterator[NewRecord]:
        for record in records:
            source.update(repr(record).encode())
            yield record[0], record[1], json.loads(record[2])

    with Log(fresh) as log:
        count = log.copy(hashed())
    for segment in segments(fresh):
        for *_, record in scan(segment):
            target.update(repr(record).encode())
    if target.digest() != source.digest():
        what, fix = "the copy differs from the original, which is kept", "check disk and memory"
        raise DistillError(Exit.STATE, fresh, what, fix)
    return count


def _intact(folder: Path, losses: list[str]) -> Iterator[StoredRecord]:
    """Yield the first intact record of every key, and add to `losses` a line on each lost one.

    A record that another writer stored too is no loss.
    """
    read_version(folder)  # which refuses a newer one
    writers = dict[tuple[str, str], str]()
    for segment in segments(folder, check=False):
        for number, (_, data, record) in enumerate(scan(segment), 1):
            reason = "damaged" if data.endswith(b"\n") else "cut off while being written"
            if record is not None:
                kind, key, _ = record
                if (kind, key) not in writers:
                    writers[kind, key] = writer_of(segment)
                    yield record
                    continue
                if writers[kind, key] != writer_of(segment):
                    continue
                reason = f"{kind} {key} a second time, the first is kept"
            losses.append(f"{segment.name}:{number}: {reason}, {len(data)} bytes")

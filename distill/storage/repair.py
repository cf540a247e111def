"""Repairs and compacts a log: copies what is intact, or worth keeping, into a fresh one.

The copy is compared with what was copied before it takes the original's name. A kill at any moment
leaves the log complete under one name or the other, and the same command goes on.
"""

import hashlib
import json
import shutil
from collections import Counter
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
    NEWLINE,
    UNFINISHED,
    Log,
    NewRecord,
    StoredRecord,
    copy,
    damaged,
    read_version,
    refuse_half_copy,
    scan,
    segments,
    writer_of,
)

LostLine = tuple[str, int, str]  # left out by a copy: segment and number, length in bytes, why


def repair(folder: Path) -> list[str]:
    """Put what is intact into a fresh log, in the original's place; return lines to print.

    The original becomes `FOLDER.damaged-N`. The lines that were left out are also listed in
    `repair.json` in the fresh log. Raises DistillError (exit 5) where the folder is no log, or is
    being written.
    """
    fresh = folder.with_name(folder.name + UNFINISHED["repair"])
    with disk_errors(folder):
        refuse_half_copy(folder, "repair")
        if folder.exists():
            _refuse_no_store(folder)
            with folder_lock(folder):
                number = 1 + len(list(folder.parent.glob(f"{folder.name}.damaged-*")))
                original, lost = f"{folder.name}.damaged-{number}", list[LostLine]()
                count = _copy(_intact(folder, lost), fresh)
                report = {"kept": count, "losses": lost, "original": original}
                write_json(fresh / "repair.json", report)
                folder.rename(folder.with_name(original))
        fresh.rename(folder)
        fsync_folder(folder.parent)
    report = read_json(folder / "repair.json")
    original = folder.with_name(report["original"])
    head = f"{report['kept']} records are intact; the original is kept in {original}"
    return [head, *(f"{place}: {why}, {size} bytes" for place, size, why in report["losses"])]


def compact(folder: Path, worth_keeping: Callable[[Log, str, bytes], bool]) -> list[str]:
    """Put what is worth keeping into a fresh log in the original's place; return lines to print.

    `worth_keeping` takes a log, a record's kind and its JSON. Torn tails and the report of a repair
    are kept, and segments are filled up. Raises DistillError (exit 5) where the folder is no log,
    is damaged, or is being written.
    """
    fresh = folder.with_name(folder.name + UNFINISHED["compact"])
    original = folder.with_name(f"{folder.name}.original")

    def size() -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    with disk_errors(folder):
        refuse_half_copy(folder, "compact")
        if not original.exists():  # else a compaction was cut off when the copy was complete
            _refuse_no_store(folder)
            with Log(folder) as log:
                lost, left_out = list[LostLine](), Counter[str]()

                def valuable() -> Iterator[StoredRecord]:
                    for record in _intact(folder, lost):
                        if worth_keeping(log, record.kind, record.body):
                            yield record
                        else:
                            left_out[record.kind] += 1

                count = _copy(valuable(), fresh)
                if lost:  # damaged since the log was opened
                    raise damaged(folder / lost[0][0], folder)
                for path in [*folder.glob("torn/*"), *folder.glob("repair.json")]:
                    write_atomic(fresh / path.relative_to(folder), path.read_bytes())
                report = {"kept": count, "left_out": left_out, "before": size()}
                write_json(fresh / "compact.json", report)
                folder.rename(original)
        if not folder.exists():
            fresh.rename(folder)
            fsync_folder(folder.parent)
        report = read_json(folder / "compact.json")  # not there: this is not what was copied
        shutil.rmtree(original)
        fsync_folder(folder.parent)
    counts = [f"{report['kept']} records kept"]
    counts += [f"{count} of kind {kind} left out" for kind, count in report["left_out"].items()]
    return ["; ".join(counts), f"{report['before']:,} bytes before, {size():,} after"]


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
            yield record.kind, record.key, json.loads(record.body)

    with Log(fresh) as log:
        count = copy(hashed(), log)
    for segment in segments(fresh):
        for *_, record in scan(segment):
            target.update(repr(record).encode())
    if target.digest() != source.digest():
        what, fix = "the copy differs from the original, which is kept", "check disk and memory"
        raise DistillError(Exit.STATE, fresh, what, fix)
    return count


def _intact(folder: Path, lost: list[LostLine]) -> Iterator[StoredRecord]:
    """Yield the first intact record of every key, and add to `lost` every other line.

    A record that another writer stored too is no loss.
    """
    read_version(folder)  # which refuses a newer one
    seen = dict[tuple[str, str], str]()
    for segment in segments(folder, check=False):
        writer = writer_of(segment)
        for number, (_, data, record) in enumerate(scan(segment), 1):
            reason = "damaged" if data[-1] == NEWLINE else "cut off while being written"
            if record is not None:
                key = (record.kind, record.key)
                if key not in seen:
                    seen[key] = writer
                    yield record
                    continue
                reason = f"{record.kind} {record.key} a second time, the first is kept"
            if record is None or seen[record.kind, record.key] == writer:
                lost.append((f"{segment.name}:{number}", len(data), reason))

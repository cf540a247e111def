"""Repairs a log: copies what is intact into a fresh one, which takes the original's place."""

import shutil
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from distill.errors import DistillError, Exit
from distill.storage import log as logs
from distill.storage.files import (
    disk_errors,
    folder_lock,
    fsync_folder,
    read_json,
    write_atomic,
    write_json,
)


def repair(folder: Path) -> list[str]:
    """Put the intact lines into a fresh log, in the original's place; return lines to print.

    The original becomes `FOLDER.damaged-N`. A kill leaves the log complete under one name or the
    other. Raises DistillError (exit 5) where the folder is no log, or is being written.
    """
    fresh = folder.with_name(folder.name + logs.REPAIRED)
    with disk_errors(folder):
        if folder.exists():
            if not logs.segments(folder, check=False) and not (folder / "version.json").exists():
                raise DistillError(Exit.STATE, folder, "is no store", "check the path")
            with folder_lock(folder):
                logs.has_version(folder)  # which refuses a newer one
                shutil.rmtree(fresh, ignore_errors=True)  # of a repair that was killed
                losses, writers = list[str](), dict[tuple[str, str], str]()
                paths = logs.segments(folder, check=False)
                for writer, group in groupby(paths, logs.writer_of):
                    for number, segment in enumerate(group, 1):
                        lines = _intact(segment, writers, losses)
                        write_atomic(fresh / logs.segment_name(writer, number), lines)
                write_json(fresh / "version.json", {"version": logs.VERSION})
                try:
                    with logs.Log(fresh, writable=False) as copy:  # which checks every line of it
                        records = sum(map(len, copy.index.values()))
                except DistillError as error:
                    what = f"the copy cannot be read: {error.what}; the original is kept"
                    raise DistillError(Exit.STATE, fresh, what, "check disk and memory") from None
                number = 1 + len(list(folder.parent.glob(f"{folder.name}.damaged-*")))
                report = {"kept": records, "losses": losses}
                report["original"] = f"{folder.name}.damaged-{number}"
                write_json(fresh / "repair.json", report)
                folder.rename(folder.with_name(report["original"]))
        fresh.rename(folder)
        fsync_folder(folder.parent)
    report = read_json(folder / "repair.json")
    original = f"the original is kept in {folder.with_name(report['original'])}"
    return [f"{report['kept']} records are intact; {original}", *map(str, report["losses"])]


def _intact(
    segment: Path, writers: dict[tuple[str, str], str], losses: list[str]
) -> Iterator[bytes]:
    """Yield the line of each key's first intact record; `losses` gets a line on each that is lost.

    `writers` says who wrote the first of each key: another's second one is no loss.
    """
    writer = logs.writer_of(segment)
    for number, (_, data, record) in enumerate(logs.scan(segment), 1):
        reason = "damaged" if data.endswith(b"\n") else "cut off while being written"
        if record is not None:
            if record[:2] not in writers:
                writers[record[:2]] = writer
                yield data.removesuffix(b"\n") + b"\n"
                continue
            if writers[record[:2]] != writer:
                continue
            reason = f"{record[0]} {record[1]} a second time, the first is kept"
        losses.append(f"{segment.name}:{number}: {reason}, {len(data)} bytes")

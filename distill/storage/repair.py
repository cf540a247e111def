"""Repairs a log: copies what is intact into a fresh one, which takes the original's place."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from distill.errors import DistillError, Exit
from distill.storage import log as logs
from distill.storage.files import disk_errors, folder_lock, fsync_folder, read_json, write_json
from distill.storage.log import Log, NewRecord, StoredRecord


def repair(folder: Path) -> list[str]:
    """Put what is intact into a fresh log, in the original's place; return lines to print.

    The original becomes `FOLDER.damaged-N`. A kill leaves the log complete under one name or the
    other. Raises DistillError (exit 5) where the folder is no log, or is being written.
    """
    fresh = folder.with_name(folder.name + logs.REPAIRED)
    with disk_errors(folder):
        if folder.exists():
            if not logs.segments(folder, check=False) and not (folder / "version.json").exists():
                raise DistillError(Exit.STATE, folder, "is no store", "check the path")
            with folder_lock(folder):
                shutil.rmtree(fresh, ignore_errors=True)  # of a repair that was killed
                number = 1 + len(list(folder.parent.glob(f"{folder.name}.damaged-*")))
                original, losses = f"{folder.name}.damaged-{number}", list[str]()
                source, target = hashlib.sha256(), hashlib.sha256()

                def hashed() -> Iterator[NewRecord]:
                    for record in _intact(folder, losses):
                        source.update(repr(record).encode())
                        yield record[0], record[1], json.loads(record[2])

                with Log(fresh) as log:
                    count = log.copy(hashed())
                for segment in logs.segments(fresh):
                    for *_, record in logs.scan(segment):
                        target.update(repr(record).encode())
                if target.digest() != source.digest():
                    what = "the copy differs from the original, which is kept"
                    raise DistillError(Exit.STATE, fresh, what, "check disk and memory")
                report = {"kept": count, "losses": losses, "original": original}
                write_json(fresh / "repair.json", report)
                folder.rename(folder.with_name(original))
        fresh.rename(folder)
        fsync_folder(folder.parent)
    report = read_json(folder / "repair.json")
    original = folder.with_name(report["original"])
    head = f"{report['kept']} records are intact; the original is kept in {original}"
    return [head, *map(str, report["losses"])]


def _intact(folder: Path, losses: list[str]) -> Iterator[StoredRecord]:
    """Yield the first intact record of every key; `losses` gets a line on each that is lost."""
    logs.has_version(folder)  # which refuses a newer one
    writers = dict[tuple[str, str], str]()
    for segment in logs.segments(folder, check=False):
        for number, (_, data, record) in enumerate(logs.scan(segment), 1):
            reason = "damaged" if data.endswith(b"\n") else "cut off while being written"
            if record is not None:
                kind, key, _ = record
                if (kind, key) not in writers:
                    writers[kind, key] = logs.writer_of(segment)
                    yield record
                    continue
                if writers[kind, key] != logs.writer_of(segment):
                    continue
                reason = f"{kind} {key} a second time, the first is kept"
            losses.append(f"{segment.name}:{number}: {reason}, {len(data)} bytes")

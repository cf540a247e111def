"""A run's ledger: what each go of a stage took, in seconds, tokens and dollars, also when killed.

What a stage spends stands at once in `stages/STAGE.spent.jsonl`; when the stage ends, or the next
go finds that it was killed, the sum is entered in `ledger.jsonl`.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

from distill.records import LedgerEntry
from distill.storage.files import append_record, disk_errors, read_json, read_records

HEARTBEAT = 5.0  # seconds between the signs of life of a running stage
SPENT = ".spent.jsonl"
COUNTS = [name for name, field in LedgerEntry.model_fields.items() if field.annotation is int]


class Ledger:
    """The ledger in a run's folder, and the stage whose spending is counted now."""

    def __init__(self, folder: Path) -> None:
        self.path, self.stages = folder / "ledger.jsonl", folder / "stages"
        self._stage = ""

    def entries(self) -> list[LedgerEntry]:
        """Return the ledger so far."""
        return read_records(self.path, LedgerEntry, torn=True) if self.path.exists() else []

    def parts(self, stage: str = "") -> list[LedgerEntry]:
        """Return what a stage, or the running one, has spent and is not in the ledger yet."""
        path = self.stages / ((stage or self._stage) + SPENT)
        return read_records(path, LedgerEntry, torn=True) if path.exists() else []

    def spend(
        self, input_tokens: int = 0, output_tokens: int = 0, student: bool = False, **more: object
    ) -> None:
        """Add to what the running stage has spent; `more` are further fields of its entry."""
        if not self._stage:
            return
        tokens = {"input_tokens": input_tokens, "output_tokens": output_tokens}
        tokens["student_output_tokens"] = output_tokens if student else 0
        facts = {"stage": self._stage, "started": now(), "seconds": 0.0, **tokens, **more}
        path = self.stages / (self._stage + SPENT)
        with disk_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(LedgerEntry.model_validate(facts).model_dump_json() + "\n")

    @contextmanager
    def counting(self, stage: str, marker: Path, started: str) -> Iterator[None]:
        """Enter the seconds and the spending of the block, also when it fails."""
        clock, note, over = time.monotonic(), "failed", threading.Event()

        def beat() -> None:
            while not over.wait(HEARTBEAT):
                with suppress(OSError):
                    os.utime(marker)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        self._stage = stage
        try:
            yield
            note = ""
        finally:
            self._stage = ""
            over.set()
            thread.join()
            self._enter(stage, started, time.monotonic() - clock, note)

    def enter_killed(self, stage: str) -> None:
        """Enter the seconds of `stage` and others that were killed, until the last sign of life."""
        spending = {p.name.removesuffix(SPENT) for p in self.stages.glob(f"*{SPENT}")}
        for name in sorted({stage, *spending}):
            marker = self.stages / f"{name}.json"
            begun = read_json(marker).get("begun") if marker.exists() else None
            if any((entry.stage, entry.started) == (name, begun) for entry in self.entries()):
                (self.stages / (name + SPENT)).unlink(missing_ok=True)  # killed after its entry
            elif begun:
                alive = marker.stat().st_mtime - datetime.fromisoformat(begun).timestamp()
                self._enter(name, begun, max(alive, 0.0), "killed")

    def _enter(self, stage: str, started: str, seconds: float, note: str) -> None:
        """Write a stage's entry, with the sum of what it has spent; None where nothing is known."""
        parts = self.parts(stage)
        sums: dict[str, object] = {n: sum(getattr(part, n) for part in parts) for n in COUNTS}
        for name in ("dollars", "unknown_dollars"):
            amounts = [getattr(part, name) for part in parts if getattr(part, name) is not None]
            sums[name] = sum(amounts, Decimal(0)) if amounts else None
        price = next((part.price for part in reversed(parts) if part.price), None)
        facts = {"stage": stage, "started": started, "seconds": seconds, "note": note, **sums}
        append_record(self.path, LedgerEntry.model_validate({**facts, "price": price}))
        (self.stages / (stage + SPENT)).unlink(missing_ok=True)


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")

"""A run's folder: its stages and their fingerprints, its manifest, and the ledger of what was spent.

A stage is fresh, unfinished, done or stale. A stale one (its config keys or inputs changed) stops with the keys that
differ, until `--redo` sets its old outputs aside under `.old/`; nothing is ever overwritten silently.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from distill.config import Config
from distill.errors import DistillError, Exit
from distill.records import LedgerEntry
from distill.store import FolderLock, read_json, read_records, sha256_file, write_json

State = Literal["fresh", "unfinished", "done", "stale"]


@dataclass(frozen=True)
class Stage:
    """One verb of the pipeline: the config keys and files it reads, the files it writes, and its work."""

    name: str
    keys: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    main: Callable[[Config, "Run"], None]
    identity: Callable[[Config], dict[str, str]] = (
        lambda config: {}
    )  # further inputs by hash: corpus files, models
    purpose: str = ""


class Run:
    """The folder `runs/NAME` of one experiment."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = config.runs / config.name
        self._spent = {
            "input_tokens": 0,
            "output_tokens": 0,
            "dollars": None,
            "price": None,
            "note": "",
        }

    def path(self, name: str) -> Path:
        """Return the path of a file of the run."""
        return self.folder / name

    def lock(self) -> FolderLock:
        """Return the lock that a writer of this run holds."""
        return FolderLock(self.folder)

    def fingerprint(self, stage: Stage) -> dict[str, Any]:
        """Return what the stage's result depends on: its config keys, the hashes of its inputs, its identities."""
        resolved = self.config.resolved()
        values = {key: _lookup(resolved, key) for key in stage.keys}
        hashes = {
            name: sha256_file(self.path(name)) for name in stage.inputs if self.path(name).is_file()
        }
        return {
            **flatten(values),
            **{f"file {k}": v for k, v in hashes.items()},
            **stage.identity(self.config),
        }

    def marker(self, stage: Stage) -> Path:
        """Return the file that holds the stage's fingerprint and whether it finished."""
        return self.folder / "stages" / f"{stage.name}.json"

    def state(self, stage: Stage) -> tuple[State, list[str]]:
        """Return the stage's state, and for a stale one the differences in words."""
        if not self.marker(stage).exists():
            return "fresh", []
        kept = read_json(self.marker(stage))
        changes = differences(kept["fingerprint"], self.fingerprint(stage))
        if changes:
            return "stale", changes
        whole = kept["finished"] and all(self.path(name).exists() for name in stage.outputs)
        return ("done" if whole else "unfinished"), []

    def checked_state(self, stage: Stage) -> State:
        """Return the stage's state; raises DistillError (exit 5) with the keys that differ where it is stale."""
        state, changes = self.state(stage)
        if state == "stale":
            shown = "; ".join(changes[:6])
            more = f"; and {len(changes) - 6} more" if len(changes) > 6 else ""
            raise DistillError(
                Exit.STATE,
                self.folder,
                f"stage {stage.name} was made with other settings: {shown}{more}",
                f"--redo {stage.name} remakes it and what follows, or choose a new name=",
            )
        return state

    def perform(self, stage: Stage, redo: bool = False) -> bool:
        """Run the stage unless it is done; return whether it ran. Raises DistillError (exit 5) where it is stale."""
        if redo:
            self.remake([stage])
        if self.checked_state(stage) == "done":
            return False
        mark = {"fingerprint": self.fingerprint(stage), "finished": False}
        write_json(self.marker(stage), mark)
        with self._ledger(stage.name):
            stage.main(self.config, self)
        write_json(self.marker(stage), {**mark, "finished": True, "at": now()})
        return True

    def _set_aside(self, stage: Stage) -> None:
        """Move the stage's outputs and marker to `.old/`, numbered."""
        count = len(list((self.folder / ".old").glob(f"{stage.name}-*")))
        target = self.folder / ".old" / f"{stage.name}-{count + 1}"
        target.mkdir(parents=True)
        for path in [self.marker(stage), *(self.path(name) for name in stage.outputs)]:
            if path.exists():
                shutil.move(path, target / path.name)

    def remake(self, stages: Iterable[Stage]) -> None:
        """Set the outputs of `stages` aside, the last first, so that they are made again."""
        for stage in reversed(list(stages)):
            if self.marker(stage).exists():
                self._set_aside(stage)

    def spend(
        self,
        input_tokens: int = 0,
        output_tokens: int = 0,
        dollars: Decimal | None = None,
        price: str | None = None,
    ) -> None:
        """Add to what the stage now running has spent."""
        self._spent["input_tokens"] += input_tokens
        self._spent["output_tokens"] += output_tokens
        if dollars is not None:
            self._spent["dollars"] = (self._spent["dollars"] or Decimal(0)) + dollars
        self._spent["price"] = price or self._spent["price"]

    @contextmanager
    def _ledger(self, stage: str) -> Iterator[None]:
        """Account for the seconds and the spending of the block, also when it fails."""
        started, clock = now(), time.monotonic()
        self._spent = {
            "input_tokens": 0,
            "output_tokens": 0,
            "dollars": None,
            "price": None,
            "note": "failed",
        }
        try:
            yield
            self._spent["note"] = ""
        finally:
            entry = LedgerEntry(
                stage=stage, started=started, seconds=time.monotonic() - clock, **self._spent
            )
            with self.path("ledger.jsonl").open("a", encoding="utf-8") as file:
                file.write(entry.to_line() + "\n")

    def ledger(self) -> list[LedgerEntry]:
        """Return the ledger so far."""
        path = self.path("ledger.jsonl")
        return read_records(path, LedgerEntry) if path.exists() else []

    def note(self, key: str, value: Any) -> None:
        """Record a fact (a hash, a version, a count) in the manifest."""
        path = self.path("manifest.json")
        write_json(path, {**(read_json(path) if path.exists() else {}), key: value})

    def manifest(self) -> dict[str, Any]:
        """Return the manifest so far."""
        path = self.path("manifest.json")
        return read_json(path) if path.exists() else {}


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _lookup(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted keys."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v
        for key, child in tree.items()
        for k, v in flatten(child, f"{prefix}.{key}" if prefix else key).items()
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Name every key that differs, with both values cut to a readable length."""
    keys = sorted(old.keys() | new.keys())
    return [
        f"{k} was {_short(old.get(k))}, is {_short(new.get(k))}"
        for k in keys
        if old.get(k) != new.get(k)
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"

"""A run's folder: its stages and their fingerprints, its manifest, and the ledger of what was spent.

A stage is fresh, unfinished, done or stale. A stale one (its config keys or inputs changed) stops with the keys that
differ, until `--redo` sets its old outputs aside under `.old/`; nothing is ever overwritten silently. A stage that was
killed is unfinished: the same settings continue it, and its seconds until then are in the ledger.

What a later reader can check (`distill verify`): a finished stage's marker holds the SHA-256 of every file that it
wrote, the manifest that of every marker and what the stage was made with, and the manifest ends with its own.
"""

import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from pydantic_core import to_jsonable_python

from distill.config import Config
from distill.config_file import load_config, place_of
from distill.errors import DistillError, Exit
from distill.records import LedgerEntry
from distill.renamed_keys import fields_in, present_path
from distill.storage.environment import environment
from distill.storage.files import (
    append_record,
    as_json,
    disk_errors,
    read_json,
    read_records,
    sha256_file,
    sha256_files,
    sha256_text,
    write_atomic,
    write_json,
)
from distill.storage.locks import FolderLock, sweep
from distill.storage.progress import say

State = Literal["fresh", "unfinished", "done", "stale"]
HEARTBEAT = 5.0  # seconds between the signs of life of a running stage
SHOWN = 6  # differences, or names of files, in a message
SEAL = "sha256"  # the manifest's last key
HASH = re.compile(r"[0-9a-f]{32,64}")
# In a fingerprint: a file beside the weights of a model in a folder, after what the model does there
MODEL_FILE = re.compile(r"(base|judge|student|teacher|tokenizer|weights) file .+")


@dataclass(frozen=True)
class Stage:
    """One verb of the pipeline: the config keys and files it reads, the files it writes, and its work."""

    name: str
    keys: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    main: Callable[..., None]  # of config and run; training also knows allow_inexact
    identity: Callable[[Config], dict[str, str]] = (
        lambda config: {}
    )  # further inputs by hash: corpus files, models
    purpose: str = ""
    applies: Callable[[Config], bool] = lambda config: True  # whether a config needs it at all
    # models whose change it finds itself when it continues after a kill, more exactly than its fingerprint
    compares: tuple[str, ...] = ()


class Run:
    """The folder `runs/NAME` of one experiment, or one of another name that is there already."""

    def __init__(self, config: Config, folder: Path | None = None) -> None:
        self.config = config
        self.folder = folder or config.runs / config.name
        self._running = ""  # the stage whose spending is counted
        self.remade = set[str]()  # the stages whose making anew was asked for

    def path(self, name: str) -> Path:
        """Return the path of a file of the run."""
        return self.folder / name

    def trained(self, name: str) -> Path:
        """Return the path of a file that the last training made: on-policy rounds, where the config has any."""
        return self.path(f"refined/{name}" if self.config.on_policy.rounds else name)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run's lock, which whoever writes in its folder needs; clean up what a killed holder left."""
        with FolderLock(self.folder):
            sweep(self.folder)
            yield

    def fingerprint(self, stage: Stage) -> dict[str, Any]:
        """Return what the stage's result depends on: its config keys, the hashes of its inputs, its identities."""
        resolved = self.config.resolved()
        values = {key: _lookup(resolved, key) for key in stage.keys}
        with disk_errors(self.folder):
            files = [name for name in stage.inputs if self.path(name).is_file()]
            hashes = {name: sha256_file(self.path(name)) for name in files}
        return {
            **flatten(values),
            **{f"file {k}": v for k, v in hashes.items()},
            **stage.identity(self.config),
        }

    def marker(self, stage: Stage) -> Path:
        """Return the file that holds the stage's fingerprint and whether it finished."""
        return self._marker(stage.name)

    def _marker(self, name: str) -> Path:
        return self.folder / "stages" / f"{name}.json"

    def _kept(self, name: str) -> dict[str, Any]:
        """Return what the stage's marker holds; raises DistillError (exit 5) where it is damaged."""
        kept, marker = read_json(self._marker(name)), self._marker(name)
        if not isinstance(kept, dict) or not isinstance(kept.get("fingerprint"), dict):
            raise DistillError(Exit.STATE, marker, "is damaged", f"--redo {name} remakes it")
        return kept

    def state(self, stage: Stage) -> tuple[State, list[str]]:
        """Return the stage's state, and for a stale one the differences in words.

        An input that is missing now is no difference: the stage that makes it has yet to run. A stage that was begun
        with other settings and has produced nothing is fresh.
        """
        if not self.marker(stage).exists():
            return "fresh", []
        kept, new = self._kept(stage.name), self.fingerprint(stage)
        missing = {f"file {name}" for name in stage.inputs if not self.path(name).exists()}
        old = {key: value for key, value in kept["fingerprint"].items() if key not in missing}
        old = {**self._taken_for_granted(stage, old, new), **old}
        finished = kept.get("finished") is True
        if not finished:
            old, new = (
                {k: v for k, v in facts.items() if k.split(" file ")[0] not in stage.compares}
                for facts in (old, new)
            )
        if changes := differences(old, new):
            begun = finished or any(_holds_files(self.path(name)) for name in stage.outputs)
            return ("stale", changes) if begun else ("fresh", [])
        # What its marker lists no file of, it did not write: an earlier distill's training made no merged/.
        lists = tuple(f"{file}/" for file in kept.get("outputs", stage.outputs))
        missed = [n for n in stage.outputs if not self.path(n).exists()]
        whole = finished and not any(file.startswith(f"{n}/") for n in missed for file in lists)
        return ("done" if whole else "unfinished"), []

    def _taken_for_granted(
        self, stage: Stage, old: dict[str, Any], new: dict[str, Any]
    ) -> dict[str, Any]:
        """Return what a fingerprint of an earlier distill does not say of models in folders.

        It is what was recorded when the stage was accepted. Before that it is as the folder is now, but for the
        student's weights, which the adapter knows.
        """
        added, base = unnamed(old, new), self.path("adapter/base.json")
        if not added:
            return {}
        if "student" in added and base.is_file():
            added["student"] = read_json(base).get("identity")
        return {**added, **self.manifest().get("accepted", {}).get(stage.name, {})}

    def _accept(self, stage: Stage) -> None:
        """Record the files of models of which a finished stage knows the weights alone, and say so once a run."""
        accepted = self.manifest().get("accepted", {})
        added = unnamed(self._kept(stage.name)["fingerprint"], self.fingerprint(stage))
        if added and stage.name not in accepted:
            if not accepted:
                what = "knows models in folders by their weights alone, which are the same"
                say(f"{self.folder}: {what}; from now on their other files count too")
            self.note("accepted", {**accepted, stage.name: added})

    def checked_state(self, stage: Stage) -> State:
        """Return the stage's state; raises DistillError (exit 5) with the keys that differ where it is stale."""
        state, changes = self.state(stage)
        if state == "stale":
            shown = "; ".join(changes[:SHOWN])
            more = f"; and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
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
            self._accept(stage)
            return False
        self.do(stage)
        return True

    def do(self, stage: Stage) -> None:
        """Run the stage whatever its state, with its marker, its signs of life and its entry in the ledger."""
        for name in sorted({stage.name, *self._begun_to_spend()}):
            self._account_for_the_killed(name)
        mark = {"fingerprint": self.fingerprint(stage), "finished": False, "begun": now()}
        write_json(self.marker(stage), mark)
        self._note_stage(stage, {"environment": environment()})
        with self._ledger(stage.name, mark["begun"]), heartbeat(self.marker(stage)):
            stage.main(self.config, self)
        self._finish(stage, {**mark, "finished": True, "at": now()})

    def _finish(self, stage: Stage, mark: dict[str, Any]) -> None:
        """Write the marker of a finished stage, with the hashes of what it wrote and of the ledger so far."""
        with disk_errors(self.folder):
            outputs = sha256_files(self.folder, stage.outputs)
            ledger = sha256_file(self.path("ledger.jsonl"))
        text = as_json({**mark, "outputs": outputs, "ledger": ledger})
        self._note_stage(stage, {**self.made_with(stage.name), "marker": sha256_text(text)})
        write_atomic(self.marker(stage), text)

    def _note_stage(self, stage: Stage, facts: dict[str, Any]) -> None:
        self.note("stages", {**self.manifest().get("stages", {}), stage.name: facts})

    def made_with(self, stage: str) -> dict[str, Any]:
        """Return what the manifest says that a stage was made with: its `environment`, and later its marker's hash."""
        return self.manifest().get("stages", {}).get(stage, {})

    def _set_aside(self, stage: Stage) -> None:
        """Move the stage's outputs, then its marker, to `.old/`, numbered: a crash between leaves it to do again."""
        count = len(list((self.folder / ".old").glob(f"{stage.name}-*")))
        target = self.folder / ".old" / f"{stage.name}-{count + 1}"
        with disk_errors(target):
            for path in [*(self.path(name) for name in stage.outputs), self.marker(stage)]:
                if path.exists():
                    moved = target / path.relative_to(self.folder)
                    moved.parent.mkdir(parents=True, exist_ok=True)
                    path.rename(moved)

    def remake(self, stages: Iterable[Stage]) -> None:
        """Set the outputs of `stages` aside, the last first, so that they are made again."""
        for stage in reversed(list(stages)):
            self.remade.add(stage.name)
            if self.marker(stage).exists():
                self._set_aside(stage)

    def spend(
        self,
        input_tokens: int = 0,
        output_tokens: int = 0,
        dollars: Decimal | None = None,
        price: str | None = None,
        attempts: int = 0,
        unknown: int = 0,
        unknown_dollars: Decimal | None = None,
        paid: bool = False,
    ) -> None:
        """Add to what the stage now running has spent; it is in a file at once, so that a kill loses none of it.

        `paid` says that the tokens are those of paid attempts.
        """
        if self._running:
            entry = LedgerEntry(
                stage=self._running,
                started=now(),
                seconds=0.0,
                input_tokens=input_tokens,
                output_tokens=output_tokens,
                paid_input_tokens=input_tokens if paid else 0,
                paid_output_tokens=output_tokens if paid else 0,
                dollars=dollars,
                price=price,
                attempts=attempts,
                unknown=unknown,
                unknown_dollars=unknown_dollars,
            )
            path = self._spent(self._running)
            with disk_errors(path), path.open("a", encoding="utf-8") as file:
                file.write(entry.to_line() + "\n")

    @contextmanager
    def joining(self, stage: Stage) -> Iterator[None]:
        """Count what this process spends as part of a stage that another process performs."""
        self._running = stage.name
        try:
            yield
        finally:
            self._running = ""

    def _spent(self, stage: str) -> Path:
        """Return the file of what a stage has spent and the ledger does not hold yet."""
        return self.folder / "stages" / f"{stage}.spent.jsonl"

    @contextmanager
    def _ledger(self, stage: str, started: str) -> Iterator[None]:
        """Account for the seconds and the spending of the block, also when it fails."""
        clock, note, self._running = time.monotonic(), "failed", stage
        try:
            yield
            note = ""
        finally:
            self._running = ""
            self._enter(stage, started, time.monotonic() - clock, note)

    def _enter(self, stage: str, started: str, seconds: float, note: str) -> None:
        """Write the stage's entry in the ledger, with the sum of what it has spent."""
        path = self._spent(stage)
        spent = read_records(path, LedgerEntry, torn=True) if path.exists() else []
        entry = LedgerEntry(
            stage=stage,
            started=started,
            seconds=seconds,
            input_tokens=sum(entry.input_tokens for entry in spent),
            output_tokens=sum(entry.output_tokens for entry in spent),
            paid_input_tokens=sum(entry.paid_input_tokens for entry in spent),
            paid_output_tokens=sum(entry.paid_output_tokens for entry in spent),
            dollars=_sum(entry.dollars for entry in spent),
            price=next((entry.price for entry in reversed(spent) if entry.price), None),
            attempts=sum(entry.attempts for entry in spent),
            unknown=sum(entry.unknown for entry in spent),
            unknown_dollars=_sum(entry.unknown_dollars for entry in spent),
            note=note,
        )
        append_record(self.path("ledger.jsonl"), entry)
        path.unlink(missing_ok=True)

    def _begun_to_spend(self) -> Iterator[str]:
        """Yield the names of what has spent, and was killed before the ledger said so."""
        ending = ".spent.jsonl"
        for path in (self.folder / "stages").glob(f"*{ending}"):
            yield path.name.removesuffix(ending)

    def _account_for_the_killed(self, name: str) -> None:
        """Where a stage was killed before, enter what it spent, and its seconds up to its last sign of life."""
        marker = self._marker(name)
        begun = self._kept(name).get("begun") if marker.exists() else None
        if any(e.stage == name and e.started == begun for e in self.ledger()):
            self._spent(name).unlink(missing_ok=True)  # killed just after it was entered
        elif begun:
            alive = marker.stat().st_mtime - datetime.fromisoformat(begun).timestamp()
            self._enter(name, begun, max(alive, 0.0), "killed")

    def ledger(self) -> list[LedgerEntry]:
        """Return the ledger so far."""
        path = self.path("ledger.jsonl")
        return read_records(path, LedgerEntry, torn=True) if path.exists() else []

    def note(self, key: str, value: Any) -> None:
        """Record a fact (a hash, a version, a count) in the manifest, which is sealed anew."""
        write_atomic(self.path("manifest.json"), sealed({**self.manifest(), key: value}))

    def manifest(self) -> dict[str, Any]:
        """Return the manifest so far, without its seal."""
        path = self.path("manifest.json")
        facts = read_json(path) if path.exists() else {}
        return {key: value for key, value in facts.items() if key != SEAL}


def open_run(place: Path, overrides: Sequence[str] = ()) -> Run:
    """Return the run of a config file, or of a run's folder (which may have been moved)."""
    return open_folder(place, overrides) if place.is_dir() else Run(load_config(place, overrides))


def open_folder(place: Path, overrides: Sequence[str] = ()) -> Run:
    """Return the run in a folder, whatever it is called and wherever it was moved or copied.

    Overrides of `name` or `runs` make it another run with the same config, beside this one or there. Raises
    DistillError (exit 2) where the folder holds no run.
    """
    if not (place / "config.json").exists():
        what, fix = "is no run: it has no config.json", "name a config or a run's folder"
        raise DistillError(Exit.CONFIG, place, what, fix)
    real = place.resolve()  # a link is the run that it leads to, with the store beside that
    folder = place if place.name == real.name and not place.is_symlink() else real
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        what, fix = "is no UTF-8 path, and what writes models takes no other", "rename it"
        raise DistillError(Exit.CONFIG, folder, what, fix) from None
    config = load_config(folder / "config.json", overrides, place_of(folder))
    changed = {override.partition("=")[0].strip() for override in overrides} & {"name", "runs"}
    if "runs" not in changed:
        config = config.model_copy(update={"runs": folder.parent})
    return Run(config, None if changed else folder)


def sealed(manifest: dict[str, Any]) -> str:
    """Return the text of a manifest with its own SHA-256 at its end."""
    return as_json({**manifest, SEAL: sha256_text(as_json(manifest))})


def _sum(dollars: Iterable[Decimal | None]) -> Decimal | None:
    """Return the sum of what is known, or None where nothing is."""
    known = [amount for amount in dollars if amount is not None]
    return sum(known, Decimal(0)) if known else None


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
    """Name every key that differs: settings with both values, files and other hashed inputs as lists of names.

    Old names of keys are read as the present ones. A setting that one side lacks, because it came later or belongs to
    another kind of teacher, counts as its default there.
    """
    old = {".".join(present_path(key.split("."), Config)): value for key, value in old.items()}
    settings, files = [], dict[str, list[str]]()
    for key in sorted(old.keys() | new.keys()):
        before, after = _setting(old, key), _setting(new, key)
        if before == after or (before in (None, "") and after in (None, "")):
            continue
        if HASH.fullmatch(str(after if before is None else before)):
            how = "added" if before is None else "removed" if after is None else "changed"
            files.setdefault(how, []).append(key.removeprefix("file ").removeprefix("input "))
        else:
            settings.append(f"{key} was {_short(before)}, is {_short(after)}")
    return settings + [f"{how}: {_listed(names)}" for how, names in files.items()]


def _setting(fingerprint: dict[str, Any], key: str) -> Any:
    """Return what a fingerprint says of a key: its value, else its default where it is a setting, else None."""
    if key in fingerprint:
        return fingerprint[key]
    annotation, names = Config, key.split(".")
    for depth, name in enumerate(names, 1):
        field = fields_in(annotation).get(name)
        if field is None or (field.is_required() and depth == len(names)):
            return None
        if depth == len(names):
            return to_jsonable_python(field.default)
        # a section that may be null has defaults only where the fingerprint has other keys of it
        section = ".".join(names[:depth])
        off = section in fingerprint or field.default is None
        if off and not any(other.startswith(f"{section}.") for other in fingerprint):
            return None
        annotation = field.annotation
    return None


def unnamed(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return what `new` says of models in folders of which `old` names no file.

    An earlier distill knew such a model by its weights alone, or, the student and the judge, by its name.
    """
    ours, theirs = (
        {found[1] for key in facts if (found := MODEL_FILE.fullmatch(key))} for facts in (new, old)
    )
    roles = ours - theirs
    return {k: v for k, v in new.items() if k not in old and k.split(" file ")[0] in roles}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _short(value: Any) -> str:
    text = "unset" if value is None else " ".join(str(value).split())
    return text if len(text) <= 40 else text[:39] + "…"


def _holds_files(path: Path) -> bool:
    return path.is_file() or any(child.is_file() for child in path.rglob("*"))


@contextmanager
def heartbeat(path: Path) -> Iterator[None]:
    """Set the file's time to now every few seconds while the block runs, as a sign of life."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(HEARTBEAT):
            with suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()

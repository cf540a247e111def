"""A run's folder: its stages, their markers with fingerprints, and its manifest.

A stage is fresh, unfinished, done or stale. A stale one (its config keys or inputs changed) stops
with the keys that differ, until `--redo` sets its old outputs aside under `.old/`; nothing is ever
overwritten silently. A stage that was killed is unfinished: the same settings continue it, and its
seconds until then are in the ledger.

What a later reader can check (`distill verify`): a finished stage's marker holds the SHA-256 of every
file that it wrote, the manifest that of every marker and what the stage was made with, and the
manifest ends with its own.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal

from distill.config import Config
from distill.config_file import load_config, place_of
from distill.errors import DistillError, Exit
from distill.storage.environment import environment
from distill.storage.files import (
    as_json,
    disk_errors,
    read_json,
    sha256_file,
    sha256_files,
    sha256_text,
    write_atomic,
    write_json,
)
from distill.storage.fingerprints import SHOWN, differences, flatten, unnamed
from distill.storage.ledger import Ledger, heartbeat, now
from distill.storage.locks import FolderLock, sweep
from distill.storage.progress import say

StageState = Literal["fresh", "unfinished", "done", "stale"]
SEAL = "sha256"  # the manifest's last key


@dataclass(frozen=True)
class Stage:
    """A verb of the pipeline: the config keys and files it reads, what it writes, and its work."""

    name: str
    keys: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    main: Callable[..., None]  # of config and run; training also knows allow_inexact
    # further inputs by hash: corpus files, models
    identity: Callable[[Config], dict[str, str]] = lambda config: {}
    purpose: str = ""
    applies: Callable[[Config], bool] = lambda config: True  # whether a config needs it at all
    # models whose change it finds itself, more exactly, when it continues after a kill
    compares: tuple[str, ...] = ()


class Run:
    """The folder `runs/NAME` of one experiment, or one of another name that is there already."""

    def __init__(self, config: Config, folder: Path | None = None) -> None:
        self.config = config
        self.folder = folder or config.runs / config.name
        self.ledger = Ledger(self.folder)
        self.remade = set[str]()  # the stages that --redo set aside

    def path(self, name: str) -> Path:
        """Return the path of a file of the run."""
        return self.folder / name

    def trained(self, name: str) -> Path:
        """Return the path of a file of the last training: of on-policy rounds, where there are any."""
        return self.path(f"refined/{name}" if self.config.on_policy.rounds else name)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the lock that writing in the folder needs; clean up what a killed holder left."""
        with FolderLock(self.folder):
            sweep(self.folder)
            yield

    def fingerprint(self, stage: Stage) -> dict[str, Any]:
        """Return what the stage's result depends on: config keys, hashes of inputs, identities."""
        resolved = self.config.resolved()
        values = dict[str, Any]()
        for key in stage.keys:
            with suppress(KeyError):  # a key of another kind of teacher
                values[key] = reduce(lambda tree, name: tree[name], key.split("."), resolved)
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
        return self.path(f"stages/{stage.name}.json")

    def _read_marker(self, name: str) -> dict[str, Any]:
        """Return a stage's marker; raises DistillError (exit 5) where it is damaged."""
        path = self.path(f"stages/{name}.json")
        mark = read_json(path)
        if not isinstance(mark, dict) or not isinstance(mark.get("fingerprint"), dict):
            raise DistillError(Exit.STATE, path, "is damaged", f"--redo {name} remakes it")
        return mark

    def state(self, stage: Stage) -> tuple[StageState, list[str]]:
        """Return the stage's state, and for a stale one the differences in words.

        An input that is missing now is no difference: the stage that makes it has yet to run. A stage
        that was begun with other settings and has produced nothing is fresh.
        """
        if not self.marker(stage).exists():
            return "fresh", []
        mark, new = self._read_marker(stage.name), self.fingerprint(stage)
        missing = {f"file {name}" for name in stage.inputs if not self.path(name).exists()}
        old = {key: value for key, value in mark["fingerprint"].items() if key not in missing}
        old = {**self._assumed(stage, old, new), **old}
        finished = mark.get("finished") is True
        if not finished:
            old, new = (
                {k: v for k, v in facts.items() if k.split(" file ")[0] not in stage.compares}
                for facts in (old, new)
            )
        if changes := differences(old, new):
            outputs = [p for n in stage.outputs for p in (self.path(n), *self.path(n).rglob("*"))]
            begun = finished or any(path.is_file() for path in outputs)
            return ("stale", changes) if begun else ("fresh", [])
        # What its marker lists no file of, it did not write: an earlier distill's training made no merged/.
        lists = tuple(f"{file}/" for file in mark.get("outputs", stage.outputs))
        absent = [n for n in stage.outputs if not self.path(n).exists()]
        complete = finished and not any(file.startswith(f"{n}/") for n in absent for file in lists)
        return ("done" if complete else "unfinished"), []

    def _assumed(self, stage: Stage, old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        """Return what a fingerprint of an earlier distill does not say of models in folders.

        It is what was recorded when the stage was accepted. Before that it is as the folder is now,
        but for the student's weights, which the adapter knows.
        """
        added, base = unnamed(old, new), self.path("adapter/base.json")
        if not added:
            return {}
        if "student" in added and base.is_file():
            added["student"] = read_json(base).get("identity")
        return {**added, **self.manifest().get("accepted", {}).get(stage.name, {})}

    def checked_state(self, stage: Stage) -> StageState:
        """Return the stage's state; raises DistillError (exit 5) with what differs for a stale one."""
        state, changes = self.state(stage)
        if state == "stale":
            first = "; ".join(changes[:SHOWN])
            more = f"; and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
            raise DistillError(
                Exit.STATE,
                self.folder,
                f"stage {stage.name} was made with other settings: {first}{more}",
                f"--redo {stage.name} remakes it and what follows, or choose a new name=",
            )
        return state

    def perform(self, stage: Stage, redo: bool = False) -> bool:
        """Run the stage unless it is done; return whether it ran.

        Raises DistillError (exit 5) where it is stale. Of a finished stage of an earlier distill that
        knows models in folders by their weights alone, the other files are recorded now.
        """
        if redo:
            self.remake([stage])
        if self.checked_state(stage) == "done":
            accepted = self.manifest().get("accepted", {})
            old, new = self._read_marker(stage.name)["fingerprint"], self.fingerprint(stage)
            if (added := unnamed(old, new)) and stage.name not in accepted:
                if not accepted:
                    what = "knows models in folders by their weights alone, which are the same"
                    say(f"{self.folder}: {what}; from now on their other files count too")
                self.note("accepted", {**accepted, stage.name: added})
            return False
        self.do(stage)
        return True

    def do(self, stage: Stage) -> None:
        """Run the stage whatever its state, with its marker, signs of life and ledger entry."""
        for name in sorted({stage.name, *self.ledger.interrupted()}):
            path = self.path(f"stages/{name}.json")
            begun = self._read_marker(name).get("begun") if path.exists() else None
            self.ledger.enter_killed(name, path, begun)
        marker = self.marker(stage)
        mark = {"fingerprint": self.fingerprint(stage), "finished": False, "begun": now()}
        write_json(marker, mark)
        self._note_stage(stage, {"environment": environment()})
        with self.ledger.counting(stage.name, mark["begun"]), heartbeat(marker):
            stage.main(self.config, self)
        mark |= {"finished": True, "at": now()}
        with disk_errors(self.folder):
            mark["outputs"] = sha256_files(self.folder, stage.outputs)
            mark["ledger"] = sha256_file(self.ledger.path)
        text = as_json(mark)
        self._note_stage(stage, {**self.made_with(stage.name), "marker": sha256_text(text)})
        write_atomic(marker, text)

    def _note_stage(self, stage: Stage, facts: dict[str, Any]) -> None:
        self.note("stages", {**self.manifest().get("stages", {}), stage.name: facts})

    def made_with(self, stage: str) -> dict[str, Any]:
        """Return what the manifest says of a stage: its `environment`, and its marker's hash."""
        return self.manifest().get("stages", {}).get(stage, {})

    def remake(self, stages: Iterable[Stage]) -> None:
        """Set the outputs of `stages` aside, the last first, so that they are made again.

        They go to `.old/`, numbered, and the marker last: a crash between leaves it to do again.
        """
        for stage in reversed(list(stages)):
            self.remade.add(stage.name)
            if not self.marker(stage).exists():
                continue
            count = len(list((self.folder / ".old").glob(f"{stage.name}-*")))
            target = self.folder / ".old" / f"{stage.name}-{count + 1}"
            with disk_errors(target):
                for path in [*(self.path(name) for name in stage.outputs), self.marker(stage)]:
                    if path.exists():
                        moved = target / path.relative_to(self.folder)
                        moved.parent.mkdir(parents=True, exist_ok=True)
                        path.rename(moved)

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

    Overrides of `name` or `runs` make it another run with the same config, beside this one or there.
    Raises DistillError (exit 2) where the folder holds no run.
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

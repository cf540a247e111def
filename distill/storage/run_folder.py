"""A run's folder: its stages, their markers with fingerprints, and its manifest.

A stale stage (its config keys or inputs changed) stops with what differs, until `--redo` sets its
old outputs aside under `.old/`; one that was killed is continued by the same settings. A marker
holds the SHA-256 of each file of its stage, the manifest that of each marker, and its own.
"""

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic_core import to_jsonable_python

from distill.config.learning import tried
from distill.config.renamed_keys import BEFORE, fields_in, present_path, present_value
from distill.config.tree import Config
from distill.config.yaml_file import load_config, place_of, with_values
from distill.errors import DistillError, Exit, one_line
from distill.storage import files
from distill.storage.environment import environment
from distill.storage.ledger import Ledger, now

Fingerprint = dict[str, object]  # what a result depends on: dotted config keys, hashes of inputs
StageState = Literal["fresh", "unfinished", "done", "stale"]
SEAL = "sha256"  # the manifest's last key
SHOWN = 6  # differences, or names of files, in a message
HASH = re.compile(r"[0-9a-f]{32,64}")
# Settings of memory: how much is computed at once changes results by rounding alone.
MEMORY = (
    *("teacher.concurrency", "evaluation.concurrency", "evaluation.judge.concurrency"),
    *("train.micro_batch_tokens", "train.gradient_checkpointing"),
    "evaluation.judge.max_consecutive_failures",
)
# A file beside the weights of a model in a folder, after what the model does there
MODEL_FILE = re.compile(r"(base|judge|student|teacher|tokenizer|weights) file .+")


@dataclass(frozen=True)
class Stage:
    """A verb of the pipeline: the config keys and files it reads, what it writes, and its work."""

    name: str
    keys: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    main: Callable[..., None]  # of the run; training also knows allow_inexact
    identity: Callable[[Config], Mapping[str, object]] = lambda config: {}  # hashes of its sources
    purpose: str = ""
    applies: Callable[[Config], bool] = lambda config: True  # whether a config needs it at all
    compares: tuple[str, ...] = ()  # models whose change it finds itself when it continues
    smaller: str = "end what else uses the GPU"  # what to do where its memory does not suffice

    @property
    def marker(self) -> str:
        """Return the file in a run's folder that holds its fingerprint and what it wrote."""
        return f"stages/{self.name}.json"


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
        """Return the path of a file of the last training: of stage `refine`, if there is one."""
        return self.path(f"refined/{name}" if self.config.refines else name)

    def settled(self) -> Config:
        """Return the config with the settings of training that a search chose, if any did."""
        path = self.path("recipe.json")
        if self.config.recipe.mode == "off" or not path.exists():
            return self.config
        return tried(self.config, **files.read_json(path)["choice"])

    def lock(self) -> AbstractContextManager[None]:
        """Return the lock that writing in the folder needs."""
        return files.folder_lock(self.folder)

    def fingerprint(self, stage: Stage) -> Fingerprint:
        """Return what the stage's result depends on: config keys, hashes of inputs, identities."""
        sections = tuple(f"{key}." for key in stage.keys)
        settings = flatten(self.config.resolved()).items()
        values = {key: value for key, value in settings if f"{key}.".startswith(sections)}
        with files.disk_errors(self.folder):
            # what a refining left is no input of a config without one
            names = (n for n in stage.inputs if self.config.refines or not n.startswith("refined/"))
            inputs = [name for name in names if self.path(name).is_file()]
            hashes = {f"file {name}": files.sha256_file(self.path(name)) for name in inputs}
        return {**values, **hashes, **stage.identity(self.config)}

    def _read_marker(self, stage: Stage) -> dict[str, Any]:
        mark = files.read_json(self.path(stage.marker))
        if not isinstance(mark, dict) or not isinstance(mark.get("fingerprint"), dict):
            fix = f"--redo {stage.name} remakes it"
            raise DistillError(Exit.STATE, self.path(stage.marker), "is damaged", fix)
        return mark

    def state(self, stage: Stage) -> tuple[StageState, list[str]]:
        """Return the stage's state, and for a stale one the differences in words.

        An input that is missing now is no difference. A stage that was begun with other settings
        and has produced nothing is fresh.
        """
        if not self.path(stage.marker).exists():
            return "fresh", []
        mark, new = self._read_marker(stage), self.fingerprint(stage)
        finished = mark.get("finished") is True
        absent = {f"file {name}" for name in stage.inputs if not self.path(name).exists()}
        old = {key: value for key, value in mark["fingerprint"].items() if key not in absent}
        # What an earlier distill does not say of models in folders is what a later one recorded,
        # else as the folder is now, but for the student's weights: the adapter knows them
        if added := unnamed(old, new):
            base = self.path("adapter/base.json")
            if "student" in added and base.is_file():
                added["student"] = files.read_json(base).get("identity")
            old = {**added, **self.manifest().get("accepted", {}).get(stage.name, {}), **old}
        # nor does it name the tables that it read
        old = {key: value for key, value in new.items() if key.startswith("table ")} | old
        ignored = set(MEMORY)
        if not finished:
            models = {key for key in old.keys() | new if key.split(" file ")[0] in stage.compares}
            ignored |= models
        if changes := differences(old, new, ignored):
            outputs = [p for n in stage.outputs for p in (self.path(n), *self.path(n).rglob("*"))]
            begun = finished or any(path.is_file() for path in outputs)
            return ("stale", changes) if begun else ("fresh", [])
        # What its marker lists no file of, it did not write: an earlier training made no merged/.
        lists = tuple(f"{file}/" for file in mark.get("outputs", stage.outputs))
        gone = tuple(f"{name}/" for name in stage.outputs if not self.path(name).exists())
        complete = finished and not any(file.startswith(gone) for file in lists)
        return ("done" if complete else "unfinished"), []

    def checked_state(self, stage: Stage) -> StageState:
        """Return the stage's state; a stale one raises DistillError (exit 5) with the changes."""
        state, changes = self.state(stage)
        if state == "stale":
            what = f"stage {stage.name} was made with other settings: {_first(changes, '; ')}"
            fix = f"--redo {stage.name} remakes it and what follows, or choose a new name="
            raise DistillError(Exit.STATE, self.folder, what, fix)
        return state

    def perform(self, stage: Stage) -> bool:
        """Run the stage unless it is done; return whether it ran. Exit 5 where it is stale."""
        if self.checked_state(stage) == "done":
            return False
        self.do(stage)
        return True

    def do(self, stage: Stage) -> None:
        """Run the stage whatever its state, with its marker, signs of life and ledger entry."""
        self.ledger.enter_killed(stage.name)
        marker = self.path(stage.marker)
        mark = {"fingerprint": self.fingerprint(stage), "finished": False, "begun": now()}
        files.write_json(marker, mark)
        facts: dict[str, object] = {"environment": environment()}
        self.note("stages", {**self.manifest().get("stages", {}), stage.name: facts})
        with self.ledger.counting(stage.name, marker, mark["begun"]):
            self.work(stage)
        mark |= {"finished": True, "at": now()}
        with files.disk_errors(self.folder):
            mark["outputs"] = files.sha256_files(self.folder, stage.outputs)
            mark["ledger"] = files.sha256_file(self.ledger.path)
        text = files.as_json(mark)
        facts["marker"] = hashlib.sha256(text.encode()).hexdigest()
        self.note("stages", {**self.manifest().get("stages", {}), stage.name: facts})
        files.write_atomic(marker, text)

    def work(self, stage: Stage) -> None:
        """Do a stage's work alone; raises DistillError (exit 7) where a GPU's memory runs out."""
        config = self.config
        try:
            self.config = self.settled() if stage.name == "train" else config
            stage.main(self)
        except Exception as error:  # torch's own, which is not imported here
            full = "CUDA error: out of memory" in str(error)
            if not full and type(error).__name__ != "OutOfMemoryError":
                raise
            what = f"out of GPU memory: {'. '.join(one_line(error).split('. ')[:2])}"
            fix = f"{stage.smaller}; the same command continues"
            raise DistillError(Exit.TRAINING, f"stage {stage.name}", what, fix) from None
        finally:
            self.config = config

    def made_with(self, stage: str) -> dict[str, Any]:
        """Return what the manifest says of a stage: its `environment`, and its marker's hash."""
        return self.manifest().get("stages", {}).get(stage, {})

    def remake(self, stages: Iterable[Stage]) -> None:
        """Set the outputs of `stages` aside in `.old/`, the last stage first and its marker last: a
        crash between leaves it to do again."""
        for stage in reversed(list(stages)):
            self.remade.add(stage.name)
            if self.path(stage.marker).exists():
                count = len(list((self.folder / ".old").glob(f"{stage.name}-*")))
                target = self.folder / ".old" / f"{stage.name}-{count + 1}"
                with files.disk_errors(target):
                    for name in (*stage.outputs, stage.marker):
                        if self.path(name).exists():
                            (target / name).parent.mkdir(parents=True, exist_ok=True)
                            self.path(name).rename(target / name)

    def note(self, key: str, value: object) -> None:
        """Record a fact (a hash, a version, a count) in the manifest, which is sealed anew."""
        files.write_atomic(self.path("manifest.json"), sealed({**self.manifest(), key: value}))

    def manifest(self) -> dict[str, Any]:
        """Return the manifest so far, without its seal."""
        path = self.path("manifest.json")
        facts = files.read_json(path) if path.exists() else {}
        return {key: value for key, value in facts.items() if key != SEAL}


def sealed(manifest: Mapping[str, object]) -> str:
    """Return the text of a manifest with its own SHA-256 at its end."""
    sha256 = hashlib.sha256(files.as_json(manifest).encode()).hexdigest()
    return files.as_json({**manifest, SEAL: sha256})


def open_run(place: Path, overrides: Sequence[str] = ()) -> Run:
    """Return the run of a config file, or in a folder, whatever it is called or moved to.

    Of a folder, overrides of `name` or `runs` make it another run with the same config, beside this
    one or there. Raises DistillError (exit 2) where the folder holds no run.
    """
    if not place.is_dir():
        config = load_config(place, overrides)
        return Run(with_chosen_engines(config, config.runs / config.name))
    if not (place / "config.json").exists():
        what, fix = "is no run: it has no config.json", "name a config or a run's folder"
        raise DistillError(Exit.CONFIG, place, what, fix)
    real = place.resolve()  # a link is the run that it leads to, with the store beside that
    folder = place if place.name == real.name and not place.is_symlink() else real
    if str(folder).encode(errors="ignore").decode() != str(folder):
        what, fix = "is no UTF-8 path, and what writes models takes no other", "rename it"
        raise DistillError(Exit.CONFIG, folder, what, fix)
    config = load_config(folder / "config.json", overrides, place_of(folder))
    changed = {override.partition("=")[0].strip() for override in overrides} & {"name", "runs"}
    if "runs" not in changed:
        config = config.model_copy(update={"runs": folder.parent})
    return Run(with_chosen_engines(config, folder), None if changed else folder)


def require_made(path: Path, verb: str) -> None:
    """Stop (exit 5) where a file or folder of a run is missing, and name the command for it."""
    if not path.exists():
        raise DistillError(Exit.STATE, path, "is missing", f"make it: distill {verb} CONFIG")


def with_chosen_engines(config: Config, folder: Path) -> Config:
    """Return a config with the engines that a run's folder, if it is there, was begun with."""
    path, keys = folder / "config.json", config.auto_engines
    if not keys or not path.is_file():
        return config
    chosen = flatten(files.read_json(path))
    return with_values(config, {key: chosen.get(key, BEFORE["engine"]) for key in keys})


def flatten(tree: object, prefix: str = "") -> dict[str, object]:
    """Flatten nested mappings to dotted keys."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    parts = [flatten(child, f"{prefix}.{key}".removeprefix(".")) for key, child in tree.items()]
    return {key: value for part in parts for key, value in part.items()}


def _first(parts: Sequence[str], separator: str) -> str:
    more = f"{separator}and {len(parts) - SHOWN} more" if len(parts) > SHOWN else ""
    return separator.join(parts[:SHOWN]) + more


def differences(
    old: Mapping[str, object], new: Mapping[str, object], ignored: Collection[str] = ()
) -> list[str]:
    """Name every key that differs: settings with both values, hashed inputs as lists of names.

    Old names of keys are read as the present ones; a setting that one side lacks has its default,
    and files of a model in a folder that an earlier distill did not name are those of now.
    """
    old = {".".join(present_path(key.split("."), Config)): value for key, value in old.items()}
    old |= unnamed(old, new)
    settings, hashed = [], dict[str, list[str]]()
    for key in sorted(old.keys() | new.keys()):
        before, after = (present_value(key, _setting(facts, key)) for facts in (old, new))
        unset = before in (None, "") and after in (None, "")
        if before == after or unset or key in ignored:
            continue
        if HASH.fullmatch(str(after if before is None else before)):
            how = "added" if before is None else "removed" if after is None else "changed"
            hashed.setdefault(how, []).append(key.removeprefix("file ").removeprefix("input "))
            continue
        texts = ["unset" if v is None else " ".join(str(v).split()) for v in (before, after)]
        was, now_is = (text if len(text) <= 40 else text[:39] + "…" for text in texts)
        settings.append(f"{key} was {was}, is {now_is}")
    return settings + [f"{how}: {_first(names, ', ')}" for how, names in hashed.items()]


def _setting(fingerprint: Mapping[str, object], key: str) -> object:
    """Return a key's value in a fingerprint, else a setting's default, else None."""
    if key in fingerprint:
        return fingerprint[key]
    annotation, names = Config, key.split(".")
    for depth, name in enumerate(names, 1):
        field = fields_in(annotation).get(name)
        if field is None or (field.is_required() and depth == len(names)):
            return None
        if depth == len(names):
            return to_jsonable_python(BEFORE.get(name, field.default))
        # a section that may be null has defaults only where the fingerprint has other keys of it
        section = ".".join(names[:depth])
        off = section in fingerprint or field.default is None
        if off and not any(other.startswith(f"{section}.") for other in fingerprint):
            return None
        annotation = field.annotation
    return None


def unnamed(old: Mapping[str, object], new: Mapping[str, object]) -> Fingerprint:
    """Return what `new` says of models in folders of which `old`, an earlier one, names no file."""
    ours, theirs = (
        {match[1] for key in facts if (match := MODEL_FILE.fullmatch(key))} for facts in (new, old)
    )
    roles = ours - theirs
    return {k: v for k, v in new.items() if k not in old and k.split(" file ")[0] in roles}

"""Suites: named lists of tasks with their questions, as YAML (`eval/suites/*.yaml`), read into items.

A task is one of `configs/tasks` or stands in the suite itself; its questions are rows of a file or of a dataset, read as
the corpus is. Who is asked, how long an answer may be, where the questions come from and under which license stand in
the suite. Reading one loads no model.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from distill.config import Columns, Config, File, Positive, Section, checked_model
from distill.config_file import find_config
from distill.corpus.corpus import rank
from distill.corpus.prompts import ask
from distill.corpus.readers import Reject, SourceRow, list_files, read_dataset, read_file
from distill.corpus.rows import interpret
from distill.errors import DistillError, Exit
from distill.evaluation.items import held_out, items_of
from distill.records import Document, Item, digest
from distill.renamed_keys import first_names
from distill.storage.files import sha256_file
from distill.storage.run_folder import open_folder
from distill.tasks.task import Task, load_section, load_task, task_path

SUITES = Path("eval/suites")
Text = Annotated[str, Field(min_length=3, max_length=2000)]


class Data(Section):
    """Where the questions of a task come from: a file beside the suite or a dataset; rows of one `cluster` go together."""

    path: File | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "test"
    columns: Columns = Columns()
    reference_pattern: str | None = None
    cluster: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "Data":
        if (self.path is None) == (self.dataset is None):
            raise ValueError("needs path or dataset, and not both")
        if self.dataset is not None:
            checked_model(self.dataset)
        return self


class Entry(Section):
    """A task of a suite: its name or the task itself, its questions, how many of them, and the length of an answer."""

    task: str | Task
    data: Data
    n: Positive | None = None
    max_new_tokens: Positive = 256


class SuiteFile(Section):
    """A suite as it stands in YAML; base and student are always asked, the teacher where it says so."""

    name: str
    description: Text
    source: Text
    license: Text
    ask_teacher: bool = False
    tasks: Annotated[tuple[Entry, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Part:
    """A task of a suite with its items."""

    task: Task
    items: tuple[Item, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Suite:
    """A suite with its items; `facts` is what a reader is told about it."""

    name: str
    ask_teacher: bool
    parts: tuple[Part, ...]
    facts: Mapping[str, Any]

    @property
    def items(self) -> list[Item]:
        """Return the items of all tasks."""
        return [item for part in self.parts for item in part.items]

    def limits(self) -> dict[str, int]:
        """Return how many tokens an answer may have, by item id."""
        return {item.id: part.max_new_tokens for part in self.parts for item in part.items}


def suite_path(name_or_path: str) -> Path:
    """Return the file of a suite: a path ending in .yaml, or the name of one in eval/suites."""
    if name_or_path.endswith((".yaml", ".yml")):
        return find_config(Path(name_or_path))
    return find_config(SUITES / f"{name_or_path}.yaml")


def known_suites() -> list[str]:
    """Return the names of the suites that ship."""
    return sorted(path.stem for path in suite_path("forgetting").parent.glob("*.yaml"))


def load_suites(names: Sequence[str]) -> list[Suite]:
    """Read suites and their items; raises DistillError: exit 2 for a faulty suite, 3 for faulty or missing questions."""
    suites = [load_suite(name) for name in names]
    repeated = {s.name for s in suites if sum(s.name == other.name for other in suites) > 1}
    if repeated:
        what = f"two suites are called {min(repeated)}"
        raise DistillError(Exit.CONFIG, "evaluation.suites", what, "rename one of the files")
    return suites


def load_suite(name_or_path: str, data: Path | None = None) -> Suite:
    """Read one suite and its items; a run's folder is the suite of its held-out prompts.

    `data` is a file of questions that stands in for what the suite would fetch from the Hub.
    """
    if is_run(Path(name_or_path)):
        return held_out_suite(Path(name_or_path))
    path = suite_path(name_or_path)
    told = _read(path)
    parts = [_part(entry if data is None else _local(entry, data), path) for entry in told.tasks]
    names = [part.task.name for part in parts]
    if len(set(names)) < len(names):
        raise DistillError(Exit.CONFIG, path, "two tasks have one name", "name them differently")
    facts = told.model_dump(include={"description", "source", "license"})
    return Suite(told.name, told.ask_teacher, tuple(parts), {**facts, "sha256": _hash(path, told)})


def tasks_of(config: Config) -> list[Task]:
    """Return the tasks whose answers a run checks: those it asks, and those of its suites. Reads no questions."""
    asked = [load_task(name) for name in config.prompts.tasks]
    suites = [_read(suite_path(name)) for name in config.evaluation.suites]
    return asked + [_task(entry) for suite in suites for entry in suite.tasks]


def _task(entry: Entry) -> Task:
    return entry.task if isinstance(entry.task, Task) else load_task(entry.task)


def _local(entry: Entry, file: Path) -> Entry:
    data = entry.data.model_copy(update={"path": file.absolute(), "dataset": None})
    return entry.model_copy(update={"data": data})


def is_run(path: Path) -> bool:
    """Tell whether a path is a run's folder; a model's has a config.json too."""
    return (path / "config.json").is_file() and (path / "dataset").is_dir()


def held_out_suite(run: Path) -> Suite:
    """Return a run's held-out prompts as a suite, as far as their tasks have a checker."""
    config = open_folder(run).config
    items = items_of(held_out(run / "dataset/heldout.jsonl"), run / "documents.jsonl")
    names = [name for name in dict.fromkeys(i.task for i in items) if task_path(name).is_file()]
    tasks = [task for task in map(load_task, names) if task.checker]
    if not tasks:
        what, fix = "no held-out prompt has a task with a checker", "eval/compare.py compares runs"
        raise DistillError(Exit.EVALUATION, run, what, fix)
    limit = config.evaluation.max_new_tokens or config.teacher.max_new_tokens
    parts = [Part(t, tuple(i for i in items if i.task == t.name), limit) for t in tasks]
    facts = {
        "description": f"the held-out prompts of the run {run.resolve().name}",
        "source": "the run's corpus",
        "license": "that of the corpus",
        "sha256": sha256_file(run / "dataset/heldout.jsonl"),
    }
    return Suite(f"{run.resolve().name}-heldout", False, tuple(parts), facts)


def _read(path: Path) -> SuiteFile:
    if not path.is_file():
        fix = f"a path ending in .yaml, or one of {', '.join(known_suites())}"
        raise DistillError(Exit.CONFIG, path, "there is no such suite", fix)
    return load_section(path, SuiteFile, "suite", str(SUITES))


def _part(entry: Entry, suite: Path) -> Part:
    """Make the items of a task; raises DistillError where nothing decides whether an answer is right."""
    task = _task(entry)
    if task.checker is None:
        fix = "add a checker and its metric to the task"
        raise DistillError(Exit.CONFIG, suite, f"task {task.name} has no checker", fix)
    questions = _questions(entry.data, suite, f"{suite}: task {task.name}")
    chosen = sorted(questions, key=lambda d: rank(d.id, 0, "suite"))[: entry.n]
    items: dict[str, Item] = {}
    for document in chosen:
        item = Item.make(ask(task, document))
        cluster = document.meta.get(entry.data.cluster or "", item.cluster)
        items[item.id] = item.model_copy(update={"cluster": str(cluster)})
    return Part(task, tuple(items.values()), entry.max_new_tokens)


def _questions(data: Data, suite: Path, where: str) -> list[Document]:
    """Read the rows of a task; every one must be a question, for what is left out would change the result."""
    found = []
    for row in _rows(data, suite):
        try:
            if isinstance(row, Reject):
                raise ValueError(row.reason)
            pattern = data.reference_pattern
            found.append(interpret(row.value, row.where, data.columns, "prompts", pattern))
        except ValueError as error:
            what = f"{row.where} is no question: {error}"
            fix = "correct the row, or map data.columns"
            raise DistillError(Exit.INPUT, where, what, fix) from None
    if not found:
        raise DistillError(Exit.INPUT, where, "no items", "give it at least one question")
    return found


def _rows(data: Data, suite: Path) -> Iterator[SourceRow | Reject]:
    if data.path is None:
        try:
            yield from read_dataset(data.dataset or "", data.dataset_config, data.dataset_split)
        except DistillError as error:
            fix = "check the name and the connection, or give the questions with --data FILE"
            raise DistillError(error.code, error.where, error.what, fix) from None
        return
    for file in list_files(_place(data.path, suite))[0]:
        yield from read_file(file, file.name)


def _place(path: Path, suite: Path) -> Path:
    """Return where a file of questions lies: beside the suite, else as the path says, else as it ships."""
    beside = suite.parent / path
    return beside if beside.exists() else find_config(path)


def amounts(config: Config) -> list[tuple[int | None, int]]:
    """Return, for each task of a run's suites, its items (None: all rows of a dataset unread) and an answer's tokens."""
    found = []
    for path in map(suite_path, config.evaluation.suites):
        for entry in _read(path).tasks:
            items = entry.n if entry.data.path is None else len(_part(entry, path).items)
            found.append((items, entry.max_new_tokens))
    return found


def identity(config: Config) -> dict[str, str]:
    """Return the hash of each suite that a run is measured on: of its YAML, its tasks and its files of questions."""
    paths = {name: suite_path(name) for name in config.evaluation.suites}
    return {f"suite {name}": _hash(path, _read(path)) for name, path in paths.items()}


def _hash(suite: Path, told: SuiteFile) -> str:
    named = [task_path(e.task) for e in told.tasks if isinstance(e.task, str)]
    places = [_place(e.data.path, suite) for e in told.tasks if e.data.path]
    questions = [file for place in places for file in list_files(place)[0]]
    hashes = [sha256_file(file) for file in (*named, *questions) if file.is_file()]
    return digest([hashlib.sha256(first_names(suite.read_bytes())).hexdigest(), *hashes])

"""What the models are asked: a run's held-out items, and suites.

A suite is a named list of tasks with their questions, as YAML (`eval/suites/*.yaml`). A task is one
of `configs/tasks` or stands in the suite itself; its questions are rows of a file or of a dataset,
read as the corpus is. Nothing here loads a model.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from distill.config.renamed_keys import first_names
from distill.config.teachers import EndpointTeacher, Teacher
from distill.config.tree import Columns
from distill.config.values import File, Positive, Section, checked_model
from distill.config.yaml_file import find_config
from distill.corpus.corpus import rank
from distill.corpus.prompts import ask
from distill.corpus.readers import Reject, SourceRow, list_files, read_dataset, read_file
from distill.corpus.rows import interpret
from distill.errors import DistillError, Exit
from distill.records import Document, Item, Pair, Prompt, Record, Response, digest
from distill.storage.files import read_records, sha256_file, write_records
from distill.storage.run_folder import open_run
from distill.tasks.scoring import answer_limit
from distill.tasks.task import Task, load_section, load_task, task_path, tasks_of_run

SUITES = Path("eval/suites")
RECORDED = "the teacher's answers were recorded, and it cannot be asked anew"
UNPAID = "a paid teacher is asked the questions of a suite only within teacher.budget_dollars"
UNASKED = "the suite does not ask the teacher"
Text = Annotated[str, Field(min_length=3, max_length=2000)]


class Data(Section):
    """Where questions come from: a file beside the suite, or a dataset."""

    path: File | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "test"
    columns: Columns = Columns()
    reference_pattern: str | None = None
    cluster: str | None = None
    """A column; rows that share its value are not independent."""

    @model_validator(mode="after")
    def _one_source(self) -> "Data":
        if (self.path is None) == (self.dataset is None):
            raise ValueError("needs path or dataset, and not both")
        if self.dataset is not None:
            checked_model(self.dataset)
        return self

    def files(self, suite: Path) -> list[Path]:
        """Return the files of questions: beside the suite, else at their path, else as shipped."""
        if self.path is None:
            return []
        beside = suite.parent / self.path
        return list_files(beside if beside.exists() else find_config(self.path))[0]


class Entry(Section):
    """A task of a suite (or its name), its questions, how many, and the length of an answer."""

    task: str | Task
    data: Data
    n: Positive | None = None
    max_new_tokens: Positive = 256

    def load_task(self) -> Task:
        """Return the task itself."""
        return self.task if isinstance(self.task, Task) else load_task(self.task)


class SuiteFile(Section):
    """A suite's YAML; base and student are always asked, the teacher where `ask_teacher` is set."""

    name: str
    description: Text
    source: Text
    license: Text
    ask_teacher: bool = False
    tasks: Annotated[tuple[Entry, ...], Field(min_length=1)]

    def sha256(self, path: Path) -> str:
        """Return the hash of the YAML in `path`, of its tasks and of its files of questions."""
        tasks = [task_path(e.task) for e in self.tasks if isinstance(e.task, str)]
        questions = [file for e in self.tasks for file in e.data.files(path)]
        hashes = [sha256_file(file) for file in (*tasks, *questions) if file.is_file()]
        return digest([hashlib.sha256(first_names(path.read_bytes())).hexdigest(), *hashes])


class Part(Record):
    """A task of a suite with its items."""

    task: Task
    items: tuple[Item, ...]
    max_new_tokens: int


class Suite(Record):
    """A suite with its items, as it is kept in a run's `answers/suites.json`."""

    name: str
    ask_teacher: bool
    parts: tuple[Part, ...]
    facts: dict[str, str]  # description, source, license and hash, for the report

    @property
    def items(self) -> list[Item]:
        """Return the items of all tasks."""
        return [item for part in self.parts for item in part.items]

    @property
    def tasks(self) -> dict[str, Task]:
        """Return the tasks by name."""
        return {part.task.name: part.task for part in self.parts}

    def limits(self) -> dict[str, int]:
        """Return how many tokens an answer may have, by item id."""
        return {item.id: part.max_new_tokens for part in self.parts for item in part.items}


def known_suites() -> list[str]:
    """Return the names of the suites that ship."""
    return sorted(
        path.stem for path in find_config(SUITES / "forgetting.yaml").parent.glob("*.yaml")
    )


def read_suite(name_or_path: str) -> tuple[SuiteFile, Path]:
    """Read a suite's YAML, but no questions, by its path or its name; return its path too."""
    shipped = not name_or_path.endswith((".yaml", ".yml"))
    path = find_config(SUITES / f"{name_or_path}.yaml" if shipped else Path(name_or_path))
    if not path.is_file():
        fix = f"a path ending in .yaml, or one of {', '.join(known_suites())}"
        raise DistillError(Exit.CONFIG, path, "there is no such suite", fix)
    return load_section(path, SuiteFile, "suite", str(SUITES)), path


def load_suites(names: Sequence[str]) -> list[Suite]:
    """Read suites and their items; raises DistillError: exit 2 for YAML, 3 for the questions."""
    suites = [load_suite(name) for name in names]
    called = [suite.name for suite in suites]
    if repeated := [name for name in called if called.count(name) > 1]:
        what = f"two suites are called {repeated[0]}"
        raise DistillError(Exit.CONFIG, "evaluation.suites", what, "rename one of the files")
    return suites


def load_suite(name_or_path: str, questions: Path | None = None) -> Suite:
    """Read one suite and its items; a run's folder is the suite of its held-out prompts.

    `questions` is a file that stands in for what the suite would fetch from the Hub.
    """
    if is_run(Path(name_or_path)):
        return held_out_suite(Path(name_or_path))
    suite, path = read_suite(name_or_path)
    local = {"path": questions.absolute(), "dataset": None} if questions else {}
    parts = tuple(load_part(e, e.data.model_copy(update=local), path) for e in suite.tasks)
    if len({part.task.name for part in parts}) < len(parts):
        raise DistillError(Exit.CONFIG, path, "two tasks have one name", "name them differently")
    facts = suite.model_dump(include={"description", "source", "license"})
    facts["sha256"] = suite.sha256(path)
    return Suite(name=suite.name, ask_teacher=suite.ask_teacher, parts=parts, facts=facts)


def load_part(entry: Entry, data: Data, suite: Path) -> Part:
    """Read a task's questions as items; every row must be one, or the result would change."""
    task = entry.load_task()
    where = f"{suite}: task {task.name}"
    if task.checker is None:
        fix = "add a checker and its metric to the task"
        raise DistillError(Exit.CONFIG, suite, f"task {task.name} has no checker", fix)
    documents = list[Document]()
    for row in question_rows(data, suite):
        try:
            if isinstance(row, Reject):
                raise ValueError(row.reason)
            pattern = data.reference_pattern
            documents.append(interpret(row.value, row.where, data.columns, "prompts", pattern))
        except ValueError as error:
            what, fix = f"{row.where} is no question: {error}", "correct the row, or data.columns"
            raise DistillError(Exit.INPUT, where, what, fix) from None
    if not documents:
        raise DistillError(Exit.INPUT, where, "no items", "give it at least one question")
    items: dict[str, Item] = {}
    for document in sorted(documents, key=lambda d: rank(d.id, 0, "suite"))[: entry.n]:
        item = Item.make(ask(task, document))
        cluster = document.meta.get(data.cluster or "", item.cluster)
        items[item.id] = item.model_copy(update={"cluster": str(cluster)})
    return Part(task=task, items=tuple(items.values()), max_new_tokens=entry.max_new_tokens)


def question_rows(data: Data, suite: Path) -> Iterator[SourceRow | Reject]:
    """Yield the rows of a file of questions, or of a dataset."""
    for file in data.files(suite):
        yield from read_file(file, file.name)
    try:
        if data.dataset:
            yield from read_dataset(data.dataset, data.dataset_config, data.dataset_split)
    except DistillError as error:
        fix = "check the name and the connection, or give the questions with --data FILE"
        raise DistillError(error.code, error.where, error.what, fix) from None


def tasks_of(tasks: Sequence[str], suites: Sequence[str]) -> list[Task]:
    """Return the tasks whose answers a run checks, those of its suites too; reads no questions."""
    entries = [entry for name in suites for entry in read_suite(name)[0].tasks]
    return [*map(load_task, tasks), *(entry.load_task() for entry in entries)]


def amounts(names: Sequence[str]) -> Iterator[tuple[int | None, int]]:
    """Yield each task's items (None: all rows of an unread dataset) and an answer's tokens."""
    for suite, path in map(read_suite, names):
        for entry in suite.tasks:
            items = len(load_part(entry, entry.data, path).items) if entry.data.path else entry.n
            yield items, entry.max_new_tokens


def suite_hashes(names: Sequence[str]) -> dict[str, str]:
    """Return the hash of each suite that a run is measured on, for its fingerprint."""
    suites = {name: read_suite(name) for name in names}
    return {f"suite {name}": suite.sha256(path) for name, (suite, path) in suites.items()}


def why_no_teacher(teacher: Teacher, suite: Suite) -> str | None:
    """Say why a suite is not put to the teacher, or None where it is.

    A local teacher is asked where the suite says so. A paid one needs a budget besides: nobody who
    runs an evaluation should find a charge for questions that no student learns from.
    """
    if not suite.ask_teacher:
        return UNASKED
    if isinstance(teacher, EndpointTeacher) and teacher.budget_dollars is None:
        return UNPAID
    return None if teacher.makes_answers else RECORDED


def write_answers(
    folder: Path, suite: Suite, answers: Mapping[str, Mapping[str, Response]]
) -> None:
    """Write what the models answered to a suite, in the order of its items."""
    for model, by_id in answers.items():
        path = folder / f"answers/{suite.name}/{model}.jsonl"
        write_records(path, [by_id[i.id] for i in suite.items if i.id in by_id])


def is_run(path: Path) -> bool:
    """Tell whether a path is a run's folder; a model's has a config.json too."""
    return (path / "config.json").is_file() and (path / "dataset").is_dir()


def held_out_items(run: Path) -> tuple[list[Pair], list[Item]]:
    """Return the held-out pairs of a run's folder, one a prompt, and their items, in one order.

    Chunks of one original document are one cluster. Raises DistillError (exit 8) where there are
    none.
    """
    path, documents, pairs = run / "dataset/heldout.jsonl", run / "documents.jsonl", {}
    for pair in read_records(path, Pair):
        pairs.setdefault(pair.prompt.id, pair)
    if not pairs:
        fix = "raise corpus.split.heldout or prompts.heldout"
        raise DistillError(Exit.EVALUATION, path, "no held-out items", fix)
    rows = read_records(documents, Document) if documents.exists() else []
    prompts = [pair.prompt for pair in pairs.values()]
    both = zip(prompts, origins_of(prompts, rows), strict=True)
    items = [Item.make(prompt).model_copy(update={"cluster": origin}) for prompt, origin in both]
    return list(pairs.values()), items


def origins_of(prompts: Sequence[Prompt], documents: Sequence[Document]) -> list[str]:
    """Return the original document of each prompt."""
    parents = {d.id: str(d.meta.get("parent") or d.id) for d in documents}
    return [parents.get(prompt.document_id, prompt.document_id) for prompt in prompts]


def by_item(items: Sequence[Item], responses: Sequence[Response]) -> dict[str, Response]:
    """Index answers, given in the order of the items, by item."""
    return {item.id: response for item, response in zip(items, responses, strict=True)}


def held_out_suite(folder: Path) -> Suite:
    """Return a run's held-out prompts as a suite, as far as their tasks have a checker."""
    limit, name = answer_limit(open_run(folder).config), folder.resolve().name
    items, find, parts = held_out_items(folder)[1], tasks_of_run(folder), list[Part]()
    for task in map(find, dict.fromkeys(item.task for item in items)):
        if task and task.checker:
            mine = tuple(item for item in items if item.task == task.name)
            parts.append(Part(task=task, items=mine, max_new_tokens=limit))
    if not parts:
        what, fix = "no held-out prompt has a task with a checker", "eval/compare.py compares runs"
        raise DistillError(Exit.EVALUATION, folder, what, fix)
    facts = {
        "description": f"the held-out prompts of the run {name}",
        "source": "the run's corpus",
        "license": "that of the corpus",
        "sha256": sha256_file(folder / "dataset/heldout.jsonl"),
    }
    return Suite(name=f"{name}-heldout", ask_teacher=False, parts=tuple(parts), facts=facts)

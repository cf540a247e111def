"""Tasks: what is asked about a document or of a prompt, as YAML that a user can write without code.

A task has a student's view (what is trained and served), where it differs a teacher's (which may
see a passage that the student does not), and perhaps a checker. Templates are jinja2 in a sandbox.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import ValidationError, field_validator, model_validator

from distill.config.values import Section
from distill.config.yaml_file import find_config, read_yaml
from distill.errors import DistillError, Exit
from distill.records import Prompt
from distill.storage.files import read_json
from distill.tasks.checkers import needs_reference, validate

NamedSection = TypeVar("NamedSection", bound=Section)
TASKS_FILE = "tasks.json"  # in a run's folder: the tasks as they were asked, by name
ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False)
compile_template = cache(ENVIRONMENT.from_string)  # a task's templates are filled for each prompt


class PromptView(Section):
    """The turns of one side: templates of the user's turn and, if any, of the system's."""

    user: str = ""
    system: str | None = None

    @field_validator("user", "system")
    @classmethod
    def _template(cls, value: str | None) -> str | None:
        try:
            ENVIRONMENT.parse(value or "")
        except TemplateSyntaxError as error:
            raise ValueError(f"template line {error.lineno}: {error.message}") from None
        return value


class Task(Section):
    """A named task; `metric` is what the scorecard calls the share that passes the checker."""

    name: str
    metric: str | None = None
    student: PromptView
    teacher: PromptView | None = None
    reference: str | None = None
    checker: dict[str, Any] | None = None

    @field_validator("checker")
    @classmethod
    def _known_checker(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            validate(value)
        return value

    @model_validator(mode="after")
    def _complete(self) -> "Task":
        if not self.student.user.strip():
            raise ValueError("student.user is empty")
        if (self.checker is None) != (self.metric is None):
            raise ValueError("metric and checker come together: the metric counts what passes")
        return self

    def teacher_view(self) -> PromptView | None:
        """Return the teacher's view, with the student's user turn where it states none."""
        if self.teacher is None or self.teacher.user.strip():
            return self.teacher
        return self.teacher.model_copy(update={"user": self.student.user})


FindTask = Callable[[str], Task | None]


def task_path(name_or_path: str) -> Path:
    """Return the file of a task: a path ending in .yaml, or the name of one in configs/tasks."""
    if name_or_path.endswith((".yaml", ".yml")):
        return find_config(Path(name_or_path))
    return find_config(Path("configs/tasks") / f"{name_or_path}.yaml")


def load_task(name_or_path: str) -> Task:
    """Read and check a task; raises DistillError (exit 2) naming the file and the error."""
    return load_section(task_path(name_or_path), Task, "task", "configs/tasks")


def load_section(path: Path, kind: type[NamedSection], what: str, examples: str) -> NamedSection:
    """Read a YAML file as a section that is named after it, or stop (exit 2) with the error."""
    tree = read_yaml(path, kind)
    if not isinstance(tree, dict):
        raise DistillError(Exit.CONFIG, path, f"holds no {what}", f"start from one of {examples}")
    return as_section({"name": path.stem, **tree}, path, kind, what)


def as_section(
    tree: dict[str, object], path: Path, kind: type[NamedSection], what: str
) -> NamedSection:
    """Check what was read from a file; raises DistillError (exit 2) with the file and the error."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        nearest = max(error.errors(), key=lambda detail: len(detail["loc"]))  # among alternatives
        key, message = ".".join(map(str, nearest["loc"])), nearest["msg"]
        wrong = f"{key}: {message.removeprefix('Value error, ')}".removeprefix(": ")
        raise DistillError(Exit.CONFIG, path, wrong, f"correct the {what}") from None


@cache
def shipped(name: str) -> Task | None:
    """Return the task of that name in configs/tasks, or None."""
    return load_task(name) if task_path(name).is_file() else None


def checker_of(task: Task | None, prompt: Prompt) -> dict[str, Any] | None:
    """Return the task's checker, None where it has none or lacks the reference that it needs."""
    checker = task and task.checker
    unable = checker and needs_reference(checker["kind"]) and not (prompt.reference or "").strip()
    return None if unable else checker


def tasks_of_run(folder: Path) -> FindTask:
    """Return what finds a task by its name: in the run's `tasks.json`, else in configs/tasks."""
    path = folder / TASKS_FILE
    rows = read_json(path).items() if path.is_file() else ()
    tasks = {name: as_section({"name": name, **row}, path, Task, "task") for name, row in rows}
    return lambda name: tasks.get(name) or shipped(name)


def checkable(prompts: Sequence[Prompt], find: FindTask, key: str) -> list[Prompt]:
    """Return the prompts whose answers the checker of their task can judge.

    Raises DistillError (exit 2), for the config's `key` that needs it, where a task has none.
    """
    judged = [prompt for prompt in prompts if checker_of(find(prompt.task), prompt)]
    for name in sorted({prompt.task for prompt in prompts} - {prompt.task for prompt in judged}):
        lack = "no prompt with the reference that its checker needs"
        what = f"task {name} has {lack if (task := find(name)) and task.checker else 'no checker'}"
        raise DistillError(Exit.CONFIG, key, what, f"add it, or leave {key} out")
    return judged


def fill(template: str, task: str, values: Mapping[str, object]) -> str:
    """Render a template; raises DistillError (exit 2) where it uses a value that is not there."""
    try:
        return compile_template(template).render(values).strip()
    except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
        fix = f"templates may use: {', '.join(sorted(values))}"
        raise DistillError(Exit.CONFIG, f"task {task}", f"template: {error}", fix) from None

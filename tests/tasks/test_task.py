"""Tasks: the shipped ones load, and a wrong one ends with its file and its fault."""

from pathlib import Path

import pytest

from distill.errors import Exit
from distill.tasks.task import fill, load_task, shipped
from tests.support.errors import stops

SHIPPED = sorted(Path("configs/tasks").glob("*.yaml"))


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_docs_task_loads(tmp_path):
    block = Path("docs/corpus.md").read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    task = load_task(write(tmp_path, block))
    assert task.checker and task.teacher_view()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_tasks_load_and_fence_the_document(path):
    task = load_task(path.stem)
    assert task.name == path.stem and shipped(path.stem) == task
    for view in (task.student, task.teacher):
        if view and "document.text" in view.user:
            assert "<document>\n{{ document.text }}\n</document>" in view.user


def test_the_teacher_may_have_only_a_longer_system_turn(tmp_path):
    task = load_task(write(tmp_path, "student: {user: '{{ prompt }}'}\nteacher: {system: Long.}"))
    view = task.teacher_view()
    assert task.name == "mine" and view is not None
    assert (view.system, view.user) == ("Long.", "{{ prompt }}")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "holds no task"),
        ("student: {user: ''}", "student.user is empty"),
        ("student: {user: '{{ x'}", "template line 1"),
        ("student: {user: x}\nchecker: {kind: vibes}\nmetric: m", "kind must be one of"),
        ("student: {user: x}\nchecker: {kind: number}", "metric and checker come together"),
        ("student: {user: x}\nteachr: {user: x}", "teachr"),
        ("metric: m", "student"),
        ("student: {user: x", "mine.yaml:1"),
    ],
)
def test_a_wrong_task_names_its_file_and_fault(tmp_path, text, fault):
    with stops(Exit.CONFIG, "no_such_task"):
        load_task("no_such_task")
    with stops(Exit.CONFIG) as caught:
        load_task(write(tmp_path, text))
    assert fault in str(caught.value) and "mine.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ missing }}",
        "{{ document.meta.missing }}",
        "{{ document.__class__.__mro__ }}",
        "{{ document.text.__globals__ }}",
        "{{ 1 / 'a' }}",
        "{{ 1 // 0 }}",
        "{{ range(10**9) }}",
    ],
)
def test_a_template_that_fails_or_breaks_out_is_one_line(template):
    values = {"document": {"text": "t", "meta": {}}}
    with stops(Exit.CONFIG) as caught:
        fill(template, "mine", values)
    assert "\n" not in str(caught.value)


def test_a_document_is_not_a_template():
    values = {"document": {"text": "{{ 7 * 7 }}{% raw %}", "meta": {}}}
    assert fill("{{ document.text }}", "mine", values) == "{{ 7 * 7 }}{% raw %}"

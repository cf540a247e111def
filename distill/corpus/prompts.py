"""The prompts stage: applies the tasks to the documents, in the student's view and where it differs the teacher's.

A prompt is in the split of its document. Which documents are asked, and what, follows from content hashes, so a run
repeats; with `per_document: rotate` each document gets one task, and each split the same number of each.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from distill.config import Config
from distill.corpus.control_tokens import break_up, looks_like_instructions
from distill.errors import DistillError, Exit
from distill.records import SPLITS, Document, Message, Prompt
from distill.storage.files import read_records, sha256_file, write_json, write_records
from distill.storage.progress import say
from distill.storage.run_folder import Run
from distill.tasks.task import TASKS_FILE, PromptView, Task, fill, load_task, task_path

PLAIN = "chat"  # the task of prompts that are asked unchanged


def main(config: Config, run: Run) -> None:
    """Make prompts.jsonl from documents.jsonl; raises DistillError (exit 2) where a task does not fit the documents."""
    settings = config.prompts
    documents = read_records(run.path("documents.jsonl"), Document)
    tasks = load_tasks(settings.tasks)
    caps = {split: getattr(settings, split) for split in SPLITS}
    prompts: list[Prompt] = []
    counts: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        mine = sorted((d for d in documents if d.split == split), key=lambda d: d.id)
        documents_and_tasks = pairs(
            mine, tasks, settings.per_document, settings.questions is not None
        )
        new = [ask(task, doc) for doc, task in islice(documents_and_tasks, caps[split])]
        counts[split] = dict(Counter(prompt.task for prompt in new))
        prompts += new
    write_records(run.path("prompts.jsonl"), prompts)
    write_json(run.path(TASKS_FILE), {task.name: task.model_dump(mode="json") for task in tasks})
    report(run, documents, counts)


def load_tasks(names: Sequence[str]) -> list[Task]:
    """Load the tasks; raises DistillError (exit 2) where two have one name, which prompts could not tell apart."""
    tasks = [load_task(name) for name in names]
    again = next((n for n, count in Counter(t.name for t in tasks).items() if count > 1), None)
    if again:
        raise DistillError(
            Exit.CONFIG, "prompts.tasks", f"two tasks are called {again}", "rename one"
        )
    return tasks


def identity(config: Config) -> dict[str, str]:
    """Return the hash of each task's file."""
    paths = {name: task_path(name) for name in config.prompts.tasks or (PLAIN,)}
    return {f"task {name}": sha256_file(path) for name, path in paths.items() if path.is_file()}


def pairs(
    documents: list[Document], tasks: list[Task], per_document: str, questions: bool = False
) -> Iterator[tuple[Document, Task]]:
    """Yield each document with each of its tasks; a row that holds a prompt needs no task.

    Raises DistillError (exit 2) for a document without a task, unless the teacher writes `questions` about it.
    """
    plain = load_task(PLAIN)
    for place, document in enumerate(documents):
        if not tasks and "messages" in document.meta:
            yield document, plain
        elif not tasks and not questions:
            raise DistillError(
                Exit.CONFIG,
                "prompts.tasks",
                f"{document.source} is a document, and no task is asked of it",
                "name tasks, or set prompts.questions",
            )
        elif tasks and per_document == "rotate":
            yield document, tasks[place % len(tasks)]
        else:
            yield from ((document, task) for task in tasks)


def ask(task: Task, document: Document) -> Prompt:
    """Build the prompt of a task about a document, or around the prompt that a row holds."""
    values = template_values(document)
    teacher = task.teacher_view()
    reference = document.meta.get("reference")
    if task.reference is not None:
        reference = fill(task.reference, task.name, values)
    return Prompt.make(
        turns(task.student, task.name, document, values),
        document.id,
        task.name,
        turns(teacher, task.name, document, values) if teacher else None,
        reference,
    )


def template_values(document: Document) -> dict[str, Any]:
    """Return what templates may use: `document.text`, `document.meta`, and `prompt` where there is one."""
    meta = {k: break_up(v) if isinstance(v, str) else v for k, v in document.meta.items()}
    values: dict[str, Any] = {"document": {"text": break_up(document.text), "meta": meta}}
    messages = document.meta.get("messages")
    return values | {"prompt": break_up(messages[-1]["content"])} if messages else values


def turns(
    view: PromptView, task: str, document: Document, values: dict[str, Any]
) -> tuple[Message, ...]:
    """Return one side's conversation: the document's own earlier turns, and the task's user turn.

    A system turn of the task replaces the conversation's own.
    """
    earlier = [
        Message(role=turn["role"], content=break_up(turn["content"]))
        for turn in document.meta.get("messages", [])[:-1]
    ]
    if view.system is not None:
        earlier = [turn for turn in earlier if turn.role != "system"]
        earlier.insert(0, Message(role="system", content=fill(view.system, task, values)))
    return (*earlier, Message(role="user", content=fill(view.user, task, values)))


def report(run: Run, documents: list[Document], counts: dict[str, dict[str, int]]) -> None:
    """Show and note the prompts of each split and task, and how many documents look like an injection."""
    forged = sum(break_up(document.text) != document.text for document in documents)
    ordering = sum(looks_like_instructions(document.text) for document in documents)
    note = {"counts": counts, "control_token_texts": forged, "instruction_like": ordering}
    run.note("prompts", note)
    for split, tasks in counts.items():
        by_task = ", ".join(f"{count} {task}" for task, count in tasks.items()) or "none"
        say(f"prompts: {split}: {by_task}")
    if forged or ordering:
        say(
            f"prompts: {forged} documents hold control-token text (broken up), "
            f"{ordering} look like instructions (fenced as data)"
        )

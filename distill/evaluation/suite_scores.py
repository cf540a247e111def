"""From the answers to a suite to its results: scored by each task's checker, paired, and written with its items.

A suite stands apart from the held-out items: it never enters the headline.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.evaluation import results
from distill.evaluation.measurements import SuiteResult
from distill.evaluation.results import AnswersByModel, Measured
from distill.evaluation.statistics import Certainty
from distill.evaluation.suites import Part, Suite
from distill.records import Item
from distill.storage.files import read_json, write_json, write_records
from distill.tasks.task import Task


def measure_part(
    part: Part, answers: AnswersByModel, no_teacher: str = results.NO_TEACHER
) -> Measured:
    """Score every model's answers to one task of a suite."""
    task, items = part.task, list(part.items)
    found = results.measure_task(task.name, items, answers, task.metric or "", task.checker)
    return replace(found, no_teacher=no_teacher)


def measure_suite(suite: Suite, answers: AnswersByModel, no_teacher: str) -> dict[str, Measured]:
    """Score all tasks of a suite, by name; `no_teacher` says why the teacher's answers are missing."""
    return {part.task.name: measure_part(part, answers, no_teacher) for part in suite.parts}


def suite_result(
    suite: Suite, rows: Mapping[str, Measured], answers: AnswersByModel, certainty: Certainty
) -> SuiteResult:
    """Return a suite's part of evaluation.json: its facts, a row a task, all its checks together, lengths."""
    compared = results.results_of(rows, certainty)
    return SuiteResult(
        **suite.facts,
        tasks=compared.tasks,
        overall=compared.overall,
        lengths={m: results.answer_lengths(list(by_id.values())) for m, by_id in answers.items()},
    )


def write_suite(
    folder: Path, suite: Suite, rows: Mapping[str, Measured], models: Iterable[str]
) -> list[Path]:
    """Write a suite's items and scores below `folder`; return the files of scores."""
    write_records(folder / f"scores/{suite.name}/items.jsonl", suite.items)
    written = []
    for model in models:
        scores = [score for row in rows.values() for score in row.scores[model]]
        written.append(folder / f"scores/{suite.name}/{model}.jsonl")
        write_records(written[-1], scores)
    return written


def write_answers(folder: Path, suite: Suite, answers: AnswersByModel) -> None:
    """Write what was answered to a suite below `folder`, in the order of its items."""
    for model, given in answers.items():
        path = folder / f"answers/{suite.name}/{model}.jsonl"
        write_records(path, [given[i.id] for i in suite.items if i.id in given])


def write_suites(path: Path, suites: Sequence[Suite]) -> None:
    """Keep suites as they were asked: what they were read from may change, or be fetched from elsewhere."""
    write_json(path, [_plain(suite) for suite in suites])


def _plain(suite: Suite) -> dict[str, Any]:
    parts = [
        {
            "task": part.task.model_dump(mode="json"),
            "items": [item.model_dump(mode="json") for item in part.items],
            "max_new_tokens": part.max_new_tokens,
        }
        for part in suite.parts
    ]
    told = {"name": suite.name, "ask_teacher": suite.ask_teacher, "facts": dict(suite.facts)}
    return {**told, "parts": parts}


def read_suites(path: Path) -> list[Suite]:
    """Read what `write_suites` kept."""
    return [
        Suite(row["name"], row["ask_teacher"], tuple(map(_part, row["parts"])), row["facts"])
        for row in read_json(path)
    ]


def _part(row: Mapping[str, Any]) -> Part:
    items = tuple(Item.model_validate(item) for item in row["items"])
    return Part(Task.model_validate(row["task"]), items, row["max_new_tokens"])

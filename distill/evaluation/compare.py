"""Compare two runs, two models of runs, or two files of scores or answers: `python eval/compare.py A B`.

A side is a run's folder (its student), `RUN/scores/MODEL.jsonl`, or a `.jsonl` file of scores or of answers. Items are
paired by their content, so two runs can be compared wherever they share held-out items; the rest is counted.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from distill.errors import DistillError, Exit
from distill.evaluation.items import held_out, items_of
from distill.evaluation.report import table
from distill.evaluation.scorers import passes
from distill.evaluation.statistics import (
    USUAL,
    Bounds,
    Certainty,
    Estimate,
    estimate_difference,
    pair,
    require_paired,
)
from distill.evaluation.words import figure, signed
from distill.records import Item, Response, Score
from distill.store import read_records
from distill.tasks import checker_of, task_path


class Side(NamedTuple):
    """One side: its name, its scores by item id, and the items that it knows."""

    name: str
    values: dict[str, float | None]
    items: dict[str, Item]


def compare_paths(a: Path, b: Path, certainty: Certainty = USUAL) -> str:
    """Return the comparison as a table: a row a task, each paired on the items of both, and the interval of a - b.

    Raises DistillError: exit 3 for a path that holds neither scores nor answers, 8 where fewer than 95 % are paired.
    """
    items = {**known_items(a), **known_items(b)}
    left, right = load_side(a, items), load_side(b, items)
    shared = [i for i in left.values if i in right.values]
    lines = [
        f"a: {left.name}",
        f"b: {right.name}",
        f"{len(shared)} items in both, {len(left.values) - len(shared)} only in a, "
        f"{len(right.values) - len(shared)} only in b",
    ]
    if not items:
        lines.append("no held-out file was found, so every item counts as its own document")
    rows = []
    for task in dict.fromkeys(_task(items, i) for i in shared):
        ids = [i for i in shared if _task(items, i) == task]
        rows.append(_row(task, ids, left, right, items, certainty))
    head = ("task", "n", "missing", "a", "b", "a − b", "interval")
    return "\n".join([*lines, "", table(head, rows)])


def _task(items: Mapping[str, Item], item: str) -> str:
    return items[item].task if item in items else "all"


def _row(
    task: str,
    ids: Sequence[str],
    left: Side,
    right: Side,
    items: Mapping[str, Item],
    certainty: Certainty,
) -> tuple[str, ...]:
    paired = pair(left.values, right.values, ids)
    require_paired(paired, len(ids), f"task {task}")
    clusters = [items[i].cluster if i in items else i for i in paired.items]
    passed = set(paired.a_N) | set(paired.b_N) <= {0.0, 1.0}
    bounds = Bounds(0.0, 1.0) if passed else None  # of agreement scores the file says no bounds
    change = estimate_difference(paired.a_N, paired.b_N, clusters, certainty, bounds)
    means = [figure(float(side.mean()) if len(side) else None, 3) for side in paired[1:3]]
    return (
        task,
        str(len(paired.items)),
        str(paired.missing),
        *means,
        signed(change.value, 3),
        _interval(change),
    )


def _interval(change: Estimate) -> str:
    if change.low is None:
        return change.reason or "not known"
    return f"{signed(change.low, 3)} to {signed(change.high, 3)}"


def run_of(path: Path) -> Path | None:
    """Return the run that a path is, or lies in, if any."""
    return next((p for p in (path, *path.resolve().parents) if (p / "config.json").is_file()), None)


def known_items(path: Path) -> dict[str, Item]:
    """Return the held-out items of the run that a path belongs to."""
    run = run_of(path)
    if run is None or not (run / "dataset/heldout.jsonl").is_file():
        return {}
    made = items_of(held_out(run / "dataset/heldout.jsonl"), run / "documents.jsonl")
    return {item.id: item for item in made}


def load_side(path: Path, items: Mapping[str, Item]) -> Side:
    """Read one side's scores; answers are scored with the checkers of their tasks."""
    file = path / "scores/student.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise DistillError(
            Exit.INPUT, file, "is missing", "name a run, a file of scores or of answers"
        )
    try:
        with file.open("rb") as lines:
            Score.from_line(next(lines, b"{}"))
    except ValidationError:
        return Side(str(path), _scored(file, items), dict(items))
    return Side(str(path), {s.item_id: s.value for s in read_records(file, Score)}, dict(items))


def _scored(file: Path, items: Mapping[str, Item]) -> dict[str, float | None]:
    """Score a file of answers on the known items whose task has a checker."""
    answers = {answer.prompt_id: answer for answer in read_records(file, Response)}
    values = {}
    for item in items.values():
        checker = checker_of(item.task) if task_path(item.task).is_file() else None
        if checker is not None:
            values[item.id] = passes(checker, file.stem)(item, answers.get(item.prompt.id)).value
    if not values:
        raise DistillError(
            Exit.INPUT, file, "holds answers, but no held-out item is known that checks them",
            "compare with a run that has these prompts",
        )  # fmt: skip
    return values

"""Compare two runs, two models of runs, or two files of scores or answers: `python eval/compare.py A B`.

A side is a run's folder (its student), `RUN/scores/MODEL.jsonl`, or a `.jsonl` file of scores or of answers; or several
of them that differ in their seed only: `python eval/compare.py --a A1 A2 A3 --b B1 B2 B3`. Items are paired by their
content, so two runs can be compared wherever they share held-out items; the rest is counted.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
from pydantic import ValidationError

from distill.errors import DistillError, Exit
from distill.evaluation.claims import across_seeds, conclude, mcnemar, smallest_visible
from distill.evaluation.items import held_out, items_of
from distill.evaluation.scorers import passes
from distill.evaluation.statistics import (
    USUAL,
    Bounds,
    Certainty,
    Estimate,
    Floats,
    estimate_difference,
    pair,
    require_paired,
)
from distill.formatting import figure, markdown_table, p_value, signed
from distill.records import Item, Response, Score
from distill.storage.files import read_records
from distill.tasks.task import tasks_of_run

HEAD = ("task", "n", "missing", "a", "b", "a − b", "interval", "could see", "McNemar p", "a is")


class Side(NamedTuple):
    """One side: its name, its scores by item id, and the items that it knows."""

    name: str
    values: dict[str, float | None]
    items: dict[str, Item]


def compare_paths(a: Sequence[Path], b: Sequence[Path], certainty: Certainty = USUAL) -> str:
    """Return the comparison as a table: a row a task, each paired on the items of both, and the interval of a - b.

    Several paths a side are runs with other seeds. Raises DistillError: exit 3 for a path that holds neither scores nor
    answers, 8 where fewer than 95 % are paired.
    """
    items = {k: item for path in (*a, *b) for k, item in known_items(path).items()}
    left, right = ([load_side(path, items) for path in side] for side in (a, b))
    in_a, in_b = (
        dict.fromkeys(i for side in sides for i in side.values) for sides in (left, right)
    )
    shared = [i for i in in_a if i in in_b]
    lines = [
        *(f"a: {side.name}" for side in left),
        *(f"b: {side.name}" for side in right),
        f"{len(shared)} items in both, {len(in_a) - len(shared)} only in a, "
        f"{len(in_b) - len(shared)} only in b",
    ]
    if not items:
        lines.append("no held-out file was found, so every item counts as its own document")
    rows = []
    for task in dict.fromkeys(_task(items, i) for i in shared):
        ids = [i for i in shared if _task(items, i) == task]
        rows.append(_row(task, ids, left, right, items, certainty))
    return "\n".join([*lines, "", markdown_table(HEAD, rows)])


def _task(items: Mapping[str, Item], item: str) -> str:
    return items[item].task if item in items else "all"


def _row(
    task: str,
    ids: Sequence[str],
    left: Sequence[Side],
    right: Sequence[Side],
    items: Mapping[str, Item],
    certainty: Certainty,
) -> tuple[str, ...]:
    paired = pair(_averaged(left, ids), _averaged(right, ids), ids)
    require_paired(paired, len(ids), f"task {task}")
    clusters = [items[i].cluster if i in items else i for i in paired.items]
    sides = (paired.a_N, paired.b_N, clusters)
    passed = set(paired.a_N) | set(paired.b_N) <= {0.0, 1.0}
    bounds = Bounds(0.0, 1.0) if passed else None  # of agreement scores the file says no bounds
    if len(left) == len(right) == 1:
        change = estimate_difference(*sides, certainty, bounds)
    else:
        seeds = (_by_seed(left, paired.items), _by_seed(right, paired.items))
        change = across_seeds(*seeds, clusters, certainty)
    p = mcnemar(*sides).p
    means = [figure(float(side.mean()) if len(side) else None, 3) for side in paired[1:3]]
    return (
        task,
        str(len(paired.items)),
        str(paired.missing),
        *means,
        signed(change.value, 3),
        _interval(change),
        figure(smallest_visible(*sides, certainty), 3),
        p_value(p),
        conclude(change.low, change.high, change.clusters, p).verdict,
    )


def _averaged(sides: Sequence[Side], ids: Sequence[str]) -> dict[str, float | None]:
    """Return each item's mean score over the seeds, None where one of them has none."""
    found = {i: [side.values.get(i) for side in sides] for i in ids}
    return {i: None if None in row else fmean(v or 0.0 for v in row) for i, row in found.items()}


def _by_seed(sides: Sequence[Side], ids: Sequence[str]) -> Floats:
    return np.array([[side.values[i] for i in ids] for side in sides], dtype=np.float64)


def _interval(change: Estimate) -> str:
    if change.low is None:
        return change.reason or "not known"
    return f"{signed(change.low, 3)} to {signed(change.high, 3)}"


def run_of(path: Path) -> Path | None:
    """Return the run that a path is, or lies in, if any."""
    return next((p for p in (path, *path.resolve().parents) if (p / "config.json").is_file()), None)


def known_items(path: Path) -> dict[str, Item]:
    """Return the items that a path is about: those of a suite lie beside its scores, held-out ones in the run."""
    beside = path.with_name("items.jsonl")
    if path.is_file() and beside.is_file():
        return {item.id: item for item in read_records(beside, Item)}
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
    find, values = tasks_of_run(run_of(file) or file.parent), {}
    for item in items.values():
        task = find(item.task)
        if task and task.checker:
            score = passes(task.checker, file.stem)(item, answers.get(item.prompt.id))
            values[item.id] = score.value
    if not values:
        raise DistillError(
            Exit.INPUT, file, "holds answers, but no held-out item is known that checks them",
            "compare with a run that has these prompts",
        )  # fmt: skip
    return values

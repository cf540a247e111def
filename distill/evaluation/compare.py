"""`distill compare A B`: two runs, two models of runs, or two files of scores.

A side is a run's folder (its student), `RUN/scores/MODEL.jsonl`, or a file that `distill score`
wrote; or several of them that differ in their seed only. Items are paired by their content, so two
runs can be compared wherever they share held-out items; the others are counted.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from distill.errors import DistillError, Exit
from distill.evaluation import statistics
from distill.evaluation.scorers import SHARE
from distill.evaluation.suites import held_out_items
from distill.formatting import figure, markdown_table, p_value, signed
from distill.records import Item, Score
from distill.storage.files import read_records

HEAD = ("task", "n", "missing", "a", "b", "a − b", "interval", "could see", "McNemar p", "a is")
ItemScores = Mapping[str, float | None]  # scores by item id


def compare_paths(a: Sequence[Path], b: Sequence[Path]) -> str:
    """Return a table of a - b: a row a task, each paired on the items of both, with its interval.

    Several paths a side are runs with other seeds. Raises DistillError: exit 3 for a path that
    holds no scores, 8 where fewer than 95 % are paired.
    """
    items = {k: item for path in (*a, *b) for k, item in items_beside(path).items()}
    sides = [[load_scores(path) for path in side] for side in (a, b)]
    in_a, in_b = (dict.fromkeys(i for values in side for i in values) for side in sides)
    tasks: dict[str, dict[str, str]] = {}  # the cluster of each shared item
    for i in in_a:
        if i in in_b:
            task, cluster = (items[i].task, items[i].cluster) if i in items else ("all", i)
            tasks.setdefault(task, {})[i] = cluster
    shared = sum(map(len, tasks.values()))
    lines = [
        *(f"a: {path}" for path in a),
        *(f"b: {path}" for path in b),
        f"{shared} items in both, {len(in_a) - shared} only in a, {len(in_b) - shared} only in b",
    ]
    if not items:
        lines.append("no held-out file was found, so every item counts as its own document")
    rows = [row_of(task, clusters, *sides) for task, clusters in tasks.items()]
    return "\n".join([*lines, "", markdown_table(HEAD, rows)])


def row_of(
    task: str, cluster_of: Mapping[str, str], a: Sequence[ItemScores], b: Sequence[ItemScores]
) -> tuple[str, ...]:
    """Return the comparison on the items of a task, over the mean of each side's seeds."""
    a_SN, b_SN = (
        np.array([[values.get(i) for i in cluster_of] for values in side], dtype=np.float64)
        for side in (a, b)
    )
    both_N = statistics.paired(a_SN.mean(axis=0), b_SN.mean(axis=0), f"task {task}")
    a_SN, b_SN = a_SN[:, both_N], b_SN[:, both_N]
    clusters = np.array(list(cluster_of.values()), dtype=np.object_)[both_N]
    sides = (a_SN.mean(axis=0), b_SN.mean(axis=0), clusters)
    if len(a) == len(b) == 1:
        checked = np.isin(sides[:2], (0, 1)).all()  # agreement has no bounds in the file
        change = statistics.estimate_difference(*sides, bounds=SHARE if checked else None)
    else:
        change = statistics.across_seeds(a_SN, b_SN, clusters)
    p, ends = statistics.mcnemar(*sides).p, [signed(end, 3) for end in change.ends]
    return (
        task,
        str(len(clusters)),
        str(len(cluster_of) - len(clusters)),
        *(figure(float(side_N.mean()) if len(clusters) else None, 3) for side_N in sides[:2]),
        signed(change.value, 3),
        change.reason or ("unknown" if change.low is None else " to ".join(ends)),
        figure(statistics.smallest_visible(*sides), 3),
        p_value(p),
        statistics.conclude(*change.ends, change.clusters, p).verdict,
    )


def items_beside(path: Path) -> dict[str, Item]:
    """Return the items of a path: a suite's lie beside its scores, held-out ones in the run."""
    beside = path.absolute().with_name("items.jsonl")
    if path.is_file() and beside.is_file():
        return {item.id: item for item in read_records(beside, Item)}
    above = (path, *path.resolve().parents)
    run = next((p for p in above if (p / "dataset/heldout.jsonl").is_file()), None)
    return {item.id: item for item in held_out_items(run)[1]} if run else {}


def load_scores(path: Path) -> ItemScores:
    """Read one side's scores; raises DistillError (exit 3) where it holds none."""
    file = path / "scores/student.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise DistillError(Exit.INPUT, file, "is missing", "name a run, or a file of scores")
    try:
        return {score.item_id: score.value for score in read_records(file, Score)}
    except DistillError as error:
        fix = "of answers, distill score makes scores"
        raise DistillError(Exit.INPUT, error.where, "is no score", fix) from None

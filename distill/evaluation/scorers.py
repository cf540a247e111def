"""From answers to scores: each model's score of each item, and which answers are acceptable.

Agreement with the teacher's answer (chrF) is a score too, and is never the headline.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import regex
from numpy.typing import NDArray

from distill.callables import PROVIDED
from distill.evaluation.statistics import Bounds, Floats
from distill.records import Item, Record, Response, Score, Usage
from distill.storage.files import write_records
from distill.tasks.checkers import GRADED, NEEDS_REFERENCE, needs_reference
from distill.tasks.scoring import Checker, score_answer
from distill.tasks.task import FindTask

AnswersByModel = Mapping[str, Mapping[str, Response]]  # model -> item id -> its answer
SHARE, CHRF = Bounds(0.0, 1.0), Bounds(0.0, 100.0)
NO_TEACHER = "agreement is measured against the teacher's own answer"
# as it stands in requests.jsonl, which `distill verify` makes again byte for byte
JUDGED = "the judge prefers it, or ties it with an answer of the teacher's that will do"


@dataclass(frozen=True)
class Measured:
    """One metric of some items: each model's scores by item id, the smallest and largest score."""

    metric: str
    items: Sequence[Item]
    scores: Mapping[str, Mapping[str, Score]]
    bounds: Bounds
    no_teacher: str = NO_TEACHER  # why the teacher has no scores
    checker: Checker | None = None

    @property
    def yes_or_no(self) -> bool:
        """Tell whether every score is at a bound, so that their mean is a share that passes."""
        kind = self.checker["kind"] if self.checker else None
        # a checker of the user's may grade without saying so beforehand
        values = (score.value for of_model in self.scores.values() for score in of_model.values())
        graded = kind in GRADED or any(value not in (None, *self.bounds) for value in values)
        return self.bounds == SHARE and not graded

    def of(self, model: str) -> list[Score]:
        """Return a model's scores of these items."""
        of_model = self.scores.get(model, {})
        return [of_model[item.id] for item in self.items if item.id in of_model]

    def values(self, model: str) -> dict[str, float | None]:
        """Return the values of a model's scores by item id."""
        return {score.item_id: score.value for score in self.of(model)}

    def array(self, model: str) -> Floats:
        """Return a model's scores, (N,), with NaN for what it has no score for."""
        values = self.values(model)
        return np.array([values.get(item.id) for item in self.items], dtype=np.float64)

    @cached_property
    def clusters(self) -> NDArray[np.object_]:
        """Return the clusters of the items, (N,)."""
        return np.array([item.cluster for item in self.items], dtype=np.object_)


def measure_items(
    items: Sequence[Item],
    answers: AnswersByModel,
    checker: Checker | None = None,
    metric: str = "",
    no_teacher: str = NO_TEACHER,
) -> Measured:
    """Score every model's answers to the items of one task by its checker.

    Without one: the likeness of base and student to the teacher's answers, where there are any.
    """
    references = dict[str, str]()
    if checker is None:
        references = {i: a.text for i, a in answers["teacher"].items() if a.text.strip()}
        items = [item for item in items if item.id in references]
    scores = {
        model: {
            i.id: score_answer(i, by_id.get(i.id), model, checker, references.get(i.id, ""))
            for i in items
        }
        for model, by_id in answers.items()
        if checker or model != "teacher"
    }
    if checker is None:
        return Measured("chrF", items, scores, CHRF)
    return Measured(metric, items, scores, SHARE, no_teacher, checker)


def measure_tasks(
    items: Sequence[Item], answers: AnswersByModel, find: FindTask, no_teacher: str = NO_TEACHER
) -> dict[str, Measured]:
    """Score the items task by task; `no_teacher` says why the teacher has no answers.

    A checker that compares with references is left aside where the teacher answered and no item of
    the task has one.
    """
    rows = {}
    for name in dict.fromkeys(item.task for item in items):
        mine, task = [item for item in items if item.task == name], find(name)
        checker, metric = (task.checker, task.metric or "") if task else (None, "")
        if checker and needs_reference(checker["kind"]) and "teacher" in answers:
            checker = checker if any(item.reference for item in mine) else None
        rows[name] = measure_items(mine, answers, checker, metric, no_teacher)
    return rows


def write_scores(
    folder: Path,
    models: Iterable[str],
    rows: Mapping[str, Measured],
    items: Sequence[Item] | None = None,
) -> None:
    """Write each model's scores, and beside them the items where they stand nowhere else."""
    if items is not None:
        write_records(folder / "items.jsonl", items)
    for model in models:
        scores = [score for row in rows.values() for score in row.of(model)]
        write_records(folder / f"{model}.jsonl", scores)


class HeldOutRequest(Record):
    """A held-out request: what it took each model, and whether the student's answer will do."""

    item: str
    cluster: str
    usage: dict[str, Usage]
    test: str | None = None  # None: no test covers it
    when_served: bool = False  # the test needs neither an answer key nor an answer of the teacher
    accepted: bool | None = None  # None: the test itself failed


def compares_with_answer(checker: Checker) -> bool:
    """Tell whether a check needs the right answer, which nobody has when a new request is served.

    A reference that is part of the question (the name that code must use) is there. A function of
    the user's may look at the reference, unless it says that it does not.
    """
    kind = checker["kind"]
    if function := PROVIDED["checker"].get(kind):
        return getattr(function, "needs_reference", True)
    grouped = kind == "regex" and regex.compile(checker["pattern"]).groups > 0
    return kind in NEEDS_REFERENCE or grouped


def requests_of(
    items: Sequence[Item],
    answers: AnswersByModel,
    rows: Iterable[Measured],
    verdicts: Iterable[Score] = (),
) -> list[HeldOutRequest]:
    """Return the requests in the order of the items, with what tests say of the student's answers.

    A checker accepts what passes in full, and counts for more than the judge's `verdicts` against
    the teacher: what wins, or ties with an answer that passes its check or, without one, is whole.
    """
    requests = {}
    for item in items:
        usage = {
            model: by_id[item.id].usage
            for model, by_id in answers.items()
            if item.id in by_id and by_id[item.id].stop != "error"
        }
        requests[item.id] = HeldOutRequest(item=item.id, cluster=item.cluster, usage=usage)
    tests, rows = dict[str, dict[str, object]](), [r for r in rows if "teacher" in r.scores]
    of_teacher = {item: value for row in rows for item, value in row.values("teacher").items()}
    for verdict in verdicts:
        item, value, response = verdict.item_id, verdict.value, answers["teacher"][verdict.item_id]
        complete = response.stop == "end" and bool(response.text.strip())
        right = of_teacher[item] == 1 if item in of_teacher else complete
        accepted = None if value is None else value == 1 or (value == 0.5 and right)
        tests[item] = {"test": JUDGED, "accepted": accepted}
    for row in rows:
        served = row.checker is not None and not compares_with_answer(row.checker)
        for item, value in row.values("student").items():
            accepted = None if value is None else value >= row.bounds.high
            tests[item] = {"test": row.metric, "when_served": served, "accepted": accepted}
    return [request.model_copy(update=tests.get(i, {})) for i, request in requests.items()]

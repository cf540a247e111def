"""From answers to scores: each model's score of each item, and which answers are acceptable.

An answer that is wrong, empty, truncated, refused or in the wrong format scores 0. None is for an
error of ours (no answer was stored, the request failed, the checker crashed), with the reason.
Agreement with the teacher's answer (chrF) is a score too, and is never the headline.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import regex
from numpy.typing import NDArray
from sacrebleu import sentence_chrf

from distill.callables import PROVIDED
from distill.evaluation.statistics import Bounds, Floats
from distill.records import Item, Record, Response, Score, Usage
from distill.storage.files import write_records
from distill.tasks.checkers import GRADED, NEEDS_REFERENCE, check, needs_reference
from distill.tasks.task import FindTask

AnswersByModel = Mapping[str, Mapping[str, Response]]  # model -> item id -> its answer
Checker = Mapping[str, Any]
OURS = (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError)
SHARE, CHRF = Bounds(0.0, 1.0), Bounds(0.0, 100.0)
NO_TEACHER = "agreement is measured against the teacher's own answer"
# as it stands in requests.jsonl, which `distill verify` makes again byte for byte
JUDGED = "the judge prefers it, or ties it with an answer of the teacher's that will do"


def score_answer(
    item: Item, response: Response | None, model: str, checker: Checker | None, reference: str = ""
) -> Score:
    """Score 1 where an answer passes the checker, else 0; one that grades gives its value.

    Without a checker: its likeness to the teacher's `reference`, chrF from 0 to 100 (Popović 2015).
    """
    value, answer = None, None
    if response is None:
        reason = "no answer was stored"
    elif response.stop == "error":
        reason = f"the request failed: {response.error or 'no reason given'}"
    elif response.stop == "filtered":
        value, reason = 0.0, "refused"
    elif not response.text.strip():
        value, reason = 0.0, "empty"
    elif checker is None and not reference.strip():
        reason = "there is no answer of the teacher to compare with"
    elif checker is None:
        value = sentence_chrf(response.text, [reference]).score
        reason = "chrF against the teacher"
    elif response.stop == "length":
        value, reason = 0.0, "truncated"
    elif needs_reference(checker["kind"]) and not (item.reference or "").strip():
        reason = "there is no reference to compare with"
    else:
        try:
            verdict = check(checker, item.prompt, response.text)
            grade = verdict.passed if verdict.value is None else verdict.value
            value, answer, reason = grade, verdict.answer, verdict.reason
        except OURS as error:
            reason = f"the checker failed: {type(error).__name__}: {error}"
    return Score(item_id=item.id, model=model, value=value, answer=answer, reason=reason)


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

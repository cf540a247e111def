"""From answers to scores: each model's score of each item, and which answers are acceptable.

An answer that is wrong, empty, truncated, refused or in the wrong format scores 0. None is for an
error of ours (no answer was stored, the request failed, the checker crashed), with the reason.
Agreement with the teacher's answer (chrF) is a score too, and is never the headline.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import regex
from sacrebleu import sentence_chrf

from distill.callables import PROVIDED
from distill.evaluation.statistics import Bounds, Floats
from distill.records import Item, Record, Response, Score, Usage
from distill.storage.files import write_records
from distill.tasks.checkers import GRADED, NEEDS_REFERENCE, check, needs_reference
from distill.tasks.task import FindTask

AnswersByModel = Mapping[str, Mapping[str, Response]]  # model -> item id -> its answer
Checker = Mapping[str, Any]
Outcome = tuple[float | None, str | None, str]  # value, what was extracted, and why
OURS = (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError)
SHARE, CHRF = Bounds(0.0, 1.0), Bounds(0.0, 100.0)
NO_TEACHER = "agreement is measured against the teacher's own answer"


def passes(item: Item, response: Response | None, checker: Checker, model: str) -> Score:
    """Score 1 where an answer passes the checker, else 0; one that grades gives its value."""

    def judge(response: Response) -> Outcome:
        if response.stop == "length":
            return 0.0, None, "truncated"
        if needs_reference(checker["kind"]) and not (item.reference or "").strip():
            return None, None, "there is no reference to compare with"
        try:
            verdict = check(checker, item.prompt, response.text)
        except OURS as error:
            return None, None, f"the checker failed: {type(error).__name__}: {error}"
        value = verdict.passed if verdict.value is None else verdict.value
        return None if value is None else float(value), verdict.answer, verdict.reason

    return _score(item, response, model, judge)


def agrees(item: Item, response: Response | None, reference: str, model: str) -> Score:
    """Score the likeness to the teacher's answer: chrF from 0 to 100 (Popović 2015)."""

    def judge(response: Response) -> Outcome:
        if not reference.strip():
            return None, None, "there is no answer of the teacher to compare with"
        chrf = sentence_chrf(response.text, [reference]).score
        return chrf, None, "chrF against the teacher"

    return _score(item, response, model, judge)


def _score(
    item: Item, response: Response | None, model: str, judge: Callable[[Response], Outcome]
) -> Score:
    """Score an answer by `judge`, unless there is no text to judge."""
    if response is None:
        value, answer, reason = None, None, "no answer was stored"
    elif response.stop == "error":
        failure = response.error or "no reason given"
        value, answer, reason = None, None, f"the request failed: {failure}"
    elif response.stop == "filtered":
        value, answer, reason = 0.0, None, "refused"
    elif not response.text.strip():
        value, answer, reason = 0.0, None, "empty"
    else:
        value, answer, reason = judge(response)
    return Score(item_id=item.id, model=model, value=value, answer=answer, reason=reason)


@dataclass(frozen=True)
class Measured:
    """One metric of some items: each model's scores by item id, the smallest and largest score."""

    metric: str
    items: Sequence[Item]
    scores: Mapping[str, Mapping[str, Score]]
    bounds: Bounds
    no_teacher: str = NO_TEACHER  # why the teacher has no scores
    graded: bool = False  # scores may lie between the bounds, so they are no share that passes

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
        return np.array([values.get(i) for i in self.ids()], dtype=np.float64)

    def ids(self) -> list[str]:
        """Return the ids of the items."""
        return [item.id for item in self.items]

    def clusters(self, ids: Sequence[str]) -> list[str]:
        """Return the clusters of some items."""
        clusters = {item.id: item.cluster for item in self.items}
        return [clusters[i] for i in ids]


def measure_task(
    task: str,
    items: Sequence[Item],
    answers: AnswersByModel,
    metric: str,
    checker: Checker | None,
    no_teacher: str = NO_TEACHER,
) -> Measured:
    """Score every model's answers to one task: by its checker, or without one as agreement."""
    mine = [item for item in items if item.task == task]
    if checker is None:
        return measure_agreement(mine, answers)
    scores = {
        model: {item.id: passes(item, by_id.get(item.id), checker, model) for item in mine}
        for model, by_id in answers.items()
    }
    # A checker of the user's may grade without saying so beforehand.
    between = any(s.value not in (None, 0, 1) for rows in scores.values() for s in rows.values())
    graded = checker["kind"] in GRADED or between
    return Measured(metric, mine, scores, SHARE, no_teacher, graded)


def measure_tasks(
    items: Sequence[Item], answers: AnswersByModel, find: FindTask, no_teacher: str = NO_TEACHER
) -> dict[str, Measured]:
    """Score the items task by task; `no_teacher` says why the teacher has no answers.

    A checker that compares with references is left aside where the teacher answered and no item of
    the task has one.
    """
    rows = {}
    for name in dict.fromkeys(item.task for item in items):
        task = find(name)
        checker = task.checker if task else None
        if checker and needs_reference(checker["kind"]) and "teacher" in answers:
            referenced = any(item.reference for item in items if item.task == name)
            checker = checker if referenced else None
        metric = (task and task.metric) or ""
        rows[name] = measure_task(name, items, answers, metric, checker, no_teacher)
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


def measure_agreement(items: Sequence[Item], answers: AnswersByModel) -> Measured:
    """Score the likeness of base and student to the teacher's answers, where there is one."""
    references = {i: a.text for i, a in answers["teacher"].items() if a.text.strip()}
    mine = [item for item in items if item.id in references]
    scores = {
        model: {i.id: agrees(i, by_id.get(i.id), references[i.id], model) for i in mine}
        for model, by_id in answers.items()
        if model != "teacher"
    }
    return Measured("chrF", mine, scores, CHRF)


class Acceptance(NamedTuple):
    """A test's verdicts on the student's answers by item id; None where the test itself failed."""

    test: str
    passed: Mapping[str, bool | None]
    when_served: bool  # it needs neither an answer key nor an answer of the teacher


class HeldOutRequest(Record):
    """A held-out request: what it took each model, and whether the student's answer is acceptable.

    Without a `test` no test covers it; `accepted` is None where the test failed to run.
    """

    item: str
    cluster: str
    usage: dict[str, Usage]
    test: str | None = None
    when_served: bool = False
    accepted: bool | None = None


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


def by_checker(measured: Measured, checker: Checker) -> Acceptance:
    """Accept the student's answers that pass their check in full."""
    passed = {
        item: None if value is None else value >= measured.bounds.high
        for item, value in measured.values("student").items()
    }
    return Acceptance(measured.metric, passed, not compares_with_answer(checker))


def requests_of(
    items: Sequence[Item], answers: AnswersByModel, tests: Sequence[Acceptance]
) -> list[HeldOutRequest]:
    """Return the requests in the order of the items; a later test on an item counts for more."""
    test_of = {item: test for test in tests for item in test.passed}
    requests = []
    for item in items:
        usage = {
            model: by_id[item.id].usage
            for model, by_id in answers.items()
            if item.id in by_id and by_id[item.id].stop != "error"
        }
        test = test_of.get(item.id)
        request = HeldOutRequest(
            item=item.id,
            cluster=item.cluster,
            usage=usage,
            test=test and test.test,
            when_served=bool(test and test.when_served),
            accepted=test and test.passed[item.id],
        )
        requests.append(request)
    return requests

"""The held-out requests as the economics sees them: what each took, and whether the student's answer was acceptable.

Whether an answer is acceptable is said by a test with a name: a task's checker, or another's verdicts item by item.
An item that no test covers has no `test`; one whose test failed to run has `accepted` None. Neither counts as accepted.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import regex

from distill.callables import PROVIDED
from distill.evaluation.results import AnswersByModel, Measured
from distill.records import Item, Record, Usage
from distill.tasks.checkers import NEEDS_REFERENCE


class Acceptance(NamedTuple):
    """A test's verdicts by item id; `when_served`: it needs no answer key and no answer of the teacher's."""

    test: str
    passed: Mapping[str, bool | None]
    when_served: bool


class Asked(Record):
    """One held-out request: what it took each model that answered it, and whether the student's answer will do."""

    item: str
    cluster: str
    usage: dict[str, Usage]
    test: str | None = None
    when_served: bool = False
    accepted: bool | None = None


def compares_with_answer(checker: Mapping[str, Any]) -> bool:
    """Tell whether a check needs the right answer, which nobody has when a new request is served.

    A reference that is part of the question (the name that code must use) is there; one that is the
    answer is not. A function of the user's may look at it, unless it says that it does not.
    """
    kind = checker["kind"]
    if mine := PROVIDED["checker"].get(kind):
        return getattr(mine, "needs_reference", True)
    grouped = kind == "regex" and regex.compile(checker["pattern"]).groups > 0
    return kind in NEEDS_REFERENCE or grouped


def by_checker(measured: Measured, checker: Mapping[str, Any]) -> Acceptance:
    """Accept the student's answers that pass their check in full."""
    passed = {
        item: None if value is None else value >= measured.bounds.high
        for item, value in measured.values("student").items()
    }
    return Acceptance(measured.metric, passed, not compares_with_answer(checker))


def requests_of(
    items: Sequence[Item], answers: AnswersByModel, tests: Sequence[Acceptance]
) -> list[Asked]:
    """Return the requests in the order of the items; a request that failed took nothing that could be measured."""
    test_of = {item: test for test in tests for item in test.passed}
    rows = []
    for item in items:
        found = {m: given[item.id] for m, given in answers.items() if item.id in given}
        usage = {m: response.usage for m, response in found.items() if response.stop != "error"}
        asked = Asked(item=item.id, cluster=item.cluster, usage=usage)
        if test := test_of.get(item.id):
            verdict = {"test": test.test, "when_served": test.when_served}
            asked = asked.model_copy(update={**verdict, "accepted": test.passed[item.id]})
        rows.append(asked)
    return rows

"""Scorers: an item and an answer go in, a score with its evidence comes out.

An answer that is wrong, empty, truncated, refused or in the wrong format scores 0. None is for a failure of ours
(no answer was stored, the request failed, the checker crashed), with the reason. Agreement with the teacher's answer
(chrF) is a scorer too, and is never the headline.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sacrebleu import sentence_chrf

from distill.records import Item, Response, Score
from distill.tasks.checkers import check, needs_reference

Scorer = Callable[[Item, Response | None], Score]
OURS = (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError)


class Judged(NamedTuple):
    """What an answer that was given is worth, what was read out of it, and why; None where we failed."""

    value: float | None
    answer: str | None
    reason: str


def passes(checker: Mapping[str, Any], model: str) -> Scorer:
    """Return the scorer that gives 1 to an answer of `model` that passes the checker, and 0 to any other.

    A checker that grades gives its value.
    """

    def judge(item: Item, response: Response) -> Judged:
        if response.stop == "length":
            return Judged(0.0, None, "truncated")
        if needs_reference(checker["kind"]) and not (item.reference or "").strip():
            return Judged(None, None, "there is no reference to compare with")
        try:
            verdict = check(checker, item.prompt, response.text)
        except OURS as error:
            return Judged(None, None, f"the checker failed: {type(error).__name__}: {error}")
        value = verdict.passed if verdict.value is None else verdict.value
        return Judged(None if value is None else float(value), verdict.answer, verdict.reason)

    return _scorer(model, judge)


def agrees(references: Mapping[str, str], model: str) -> Scorer:
    """Return the scorer of likeness to the teacher's answers, by item id: chrF from 0 to 100 (Popović 2015)."""

    def judge(item: Item, response: Response) -> Judged:
        reference = references.get(item.id, "")
        if not reference.strip():
            return Judged(None, None, "there is no answer of the teacher to compare with")
        return Judged(
            sentence_chrf(response.text, [reference]).score, None, "chrF against the teacher"
        )

    return _scorer(model, judge)


def _scorer(model: str, judge: Callable[[Item, Response], Judged]) -> Scorer:
    """Return the scorer that judges what was answered, and knows what to do where nothing was."""

    def score(item: Item, response: Response | None) -> Score:
        if response is None:
            judged = Judged(None, None, "no answer was stored")
        else:
            judged = _without_reading(response) or judge(item, response)
        return Score(item_id=item.id, model=model, **judged._asdict())

    return score


def _without_reading(response: Response) -> Judged | None:
    """Judge what needs no look at the text: a failure of ours, or an answer that is none."""
    if response.stop == "error":
        return Judged(None, None, f"the request failed: {response.error or 'no reason given'}")
    if response.stop == "filtered":
        return Judged(0.0, None, "refused")
    return None if response.text.strip() else Judged(0.0, None, "empty")

"""Scorers: an item and an answer go in, a score with its evidence comes out.

An answer that is wrong, empty, truncated, refused or in the wrong format scores 0. None is for a failure of ours
(no answer was stored, the request failed, the checker crashed), with the reason. Agreement with the teacher's answer
(chrF) is a scorer too, and is never the headline.
"""

from collections.abc import Callable, Mapping
from typing import Any

from sacrebleu import sentence_chrf

from distill.checkers import NEEDS_REFERENCE, check
from distill.records import Item, Response, Score

Scorer = Callable[[Item, Response | None], Score]
OURS = (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError)


def passes(checker: Mapping[str, Any], model: str) -> Scorer:
    """Return the scorer that gives 1 to an answer of `model` that passes the checker, and 0 to any other."""

    def score(item: Item, response: Response | None) -> Score:
        if response is None:
            return _failed(item, model, "no answer was stored")
        early = _without_reading(item, response, model)
        if early is not None:
            return early
        if response.stop == "length":
            return Score(item_id=item.id, model=model, value=0.0, reason="truncated")
        if checker["kind"] in NEEDS_REFERENCE and not (item.reference or "").strip():
            return _failed(item, model, "there is no reference to compare with")
        try:
            verdict = check(checker, item.prompt, response.text)
        except OURS as error:
            return _failed(item, model, f"the checker failed: {type(error).__name__}: {error}")
        return Score(
            item_id=item.id,
            model=model,
            value=float(verdict.passed),
            answer=verdict.answer,
            reason=verdict.reason,
        )

    return score


def agrees(references: Mapping[str, str], model: str) -> Scorer:
    """Return the scorer of likeness to the teacher's answers, by item id: chrF from 0 to 100 (Popović 2015)."""

    def score(item: Item, response: Response | None) -> Score:
        if response is None:
            return _failed(item, model, "no answer was stored")
        early = _without_reading(item, response, model)
        if early is not None:
            return early
        reference = references.get(item.id, "")
        if not reference.strip():
            return _failed(item, model, "there is no answer of the teacher to compare with")
        value = sentence_chrf(response.text, [reference]).score
        return Score(item_id=item.id, model=model, value=value, reason="chrF against the teacher")

    return score


def _without_reading(item: Item, response: Response, model: str) -> Score | None:
    """Score what needs no look at the text: a failure of ours, or an answer that is none."""
    if response.stop == "error":
        return _failed(item, model, f"the request failed: {response.error or 'no reason given'}")
    if response.stop == "filtered":
        return Score(item_id=item.id, model=model, value=0.0, reason="refused")
    if not response.text.strip():
        return Score(item_id=item.id, model=model, value=0.0, reason="empty")
    return None


def _failed(item: Item, model: str, reason: str) -> Score:
    return Score(item_id=item.id, model=model, value=None, reason=reason)

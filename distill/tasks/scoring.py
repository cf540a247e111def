"""What one answer scores, in an evaluation and while a student trains, and how long it may be.

An answer that is wrong, empty, truncated, refused or in the wrong format scores 0. None is for an
error of ours (no answer was stored, the request failed, the checker crashed), with the reason.
"""

from collections.abc import Mapping
from typing import Any

from distill.config.tree import Config
from distill.records import Item, Response, Score
from distill.tasks.checkers import check, needs_reference

Checker = Mapping[str, Any]
OURS = (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError)


def answer_limit(config: Config) -> int:
    """Return how many tokens an answer may have: the teacher's limit, where none is set."""
    return config.evaluation.max_new_tokens or config.teacher.max_new_tokens


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
        from sacrebleu import sentence_chrf  # slow to import

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

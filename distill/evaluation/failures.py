"""Where the student fails: its worst answers, as the model card shows them, cut short.

They hold text of documents, which is masked before a prompt is made. Where the corpus is used as it is
(`corpus.private_text: keep`), nothing of them goes into what is published: neither here nor into the report.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from distill.evaluation.measurements import EvaluationResult, Sample
from distill.evaluation.scorecard import Failures, WorstAnswer

MOST = 3
LONGEST = 400  # characters of a text
WITHHELD = "corpus.private_text is keep: samples could hold private text, so they are left out"
NONE = "every worst sample passes its check"


def withheld(private_text: str) -> bool:
    """Tell whether samples must stay out of what is published."""
    return private_text == "keep"


def bare(evaluation: EvaluationResult) -> EvaluationResult:
    """Return an evaluation without what may quote documents: samples, examples of what was found, reasons of failed checks."""

    def without(tree: Any) -> Any:
        if isinstance(tree, Mapping):
            return {k: without(v) for k, v in tree.items() if k not in ("examples", "failures")}
        return tree

    return EvaluationResult.model_validate({**without(evaluation.tree()), "samples": ()})


def failures(samples: Iterable[Sample], private_text: str) -> Failures:
    """Return at most three of the student's worst answers, one a task; those that fail their check come first."""
    if withheld(private_text):
        return Failures(worst=(), reason=WITHHELD)
    worst = []
    for sample in samples:
        value = sample.scores.get("student")
        if sample.rank == "worst" and value is not None and (value < 1 or sample.metric == "chrF"):
            worst.append(sample)
    worst.sort(key=lambda sample: sample.metric == "chrF")
    if not worst:
        return Failures(worst=(), reason=NONE)
    return Failures(worst=tuple(_short(sample) for sample in worst[:MOST]))


def _short(sample: Sample) -> WorstAnswer:
    alike = f"chrF {sample.scores['student'] or 0:.0f} against the teacher"
    return WorstAnswer(
        task=sample.task,
        asked=cut(sample.messages[-1]["content"]),
        student=cut(sample.answers.get("student", "")),
        teacher=cut(sample.answers.get("teacher", "")),
        reason=alike if sample.metric == "chrF" else sample.reasons["student"],
    )


def cut(text: str) -> str:
    """Cut a text that is too long, and say so."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST].rstrip()} […]"

"""The release gate: what the evidence must say, and the override that the card shows.

A scorecard of another checkpoint is no finding here: nothing overrides that (`publish.evaluated`),
because the card's figures would be another model's. Terms and licenses are in `obligations`.
"""

from collections.abc import Sequence

from distill.errors import DistillError, Exit
from distill.evaluation.measurements import MetricRow
from distill.evaluation.scorecard import Scorecard
from distill.formatting import signed
from distill.storage.progress import say

ON_PURPOSE = 'or publish with --override "reason", which the card shows'


def evidence(card: Scorecard) -> list[DistillError]:
    """Return what speaks against a student: contamination, and that it is worse than its base.

    Worse is over all checks, else by its loss on the teacher's answers. Where the difference is
    undecided by the rule of all claims, the finding says so; it stands all the same.
    """
    findings, part = [], card.contamination
    if part and part.flagged:  # the scores on these items say nothing
        what = f"{part.flagged} of {part.n} items stand in the training data"
        fix = "--redo corpus, which takes them out"
        findings.append(DistillError(Exit.PUBLISH, "contamination", what, fix))
    row = card.overall or MetricRow()
    mean = row.student_minus_base.value
    if mean is not None:
        worse, what = mean < 0, f"{signed(100 * mean, 1)} points over all checks"
    else:
        row = card.agreement.get("nats_per_token", MetricRow())
        mean = row.student_minus_base.value or 0.0
        worse, what = mean > 0, f"{signed(mean, 3)} nats a token on the teacher's answers"
    if worse:
        decided = row.conclude("base")
        what = f"is worse than its base: {what}"
        if decided.verdict == "undecided":
            what = what.replace("is worse", "measured worse") + f" (undecided: {decided.reason})"
        fix = "train longer, on more answers, or on other settings"
        findings.append(DistillError(Exit.PUBLISH, "the student", what, fix))
    return findings


def pass_gate(findings: Sequence[DistillError], override: str | None) -> list[str]:
    """Return the findings that the card shows as overridden; without an override raise (exit 9)."""
    if findings and override is None:
        first, others = findings[0], len(findings) - 1
        more = f" (and {others} more)" if others else ""
        fix = f"{first.fix}; {ON_PURPOSE}"
        raise DistillError(first.code, first.where, first.what + more, fix)
    lines = [f"{finding.where} {finding.what}" for finding in findings]
    for line in lines:
        say(f"overridden: {line}")
    return lines

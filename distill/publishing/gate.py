"""The release gate: what the evidence must say before a student is published, and the override that the card shows.

A scorecard of another checkpoint is no finding here: nothing overrides that (`publish.evaluated`), because the card's
figures would be another model's. Terms and licenses are in `duties`.
"""

from collections.abc import Sequence

from distill.errors import DistillError, Exit
from distill.evaluation.measurements import MetricRow
from distill.evaluation.scorecard import Scorecard
from distill.publishing.fidelity import Fidelity
from distill.records import Record
from distill.storage.progress import say

ON_PURPOSE = 'or publish with --override "reason", which the card shows'


class Finding(Record):
    """Something that speaks against publishing: where it stands, what it is, what to do about it."""

    where: str
    what: str
    fix: str


def evidence(scorecard: Scorecard) -> list[Finding]:
    """Return what in a scorecard speaks against publishing its student."""
    return [found for check in (_leaked, _worse) for found in check(scorecard)]


def _leaked(scorecard: Scorecard) -> list[Finding]:
    """Find held-out items that stand in the training data: the scores on them say nothing."""
    contamination = scorecard.contamination
    if contamination is None or not contamination.flagged:
        return []
    what = f"{contamination.flagged} of {contamination.n} items stand in the training data"
    return [Finding(where="contamination", what=what, fix="--redo corpus, which takes them out")]


def _worse(scorecard: Scorecard) -> list[Finding]:
    """Find a student that measured worse than its base: over all checks, else by its loss on the teacher's answers.

    Where the difference is undecided by the rule of all claims, the finding says so; it stands all the same.
    """
    row = scorecard.overall or MetricRow()
    mean = row.student_minus_base.mean
    if mean is not None:
        worse, what = mean < 0, f"{100 * mean:+.1f} points over all checks"
    else:
        row = scorecard.agreement.get("nats_per_token", MetricRow())
        mean = row.student_minus_base.mean or 0.0
        worse, what = mean > 0, f"{mean:+.3f} nats a token on the teacher's answers"
    if not worse:
        return []
    decided = row.conclude("base")
    if decided.verdict == "undecided":
        what = f"measured worse than its base: {what} (undecided: {decided.reason})"
    else:
        what = f"is worse than its base: {what}"
    fix = "train longer, on more answers, or on other settings"
    return [Finding(where="the student", what=what, fix=fix)]


def weights(fidelity: Fidelity) -> list[Finding]:
    """Return what speaks against a merged model whose adapter was evaluated: they say something else."""
    if fidelity.same:
        return []
    what = f"is not the adapter that was evaluated: {fidelity.line()}"
    return [Finding(where="the merged model", what=what, fix="--redo evaluate")]


def pass_gate(findings: Sequence[Finding], override: str | None) -> list[str]:
    """Return what the card must say of findings that were overridden; without an override they raise (exit 9)."""
    if not findings:
        return []
    first, others = findings[0], len(findings) - 1
    if override is None:
        more = f" (and {others} more)" if others else ""
        fix = f"{first.fix}; {ON_PURPOSE}"
        raise DistillError(Exit.PUBLISH, first.where, first.what + more, fix)
    for finding in findings:
        say(f"overridden: {finding.where} {finding.what}")
    return [f"{finding.where} {finding.what}" for finding in findings]

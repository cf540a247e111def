"""The scorecard's answer in plain sentences: what was compared, how much of the teacher is kept, at what cost, when it pays.

A sentence claims only what its interval supports: where an interval holds 0, the sentence says that these items cannot
tell the two apart, not that they are equal. What is unknown is said to be unknown.
"""

from distill.evaluation.claims import conclude
from distill.evaluation.measurements import (
    RIVALS,
    DuelRow,
    JudgeResult,
    MetricRow,
    Rival,
    SuiteResult,
)
from distill.evaluation.scorecard import RequestCost, Scorecard
from distill.formatting import UNKNOWN, duration, figure, money, plain, share
from distill.report.statement import in_short
from distill.report.tables import change, points


def answer(card: Scorecard) -> dict[str, str]:
    """Return the answer under its three headings; of an old scorecard without savings the first two."""
    sections = {"Quality": quality(card), "Cost": cost(card)}
    if card.economics:
        sections["What it saves"] = in_short(card.economics, card.confidence)
    return sections


def compared(card: Scorecard) -> str:
    """Say what was compared, on what, and what the checks are."""
    settings, models = card.environment.settings, card.models
    over = f" from {settings.documents} documents" if settings.documents else ""
    items = settings.items or card.agreement["chrf"].n
    flagged = card.contamination.flagged if card.contamination else 0
    aside = f", less the {flagged} that stand in the training data" if flagged else ""
    metrics = sorted({plain(row.metric) for row in card.tasks.values()} - {"chrF"})
    checks = f" The checks: {', '.join(metrics)}; a check says what its name says, and no more."
    return (
        f"{models['teacher'].name}, the teacher, against {models['student'].name}, the student that learned from "
        f"its answers, and against that student before training (base): the same {items} held-out prompts{over}{aside}. A "
        f"request is one such prompt with its answer.{checks if metrics else ''}"
    )


def checks_kept(card: Scorecard) -> float | None:
    """Return the student's share of checks passed over the teacher's, or None where no task has a checker."""
    return ratio(card.overall.student, card.overall.teacher) if card.overall else None


def cost_share(card: Scorecard) -> tuple[float, str] | None:
    """Return what a request takes of the student over what it takes of the teacher, and of what: cost, else time."""
    student, teacher = card.cost.student, card.cost.teacher
    dollars = (student.dollars_per_1k, teacher.dollars_per_1k)
    part = ratio(*(None if d is None else float(d) for d in dollars))
    if part is not None:
        return part, "cost"
    part = ratio(student.seconds_per_1k, teacher.seconds_per_1k)
    return None if part is None else (part, "time")


def ratio(part: float | None, total: float | None) -> float | None:
    """Return part / total, or None where either is unknown or the total is not positive."""
    return None if part is None or not total or total < 0 else part / total


def quality(card: Scorecard) -> str:
    """Say how good the student is, against its teacher and against itself before training."""
    overall = card.overall
    if not overall:
        chrf = card.agreement["chrf"]
        return (
            "No task has a checker, so how good the student is, is not known; only how much its answers are like the "
            f"teacher's: chrF {figure(chrf.base, 1)} before training, {figure(chrf.student, 1)} after "
            f"({change(chrf, 'base')})."
        )
    decided = overall.conclude("base")
    gained = {
        "better": "training helped",
        "worse": "training did harm",
        "undecided": f"whether training helped is undecided: {decided.reason}",
    }[decided.verdict]
    to_base = points(overall.student_minus_base, decided, card.confidence)
    return (
        f"Of {overall.n} held-out answers, {share(overall.student)} of the student's pass their check and "
        f"{share(overall.teacher)} of the teacher's: {against_teacher(overall, card.confidence)}. Before training it was "
        f"{share(overall.base)}: {to_base}; {gained}."
    )


def against_teacher(overall: MetricRow, confidence: float) -> str:
    """Say how far the student is from its teacher, and what that allows to claim."""
    decided = overall.conclude("teacher")
    claim = {
        "better": "it is better than the teacher here",
        "worse": "it is not as good as the teacher",
        "undecided": f"which of the two is better is undecided: {decided.reason}{could_show(overall, 'teacher')}",
    }[decided.verdict]
    return f"{points(overall.student_minus_teacher, decided, confidence)}; {claim}"


def could_show(row: MetricRow, rival: Rival) -> str:
    """Say which difference so many items show with the usual power of 80 %, where that is known."""
    visible = row.against(rival).smallest_visible
    if visible is None:
        return ""
    return (
        f" (so many items show a difference of {figure(100 * visible, 1)} points or more reliably)"
    )


def cost(card: Scorecard) -> str:
    """Say what 1,000 requests take and cost."""
    student, teacher = card.cost.student, card.cost.teacher
    if student.seconds_per_1k is None and student.dollars_per_1k is None:
        return "What a request costs is not known."

    def side(row: RequestCost) -> str:
        dollars = "no known price" if row.dollars_per_1k is None else money(row.dollars_per_1k)
        return f"{duration(row.seconds_per_1k)} ({dollars})"

    part = cost_share(card)
    end = f": {share(part[0])} of the teacher's {part[1]}" if part else ""
    return f"1,000 requests take the student {side(student)} and the teacher {side(teacher)}{end}."


def on_suite(suite: SuiteResult, confidence: float) -> str:
    """Say what training changed on the questions of a suite; nothing where its checks are no single share."""
    row = suite.overall
    if not row:
        return ""
    decided = row.conclude("base")
    claim = {
        "better": "the student does better than before",
        "worse": "the student lost some of what it could do",
        "undecided": f"whether it lost or gained is undecided: {decided.reason}{could_show(row, 'base')}",
    }[decided.verdict]
    return (
        f"Of {row.n} answers {share(row.base)} pass before training and {share(row.student)} after: "
        f"{points(row.student_minus_base, decided, confidence)}; {claim}."
    )


def of_judge(judge: JudgeResult, confidence: float) -> list[str]:
    """Say which answers a judge prefers, or why it is not asked, and what weakens its word."""
    probe, model = judge.probe, judge.model
    if not probe.passed:
        lines = [f"The judge {model} is not used, so no win rate is given: {probe.reason}."]
    else:
        lines = [f"The judge {model} passed its {probe.n} probes."]
        lines += [_preferred(rival, judge.against(rival), confidence) for rival in RIVALS]
    return [*lines, *(f"Warning: {warning}." for warning in judge.warnings)]


def _preferred(rival: Rival, duels: DuelRow, confidence: float) -> str:
    rate = duels.win_rate
    if rate.mean is None:
        return f"How often the student wins against the {rival} is not known: {rate.reason}."
    low, high = (None if end is None else end - 0.5 for end in (rate.low, rate.high))
    decided = conclude(low, high, duels.documents, None, duels.n, rate.reason)
    why = decided.reason.replace("includes 0", "includes 50 %")
    claim = {
        "better": "it prefers the student",
        "worse": f"it prefers the {rival}",
        "undecided": f"which one it prefers is undecided: {why}",
    }[decided.verdict]
    ends = f"{share(rate.low)} to {share(rate.high)}"
    interval = f" ({share(confidence)} interval {ends})" if UNKNOWN not in ends else ""
    return f"Against the {rival} the student wins {share(rate.mean)}, ties counted half{interval}: {claim}."

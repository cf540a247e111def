"""The scorecard's answer in plain sentences: what was compared, how much of the teacher is kept, at what cost, when it pays.

A sentence claims only what its interval supports: where an interval holds 0, the sentence says that these items cannot
tell the two apart, not that they are equal. What is unknown is said to be unknown.
"""

from collections.abc import Mapping
from typing import Any

from distill.evaluation.claims import conclude
from distill.formatting import duration, figure, money, plain, share
from distill.report.statement import in_short
from distill.report.tables import change, conclusion, points

Row = Mapping[str, Any]
RIVALS = ("teacher", "base")
ENDS = ("low", "high")


def answer(card: Row) -> dict[str, str]:
    """Return the answer under its three headings; of an old scorecard without a surplus the first two."""
    confidence = card["environment"]["settings"]["confidence"]
    found = {"Quality": quality(card), "Cost": cost(card)}
    if card.get("economics"):
        found["What it saves"] = in_short(card["economics"], confidence)
    return found


def compared(card: Row) -> str:
    """Say what was compared, on what, and what the checks are."""
    settings, models = card["environment"]["settings"], card["models"]
    documents = settings.get("documents")
    over = f" from {documents} documents" if documents else ""
    items = settings.get("items") or card["agreement"]["chrf"]["n"]
    found = card.get("contamination", {}).get("flagged")
    aside = f", less the {found} that stand in the training data" if found else ""
    metrics = sorted({plain(row["metric"]) for row in card["tasks"].values()} - {"chrF"})
    checks = f" The checks: {', '.join(metrics)}; a check says what its name says, and no more."
    return (
        f"{models['teacher']['name']}, the teacher, against {models['student']['name']}, the student that learned from "
        f"its answers, and against that student before training (base): the same {items} held-out prompts{over}{aside}. A "
        f"request is one such prompt with its answer.{checks if metrics else ''}"
    )


def kept(card: Row) -> float | None:
    """Return the student's share of checks passed over the teacher's, or None where no task has a checker."""
    overall = card["overall"]
    return ratio(overall["student"], overall["teacher"]) if overall else None


def cost_share(card: Row) -> tuple[float, str] | None:
    """Return what a request takes of the student over what it takes of the teacher, and of what: cost, else time."""
    student, teacher = card["cost"]["student"], card["cost"]["teacher"]
    for key, what in (("dollars_per_1k", "cost"), ("seconds_per_1k", "time")):
        part = ratio(student[key], teacher[key])
        if part is not None:
            return part, what
    return None


def ratio(part: float | None, whole: float | None) -> float | None:
    """Return part / whole, or None where either is unknown or the whole is not positive."""
    return None if part is None or not whole or whole < 0 else part / whole


def quality(card: Row) -> str:
    """Say how good the student is, against its teacher and against itself before training."""
    overall = card["overall"]
    if not overall:
        chrf = card["agreement"]["chrf"]
        return (
            "No task has a checker, so how good the student is, is not known; only how much its answers are like the "
            f"teacher's: chrF {figure(chrf['base'], 1)} before training, {figure(chrf['student'], 1)} after "
            f"({change(chrf['student_minus_base'], chrf)})."
        )
    confidence = card["environment"]["settings"]["confidence"]
    to_base = overall["student_minus_base"]
    decided = conclusion(to_base, overall)
    gained = {
        "better": "training helped",
        "worse": "training did harm",
        "undecided": f"whether training helped is undecided: {decided.reason}",
    }[decided.verdict]
    return (
        f"Of {overall['n']} held-out answers, {share(overall['student'])} of the student's pass their check and "
        f"{share(overall['teacher'])} of the teacher's: {against_teacher(overall, confidence)}. Before training it was "
        f"{share(overall['base'])}: {points(to_base, overall, confidence)}; {gained}."
    )


def against_teacher(overall: Row, confidence: float) -> str:
    """Say how far the student is from its teacher, and what that allows to claim."""
    found = overall["student_minus_teacher"]
    decided = conclusion(found, overall)
    said = {
        "better": "it is better than the teacher here",
        "worse": "it is not as good as the teacher",
        "undecided": f"which of the two is better is undecided: {decided.reason}{could_show(found)}",
    }[decided.verdict]
    return f"{points(found, overall, confidence)}; {said}"


def could_show(found: Row) -> str:
    """Say which difference so many items show with the usual power of 80 %, where that is known."""
    visible = found.get("smallest_visible")
    if visible is None:
        return ""
    shown = f"{figure(100 * visible, 1)} points or more"
    return f" (so many show a difference of {shown} reliably, a smaller one not)"


def cost(card: Row) -> str:
    """Say what 1,000 requests take and cost."""
    student, teacher = card["cost"]["student"], card["cost"]["teacher"]
    if student["seconds_per_1k"] is None and student["dollars_per_1k"] is None:
        return "What a request costs is not known."
    part = cost_share(card)
    end = f": {share(part[0])} of the teacher's {part[1]}" if part else ""
    sides = [
        f"the {name} {_taken(row)}" for name, row in (("student", student), ("teacher", teacher))
    ]
    return f"1,000 requests take {' and '.join(sides)}{end}."


def _taken(row: Row) -> str:
    dollars = "no known price" if row["dollars_per_1k"] is None else money(row["dollars_per_1k"])
    return f"{duration(row['seconds_per_1k'])} ({dollars})"


def on_suite(suite: Row, confidence: float) -> str:
    """Say what training changed on the questions of a suite; nothing where its checks are no single share."""
    row = suite["overall"]
    if not row:
        return ""
    change = row["student_minus_base"]
    decided = conclusion(change, row)
    said = {
        "better": "the student does better than before",
        "worse": "the student lost some of what it could do",
        "undecided": f"whether it lost or gained is undecided: {decided.reason}{could_show(change)}",
    }[decided.verdict]
    return (
        f"Of {row['n']} answers {share(row['base'])} pass before training and {share(row['student'])} after: "
        f"{points(change, row, confidence)}; {said}."
    )


def of_judge(judge: Row, confidence: float) -> list[str]:
    """Say which answers a judge prefers, or why it is not asked, and what weakens its word."""
    probe, model = judge["probe"], judge["model"]
    if not probe["passed"]:
        said = [f"The judge {model} is not used, so no win rate is given: {probe['reason']}."]
    else:
        said = [f"The judge {model} passed its {probe['n']} probes."]
        said += [_preferred(rival, judge[rival], confidence) for rival in RIVALS]
    return [*said, *(f"Warning: {warning}." for warning in judge["warnings"])]


def _preferred(rival: str, duels: Row, confidence: float) -> str:
    rate = duels["win_rate"]
    if rate["mean"] is None:
        return f"How often the student wins against the {rival} is not known: {rate['reason']}."
    low, high = (None if rate[end] is None else rate[end] - 0.5 for end in ENDS)
    decided = conclude(low, high, duels.get("documents"), None, duels.get("n"), rate.get("reason"))
    why = decided.reason.replace("includes 0", "includes 50 %")
    said = {
        "better": "it prefers the student",
        "worse": f"it prefers the {rival}",
        "undecided": f"which one it prefers is undecided: {why}",
    }[decided.verdict]
    between = "" if rate["low"] is None else f" to {share(rate['high'])}"
    interval = f" ({share(confidence)} interval {share(rate['low'])}{between})" if between else ""
    return f"Against the {rival} the student wins {share(rate['mean'])}, ties counted half{interval}: {said}."

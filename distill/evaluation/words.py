"""Figures as people read them, and the scorecard's answer in plain sentences.

A sentence claims only what its interval supports: where an interval holds 0, the sentence says that these items cannot
tell the two apart, not that they are equal. What is unknown is said to be unknown.
"""

from collections.abc import Mapping
from typing import Any

UNKNOWN = "–"
MINUS = "−"
HARD = "\u00a0"  # a space that no line breaks at
Row = Mapping[str, Any]


def plain_numbers(tree: Any) -> Any:
    """Return a tree for JSON: Decimals and fractions as numbers of six significant digits; more would be noise."""
    if isinstance(tree, Mapping):
        return {key: plain_numbers(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain_numbers(value) for value in tree]
    if isinstance(tree, bool | int | str) or tree is None:
        return tree
    return float(f"{float(tree):.6g}")


def figure(value: float | None, digits: int = 2) -> str:
    """Return a number with a true minus sign, or a dash where it is not known."""
    if value is None:
        return UNKNOWN
    return f"{value:,.{digits}f}".replace("-", MINUS)


def signed(value: float | None, digits: int = 2) -> str:
    """Return a number with its sign."""
    text = figure(value, digits)
    return f"+{text}" if value is not None and value > 0 else text


def share(value: float | None, digits: int = 0) -> str:
    """Return a share as a percentage."""
    return UNKNOWN if value is None else f"{figure(100 * value, digits)}{HARD}%"


def score(value: float | None, metric: str) -> str:
    """Return a score in the unit of its metric: chrF and nats as they are, all else as a percentage."""
    if metric.startswith("loss"):
        return figure(value, 3)
    return figure(value, 1) if metric == "chrF" else share(value)


def change(row: Row, metric: str) -> str:
    """Return a difference and its interval, in points, chrF or nats."""
    if row.get("mean") is None:
        return UNKNOWN
    scale, digits = (
        (1, 3) if metric.startswith("loss") else (1, 1) if metric == "chrF" else (100, 1)
    )
    mean, low, high = (None if row[k] is None else scale * row[k] for k in ("mean", "low", "high"))
    return f"{signed(mean, digits)} [{signed(low, digits)}, {signed(high, digits)}]"


def points(row: Row, confidence: float) -> str:
    """Return a difference of shares and its interval in words."""
    if row.get("mean") is None:
        return f"not known ({row.get('reason', 'no interval')})"
    mean, low, high = (signed(100 * row[k], 1) for k in ("mean", "low", "high"))
    return f"{mean} percentage points ({share(confidence)} interval {low} to {high})"


def leaked(found: Row, clean: Row | None) -> list[str]:
    """Say how many items stand in the training data, and the shares of checks passed without and with them."""
    if not found:
        return []
    if not found["flagged"]:
        said = f"None of the {found['n']} items was found in the training data"
        blank = found.get("unsearchable")
        but = f" ({blank} of them have no words of their own to look for)" if blank else ""
        return [f"{said}{but}. {found['method']}"]
    rate = f"{share(found['rate']['low'], 1)} to {share(found['rate']['high'], 1)}"
    said = f"{found['flagged']} of {found['n']} items (interval {rate}) stand in the training data"
    whole = (found["all_items"] or {}).get("overall")
    beside = ""
    if clean and whole:
        pairs = (f"{m} {share(clean[m])} and {share(whole[m])}" for m in ("teacher", "student"))
        beside = f" Checks passed without and with them: {', '.join(pairs)}."
    return [f"{said}; the figures are without them.{beside} {found['method']}"]


def money(value: float | None) -> str:
    """Return dollars, sums below one to two significant digits."""
    if value is None:
        return UNKNOWN
    return f"${value:,.2f}" if value >= 0.1 or not value else f"${float(f'{value:.2g}')}"


def duration(seconds: float | None) -> str:
    """Return a time as seconds, minutes or hours."""
    if seconds is None:
        return UNKNOWN
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60)):
        if seconds < limit:
            return f"{seconds / size:.1f}{HARD}{unit}"
    return f"{seconds / 3600:.1f}{HARD}h"


def verdict(row: Row, better: str, worse: str, open_question: str) -> str:
    """Choose the words that an interval supports."""
    if row.get("low") is None:
        return f"how sure that is, is not known: {row.get('reason', 'no interval')}"
    if row["low"] > 0:
        return better
    return worse if row["high"] < 0 else open_question


def ratio(part: float | None, whole: float | None) -> float | None:
    """Return part / whole, or None where either is unknown or the whole is not positive."""
    return None if part is None or not whole or whole < 0 else part / whole


def grouped(reasons: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """Return each reason with all that is missing because of it."""
    return [
        (reason, [path for path, why in reasons.items() if why == reason])
        for reason in dict.fromkeys(reasons.values())
    ]


def kept(card: Mapping[str, Any]) -> float | None:
    """Return the student's share of checks passed over the teacher's, or None where no task has a checker."""
    overall = card["overall"]
    return ratio(overall["student"], overall["teacher"]) if overall else None


def cost_share(card: Mapping[str, Any]) -> float | None:
    """Return what a request costs the student over what it costs the teacher: in dollars, else in seconds."""
    student, teacher = card["cost"]["student"], card["cost"]["teacher"]
    dollars = ratio(student["dollars_per_1k"], teacher["dollars_per_1k"])
    if dollars is not None:
        return dollars
    return ratio(student["seconds_per_1k"], teacher["seconds_per_1k"])


def answer(card: Mapping[str, Any]) -> list[str]:
    """Return the scorecard's answer in sentences: quality, gain, cost."""
    return [*_quality(card), *_cost(card)]


def _quality(card: Mapping[str, Any]) -> list[str]:
    overall = card["overall"]
    if not overall:
        chrf = card["agreement"]["chrf"]
        return [
            "No task has a checker, so how good the student is, is not known; only how much its answers are like the "
            f"teacher's: chrF {figure(chrf['base'], 1)} before training, {figure(chrf['student'], 1)} after "
            f"({change(chrf['student_minus_base'], 'chrF')})."
        ]
    to_teacher, to_base = overall["student_minus_teacher"], overall["student_minus_base"]
    compared = verdict(
        to_teacher,
        "it is better than the teacher here",
        "it is not as good as the teacher",
        "these items cannot tell the two apart",
    )
    gained = verdict(
        to_base,
        "training helped",
        "training did harm",
        "whether training helped cannot be told from these items",
    )
    confidence = card["environment"]["settings"]["confidence"]
    metrics = {row["metric"].replace("_", " ") for row in card["tasks"].values()} - {"chrF"}
    return [
        f"Of {overall['n']} held-out answers, {share(overall['student'])} of the student's pass their check, "
        f"{share(overall['teacher'])} of the teacher's, and {share(overall['base'])} of those of the student before "
        f"training. The checks: {', '.join(sorted(metrics))}; a check says what its name says, and no more.",
        f"Against the teacher: {points(to_teacher, confidence)}; {compared}.",
        f"Against the student before training: {points(to_base, confidence)}; {gained}.",
    ]


def _cost(card: Mapping[str, Any]) -> list[str]:
    student, teacher = card["cost"]["student"], card["cost"]["teacher"]
    if student["seconds_per_1k"] is None and student["dollars_per_1k"] is None:
        return ["What a request costs is not known."]
    part = cost_share(card)
    end = f": {share(part)} of the teacher's cost." if part is not None else "."
    return [
        f"1,000 requests take the student {duration(student['seconds_per_1k'])} "
        f"({money(student['dollars_per_1k'])}) and the teacher {duration(teacher['seconds_per_1k'])} "
        f"({money(teacher['dollars_per_1k'])}){end}"
    ]

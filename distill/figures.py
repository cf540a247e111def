"""Figures as people read them: a true minus, a unit, an interval beside a difference, and a dash for what is unknown.

`verdict` chooses the words that an interval supports: where it holds 0, these items cannot tell, which is not "equal".
"""

from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

UNKNOWN = "–"
MINUS = "−"
HARD = "\u00a0"  # a space that no line breaks at
Row = Mapping[str, Any]
ALPHA = 0.05  # of the exact test beside an interval: a few items that differ can fool the interval


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


def between(low: str, high: str) -> str:
    """Return an interval, which no line breaks within."""
    return f"[{low},{HARD}{high}]"


def change(row: Row, metric: str) -> str:
    """Return a difference and its interval, in points, chrF or nats."""
    if row.get("mean") is None:
        return UNKNOWN
    scale, digits = (
        (1, 3) if metric.startswith("loss") else (1, 1) if metric == "chrF" else (100, 1)
    )
    mean, low, high = (None if row[k] is None else scale * row[k] for k in ("mean", "low", "high"))
    return f"{signed(mean, digits)} {between(signed(low, digits), signed(high, digits))}"


def points(row: Row, confidence: float) -> str:
    """Return a difference of shares and its interval in words."""
    if row.get("mean") is None:
        return f"not known ({row.get('reason', 'no interval')})"
    mean, low, high = (signed(100 * row[k], 1) for k in ("mean", "low", "high"))
    return f"{mean} percentage points ({share(confidence)} interval {low} to {high})"


def within(row: Row, model: str, metric: str) -> str:
    """Return a model's score with its interval."""
    low, high = row["intervals"][model]
    if row[model] is None or low is None:
        return score(row[model], metric)
    return f"{score(row[model], metric)} {between(score(low, metric), score(high, metric))}"


def plain(name: str) -> str:
    """Return the name of a metric or task as words."""
    return name.replace("_", " ")


def money(value: float | None) -> str:
    """Return dollars, sums below one to two significant digits."""
    if value is None:
        return UNKNOWN
    return f"${value:,.2f}" if value >= 0.1 or not value else f"${Decimal(f'{value:.2g}'):f}"


def duration(seconds: float | None) -> str:
    """Return a time as seconds, minutes or hours."""
    if seconds is None:
        return UNKNOWN
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60)):
        if seconds < limit:
            return f"{seconds / size:.1f}{HARD}{unit}"
    return f"{seconds / 3600:.1f}{HARD}h"


def verdict(row: Row, better: str, worse: str, open_question: str) -> str:
    """Choose the words that an interval supports; of yes/no scores the exact test (McNemar) must agree."""
    if row.get("low") is None:
        return f"how sure that is, is not known: {row.get('reason', 'no interval')}"
    p = (row.get("mcnemar") or {}).get("p")
    if p is not None and p >= ALPHA:
        return open_question
    if row["low"] > 0:
        return better
    return worse if row["high"] < 0 else open_question


def grouped(reasons: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """Return each reason with all that is missing because of it."""
    return [
        (reason, [path for path, why in reasons.items() if why == reason])
        for reason in dict.fromkeys(reasons.values())
    ]


def markdown_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table whose columns line up as plain text; the first is left-aligned."""
    cells = [[_cell(c) for c in row] for row in [head, *body]]
    widths = [max(3, *(len(row[k]) for row in cells)) for k in range(len(head))]
    lines = [cells[0], [_rule(k, w) for k, w in enumerate(widths)], *cells[1:]]
    return "\n".join(
        f"| {' | '.join(map(_justify, line, widths, range(len(head))))} |" for line in lines
    )


def _justify(text: str, width: int, column: int) -> str:
    return text.rjust(width) if column else text.ljust(width)


def _rule(column: int, width: int) -> str:
    return "-" * width if column == 0 else "-" * (width - 1) + ":"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())

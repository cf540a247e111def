"""How figures and tables are written for people: a true minus, a unit, an interval in brackets,
and a dash for what is unknown. What they allow to claim is decided in `evaluation.statistics`.
"""

import html
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Decimal
from typing import Any

from pydantic import BaseModel
from rich.table import Table

Number = Decimal | float
UNKNOWN = "–"
MINUS = "−"
HARD = "\u00a0"  # a space that no line breaks at
UNDECIDED = "(undecided)"  # in place of an interval that says more than is decided
INTERVAL = (
    r"\[(?:[\d\s.,+$%−–]|\d\s(?:min|s|h))*\](?![(\[:])"  # brackets around figures are no link
)
# What Markdown or HTML would take for markup; `_` only at the border of a word.
MARKUP = re.compile(
    rf"(?P<figures>{INTERVAL})|(?P<html>[<>]|&(?=#?\w+;))"
    r"|^[-+=#]+(?=\s|$)|[\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])"
)


def table(title: str, *columns: str) -> Table:
    """Return an empty table for the terminal; a column named `>…` is set flush right."""
    empty = Table(title=title, title_justify="left")
    for name in columns:
        empty.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left")
    return empty


def markdown_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table whose columns line up as plain text; cells hold no markup."""
    rows = [[escape_markdown(cell).replace(HARD, " ") for cell in row] for row in [head, *body]]
    widths = [max(3, *(len(row[k]) for row in rows)) for k in range(len(head))]
    rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rules, *lines[1:]])


def one_line(value: object) -> str:
    """Return text as one line without control, invisible or repeated space characters."""
    text = "".join(c if c.isprintable() or c == HARD else " " for c in str(value))
    return re.sub(" +", " ", text).strip()


def visible(text: str) -> str:
    """Return text that cannot steer a terminal: control and invisible characters are escaped, but
    ends of lines, tabs, and the joiners that some scripts are written with."""
    safe = "\n\t\u200c\u200d"
    return "".join(
        c if c.isprintable() or c in safe or unicodedata.category(c) == "Zs" else ascii(c)[1:-1]
        for c in text
    )


def escape_markdown(value: object) -> str:
    """Return text as one line in which no markup of its own survives, in Markdown or in HTML."""

    def escaped(match: re.Match[str]) -> str:
        if match["html"]:
            return html.escape(match[0])
        return match[0] if match["figures"] else f"\\{match[0]}"

    return MARKUP.sub(escaped, one_line(value))


def verbatim(value: object) -> str:
    """Return text for Markdown as it is, with its lines, where no markup of its own survives."""
    text = "".join(c if c.isprintable() or c == "\n" else " " for c in str(value))
    safe = re.sub(r"[`*_\[\]~]", lambda c: f"&#{ord(c[0])};", html.escape(text, quote=False))
    return "<pre>\n" + "\n".join(f"  {line}" for line in safe.split("\n")) + "\n</pre>"


def plain_numbers(tree: Any) -> Any:
    """Return a tree for JSON: fractions as numbers of six significant digits; more is noise."""
    if isinstance(tree, BaseModel):
        tree = tree.model_dump(exclude_unset=True, by_alias=True)
    if isinstance(tree, Mapping):
        return {key: plain_numbers(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain_numbers(value) for value in tree]
    if isinstance(tree, bool | int | str) or tree is None:
        return tree
    return float(f"{float(tree):.6g}")


def figure(value: Number | None, digits: int = 2) -> str:
    """Write a number with a true minus sign."""
    return UNKNOWN if value is None else f"{value:,.{digits}f}".replace("-", MINUS)


def signed(value: float | None, digits: int = 2) -> str:
    """Write a number with its sign."""
    text = figure(value, digits)
    return f"+{text}" if value is not None and value > 0 else text


def count(value: float | None) -> str:
    """Write a whole number."""
    return figure(value, 0)


def share(value: Number | None, digits: int = 0) -> str:
    """Write a share as a percentage."""
    return UNKNOWN if value is None else f"{figure(100 * float(value), digits)}{HARD}%"


def p_value(p: float | None) -> str:
    """Write the p value of a test; none is so small that it is 0."""
    return "< 0.001" if p is not None and p < 0.001 else figure(p, 3)


def score(value: float | None, metric: str) -> str:
    """Write a score in the unit of its metric: chrF, nats, else a percentage."""
    if metric.startswith("loss"):
        return figure(value, 3)
    return figure(value, 1) if metric == "chrF" else share(value)


def estimate(
    value: Number | None,
    low: Number | None,
    high: Number | None,
    form: Callable[[Any], str],
    unit: str = "",
    undecided: bool = False,
) -> str:
    """Write a figure with its interval, or `(undecided)` where that would claim more than is so."""
    if value is None:
        return UNKNOWN
    text = form(value) + unit
    if low is None or high is None:
        return f"{text} {UNDECIDED}" if undecided else text
    if undecided and not low <= 0 <= high:
        return f"{text} {UNDECIDED}"
    return f"{text} [{form(low)},{HARD}{form(high)}]"


def clip(text: str, most: int) -> str:
    """Cut a text that is too long to show, and mark the cut."""
    return text if len(text) <= most else f"{text[:most].rstrip()} […]"


def plain(name: str) -> str:
    """Write the name of a metric or task as words."""
    return name.replace("_", " ")


def duration(seconds: float | None) -> str:
    """Write a time in seconds, minutes or hours, to two digits."""
    if seconds is None:
        return UNKNOWN
    seconds = float(seconds)
    for unit, length in (("s", 1), ("min", 60)):
        if seconds < 99.5 * length:
            return f"{seconds / length:.2g} {unit}"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 99.5 else f"{hours:,.0f} h"


def size(value: float) -> str:
    """Write bytes with a unit."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.{0 if value >= 100 * scale else 1}f} {unit}"
    return f"{value:.0f} B"


def money(value: Number | None, up: bool = False) -> str:
    """Write dollars to the cent, below ten cents to two digits; a cost estimate is rounded `up`."""
    if value is None:
        return UNKNOWN
    amount = abs(value if isinstance(value, Decimal) else Decimal(repr(value)))
    places = 2 if amount >= Decimal("0.1") or not amount else 1 - amount.adjusted()
    rounding = ROUND_CEILING if up else ROUND_HALF_EVEN
    text = f"${amount.quantize(Decimal(1).scaleb(-places), rounding):,f}"
    return f"{MINUS}{text}" if value < 0 else text

"""How the terminal shows tables, and ranges of counts, seconds and bytes."""

from rich.table import Table

from distill.estimates import Span


def table(title: str, *columns: str) -> Table:
    """Return an empty table; a column whose name begins with `>` is set flush right."""
    made = Table(title=title, title_justify="left")
    for name in columns:
        made.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left")
    return made


def count(span: Span) -> str:
    """Write a range of whole numbers."""
    low, high = round(span.low), round(span.high)
    return f"{low:,}" if low == high else f"{_rounded(low)} to {_rounded(high)}"


def _rounded(value: int) -> str:
    """Keep two digits of a large estimate."""
    places = len(str(value)) - 2
    return f"{round(value, -places) if places > 1 else value:,}"


def duration(span: Span | None) -> str:
    """Write a range of seconds."""
    return f"{_time(span.low)} to {_time(span.high)}" if span else "not known"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def bytes_of(span: Span) -> str:
    """Write a range of bytes."""
    low, high = size_of(span.low), size_of(span.high)
    return low if low == high else f"{low} to {high}"


def size_of(value: float) -> str:
    """Write bytes with a unit."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.{0 if value >= 100 * scale else 1}f} {unit}"
    return f"{value:.0f} B"

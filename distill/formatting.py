"""How figures and tables are written for people: counts, seconds, bytes and dollars, and a dash for what is unknown."""

from decimal import ROUND_CEILING, Decimal

from rich.table import Table

UNKNOWN = "–"


def table(title: str, *columns: str) -> Table:
    """Return an empty table; a column whose name begins with `>` is set flush right."""
    made = Table(title=title, title_justify="left")
    for name in columns:
        made.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left")
    return made


def count(value: float | None) -> str:
    """Write a whole number."""
    return UNKNOWN if value is None else f"{round(value):,}"


def duration(seconds: float | None) -> str:
    """Write a time in seconds, minutes or hours, to about two digits."""
    if seconds is None:
        return UNKNOWN
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def size(value: float) -> str:
    """Write bytes with a unit."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.{0 if value >= 100 * scale else 1}f} {unit}"
    return f"{value:.0f} B"


def dollars(value: Decimal | None) -> str:
    """Write dollars to the cent, and to two digits below ten cents; rounded up, since a bill is no place to hope."""
    if value is None:
        return UNKNOWN
    places = 2 if value >= Decimal("0.1") or not value else 1 - value.adjusted()
    return f"${value.quantize(Decimal(1).scaleb(-places), ROUND_CEILING):,f}"

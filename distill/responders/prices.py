"""The price book: what an hour of a machine and a million tokens of a hosted model cost.

A price that is not in the book, or older than a year, is unknown: None, with the reason to show.
"""

from collections.abc import Iterable
from datetime import date
from decimal import Decimal
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import Field

from distill.config.yaml_file import find_config, read_table
from distill.records import Record, Usage

SHIPPED = Path("configs/prices.yaml")
MAX_AGE_DAYS = 365  # list prices of hosted models fell by up to 80 % within weeks in 2026
MILLION = Decimal(1_000_000)

Money = Annotated[Decimal, Field(ge=0, allow_inf_nan=False)]


class MachinePrice(Record):
    """What an hour of a machine costs."""

    name: str
    what: str = ""
    dollars_per_hour: Money
    date: date
    source: str

    def of(self, seconds: float) -> Decimal:
        """Return the dollars that `seconds` of the machine cost."""
        return self.dollars_per_hour * Decimal(repr(seconds)) / 3600


class TokenPrice(Record):
    """What a hosted model costs a million tokens; `model` is a pattern over its name."""

    model: str
    dollars_per_million_input: Money
    dollars_per_million_output: Money
    dollars_per_million_cached_input: Money | None = None
    batch_discount: Annotated[Decimal, Field(ge=0, lt=1)] | None = None
    date: date
    source: str
    note: str = ""

    @property
    def rates(self) -> str:
        """Return the price of input and output in words."""
        dollars_in, dollars_out = self.dollars_per_million_input, self.dollars_per_million_output
        return f"${dollars_in} in, ${dollars_out} out a million tokens"

    def of(self, usage: Usage) -> Decimal:
        """Return the dollars of one answer; cached input without a price of its own is input."""
        cached = self.dollars_per_million_cached_input
        if cached is None:
            cached = self.dollars_per_million_input
        fresh = usage.input_tokens - usage.cached_input_tokens
        paid = fresh * self.dollars_per_million_input + usage.cached_input_tokens * cached
        return (paid + usage.output_tokens * self.dollars_per_million_output) / MILLION

    def in_batch(self) -> "TokenPrice":
        """Return the price of answers that come by batch; where no discount is known it is this."""
        share = 1 - (self.batch_discount or 0)
        names = [f"dollars_per_million_{kind}" for kind in ("input", "output", "cached_input")]
        full = {name: getattr(self, name) for name in names}
        reduced = {name: price and price * share for name, price in full.items()}
        return self.model_copy(update={**reduced, "batch_discount": None})


Price = TypeVar("Price", MachinePrice, TokenPrice)


class PriceBook(Record):
    """Rows in order of precedence, read on one day; older than MAX_AGE_DAYS none is used."""

    machines: tuple[MachinePrice, ...] = ()
    tokens: tuple[TokenPrice, ...] = ()
    today: date = Field(default_factory=date.today)

    def machine(self, name: str | None) -> MachinePrice | None:
        """Return the hourly price of the machine called `name`, or None."""
        return self._current(row for row in self.machines if row.name == name)

    def teacher(self, model: str) -> TokenPrice | None:
        """Return the price of the hosted model `model`, or None."""
        return self._current(row for row in self.tokens if fnmatchcase(model, row.model))

    def _current(self, rows: Iterable[Price]) -> Price | None:
        return next((r for r in rows if (self.today - r.date).days <= MAX_AGE_DAYS), None)

    def why_no_machine(self, name: str | None) -> str:
        """Return why `machine(name)` is None."""
        if name is None:
            return "evaluation.machine is not set, so time has no price"
        return _why_none("machine", name, [row.name for row in self.machines])

    def why_no_teacher(self, model: str) -> str:
        """Return why `teacher(model)` is None."""
        return _why_none("model", model, [row.model for row in self.tokens])


def _why_none(kind: str, name: str, patterns: list[str]) -> str:
    if any(fnmatchcase(name, pattern) for pattern in patterns):
        return f"the list price of {name} is older than {MAX_AGE_DAYS} days"
    names = ", ".join(dict.fromkeys(pattern.strip("*") for pattern in patterns))
    return f"the price table has no {kind} {name} (it has {names})"


def load_prices(path: Path | None = None, today: date | None = None) -> PriceBook:
    """Read the shipped prices, after the rows of the user's file `path`; exit 2 on a wrong one."""
    fix = "see configs/prices.yaml for the form"
    places = [find_config(place) for place in (path, SHIPPED) if place]
    books = [read_table(place, PriceBook, fix) for place in places]
    return PriceBook(
        machines=tuple(row for book in books for row in book.machines),
        tokens=tuple(row for book in books for row in book.tokens),
        today=today or date.today(),
    )

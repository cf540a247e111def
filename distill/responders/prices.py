"""The price book: what an hour of a machine and a million tokens of a hosted model cost, each with date and source.

A price that is not in the book, or that is older than a year, is unknown: the caller gets None with the reason to
show, and unknown never becomes 0. Money is Decimal throughout.
"""

from collections.abc import Iterable, Mapping
from datetime import date
from decimal import Decimal
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError

from distill.config_file import find_config, read_yaml
from distill.errors import DistillError, Exit
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
    """What a hosted model costs a million tokens; `model` is a pattern over its name.

    `batch_discount` is what answers within a day, rather than at once, are cheaper by: 0.5 for half the price.
    """

    model: str
    dollars_per_million_input: Money
    dollars_per_million_output: Money
    dollars_per_million_cached_input: Money | None = None
    batch_discount: Annotated[Decimal, Field(ge=0, lt=1)] | None = None
    date: date
    source: str
    note: str = ""

    def of(self, usage: Usage) -> Decimal:
        """Return the dollars of one answer; cached input counts as input where it has no price of its own."""
        cached = self.dollars_per_million_cached_input
        if cached is None:
            cached = self.dollars_per_million_input
        fresh = usage.input_tokens - usage.cached_input_tokens
        paid = fresh * self.dollars_per_million_input + usage.cached_input_tokens * cached
        return (paid + usage.output_tokens * self.dollars_per_million_output) / MILLION


Row = TypeVar("Row", MachinePrice, TokenPrice)


class _Table(Record):
    machines: tuple[MachinePrice, ...] = ()
    tokens: tuple[TokenPrice, ...] = ()


class PriceBook:
    """Rows in order of precedence, read on one day: a row older than MAX_AGE_DAYS on it is not used."""

    def __init__(
        self, machines: Iterable[MachinePrice], tokens: Iterable[TokenPrice], today: date
    ) -> None:
        self.machines, self.tokens, self.today = tuple(machines), tuple(tokens), today

    def facts(self) -> dict[str, Any]:
        """Return the book as JSON values: its day, and its rows in their order."""
        rows = {"machines": self.machines, "tokens": self.tokens}
        shown = {kind: [row.model_dump(mode="json") for row in of] for kind, of in rows.items()}
        return {"today": self.today.isoformat(), **shown}

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> "PriceBook":
        """Read what `facts` returned."""
        table = _Table(machines=facts["machines"], tokens=facts["tokens"])
        return cls(table.machines, table.tokens, date.fromisoformat(facts["today"]))

    def machine(self, name: str | None) -> MachinePrice | None:
        """Return the hourly price of the machine called `name`, or None."""
        return self._current(row for row in self.machines if row.name == name)

    def teacher(self, model: str) -> TokenPrice | None:
        """Return the price of the hosted model `model`, or None."""
        return self._current(row for row in self.tokens if fnmatchcase(model, row.model))

    def why_no_machine(self, name: str | None) -> str:
        """Say why `machine(name)` is None."""
        if name is None:
            return "evaluation.machine is not set, so time has no price"
        if any(row.name == name for row in self.machines):
            return f"the price of {name} is older than {MAX_AGE_DAYS} days"
        known = ", ".join(dict.fromkeys(row.name for row in self.machines))
        return f"the price table has no machine {name} (it has {known})"

    def why_no_teacher(self, model: str) -> str:
        """Say why `teacher(model)` is None."""
        if any(fnmatchcase(model, row.model) for row in self.tokens):
            return f"the list price of {model} is older than {MAX_AGE_DAYS} days"
        known = ", ".join(dict.fromkeys(row.model.strip("*") for row in self.tokens))
        return f"the price table has no model {model} (it has {known})"

    def _current(self, rows: Iterable[Row]) -> Row | None:
        return next((r for r in rows if (self.today - r.date).days <= MAX_AGE_DAYS), None)


def load_prices(path: Path | None = None, today: date | None = None) -> PriceBook:
    """Read the shipped price table, with the rows of the user's file `path` before its own.

    Raises DistillError (exit 2) where a file is missing or a row is wrong.
    """
    tables = [_read(find_config(path))] if path else []
    tables.append(_read(find_config(SHIPPED)))
    machines = [row for table in tables for row in table.machines]
    tokens = [row for table in tables for row in table.tokens]
    return PriceBook(machines, tokens, today or date.today())


def _read(path: Path) -> _Table:
    try:
        return _Table.model_validate(read_yaml(path, _Table))
    except ValidationError as error:
        fault = error.errors()[0]
        where = f"{path}: {'.'.join(map(str, fault['loc']))}"
        raise DistillError(
            Exit.CONFIG, where, fault["msg"], "see configs/prices.yaml for the form"
        ) from None

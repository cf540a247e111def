"""The price book: dated rows with a source, the user's rows first, and unknown stays unknown."""

from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest

from distill.errors import Exit
from distill.records import Usage
from distill.responders.prices import load_prices
from tests.support.errors import stops

TODAY = date(2026, 11, 22)
OWN = """
machines:
  - {name: cpu-2-core, dollars_per_hour: "1.50", date: "2026-11-01", source: my invoice}
tokens:
  - {model: "acme/*", dollars_per_million_input: 1, dollars_per_million_output: 2,
     date: "2026-11-01", source: mail}
"""


def test_every_shipped_row_has_a_price_a_date_and_a_source() -> None:
    book = load_prices(today=TODAY)
    assert {"cpu-2-core", "gpu-24gb", "h100"} <= {row.name for row in book.machines}
    assert len(book.tokens) >= 3
    for row in (*book.machines, *book.tokens):
        assert row.source.startswith("https://") and date(2026, 1, 1) <= row.date <= TODAY


def test_time_and_tokens_are_priced_in_decimals() -> None:
    book = load_prices(today=TODAY)
    machine, hosted = book.machine("cpu-2-core"), book.teacher("openai/gpt-5.6-terra")
    assert machine and machine.of(3600.0) == machine.dollars_per_hour == Decimal("0.0816")
    usage = Usage(input_tokens=1_000_000, cached_input_tokens=500_000, output_tokens=100_000)
    assert hosted and hosted.of(usage) == sum(map(Decimal, ("1.00", "0.10", "1.2")))


def test_what_is_not_there_or_old_is_unknown_and_says_why() -> None:
    book, later = load_prices(today=TODAY), load_prices(today=date(2028, 1, 1))
    assert book.machine("toaster") is None and book.teacher("unheard/of") is None
    assert "no machine toaster" in book.why_no_machine("toaster")
    assert "not set" in book.why_no_machine(None)
    assert later.machine("cpu-2-core") is None and later.teacher("gpt-5.6-terra") is None
    assert "older than" in later.why_no_machine("cpu-2-core")


def test_a_file_of_ones_own_wins_and_the_shipped_rows_remain(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(OWN)
    book = load_prices(path, TODAY)
    own, shipped = book.machine("cpu-2-core"), book.machine("h100")
    assert own is not None and own.dollars_per_hour == Decimal("1.50") and shipped is not None
    assert book.teacher("acme/large") is not None


@pytest.mark.parametrize("row", ['"-1"', "free", ".nan"])
def test_a_wrong_row_is_one_clear_line(tmp_path: Path, row: str) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(OWN.replace('"1.50"', row))
    with stops(Exit.CONFIG) as caught:
        load_prices(path, TODAY)
    assert "machines.0.dollars_per_hour" in str(caught.value)

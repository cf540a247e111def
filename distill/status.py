"""`distill status`: what a run has done, what is left, and what each stage has cost so far. Loads no model."""

from collections.abc import Sequence
from decimal import Decimal

from rich.table import Table

from distill.records import LedgerEntry
from distill.run import Run, Stage
from distill.store import read_json

WORDS = {"fresh": "left", "unfinished": "begun", "done": "done", "stale": "stale"}


def status_table(run: Run, stages: Sequence[Stage]) -> Table:
    """Return one row a stage, from the markers and the ledger, and a row of sums."""
    table = Table(title=f"{run.folder}", title_justify="left")
    table.add_column("stage")
    table.add_column("state")
    table.add_column("finished")
    for column in ("seconds", "tokens in", "tokens out", "dollars"):
        table.add_column(column, justify="right")
    ledger = run.ledger()
    for stage in stages:
        spent = [entry for entry in ledger if entry.stage == stage.name]
        table.add_row(stage.name, *_state(run, stage), *_sums(spent))
    table.add_section()
    table.add_row("all", "", "", *_sums(ledger))
    return table


def _state(run: Run, stage: Stage) -> tuple[str, str]:
    state, changes = run.state(stage)
    if state == "done":
        return WORDS[state], str(read_json(run.marker(stage)).get("at", ""))
    return WORDS[state], "; ".join(changes[:3])


def _sums(entries: list[LedgerEntry]) -> tuple[str, str, str, str]:
    dollars = [entry.dollars for entry in entries if entry.dollars is not None]
    return (
        f"{sum(entry.seconds for entry in entries):,.1f}" if entries else "",
        f"{sum(entry.input_tokens for entry in entries):,}" if entries else "",
        f"{sum(entry.output_tokens for entry in entries):,}" if entries else "",
        f"{sum(dollars, Decimal(0)):.4f}" if dollars else "",
    )

"""`distill status`: what a run has done, what is left, and what each stage has cost so far. Loads no model."""

from collections.abc import Sequence
from decimal import Decimal

from rich.console import Group

from distill.errors import DistillError
from distill.formatting import table
from distill.records import LedgerEntry
from distill.responders.endpoint.budget import paid_models, unknown_outcomes
from distill.storage.run_folder import Run, Stage
from distill.storage.store import Log, read_json

WORDS = {"fresh": "left", "unfinished": "begun", "done": "done", "stale": "stale"}


def status(run: Run, stages: Sequence[Stage]) -> Group:
    """Return one row a stage, from the markers and the ledger, a row of sums, and why what is stale is stale."""
    shown = table(
        f"{run.folder}", "stage", "state", "finished", ">seconds", ">in", ">out", ">dollars"
    )
    ledger, remarks = run.ledger(), []
    for stage in stages:
        spent = [entry for entry in ledger if entry.stage == stage.name]
        state, remark = _state(run, stage)
        finished = read_json(run.marker(stage)).get("at", "") if state == "done" else ""
        shown.add_row(stage.name, state, finished[:16].replace("T", " "), *_sums(spent))
        remarks += [f"{stage.name}: {remark}"] if remark else []
    for name in dict.fromkeys(entry.stage for entry in ledger):
        if name not in {stage.name for stage in stages}:  # a pilot
            spent = [entry for entry in ledger if entry.stage == name]
            shown.add_row(name, "", spent[-1].started[:16].replace("T", " "), *_sums(spent))
    shown.add_section()
    shown.add_row("all", "", "", *_sums(ledger))
    return Group(shown, *remarks, *_doubts(run))


def _doubts(run: Run) -> list[str]:
    """Say how many requests of the run may have been billed and nobody knows how much, at most what, and name each."""
    folder = run.config.store_folder() / "responses"
    if run.config.teacher.kind != "endpoint" or not folder.exists():
        return []
    with Log(folder, writable=False) as log:
        found = unknown_outcomes(log, run.config.name, paid_models(run.config))
    if not found:
        return []
    most = [attempt.most for attempt in found if attempt.most is not None]
    sum_ = f"at most ${sum(most, Decimal(0)):.4f}" if len(most) == len(found) else "cost unknown"
    rows = [f"  {a.key}: {a.what}" + (f", at most ${a.most}" if a.most else "") for a in found]
    return [f"{len(found)} requests may have been billed, {sum_}:", *rows]


def _state(run: Run, stage: Stage) -> tuple[str, str]:
    """Return the stage's state in a word, and a remark; an input that is not there leaves it unknown."""
    if not stage.applies(run.config):
        return "not needed", ""
    try:
        state, changes = run.state(stage)
    except DistillError as error:
        return "unknown", str(error)
    return WORDS[state], "; ".join(changes)


def _sums(entries: list[LedgerEntry]) -> tuple[str, str, str, str]:
    """Return seconds, tokens in and out, and dollars where any are known."""
    if not entries:
        return "", "", "", ""
    dollars = [entry.dollars for entry in entries if entry.dollars is not None]
    return (
        f"{sum(entry.seconds for entry in entries):,.1f}",
        f"{sum(entry.input_tokens for entry in entries):,}",
        f"{sum(entry.output_tokens for entry in entries):,}",
        f"{sum(dollars, Decimal(0)):.4f}" if dollars else "",
    )

"""`distill status`: what a run has done, what is left, and what each stage has cost so far. Loads
no model."""

from collections.abc import Sequence
from decimal import Decimal

from rich.console import Group

from distill.errors import DistillError
from distill.formatting import table
from distill.records import LedgerEntry, Record
from distill.responders.endpoint.budget import Attempt, paid_models, unknown_outcomes
from distill.responders.store import Job, ResponseStore
from distill.storage.files import read_json
from distill.storage.run_folder import Run, Stage

STATES = {"fresh": "left", "unfinished": "begun", "done": "done", "stale": "stale"}


class StageStatus(Record):
    """Where a stage stands, why, and what it has taken; sums are None where nothing was entered."""

    stage: str
    state: str
    remark: str = ""
    finished: str = ""
    seconds: float | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    dollars: Decimal | None = None


class Status(Record):
    """The stages of a run, the sums of its ledger, the requests whose bill is not known, and the
    batch jobs that it waits for."""

    run: str
    stages: tuple[StageStatus, ...]
    all: StageStatus
    doubts: tuple[Attempt, ...] = ()
    jobs: tuple[str, ...] = ()


def read_status(run: Run, stages: Sequence[Stage]) -> Status:
    """Return where a run stands, from its markers, its ledger and the store."""
    ledger, rows = run.ledger.entries(), []
    for stage in stages:
        state, remark = "not needed", ""
        if stage.applies(run.config):
            try:
                code, changes = run.state(stage)
                state, remark = STATES[code], "; ".join(changes)
            except DistillError as error:  # an input is not there, which leaves it unknown
                state, remark = "unknown", str(error)
        finished = read_json(run.marker(stage)).get("at", "") if state == "done" else ""
        entries = [entry for entry in ledger if entry.stage == stage.name]
        rows.append(summed(stage.name, entries, state, remark, finished))
    names = {stage.name for stage in stages}
    for name in dict.fromkeys(e.stage for e in ledger if e.stage not in names):  # a pilot
        entries = [entry for entry in ledger if entry.stage == name]
        rows.append(summed(name, entries, "", "", entries[-1].started))
    doubts, jobs = list[Attempt](), list[Job]()
    folder = run.config.store_folder() / "responses"
    if run.config.teacher.paid and folder.exists():
        with ResponseStore(folder, writable=False) as store:
            jobs = [job for job in store.jobs() if job.run == run.config.name]
            waiting = {key for job in jobs for key in job.keys}
            doubts = unknown_outcomes(store, paid_models(run.config), run.config.name)
            doubts = [doubt for doubt in doubts if doubt.key not in waiting]
    return Status(
        run=str(run.folder),
        stages=tuple(rows),
        all=summed("all", ledger),
        doubts=tuple(doubts),
        jobs=tuple(f"{job.line()} at {job.address}" for job in jobs),
    )


def summed(
    stage: str,
    entries: Sequence[LedgerEntry],
    state: str = "",
    remark: str = "",
    finished: str = "",
) -> StageStatus:
    """Return a stage's status with the sums of its entries in the ledger."""
    status = StageStatus(stage=stage, state=state, remark=remark, finished=finished)
    if not entries:
        return status
    dollars = [entry.dollars for entry in entries if entry.dollars is not None]
    counted = ("seconds", "input_tokens", "output_tokens")
    sums = {key: sum(getattr(entry, key) for entry in entries) for key in counted}
    paid = sum(dollars, Decimal(0)) if dollars else None
    return status.model_copy(update={**sums, "dollars": paid})


def show(status: Status) -> Group:
    """Return a row a stage, a row of sums, why what is stale is stale, and what may have been
    billed."""
    rows = table(status.run, "stage", "state", "finished", ">seconds", ">in", ">out", ">dollars")
    for row in (*status.stages, status.all):
        if row is status.all:
            rows.add_section()
        sums = ("",) * 3
        if row.seconds is not None:
            sums = (f"{row.seconds:,.1f}", f"{row.input_tokens:,}", f"{row.output_tokens:,}")
        dollars = "" if row.dollars is None else f"{row.dollars:.4f}"
        rows.add_row(row.stage, row.state, row.finished[:16].replace("T", " "), *sums, dollars)
    remarks = [f"{stage.stage}: {stage.remark}" for stage in status.stages if stage.remark]
    lines: list[str] = []
    if status.doubts:
        most = [doubt.most for doubt in status.doubts if doubt.most is not None]
        complete = len(most) == len(status.doubts)
        total = f"at most ${sum(most, Decimal(0)):.4f}" if complete else "cost unknown"
        lines = [f"{len(status.doubts)} requests may have been billed, {total}:"]
        lines += [
            f"  {doubt.key}: {doubt.what}" + (f", at most ${doubt.most}" if doubt.most else "")
            for doubt in status.doubts
            if not doubt.answered
        ]
        if answered := [doubt for doubt in status.doubts if doubt.answered]:  # there may be many
            first = answered[0]
            lines.append(f"  {len(answered)} with an answer, the first {first.key}: {first.what}")
    return Group(rows, *remarks, *status.jobs, *lines)

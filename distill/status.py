"""`distill status`: what a run has done, what is left and what it cost; loads no model."""

from collections.abc import Sequence
from decimal import Decimal

from rich.console import Group

from distill.errors import DistillError
from distill.formatting import table
from distill.records import LedgerEntry, Record
from distill.responders.endpoint.budget import Attempt, attempts, paid_models
from distill.responders.store import Job, ResponseStore
from distill.storage.files import read_json
from distill.storage.run_folder import Run, Stage

STATES = {"fresh": "left", "unfinished": "begun", "done": "done", "stale": "stale"}


class StageStatus(Record):
    """Where a stage stands, why, and what it has taken; sums are None where nothing was entered."""

    stage: str
    state: str = ""
    remark: str = ""
    finished: str = ""
    seconds: float | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    dollars: Decimal | None = None


class Status(Record):
    """The stages of a run, their sums, requests of unknown outcome, and open batch jobs."""

    run: str
    stages: tuple[StageStatus, ...]
    all: StageStatus
    doubts: tuple[Attempt, ...] = ()
    jobs: tuple[str, ...] = ()


def read_status(run: Run, stages: Sequence[Stage]) -> Status:
    """Return where a run stands, from its markers, its ledger and the store."""
    ledger, rows = run.ledger.entries(), list[StageStatus]()
    for stage in stages:
        state, remark = "not needed", ""
        if stage.applies(run.config):
            try:
                code, changes = run.state(stage)
                state, remark = STATES[code], "; ".join(changes)
            except DistillError as error:  # an input is not there, which leaves it unknown
                state, remark = "unknown", str(error)
        at = read_json(run.path(stage.marker)).get("at", "") if state == "done" else ""
        rows.append(StageStatus(stage=stage.name, state=state, remark=remark, finished=at))
    pilots = {entry.stage: entry.started for entry in ledger}
    for name in sorted(pilots.keys() - {stage.name for stage in stages}):
        rows.append(StageStatus(stage=name, finished=pilots[name]))
    rows = [with_sums(row, [e for e in ledger if e.stage == row.stage]) for row in rows]
    doubts, jobs = list[Attempt](), list[Job]()
    folder = run.config.store_folder() / "responses"
    if run.config.teacher.paid and folder.exists():
        with ResponseStore(folder, writable=False) as store:
            jobs = [job for job in store.jobs() if job.run == run.config.name]
            waiting = {key for job in jobs for key in job.keys}
            doubts = attempts(store, paid_models(run.config), run.config.name)
            doubts = [d for d in doubts if d.billed == "unknown" and d.key not in waiting]
    return Status(
        run=str(run.folder),
        stages=tuple(rows),
        all=with_sums(StageStatus(stage="all"), ledger),
        doubts=tuple(doubts),
        jobs=tuple(f"{job.line()} at {job.address}" for job in jobs),
    )


def with_sums(status: StageStatus, entries: Sequence[LedgerEntry]) -> StageStatus:
    """Return a stage's status with the sums of its entries in the ledger."""
    if not entries:
        return status
    dollars = [entry.dollars for entry in entries if entry.dollars is not None]
    keys = ("seconds", "input_tokens", "output_tokens")
    sums = {key: sum(getattr(entry, key) for entry in entries) for key in keys}
    paid = sum(dollars, Decimal(0)) if dollars else None
    return status.model_copy(update={**sums, "dollars": paid})


def show(status: Status) -> Group:
    """Return a row a stage, their sums, why some are stale, and what may have been billed."""
    rows = table(status.run, "stage", "state", "finished", ">seconds", ">in", ">out", ">dollars")
    for row in (*status.stages, status.all):
        if row is status.all:
            rows.add_section()
        sums = ("",) * 3
        if row.seconds is not None:
            sums = (f"{row.seconds:,.1f}", f"{row.input_tokens:,}", f"{row.output_tokens:,}")
        dollars = "" if row.dollars is None else f"{row.dollars:.4f}"
        rows.add_row(row.stage, row.state, row.finished[:16].replace("T", " "), *sums, dollars)
    lines = [f"{stage.stage}: {stage.remark}" for stage in status.stages if stage.remark]
    lines += status.jobs
    if status.doubts:
        most = [doubt.most for doubt in status.doubts if doubt.most is not None]
        complete = len(most) == len(status.doubts)
        total = f"at most ${sum(most, Decimal(0)):.4f}" if complete else "cost unknown"
        lines.append(f"{len(status.doubts)} requests may have been billed, {total}:")
    for doubt in (doubt for doubt in status.doubts if not doubt.answered):
        limit = f", at most ${doubt.most}" if doubt.most else ""
        lines.append(f"  {doubt.key}: {doubt.what}{limit}")
    if answered := [doubt for doubt in status.doubts if doubt.answered]:  # there may be many
        first = answered[0]
        lines.append(f"  {len(answered)} with an answer, the first {first.key}: {first.what}")
    return Group(rows, *lines)

"""`distill plan`: what a run will take before anything runs: prompts, tokens, dollars, time, bytes.

Loads no model. Counts come from `work`, dollars from `cost`, all else from `estimate`. What is not
known is None, and named.
"""

import shutil
from collections.abc import Iterable
from contextlib import suppress
from decimal import Decimal

from rich.console import Group

from distill.config.teachers import EndpointTeacher, LocalTeacher
from distill.config.tree import Config
from distill.errors import DistillError, Exit
from distill.formatting import count, duration, money, size, table
from distill.pipeline import STAGES
from distill.planning.cost import TeacherCost, teacher_cost
from distill.planning.estimate import RunEstimate, StageMemory, StagePlan
from distill.planning.machine import Machine, find_machine, measure
from distill.planning.work import Work, count_work
from distill.records import Record
from distill.responders.endpoint.network import ways
from distill.responders.prices import load_prices
from distill.responders.terms import judge_teacher
from distill.storage.progress import say
from distill.storage.run_folder import Run, Stage

QUICK = 5_000_000  # bytes of corpus that are read when a run starts
SLOW, SHORT = ("float32", 2e10), 180  # a machine on which a run of so few seconds is short
LONG = 15 * 60  # seconds of a run for which a smaller size is named
UNPREDICTABLE = (DistillError, LookupError, TypeError, ValueError, OSError)


class RunPlan(Record):
    """A run's plan; `seconds` sums up the stages whose time is known, disk is in bytes."""

    name: str
    documents: int
    prompts: dict[str, int]
    stages: tuple[StagePlan, ...]
    seconds: float
    machine: Machine
    machine_dollars: Decimal | None
    teacher: TeacherCost | None
    memory: tuple[StageMemory, ...]
    disk: dict[str, float]
    disk_free: int
    notes: tuple[str, ...]


def make_plan(run: Run, origin: str | None = None, machine: Machine | None = None) -> RunPlan:
    """Return the plan of a run here or on `machine`; `origin` is its responder's, after a pilot."""
    config = run.config
    work, book = count_work(run), load_prices(config.evaluation.prices)
    require_length(config, work)
    teacher = teacher_cost(config, work, origin)
    estimate = RunEstimate(
        config, work, teacher, machine or find_machine(config.evaluation.machine, *_types(config))
    )
    stages = list(estimate.stages())
    seconds, price = _sum(stages), book.machine(config.evaluation.machine)
    notes = [*estimate.machine.notes]
    if unknown := [row.stage for row in stages if row.seconds is None]:
        notes.append(f"time: {', '.join(unknown)} not counted: not known yet")
    if work.texts is None:
        notes.append("counts: by the corpus's bytes and the config's caps; it was not read")
    if teacher:
        notes += [f"teacher: {note}" for note in teacher.notes]
    if isinstance(config.teacher, EndpointTeacher):
        notes += [f"teacher: {note}" for note in ways(config.teacher)]
    verdict = judge_teacher(config.teacher, config.terms.basis)
    stop = [] if verdict.allowed else ["a run stops here with exit 10 until terms.basis is stated"]
    notes += [f"terms: {line}" for line in [*verdict.lines(), *stop]]
    return RunPlan(
        name=config.name,
        documents=round(work.documents),
        prompts={split: round(many) for split, many in work.prompts.items()},
        stages=tuple(stages),
        seconds=seconds,
        machine=estimate.machine,
        machine_dollars=price.of(seconds) if price else None,
        teacher=teacher,
        memory=tuple(estimate.memory()),
        disk=estimate.disk(),
        disk_free=disk_free(run),
        notes=tuple(notes),
    )


def require_length(config: Config, work: Work) -> None:
    """Stop (exit 7) where no prompt fits into a training sample, with room for one token."""
    prompts, most = work.texts[1] if work.texts else (), config.train.max_length
    sizes = [sum(len(turn.content.encode()) for turn in prompt.messages) for prompt in prompts]
    if sizes and min(sizes) / work.student.bytes_a_token >= most:
        what = f"none of {len(sizes):,} prompts fits into {most:,} tokens with its answer"
        fix = "raise it, or lower corpus.chunk.max_chars"
        raise DistillError(Exit.TRAINING, "train.max_length", what, fix)


def disk_free(run: Run) -> int:
    """Return the bytes that are free where the run's folder is or will be."""
    folder = run.folder.absolute()
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.is_dir())).free


def _types(config: Config) -> list[str]:
    """Return the types in which the models of a config compute."""
    teachers = [config.teacher, *([config.soft_teacher()] if config.distributions else [])]
    types = [teacher.dtype for teacher in teachers if isinstance(teacher, LocalTeacher)]
    return [*types, config.student.dtype]


def _sum(stages: Iterable[StagePlan]) -> float:
    return sum(stage.seconds or 0.0 for stage in stages)


def show(plan: RunPlan) -> Group:
    """Return a plan for the terminal."""
    splits = ", ".join(f"{many:,} {split}" for split, many in plan.prompts.items())
    rows = table(
        f"plan of {plan.name}: prompts {splits}", "stage", "work", ">tokens", ">time", ">memory"
    )
    peaks = {row.stage: row for row in plan.memory}
    for row in plan.stages:
        tokens = "" if row.tokens is None else count(row.tokens)
        peak = size(peaks[row.stage].peak) if row.stage in peaks else ""
        rows.add_row(row.stage, row.work, tokens, duration(row.seconds), peak)
    rows.add_section()
    total = count(sum(row.tokens or 0 for row in plan.stages))
    dollars = plan.machine_dollars
    price = f"{money(dollars, up=True)} of machine time" if dollars else ""
    rows.add_row("all", price, total, duration(plan.seconds), "")
    lines = [f"machine: {plan.machine.name}: {plan.machine.source}"]
    for place in dict.fromkeys(row.place for row in plan.memory):
        there = [row for row in plan.memory if row.place == place]
        highest = max(there, key=lambda row: row.peak)
        lines += [row.line() for row in there if row is highest or not row.fits]
    needed = sum(plan.disk.values())
    each = ", ".join(f"{what} {size(amount)}" for what, amount in plan.disk.items())
    word = "DOES NOT FIT: there are" if needed > plan.disk_free else "of"
    return Group(rows, *lines, f"disk: {each}; {word} {size(plan.disk_free)}", *plan.notes)


def announce(run: Run, redo: Iterable[Stage] = ()) -> None:
    """Say how long what is left of a run takes here, and name a smaller size above 15 minutes.

    A run that is short on any machine is not announced, nor one of which nothing can be predicted.
    Raises DistillError for a stage whose weights alone do not fit (exit 7), and where the disk
    cannot hold what is trained (exit 5).
    """
    config, again = run.config, tuple(redo)

    def stages(work: Work, machine: Machine) -> list[StagePlan]:
        estimate = RunEstimate(config, work, teacher_cost(config, work), machine)
        return [row for row in estimate.stages() if row.stage in remaining]

    try:
        remaining = {s.name for s in STAGES if s in again or run.state(s)[0] != "done"}
        if remaining <= {"filter", "report"}:
            return
        # Not what the store has: the account of a store of a million answers takes minutes.
        counted, types = count_work(run, QUICK), _types(config)
        work = counted.scaled(1)
        here = measure(types, 0.0)
        estimate = RunEstimate(config, work, teacher_cost(config, work), here)
        memory = [row for row in estimate.memory() if not row.fits]
        disk, free = estimate.disk(), disk_free(run)
    except UNPREDICTABLE:
        return
    if "train" in remaining:
        require_length(config, counted)
    # What is read and answered is expected to take so much; without the rest nothing is trained.
    trained = disk["checkpoints"] + disk["merged"] if "train" in remaining else 0.0
    trained += disk.get("soft labels", 0.0) if "signals" in remaining else 0.0
    for need in (trained, sum(disk.values()) if "generate" in remaining else 0.0):
        if need > free:
            each = ", ".join(f"{what} {size(amount)}" for what, amount in disk.items() if amount)
            what = f"needs about {size(need)}, and {size(free)} are free ({each})"
            if need == trained:
                fix = "free space, or name another disk: runs=DIR"
                raise DistillError(Exit.STATE, run.folder, what, fix)
            say(f"run: {run.folder} {what}")
    for row in memory:
        if row.stage in remaining:
            if row.room is not None and row.parts["weights"] > row.room:
                fix = "take a smaller model or a larger machine; distill plan shows each stage"
                raise DistillError(Exit.TRAINING, row.stage, row.line(), fix)
            say(f"run: {'; '.join([row.line(), *here.notes])}")
    with suppress(*UNPREDICTABLE):
        slow = Machine(name="slow", kind="cpu", rates=dict.fromkeys(types, SLOW), source="")
        if _sum(stages(work, slow)) < SHORT:
            return
        machine = find_machine(config.evaluation.machine, *types)
        rows = stages(work, machine)
        seconds, long = _sum(rows), [r for r in rows if r.seconds is None or r.seconds >= 5]
        each = ", ".join(f"{row.stage} {duration(row.seconds)}" for row in long)
        say(f"run: about {duration(seconds)} on this machine ({machine.source}): {each}")
        if seconds <= LONG:
            return
        for share in (0.5, 0.25, 0.1, 0.05, 0.02, 0.01):
            fewer = work.scaled(share)
            if (shorter := _sum(stages(fewer, machine))) < LONG:
                caps = [f"prompts.{split}={n:.0f}" for split, n in fewer.prompts.items()]
                if config.prompts.questions:  # which those do not cap
                    caps.append(f"corpus.limit={max(1, share * work.documents):.0f}")
                words = " ".join([f"name={config.name}-small", *caps])
                say(f"run: a smaller size takes {duration(shorter)}: {words}")
                return
        if config.evaluation.suites:
            say("run: evaluation.suites=[] leaves out the suites, which take most of it")

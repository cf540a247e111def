"""`distill plan`: what a run will take before anything runs: prompts, tokens, dollars, time, bytes.

Loads no model. Counts come from `work`, dollars from `cost`, all else from `estimate`. What is not
known is None, and named.
"""

import shutil
from collections.abc import Iterable
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
from distill.planning.preflight import Look
from distill.planning.search import plan_search
from distill.planning.work import Work, count_work, text_of
from distill.records import Record
from distill.responders.endpoint.network import ways
from distill.responders.prices import load_prices
from distill.responders.terms import judge_teacher
from distill.storage.progress import say
from distill.storage.run_folder import Run, Stage

QUICK = 5_000_000  # bytes of corpus that are read when a run starts
MOMENT = 0.2  # seconds in which this machine is measured then
SHORT = 90  # seconds of a run that is not announced
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


def make_plan(
    run: Run, origin: str | None = None, machine: Machine | None = None, work: Work | None = None
) -> RunPlan:
    """Return the plan of a run here or on `machine`; `origin` is its responder's, after a pilot."""
    config, work = run.config, work or count_work(run)
    require_length(config, work)
    teacher = teacher_cost(config, work, origin)
    machine = machine or find_machine(config.evaluation.machine, *types_of(config))
    estimate = RunEstimate(config, work, teacher, machine)
    stages, notes, disk = estimate.stages(), [*machine.notes], estimate.disk()
    if config.recipe.mode != "off":
        search = plan_search(config, estimate)
        text = f"{search.trials} trainings" if search else "not known until the corpus is read"
        row = StagePlan(stage="recipe", work=text, seconds=search and search.seconds)
        stages.insert(next(n for n, row in enumerate(stages) if row.stage == "train"), row)
        if search:
            notes.append(search.line())
            disk["trials"] = 4.0 * estimate.adapter * search.trials + disk["merged"]
    if unknown := [row.stage for row in stages if row.seconds is None]:
        notes.append(f"time: {', '.join(unknown)} not counted: not known yet")
    if work.texts is None:
        notes.append("counts: by the corpus's bytes and the config's caps; it was not read")
    server = ways(config.teacher) if isinstance(config.teacher, EndpointTeacher) else []
    notes += [f"teacher: {note}" for note in [*(teacher.notes if teacher else ()), *server]]
    if work.unasked:
        what = "validation prompts are not asked: the checker alone reads them"
        notes.append(f"teacher: {work.unasked:,} {what} (train.metric_for_best_model)")
    verdict = judge_teacher(config.teacher, config.terms.basis)
    stop = [] if verdict.allowed else ["a run stops here with exit 10 until terms.basis is stated"]
    notes += [f"terms: {line}" for line in [*verdict.lines(), *stop]]
    seconds = sum(row.seconds or 0.0 for row in stages)
    price = load_prices(config.evaluation.prices).machine(config.evaluation.machine)
    place = run.folder.absolute()  # where the run is, or will be
    place = next(folder for folder in (place, *place.parents) if folder.is_dir())
    return RunPlan(
        name=config.name,
        documents=round(work.documents),
        prompts={split: round(many) for split, many in work.prompts.items()},
        stages=tuple(stages),
        seconds=seconds,
        machine=machine,
        machine_dollars=price.of(seconds) if price else None,
        teacher=teacher,
        memory=tuple(estimate.memory()),
        disk=disk,
        disk_free=shutil.disk_usage(place).free,
        notes=tuple(notes),
    )


def plan_and_problems(run: Run, origin: str | None) -> tuple[RunPlan | None, list[DistillError]]:
    """Return a run's plan, where one can be made, and all that would stop the run."""
    estimate, unplanned = None, dict[str, DistillError]()
    try:
        estimate = make_plan(run, origin)
    except DistillError as error:
        unplanned[str(error)] = error
    look = Look(run, here=estimate is None or estimate.machine.here)
    look.at_all()  # but for programs, which a flag allows
    return estimate, list((unplanned | look.problems).values())


def require_length(config: Config, work: Work) -> None:
    """Stop (exit 7) where no prompt fits into a training sample, with room for one token."""
    prompts, most = work.texts[1] if work.texts else (), config.train.max_length
    sizes = [len(text_of(prompt.messages).encode()) for prompt in prompts]
    if sizes and min(sizes) / work.student.bytes_a_token >= most:
        what = f"none of {len(sizes):,} prompts fits into {most:,} tokens with its answer"
        fix = "raise it, or lower corpus.chunk.max_chars"
        raise DistillError(Exit.TRAINING, "train.max_length", what, fix)


def types_of(config: Config) -> list[str]:
    """Return the types in which the models of a config compute."""
    teachers = [config.teacher, *([config.soft_teacher()] if config.distributions else [])]
    return [*(t.dtype for t in teachers if isinstance(t, LocalTeacher)), config.student.dtype]


def show(plan: RunPlan) -> Group:
    """Return a plan for the terminal."""
    splits = ", ".join(f"{many:,} {split}" for split, many in plan.prompts.items())
    columns = ("stage", "work", ">tokens", ">time", ">memory")
    rows = table(f"plan of {plan.name}: prompts {splits}", *columns)
    peaks = {row.stage: size(row.peak) for row in plan.memory}
    for row in plan.stages:
        tokens = "" if row.tokens is None else count(row.tokens)
        rows.add_row(row.stage, row.work, tokens, duration(row.seconds), peaks.get(row.stage, ""))
    rows.add_section()
    dollars, total = plan.machine_dollars, count(sum(row.tokens or 0 for row in plan.stages))
    price = f"{money(dollars, up=True)} of machine time" if dollars else ""
    rows.add_row("all", price, total, duration(plan.seconds), "")
    lines = [f"machine: {plan.machine.name}: {plan.machine.source}"]
    highest = max(plan.memory, key=lambda row: row.peak)
    lines += [row.line() for row in plan.memory if row is highest or not row.fits]
    each = ", ".join(f"{what} {size(amount)}" for what, amount in plan.disk.items())
    word = "DOES NOT FIT: there are" if sum(plan.disk.values()) > plan.disk_free else "of"
    return Group(rows, *lines, f"disk: {each}; {word} {size(plan.disk_free)}", *plan.notes)


def announce(run: Run, redo: Iterable[Stage] = ()) -> None:
    """Say how long what is left of a run takes here.

    A short run is not announced, nor one of which nothing can be predicted. Raises DistillError for
    a stage whose weights alone do not fit (exit 7), and where the disk cannot hold what is trained
    (exit 5).
    """
    config, again = run.config, tuple(redo)
    try:
        to_do = {stage.name for stage in STAGES if stage in again or run.state(stage)[0] != "done"}
        if to_do <= {"filter", "report"}:
            return
        work, here = count_work(run, QUICK), measure(types_of(config), MOMENT)
        # Not what the store has: the account of a store of a million answers takes minutes.
        plan = make_plan(run, machine=here, work=work._replace(texts=None))
    except UNPREDICTABLE:
        return
    if "train" in to_do:
        require_length(config, work)
    disk, free = plan.disk, plan.disk_free  # without these parts of it nothing is trained
    needed = disk["checkpoints"] + disk["merged"] if "train" in to_do else 0.0
    needed += disk.get("soft labels", 0.0) if "signals" in to_do else 0.0
    needed += disk.get("trials", 0.0) if "recipe" in to_do else 0.0
    if needed > free:
        each = ", ".join(f"{what} {size(amount)}" for what, amount in disk.items() if amount)
        what = f"needs about {size(needed)}, and {size(free)} are free ({each})"
        fix = "free space, or name another disk: runs=DIR"
        raise DistillError(Exit.STATE, run.folder, what, fix)
    for row in (row for row in plan.memory if row.stage in to_do and not row.fits):
        if row.room is not None and row.parts["weights"] > row.room:
            fix = "take a smaller model or a larger machine; distill plan shows each stage"
            raise DistillError(Exit.TRAINING, row.stage, row.line(), fix)
        say(f"run: {'; '.join([row.line(), *here.notes])}")
    stages = [row for row in plan.stages if row.stage in to_do]
    seconds = sum(row.seconds or 0.0 for row in stages)
    if seconds >= SHORT:
        long = [row for row in stages if row.seconds is None or row.seconds >= 5]
        each = ", ".join(f"{row.stage} {duration(row.seconds)}" for row in long)
        say(f"run: about {duration(seconds)} on this machine ({here.source}): {each}")

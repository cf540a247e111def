"""`distill plan`: what a run will take before anything runs: prompts, tokens, dollars, seconds, memory, disk.

Loads no model and imports no torch. Counts come from `work`, dollars from `cost`; seconds are operations (`sizes`) over
the rate that `machine` measured. What is not known is None, and named.
"""

import math
import shutil
from collections.abc import Iterable
from decimal import Decimal

from rich.console import Group

from distill.config import Config, LocalTeacher
from distill.errors import DistillError, Exit
from distill.evaluation.suites import amounts
from distill.formatting import count, duration, money, size, table
from distill.models import download, registry
from distill.models.registry import Shape
from distill.pipeline import STAGES
from distill.planning.cost import ANSWER, TeacherCost, teacher_cost
from distill.planning.machine import SLOTS, Machine, find_machine
from distill.planning.sizes import (
    adapter_parameters,
    answer_flops,
    cache_bytes,
    training_bytes,
    training_flops,
)
from distill.planning.work import Work, count_work
from distill.records import Record, Usage
from distill.responders.prices import load_prices
from distill.responders.terms import judge_teacher
from distill.storage.progress import say
from distill.storage.run_folder import Run, Stage
from distill.training.batches import MICRO_BATCH_TOKENS
from distill.training.soft_labels.cache import expected_bytes

RETAINED = 0.85  # of the answers, by the filters: 224 of 264 on the quickstart
START = 4.0  # seconds to load a model
TIMED = 11.0  # seconds a model for the timings of the evaluation: two runs of five, and what is under way then
UNREAD = 1000  # rows of a suite's dataset that is not read for a plan
ITEM = 60  # tokens of a suite's question, those of the template included
CACHE_SHARE = 0.4  # of the memory, which the local responder takes for keys and values
RECORD = 7  # bytes in files for each byte of text: ids, JSON, responses twice
QUICK = 5_000_000  # bytes of corpus that are read when a run starts
SLOW, SHORT = ("float32", 2e10), 180  # a machine on which a run of so few seconds is short
LONG = 15 * 60  # seconds of a run for which a smaller size is named


class StagePlan(Record):
    """What a stage does; tokens are None where it has none, seconds where they are not known."""

    stage: str
    work: str
    tokens: int | None = None
    seconds: float | None = None


class RunPlan(Record):
    """A run's plan; `seconds` are those of the stages whose time is known, `memory` and `disk` are bytes."""

    name: str
    documents: int
    prompts: dict[str, int]
    counted: bool  # the corpus was read; else its bytes and the config's caps stand in
    stages: tuple[StagePlan, ...]
    seconds: float
    machine: Machine
    machine_dollars: Decimal | None
    teacher: TeacherCost | None
    memory: dict[str, float]
    disk: dict[str, float]
    disk_free: int
    notes: tuple[str, ...]


def make_plan(run: Run, origin: str | None = None, machine: Machine | None = None) -> RunPlan:
    """Return the plan of a run on this or another machine; `origin` is its responder's, where a pilot asked it."""
    config = run.config
    machine = machine or find_machine(config.evaluation.machine, *_types(config))
    work = count_work(run)
    teacher, book = teacher_cost(config, work, origin), load_prices(config.evaluation.prices)
    stages = plan_stages(config, work, teacher, machine)
    seconds, price = _sum(stages), book.machine(config.evaluation.machine)
    notes = []
    if unknown := [row.stage for row in stages if row.seconds is None]:
        notes.append(f"time: {', '.join(unknown)} not counted: not known yet")
    if work.texts is None:
        notes.append("counts: by the corpus's bytes and the config's caps; it was not read")
    if teacher:
        notes += [f"teacher: {note}" for note in teacher.notes]
    verdict = judge_teacher(config.teacher, config.terms.basis)
    stop = [] if verdict.allowed else ["a run stops here with exit 10 until terms.basis is stated"]
    notes += [f"terms: {line}" for line in [*verdict.lines(), *stop]]
    folder = run.folder.absolute()
    return RunPlan(
        name=config.name,
        documents=round(work.documents),
        prompts={split: round(many) for split, many in work.prompts.items()},
        counted=work.texts is not None,
        stages=tuple(stages),
        seconds=seconds,
        machine=machine,
        machine_dollars=price.of(seconds) if price else None,
        teacher=teacher,
        memory=memory(config, work, machine),
        disk=disk(config, work),
        disk_free=shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.is_dir())).free,
        notes=tuple(notes),
    )


def _types(config: Config) -> list[str]:
    """Return the types in which teacher and student compute here."""
    teachers = [config.teacher, *([config.soft_teacher()] if config.distributions else [])]
    return [t.dtype for t in teachers if isinstance(t, LocalTeacher)] + [config.student.dtype]


def shape(reference: str) -> Shape:
    """Return a model's shape; raises DistillError (exit 2) where nothing says it."""
    if (model := registry.shape_of(reference)) is None:
        fix = "add it to configs/models.yaml"
        raise DistillError(Exit.CONFIG, f"model {reference}", "its shape is not known", fix)
    return model


def _sum(stages: Iterable[StagePlan]) -> float:
    return sum(stage.seconds or 0.0 for stage in stages)


def plan_stages(
    config: Config, work: Work, cost: TeacherCost | None, machine: Machine
) -> list[StagePlan]:
    """Return what each stage does, and how long that takes."""
    teacher, student, settings = config.teacher, shape(config.student.model), config.train
    dtype, lora, rows = config.student.dtype, settings.lora, list[StagePlan]()

    def add(stage: str, what: str, tokens: float | None, seconds: float) -> None:
        known_seconds = None if math.isnan(seconds) else round(seconds, 1)
        rounded = None if tokens is None else round(tokens)
        rows.append(StagePlan(stage=stage, work=what, tokens=rounded, seconds=known_seconds))

    add("corpus", f"{count(work.documents)} documents", None, work.seconds / 2)
    add("prompts", f"{count(work.all_prompts)} prompts", None, work.seconds / 2)
    if cost is None:
        add("generate", f"answers of kind {teacher.kind}, none made", None, 0)
    else:
        seconds, many = math.nan if cost.seconds is None else cost.seconds, max(1, cost.requests)
        if isinstance(teacher, LocalTeacher) and cost.requests:
            model, each = (
                shape(teacher.model),
                (cost.input_tokens / many, cost.output_tokens / many),
            )
            seconds = START + machine.answering(model, teacher.dtype, "generate", *each, many)
        text = f"{cost.requests:,} answers" + f", {cost.stored:,} stored" * bool(cost.stored)
        add("generate", text, cost.input_tokens + cost.output_tokens, seconds)
    add("filter", f"keeps about {RETAINED:.0%}", None, 1)
    prompt = work.student.tokens
    usual = work.answer_tokens or ANSWER * teacher.max_new_tokens
    answer = cost.answer_tokens if cost else usual
    samples = RETAINED * teacher.n * work.prompts["train"]
    checked = RETAINED * work.prompts["validation"]
    per_answer, reader = 0.0, config.soft_teacher()  # operations of a teacher that reads an answer
    if config.distributions and reader.runs_here:
        per_answer = answer_flops(shape(reader.model), prompt, answer)
    if config.captures and config.signals.from_answers:
        add("signals", f"{count(samples + checked)} answers, with their lists", None, 1)
    elif config.captures:
        texts = samples + checked
        text, tokens = f"{count(texts)} answers, read once", texts * (prompt + answer)
        seconds = math.nan
        if isinstance(reader, LocalTeacher):
            seconds = START + machine.seconds(texts * per_answer, reader.dtype, "train")
        else:
            price = load_prices(config.evaluation.prices).teacher(reader.model)
            paid = money(price and price.of(Usage(input_tokens=round(tokens))), up=True)
            text += f" by a server, {config.signals.k} ids a token, {paid}"
        add("signals", text, tokens, seconds)
    # Validation is a forward pass over its samples, as often as the settings say and at the end.
    adapter = adapter_parameters(student, lora.r, lora.target_modules)
    one = training_flops(student, adapter, prompt, answer, settings.gradient_checkpointing)
    live = per_answer if settings.loss.soft and not config.captures else 0.0
    seen = samples * settings.num_train_epochs
    if settings.max_steps:
        seen = settings.max_steps * settings.tokens_per_step / (prompt + answer)
    steps = max(1, seen * (prompt + answer) / settings.tokens_per_step)
    validated = checked * (1 + steps // (settings.eval_steps or math.inf))
    flops = seen * (one + live) + validated * (answer_flops(student, prompt, answer) + live)
    seconds = START + machine.seconds(flops, dtype, "train")
    add("train", f"{count(steps)} steps", seen * (prompt + answer), seconds)
    if rounds := config.on_policy.rounds:
        requests = rounds * min(config.on_policy.prompts, work.prompts["train"])
        length = ANSWER * config.on_policy.max_new_tokens
        seconds = machine.answering(student, dtype, "evaluate", prompt, length, requests)
        seconds += (
            machine.seconds(requests * (one + per_answer), dtype, "train") + 3 * rounds * START
        )
        text = f"{rounds} rounds, {count(requests)} answers of the student"
        add("refine", text, requests * (prompt + length), seconds)
    # Base and student answer held-out prompts and suites, and read the teacher's answers; a base that was not taught
    # to be short writes more than the teacher. Then these two and a local teacher are timed.
    items, limit = work.prompts["heldout"], config.evaluation.max_new_tokens
    written_tokens = (answer + ANSWER * (limit or teacher.max_new_tokens)) / 2
    requests = [(items, prompt, written_tokens)]
    for many, most in amounts(config):
        requests.append((UNREAD if many is None else many, ITEM, ANSWER * most))
    seconds = machine.seconds(2 * items * answer_flops(student, prompt, answer), dtype, "train")
    seconds += (2 + teacher.runs_here) * (START + TIMED)
    for many, prompt_tokens, answer_tokens in requests:
        seconds += machine.answering(
            student, dtype, "evaluate", prompt_tokens, answer_tokens, 2 * many
        )
    text = f"{' + '.join(count(many) for many, *_ in requests)} items, two models"
    add(
        "evaluate",
        text,
        sum(
            2 * m * (prompt_tokens + answer_tokens) for m, prompt_tokens, answer_tokens in requests
        ),
        seconds,
    )
    add("report", "scorecard and report", None, 1)
    return rows


def memory(config: Config, work: Work, machine: Machine) -> dict[str, float]:
    """Return the peaks of generation and training in bytes, from the models' shapes."""
    peaks, settings, room = {}, config.train, machine.memory or math.inf
    if isinstance(config.teacher, LocalTeacher):
        teacher, width = shape(config.teacher.model), machine.width(config.teacher.dtype)
        row = (work.teacher.tokens + config.teacher.max_new_tokens) * cache_bytes(teacher, width)
        fitting = CACHE_SHARE * (room - width * teacher.parameters) // row
        slots = max(1, min(SLOTS[machine.kind], work.all_prompts, fitting))
        # On a CPU, bfloat16 weights stand in memory a second time, in the order of oneDNN.
        weights = width * teacher.parameters * (1 + (machine.kind == "cpu" and width == 2))
        peaks["generate"] = weights + (config.teacher.max_batch_size or slots) * row
    student, width = shape(config.student.model), machine.width(config.student.dtype)
    lora, most = settings.lora, settings.micro_batch_tokens or MICRO_BATCH_TOKENS
    tokens = min(most, settings.tokens_per_step)
    adapter = adapter_parameters(student, lora.r, lora.target_modules)
    four_bit, saving = config.student.load_in_4bit, settings.gradient_checkpointing
    peak = training_bytes(student, adapter, lora.r, tokens, saving, four_bit, width)
    if settings.loss.soft and settings.loss.teacher == "live":
        peak += width * shape(config.soft_teacher().model).parameters
    return {**peaks, "train": peak}


def disk(config: Config, work: Work) -> dict[str, float]:
    """Return the bytes of what will be written: models that are not there yet, the run, its release, soft labels."""
    from huggingface_hub import try_to_load_from_cache  # a third of a second to import

    teacher, lora, sizes = config.teacher, config.train.lora, {"models to fetch": 0.0}
    references = [teacher.model] if teacher.runs_here else []
    references += [config.reader()[0]] if config.distributions else []
    for reference in dict.fromkeys([*references, config.student.model]):
        info, there = registry.lookup(reference), registry.is_folder(reference)
        if info and info.gguf:
            there = download.converted_folder(info.name, info.gguf).is_dir()
        elif not there:
            revision = info.revision if info else None
            cached = try_to_load_from_cache(reference, "config.json", revision=revision)
            there = isinstance(cached, str)
        sizes["models to fetch"] += 0 if there else 2 * shape(reference).parameters
    student, tokens = shape(config.student.model), ANSWER * teacher.max_new_tokens
    adapter = 4 * adapter_parameters(student, lora.r, lora.target_modules)
    answers = work.all_prompts * teacher.n
    text = work.text_bytes + work.all_prompts * work.teacher.bytes + 4 * tokens * answers
    # A checkpoint holds the adapter, its two moments and the best one.
    sizes["run"] = RECORD * text + 1e6 + (4 * config.train.save_total_limit + 1) * adapter
    sizes["release"] = 2 * student.parameters + adapter
    if config.captures:
        sizes["soft labels"] = RETAINED * answers * tokens * expected_bytes(1, config.signals)
    return sizes


def show(plan: RunPlan) -> Group:
    """Return a plan for the terminal."""
    splits = ", ".join(f"{many:,} {split}" for split, many in plan.prompts.items())
    rows = table(f"plan of {plan.name}: prompts {splits}", "stage", "work", ">tokens", ">time")
    for row in plan.stages:
        tokens = "" if row.tokens is None else count(row.tokens)
        rows.add_row(row.stage, row.work, tokens, duration(row.seconds))
    rows.add_section()
    total = count(sum(row.tokens or 0 for row in plan.stages))
    price = (
        f"{money(plan.machine_dollars, up=True)} of machine time" if plan.machine_dollars else ""
    )
    rows.add_row("all", price, total, duration(plan.seconds))
    lines, cost = [f"machine: {plan.machine.name}: {plan.machine.source}"], plan.teacher
    peak, disk_bytes = max(plan.memory.values()), sum(plan.disk.values())
    for title, parts, needed, room in (
        ("memory at the peak", plan.memory, peak, plan.machine.memory),
        ("disk", plan.disk, disk_bytes, plan.disk_free),
    ):
        each = ", ".join(f"{what} {size(amount)}" for what, amount in parts.items())
        word = "does not fit: there are" if needed > (room or math.inf) else "of"
        lines.append(f"{title}: {each}" + (f"; {word} {size(room)}" if room else ""))
    if cost and cost.requests:
        tokens = f"{cost.input_tokens:,} tokens in, {cost.output_tokens:,} out"
        most = f"(at most {cost.output_tokens_most:,})"
        lines.append(f"teacher: {cost.requests:,} requests, {tokens} {most}")
        if cost.dollars is not None:
            most = f"at most {money(cost.dollars_most, up=True)}, retries apart"
            lines.append(f"teacher: {money(cost.dollars, up=True)} expected, {most}")
    return Group(rows, *lines, *plan.notes)


def announce(run: Run, redo: Iterable[Stage] = ()) -> None:
    """Say how long what is left of a run takes here, and name a smaller size where that is over 15 minutes.

    It costs a few seconds, so a run that is short on any machine is not announced. Where nothing can be predicted,
    nothing is said: the run itself says better what is wrong.
    """
    config, again = run.config, tuple(redo)

    def stages(work: Work, machine: Machine) -> list[StagePlan]:
        rows = plan_stages(config, work, teacher_cost(config, work), machine)
        return [row for row in rows if row.stage in remaining]

    try:
        remaining = {
            stage.name for stage in STAGES if stage in again or run.state(stage)[0] != "done"
        }
        if remaining <= {"filter", "report"}:
            return
        # Not what the store has: the account of a store of a million answers takes minutes.
        work, types = count_work(run, QUICK).scaled(1), _types(config)
        slow = Machine(name="slow", kind="cpu", rates=dict.fromkeys(types, SLOW), source="")
        if _sum(stages(work, slow)) < SHORT:
            return
        machine = find_machine(config.evaluation.machine, *types)
        rows = stages(work, machine)
        long = (row for row in rows if row.seconds is None or row.seconds >= 5)
        each = ", ".join(f"{row.stage} {duration(row.seconds)}" for row in long)
        say(f"run: about {duration(_sum(rows))} on this machine ({machine.source}): {each}")
        for share in (0.5, 0.25, 0.1, 0.05, 0.02, 0.01) if _sum(rows) > LONG else ():
            fewer = work.scaled(share)
            if (shorter := _sum(stages(fewer, machine))) < LONG:
                caps = " ".join(f"prompts.{split}={n:.0f}" for split, n in fewer.prompts.items())
                say(
                    f"run: a smaller size takes {duration(shorter)}: name={config.name}-small {caps}"
                )
                break
    except (DistillError, LookupError, TypeError, ValueError, OSError):
        return

"""`distill plan`: what a run will take, as ranges, before anything runs. Loads no model and imports no torch.

The amount of work is that of `distill.scope`, what a paid teacher costs that of `distill.bill`. Tokens follow from bytes
of text, operations and bytes from the models' shapes, seconds from the device's rate. What a range assumes stands under
the tables.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group
from rich.table import Table

from distill import download, models
from distill.bill import Bill, make_bill, money, seconds_of, show
from distill.config import Config
from distill.devices import Device, find_device
from distill.errors import DistillError, Exit
from distill.estimates import (
    NOTHING,
    Span,
    adapter_parameters,
    answer_flops,
    body_parameters,
    cache_bytes,
    forward_flops,
    head_parameters,
    total,
    training_bytes,
    training_flops,
)
from distill.evaluation.suites import amounts
from distill.forecast import dollars_of
from distill.generation.prices import load_prices
from distill.generation.terms import judge_teacher
from distill.models import Shape
from distill.scope import Scope, questions_written, scope
from distill.tables import bytes_of, count, duration, size_of, table
from distill.training.batches import MICRO_BATCH_TOKENS
from distill.training.remote import expected_bytes as remote_bytes
from distill.training.signals import expected_bytes

ANSWER = Span(0.2, 1.0)  # of max_new_tokens
KEPT = Span(0.5, 1.0)  # of the answers, by the filters
START = Span(2, 30)  # seconds to import the libraries and load a model
RECORD = Span(3, 12)  # bytes in files for each byte of text: ids, JSON, responses twice
QUESTION = Span(20, 200)  # tokens of a question of a suite
UNREAD = Span(100, 10_000)  # rows of a dataset that is not read for a plan
CACHE_SHARE = 0.4  # of the free memory, which the local responder takes for keys and values


@dataclass(frozen=True)
class Side:
    """Tokens of a prompt as one model sees it, and of an answer."""

    prompt: Span
    answer: Span


@dataclass(frozen=True)
class Row:
    """A stage's line of the plan; seconds are None where the device is not known."""

    stage: str
    work: str
    tokens: Span | None
    seconds: Span | None


def tokens_of(size: Span) -> Span:
    """Return the tokens of a prompt from its UTF-8 bytes: 2.8 to 4.4 bytes a token, and the template's own."""
    return Span(size.low / 4.4 + 10, size.high / 2.8 + 50)


def shape(reference: str) -> Shape:
    """Return a model's shape; raises DistillError (exit 2) where nothing says it."""
    found = models.shape_of(reference)
    if found is None:
        raise DistillError(
            Exit.CONFIG,
            f"model {reference}",
            "its shape is not known",
            "add it to configs/models.yaml",
        )
    return found


def answering(model: Shape, side: Side, count: Span, device: Device | None) -> Span | None:
    """Return the seconds of `count` answers: operations, and reading the weights once a step of the batch."""
    if device is None:
        return None
    low = answer_flops(model, side.prompt.low, side.answer.low)
    high = answer_flops(model, side.prompt.high, side.answer.high)
    weights = 2 * (body_parameters(model) + head_parameters(model))
    steps = count * side.answer / device.slots
    return Span(low, high) * count / device.rate + steps * weights / device.bandwidth


def rows(config: Config, work: Scope, device: Device | None, bill: Bill | None = None) -> list[Row]:
    """Return the plan's lines; those of the teacher from its bill, where there is one."""
    student = Side(tokens_of(work.student), ANSWER * config.teacher.max_new_tokens)
    dataset = Row("filter", f"keeps {KEPT.low:.0%} to {KEPT.high:.0%}", None, Span(0, 10))
    return [
        Row("corpus", f"{count(work.documents)} documents", None, work.seconds),
        Row("prompts", f"{count(work.asked)} prompts", None, work.seconds),
        _teacher_row(config, work, device, bill),
        dataset,
        *_signals_rows(config, work, student, device),
        _training_row(config, work, student, device),
        *_refine_rows(config, work, student, device),
        _evaluation_row(config, work, student, device),
        Row("report", "scorecard and report", None, Span(0, 20)),
    ]


def _teacher_row(config: Config, work: Scope, device: Device | None, bill: Bill | None) -> Row:
    teacher = config.teacher
    if bill:
        left = bill.left
        what = f"{count(left.count)} answers" + (f", {bill.stored:,} stored" if bill.stored else "")
        return Row("generate", what, left.input + left.output, seconds_of(bill, teacher))
    if teacher.kind != "local":
        return Row("generate", f"answers of kind {teacher.kind}, none made", None, Span(0, 30))
    side = Side(tokens_of(work.teacher), ANSWER * teacher.max_new_tokens)
    answers = work.asked * teacher.n
    questions = questions_written(config, work.documents.high)
    most = Span(answers.low, answers.high + questions.high)  # the questions are written too
    seconds = answering(shape(teacher.model), side, most, device)
    tokens = most * (side.prompt + side.answer)
    return Row("generate", f"{count(answers)} answers", tokens, seconds and seconds + START)


def _supervised(config: Config, work: Scope) -> Span:
    """Return the answers that are trained on and validated with."""
    return (work.prompts["train"] + work.prompts["validation"]) * KEPT * config.teacher.n


def _signals_rows(config: Config, work: Scope, side: Side, device: Device | None) -> list[Row]:
    """Return the line of the capture, where the loss needs one: the teacher reads each answer once."""
    if not config.captures:
        return []
    reader, answers = config.soft_teacher(), _supervised(config, work)
    if config.signals.from_answers:
        return [Row("signals", f"{count(answers)} answers, with their lists", None, work.seconds)]
    if reader.kind == "endpoint":
        what = f"{count(answers)} answers, read by a server"
        return [Row("signals", what, answers * (tokens_of(work.teacher) + side.answer), None)]
    model = shape(reader.model)
    ends = ((side.prompt.low, side.answer.low), (side.prompt.high, side.answer.high))
    reading = Span(*(forward_flops(model, prompt, answer) for prompt, answer in ends))
    seconds = answers * reading / device.rate + START if device else None
    what = f"{count(answers)} answers, read once"
    return [Row("signals", what, answers * (side.prompt + side.answer), seconds)]


def _signals_disk(config: Config, work: Scope) -> list[tuple[str, Span, str]]:
    """Return the cache of distributions, where the loss needs one, and whether the disk is too small for it."""
    if not config.captures:
        return []
    one = expected_bytes(1, config.signals)
    tokens = _supervised(config, work) * ANSWER * config.teacher.max_new_tokens
    size = tokens * Span(one / 2, one * 2)
    folder = config.store_folder().absolute()
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.is_dir())).free
    short = f"only {size_of(free)} free" if size.low > free else ""
    found = [("store: the teacher's distributions", size, short)]
    if config.soft_teacher().kind == "endpoint":
        came = config.signals.from_answers  # their prompts have no lists
        read = tokens + (NOTHING if came else _supervised(config, work) * tokens_of(work.teacher))
        most = remote_bytes(1, config.signals.k)
        found.append(("store: the server's replies", read * Span(most / 2, most), ""))
    return found


def _signals_notes(config: Config, lines: Sequence[Row]) -> list[str]:
    """Say what a server that reads the answers must list, and what that costs; the run's teacher has its own table."""
    reader, book = config.soft_teacher(), load_prices(config.evaluation.prices)
    row = next((line for line in lines if line.stage == "signals"), None)
    if row is None or row.tokens is None or not config.buys_signals:
        return []
    k, price = config.signals.k, book.teacher(reader.model)
    room = f": start vLLM with --max-logprobs {k}, or set signals.k=20" if k > 20 else ""
    cost = f"cost unknown: {book.why_no_teacher(reader.model)}"
    if price:
        cost = f"{money(*dollars_of(price, row.tokens, NOTHING))} for reading ({price.date}, {price.source})"
    listed = f"signals: {reader.model} lists {k} ids a token of answer and prompt{room}"
    return [listed, f"signals: {cost}"]


def _training_row(config: Config, work: Scope, side: Side, device: Device | None) -> Row:
    settings = config.train
    model, samples = shape(config.student.model), work.prompts["train"] * KEPT * config.teacher.n
    adapter = adapter_parameters(model, settings.lora.r, settings.lora.target_modules)
    live = bool(settings.loss.soft) and not config.captures
    teacher = shape(config.soft_teacher().model) if live else None
    one = [
        training_flops(model, adapter, prompt, answer, settings.gradient_checkpointing)
        + (forward_flops(teacher, prompt, answer) if teacher else 0)
        for prompt, answer in (
            (side.prompt.low, side.answer.low),
            (side.prompt.high, side.answer.high),
        )
    ]
    epoch = samples * (side.prompt + side.answer)
    tokens = epoch * settings.num_train_epochs
    if settings.max_steps:
        most = settings.max_steps * settings.tokens_per_step
        tokens = Span(min(tokens.low, most / 2), most * 1.5)
    steps = tokens * (1 / settings.tokens_per_step)
    seconds = None
    if device:
        share = tokens / epoch if epoch.low else NOTHING
        passes = Span(min(share.low, share.high), settings.num_train_epochs)
        checks = work.prompts["validation"] * (steps.high / (settings.eval_steps or steps.high) + 1)
        measured = checks * Span(0.3, 0.5)  # of the operations of a training sample
        seconds = (samples * passes + measured) * Span(*one) / device.rate + START
    what = f"{count(Span(max(1, steps.low), max(1, steps.high)))} steps"
    return Row("train", what, tokens, seconds)


def _refine_rows(config: Config, work: Scope, side: Side, device: Device | None) -> list[Row]:
    """Return the line of the on-policy rounds: the student answers, the teacher reads that, the student trains on it."""
    own, lora = config.on_policy, config.train.lora
    if not own.rounds:
        return []
    student, teacher = shape(config.student.model), shape(config.soft_teacher().model)
    prompts = work.prompts["train"]
    asked = Span(min(own.prompts, prompts.low), min(own.prompts, prompts.high)) * own.rounds
    side = Side(side.prompt, ANSWER * own.max_new_tokens)
    adapter = adapter_parameters(student, lora.r, lora.target_modules)
    ends = ((side.prompt.low, side.answer.low), (side.prompt.high, side.answer.high))
    one = [
        forward_flops(teacher, prompt, answer)
        + training_flops(student, adapter, prompt, answer, config.train.gradient_checkpointing)
        for prompt, answer in ends
    ]
    seconds = answering(student, side, asked, device)
    if seconds and device:
        seconds = seconds + asked * Span(*one) / device.rate + START * (3 * own.rounds)
    what = f"{own.rounds} rounds, {count(asked)} answers of the student"
    return [Row("refine", what, asked * (side.prompt + side.answer), seconds)]


def _evaluation_row(config: Config, work: Scope, side: Side, device: Device | None) -> Row:
    """Return the line of the evaluation: base and student answer, and both read the teacher's answers."""
    model, items = shape(config.student.model), work.prompts["heldout"]
    limit = config.evaluation.max_new_tokens or config.teacher.max_new_tokens
    asked = Side(side.prompt, ANSWER * limit)
    seconds = answering(model, asked, items * 2, device)
    if seconds and device:
        reading = Span(
            forward_flops(model, side.prompt.low, side.answer.low),
            forward_flops(model, side.prompt.high, side.answer.high),
        )
        seconds = seconds + items * 2 * reading / device.rate + START
    tokens = items * 2 * (asked.prompt + asked.answer)
    shown, further = count(items), _suites(config, model, device)
    for _, more_tokens, more_seconds in further:
        tokens = tokens + more_tokens
        seconds = seconds + more_seconds if seconds and more_seconds else None
    shown += f" + {count(total(many for many, _, _ in further))}" if further else ""
    return Row("evaluate", f"{shown} items, two models", tokens, seconds)


def _suites(
    config: Config, model: Shape, device: Device | None
) -> list[tuple[Span, Span, Span | None]]:
    """Return items, tokens and seconds of each task of the suites; a dataset that is not read has any number of rows."""
    found = []
    for items, limit in amounts(config):
        many = UNREAD if items is None else Span(items, items)
        side = Side(QUESTION, ANSWER * limit)
        tokens = many * 2 * (side.prompt + side.answer)
        found.append((many, tokens, answering(model, side, many * 2, device)))
    return found


def disk(config: Config, work: Scope) -> list[tuple[str, Span, str]]:
    """Return what will be written: what, bytes, remark."""
    found = [_model_bytes(ref) for ref in dict.fromkeys(references(config))]
    model = shape(config.student.model)
    lora = config.train.lora
    adapter = adapter_parameters(model, lora.r, lora.target_modules)
    checkpoint = adapter * 4 * Span(3, 4)  # adapter and Adam's moments; and the best adapter
    kept = checkpoint * Span(1, config.train.save_total_limit)
    answers = work.asked * config.teacher.n + work.prompts["heldout"] * 2
    text = work.asked * work.teacher + answers * ANSWER * (4 * config.teacher.max_new_tokens)
    run = (work.text + text) * RECORD + Span(5e5, 5e6)
    return [
        *found,
        ("run: documents, answers, report", run, ""),
        *_signals_disk(config, work),
        ("run: checkpoints and adapter", kept + Span(4, 4) * adapter, ""),
        ("release, if published", Span(2, 2) * model.parameters + Span(4, 4) * adapter, ""),
    ]


def references(config: Config) -> list[str]:
    """Return the models that the run loads."""
    teacher = [config.teacher.model] if config.teacher.kind == "local" else []
    reader = [config.reader()[0]] if config.distributions else []
    return [*teacher, *reader, config.student.model]


def _model_bytes(reference: str) -> tuple[str, Span, str]:
    """Return what fetching a model downloads and keeps."""
    info, size = models.lookup(reference), 2.0 * shape(reference).parameters
    if models.is_folder(reference):
        return f"model {reference}", NOTHING, "a folder"
    if info and info.gguf:
        there = download.converted_folder(info.name, info.gguf).is_dir()
        most = Span(size, size + 2 * info.bytes)  # the download goes when it is converted
        remark = "in the cache" if there else f"download {size_of(info.bytes)}, then converted"
        return f"model {reference}", NOTHING if there else most, remark
    from huggingface_hub import try_to_load_from_cache

    revision = info.revision if info else None
    there = isinstance(try_to_load_from_cache(reference, "config.json", revision=revision), str)
    remark = "in the Hub's cache" if there else f"download {size_of(size)}"
    return f"model {reference}", NOTHING if there else Span(size, size), remark


def memory(config: Config, work: Scope, device: Device, room: float) -> list[tuple[str, float]]:
    """Return the peaks that a GPU must hold, in bytes: the teacher's generation and the student's training."""
    found, settings = [], config.train
    if config.teacher.kind == "local":
        teacher = shape(config.teacher.model)
        row = (tokens_of(work.teacher).high + config.teacher.max_new_tokens) * cache_bytes(teacher)
        free = CACHE_SHARE * (room - 2 * teacher.parameters)
        slots = config.teacher.max_batch_size or max(
            1, min(device.slots.high, work.asked.high, free // row)
        )
        peak = 2 * teacher.parameters + slots * row
        found.append((f"generate, {slots:.0f} answers at a time", peak))
    student = shape(config.student.model)
    adapter = adapter_parameters(student, settings.lora.r, settings.lora.target_modules)
    tokens = settings.micro_batch_tokens or MICRO_BATCH_TOKENS
    peak = training_bytes(
        student,
        adapter,
        settings.lora.r,
        tokens,
        settings.gradient_checkpointing,
        config.student.load_in_4bit,
    )
    return [*found, (f"train, micro-batches of {tokens:,} tokens", peak)]


def plan(config: Config, origin: str | None = None, folder: Path | None = None) -> Group:
    """Return the plan of a run for the terminal; `origin` is its responder's, where a pilot has asked it.

    `folder` is the run's, where that is not the one that its config names.
    """
    work = scope(config, folder)
    device, why = find_device(config.evaluation.machine)
    paid = config.teacher.kind == "endpoint"
    bill = make_bill(config, work, origin) if paid or origin else None
    lines = rows(config, work, device, bill)
    parts: list[Table | str] = [_work_table(config, lines)]
    if bill:
        parts += [*show(bill, config)]
    parts.append(_disk_table(disk(config, work)))
    if device and device.memory:
        parts.append(_memory_table(memory(config, work, device, device.memory), device.memory))
    notes = [
        f"device: {device.name} ({why}): {device.source}"
        if device
        else f"device: {why}: no seconds without its rate",
        "tokens: 2.8 to 4.4 bytes each; answers of 20 to 100 % of max_new_tokens"
        + (" (the teacher's: see its table)" if bill else ""),
        *_signals_notes(config, lines),
        *_terms(config),
    ]
    return Group(*parts, *notes, *_price(config, lines))


def _terms(config: Config) -> list[str]:
    """Say whether the teacher's answers may train, what is owed, and whether a run would stop."""
    verdict = judge_teacher(config)
    stop = [] if verdict.allowed else ["a run stops here with exit 10 until terms.basis is stated"]
    return [f"terms: {line}" for line in [*verdict.lines(), *stop]]


def _price(config: Config, lines: Sequence[Row]) -> list[str]:
    """Say what the seconds cost, where the machine has a price."""
    machine = config.evaluation.machine
    price = load_prices(config.evaluation.prices).machine(machine) if machine else None
    known = [line.seconds for line in lines if line.seconds]
    unknown = [line.stage for line in lines if not line.seconds]
    if price is None or len(unknown) > 1:
        return []
    cost = total(known) * (float(price.dollars_per_hour) / 3600)
    but = f", without the time of {unknown[0]}" if unknown else ""
    return [f"cost: ${cost.low:.2f} to ${cost.high:.2f} on {machine} ({price.date}){but}"]


def _work_table(config: Config, lines: Sequence[Row]) -> Table:
    shown = table(f"plan of {config.name}", "stage", "work", ">tokens", ">time")
    for line in lines:
        tokens = count(line.tokens) if line.tokens else ""
        shown.add_row(line.stage, line.work, tokens, duration(line.seconds))
    shown.add_section()
    known = [line.seconds for line in lines if line.seconds]
    whole = total(known) if len(known) == len(lines) else None
    shown.add_row("all", "", count(total(r.tokens for r in lines if r.tokens)), duration(whole))
    return shown


def _disk_table(files: Sequence[tuple[str, Span, str]]) -> Table:
    shown = table("on disk", "what", ">bytes", "")
    for what, size, remark in files:
        shown.add_row(what, bytes_of(size), remark)
    return shown


def _memory_table(peaks: Sequence[tuple[str, float]], room: float) -> Table:
    shown = table(f"GPU memory, of {size_of(room)}", "stage", ">peak", "")
    for what, peak in peaks:
        remark = "fits" if peak < 0.9 * room else "tight" if peak < room else "does not fit"
        shown.add_row(what, size_of(peak), remark)
    return shown

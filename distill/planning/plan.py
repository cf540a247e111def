"""`distill plan`: what a run will take before anything runs: prompts, tokens, dollars, time, bytes.

Loads no model. Counts come from `work`, dollars from `cost`; seconds are operations over the rate
that `machine` measured, bytes follow from the models' shapes. What is not known is None, and named.
"""

import math
import shutil
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path

from rich.console import Group

from distill.config.teachers import LocalTeacher
from distill.config.tree import Config
from distill.errors import DistillError
from distill.evaluation.suites import amounts
from distill.formatting import count, duration, money, size, table
from distill.models import download, registry
from distill.models.registry import shape_of
from distill.pipeline import STAGES
from distill.planning.cost import ANSWER, TeacherCost, teacher_cost
from distill.planning.machine import (
    Machine,
    adapter_parameters,
    answer_flops,
    cache_bytes,
    find_machine,
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
READING = 1e6  # bytes of corpus that are cleaned, deduplicated and made into prompts in a second
START = 4.0  # seconds to load a model
TIMED = (
    11.0  # seconds a model for the evaluation's timings: two runs of five, and what is under way
)
UNREAD_ROWS = 1000  # of a suite's dataset that is not read for a plan
ITEM = 60  # tokens of a suite's question, those of the template included
BATCH = {"cpu": 64, "cuda": 128}  # answers that are decoded at once, as the local responder has it
CACHE_SHARE = 0.4  # of the memory, which it takes for keys and values
STORED = 7  # bytes in files for each byte of text: ids, JSON, responses twice
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
    """A run's plan; `seconds` sums up the stages whose time is known, memory and disk are bytes."""

    name: str
    documents: int
    prompts: dict[str, int]
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
    """Return the plan of a run here or on `machine`; `origin` is its responder's, after a pilot."""
    config = run.config
    work, book = count_work(run), load_prices(config.evaluation.prices)
    teacher = teacher_cost(config, work, origin)
    estimate = RunEstimate(
        config, work, teacher, machine or find_machine(config.evaluation.machine, *_types(config))
    )
    stages = list(estimate.stages())
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
        stages=tuple(stages),
        seconds=seconds,
        machine=estimate.machine,
        machine_dollars=price.of(seconds) if price else None,
        teacher=teacher,
        memory=estimate.memory(),
        disk=estimate.disk(),
        disk_free=shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.is_dir())).free,
        notes=tuple(notes),
    )


def _types(config: Config) -> list[str]:
    """Return the types in which the models of a config compute."""
    teachers = [config.teacher, *([config.soft_teacher()] if config.distributions else [])]
    types = [teacher.dtype for teacher in teachers if isinstance(teacher, LocalTeacher)]
    return [*types, config.student.dtype]


def _sum(stages: Iterable[StagePlan]) -> float:
    return sum(stage.seconds or 0.0 for stage in stages)


def _row(stage: str, what: str, tokens: float | None, seconds: float | None) -> StagePlan:
    return StagePlan(
        stage=stage,
        work=what,
        tokens=None if tokens is None else round(tokens),
        seconds=None if seconds is None or math.isnan(seconds) else round(seconds, 1),
    )


class RunEstimate:
    """The amount of work of a config, and what each stage of it takes on a machine."""

    def __init__(
        self, config: Config, work: Work, cost: TeacherCost | None, machine: Machine
    ) -> None:
        self.config, self.work, self.cost, self.machine = config, work, cost, machine
        self.student, lora = shape_of(config.student.model), config.train.lora
        self.adapter = adapter_parameters(self.student, lora.r, lora.target_modules)
        expected = work.answer_tokens or ANSWER * config.teacher.max_new_tokens
        self.prompt, self.answer = work.student.tokens, cost.answer_tokens if cost else expected
        self.trained = RETAINED * config.teacher.n * work.prompts["train"]
        self.validated = RETAINED * work.prompts["validation"]
        self.read = 0.0  # operations of a teacher here that reads an answer for its distributions
        if config.distributions and (reader := config.soft_teacher()).runs_here:
            self.read = answer_flops(shape_of(reader.model), self.prompt, self.answer)

    def stages(self) -> Iterator[StagePlan]:
        """Yield what each stage does, and how long that takes."""
        config, work, reading = self.config, self.work, self.work.text_bytes / READING
        yield _row("corpus", f"{count(work.documents)} documents", None, reading / 2)
        yield _row("prompts", f"{count(work.all_prompts)} prompts", None, reading / 2)
        yield self.generate()
        yield _row("filter", f"keeps about {RETAINED:.0%}", None, 1)
        if config.captures:
            yield self.signals()
        yield self.train()
        if config.on_policy.rounds:
            yield self.refine()
        yield self.evaluate()
        yield _row("report", "scorecard and report", None, 1)

    def generate(self) -> StagePlan:
        """Count the teacher's answers that the store lacks."""
        teacher, cost = self.config.teacher, self.cost
        if cost is None:
            return _row("generate", f"answers of kind {teacher.kind}, none made", None, 0)
        seconds = cost.seconds
        if isinstance(teacher, LocalTeacher) and (many := cost.requests):
            sizes = (cost.input_tokens / many, cost.output_tokens / many)
            flops = many * answer_flops(shape_of(teacher.model), *sizes)
            seconds = START + self.machine.seconds(flops, teacher.dtype, "generate")
        text = f"{cost.requests:,} answers" + f", {cost.stored:,} stored" * bool(cost.stored)
        return _row("generate", text, cost.input_tokens + cost.output_tokens, seconds)

    def signals(self) -> StagePlan:
        """Count the answers whose distributions are read, by a teacher here or a server."""
        reader, signals = self.config.soft_teacher(), self.config.signals
        texts = self.trained + self.validated
        if signals.from_answers:
            return _row("signals", f"{count(texts)} answers, with their lists", None, 1)
        tokens, text = texts * (self.prompt + self.answer), f"{count(texts)} answers, read once"
        if isinstance(reader, LocalTeacher):
            seconds = START + self.machine.seconds(texts * self.read, reader.dtype, "train")
            return _row("signals", text, tokens, seconds)
        price = load_prices(self.config.evaluation.prices).teacher(reader.model)
        paid = money(price and price.of(Usage(input_tokens=round(tokens))), up=True)
        text += f" by a server, {signals.k} ids a token, {paid}"
        return _row("signals", text, tokens, None)

    def _step(self) -> float:
        """Return the operations of training on one sample."""
        saving = self.config.train.gradient_checkpointing
        return training_flops(self.student, self.adapter, self.prompt, self.answer, saving)

    def train(self) -> StagePlan:
        """Count the steps, and validation: as often as the settings say and at the end."""
        settings, tokens = self.config.train, self.prompt + self.answer
        live = self.read if settings.loss.soft and not self.config.captures else 0.0
        samples = self.trained * settings.num_train_epochs
        if settings.max_steps:
            samples = settings.max_steps * settings.tokens_per_step / tokens
        steps = max(1, samples * tokens / settings.tokens_per_step)
        passes = self.validated * (1 + steps // (settings.eval_steps or math.inf))
        flops = passes * (answer_flops(self.student, self.prompt, self.answer) + live)
        flops += samples * (self._step() + live)
        seconds = START + self.machine.seconds(flops, self.config.student.dtype, "train")
        return _row("train", f"{count(steps)} steps", samples * tokens, seconds)

    def refine(self) -> StagePlan:
        """Count the student's answers, which the teacher reads and the student learns from."""
        settings, dtype = self.config.on_policy, self.config.student.dtype
        requests = settings.rounds * min(settings.prompts, self.work.prompts["train"])
        length = ANSWER * settings.max_new_tokens
        answers = requests * answer_flops(self.student, self.prompt, length)
        seconds = self.machine.seconds(answers, dtype, "evaluate")
        seconds += self.machine.seconds(requests * (self._step() + self.read), dtype, "train")
        text = f"{settings.rounds} rounds, {count(requests)} answers of the student"
        tokens = requests * (self.prompt + length)
        return _row("refine", text, tokens, seconds + 3 * settings.rounds * START)

    def evaluate(self) -> StagePlan:
        """Base and student answer prompts and suites, read the teacher's answers, are timed.

        A base that was not taught to be short writes more than the teacher.
        """
        teacher, items = self.config.teacher, self.work.prompts["heldout"]
        limit = self.config.evaluation.max_new_tokens or teacher.max_new_tokens
        requests = [(items, self.prompt, (self.answer + ANSWER * limit) / 2)]
        for many, most in amounts(self.config.evaluation.suites):
            requests.append((UNREAD_ROWS if many is None else many, ITEM, ANSWER * most))
        dtype, tokens = self.config.student.dtype, 0.0
        read = 2 * items * answer_flops(self.student, self.prompt, self.answer)
        seconds = self.machine.seconds(read, dtype, "train")
        seconds += (2 + teacher.runs_here) * (START + TIMED)
        for many, prompt, answer in requests:
            flops = 2 * many * answer_flops(self.student, prompt, answer)
            seconds += self.machine.seconds(flops, dtype, "evaluate")
            tokens += 2 * many * (prompt + answer)
        text = f"{' + '.join(count(many) for many, *_ in requests)} items, two models"
        return _row("evaluate", text, tokens, seconds)

    def memory(self) -> dict[str, float]:
        """Return the peaks in bytes; `merge`, of float32 weights, is in main memory everywhere."""
        teacher, settings = self.config.teacher, self.config.train
        machine, peaks = self.machine, {}
        if isinstance(teacher, LocalTeacher):
            model, width = shape_of(teacher.model), machine.width(teacher.dtype)
            row = (self.work.teacher.tokens + teacher.max_new_tokens) * cache_bytes(model, width)
            fitting = CACHE_SHARE * ((machine.memory or math.inf) - width * model.parameters) // row
            batch = max(1, min(BATCH[machine.kind], self.work.all_prompts, fitting))
            # On a CPU, bfloat16 weights stand in memory a second time, in the order of oneDNN.
            weights = width * model.parameters * (1 + (machine.kind == "cpu" and width == 2))
            peaks["generate"] = weights + (teacher.max_batch_size or batch) * row
        width, student = machine.width(self.config.student.dtype), self.config.student
        tokens = min(settings.micro_batch_tokens or MICRO_BATCH_TOKENS, settings.tokens_per_step)
        peaks["train"] = training_bytes(
            self.student,
            self.adapter,
            settings.lora.r,
            tokens,
            settings.gradient_checkpointing,
            student.load_in_4bit,
            width,
        )
        if settings.loss.soft and settings.loss.teacher == "live":
            peaks["train"] += width * shape_of(self.config.soft_teacher().model).parameters
        return {**peaks, "merge": 4.0 * (self.student.parameters + self.adapter)}

    def disk(self) -> dict[str, float]:
        """Return the bytes of what will be written, and of models that are not here yet."""
        from huggingface_hub import try_to_load_from_cache  # a third of a second to import

        config, teacher, sizes = self.config, self.config.teacher, {"models to fetch": 0.0}
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
            sizes["models to fetch"] += 0 if there else 2 * shape_of(reference).parameters
        adapter, tokens = 4 * self.adapter, ANSWER * teacher.max_new_tokens
        answers = self.work.all_prompts * teacher.n
        text = self.work.text_bytes + self.work.all_prompts * self.work.teacher.bytes
        # A checkpoint holds the adapter, its two moments and the best one.
        sizes["run"] = STORED * (text + 4 * tokens * answers) + 1e6
        sizes["run"] += (4 * config.train.save_total_limit + 1) * adapter
        # in the type of the base's files; what has a name or is on the Hub has two bytes a weight
        path = Path(config.student.model) / "config.json"
        facts = registry.read_object(path) if path.is_file() else {"dtype": "bfloat16"}
        dtype = facts.get("dtype") or facts.get("torch_dtype") or "float32"
        sizes["merged"] = (2 if "16" in dtype else 4) * float(self.student.parameters)
        sizes["release"] = sizes["merged"] + adapter
        if config.captures:
            texts = RETAINED * answers * tokens
            sizes["soft labels"] = texts * expected_bytes(1, config.signals)
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
    dollars = plan.machine_dollars
    price = f"{money(dollars, up=True)} of machine time" if dollars else ""
    rows.add_row("all", price, total, duration(plan.seconds))
    machine = plan.machine
    lines, memory = [f"machine: {machine.name}: {machine.source}"], dict(plan.memory)
    main = {"merge": memory.pop("merge")} if machine.kind == "cuda" else {}
    for title, parts, needed, room in (
        ("memory at the peak", memory, max(memory.values()), machine.memory),
        ("main memory", main, max(main.values(), default=0), machine.main_memory),
        ("disk", plan.disk, sum(plan.disk.values()), plan.disk_free),
    ):
        each = ", ".join(f"{what} {size(amount)}" for what, amount in parts.items())
        word = "does not fit: there are" if needed > (room or math.inf) else "of"
        lines += [f"{title}: {each}" + (f"; {word} {size(room)}" if room else "")] if parts else []
    return Group(rows, *lines, *plan.notes)


def announce(run: Run, redo: Iterable[Stage] = ()) -> None:
    """Say how long what is left of a run takes here, and name a smaller size above 15 minutes.

    It costs a few seconds, so a run that is short on any machine is not announced. Where nothing
    can be predicted, nothing is said: the run itself says better what is wrong.
    """
    config, again = run.config, tuple(redo)

    def stages(work: Work, machine: Machine) -> list[StagePlan]:
        rows = RunEstimate(config, work, teacher_cost(config, work), machine).stages()
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
    except (DistillError, LookupError, TypeError, ValueError, OSError):
        return

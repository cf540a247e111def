"""What each stage of a run takes on a machine: tokens, seconds, memory, and files on the disk.

Seconds are operations over the rate that `machine` measured, bytes follow from the models' shapes.
Loads no model.
"""

import math
from collections.abc import Iterator
from pathlib import Path

from pydantic import computed_field

from distill.config.teachers import LocalTeacher
from distill.config.tree import Config
from distill.evaluation.suites import amounts
from distill.formatting import count, money, size
from distill.models import download, registry
from distill.models.arithmetic import (
    LoraTraining,
    Parts,
    Towards,
    adapter_parameters,
    answer_flops,
    answering_bytes,
    cache_bytes,
    capture_bytes,
    fitting_rows,
    merging_bytes,
    reading_bytes,
    row_bytes,
    training_flops,
    weight_bytes,
)
from distill.models.registry import Shape, shape_of
from distill.planning.cost import ANSWER, TeacherCost
from distill.planning.machine import Machine
from distill.planning.work import Work
from distill.records import Record, Usage
from distill.responders.prices import load_prices
from distill.training.soft_labels.cache import expected_bytes

RETAINED = 0.85  # of the answers, by the filters: 224 of 264 on the quickstart
READING = 1e6  # bytes of corpus that are cleaned, deduplicated and made into prompts in a second
START = 4.0  # seconds to load a model
TIMED = 11.0  # seconds of a model's timings: two runs of five, and what is under way
UNREAD_ROWS = 1000  # of a suite's dataset that is not read for a plan
ITEM = 60  # tokens of a suite's question, those of the template included
STORED = 7  # bytes in files for each byte of text: ids, JSON, responses twice


class StagePlan(Record):
    """What a stage does; tokens are None where it has none, seconds where they are not known."""

    stage: str
    work: str
    tokens: int | None = None
    seconds: float | None = None


class StageMemory(Record):
    """What a stage holds at its peak, in bytes by what they are for, and where there is `room`."""

    stage: str
    parts: Parts
    room: float | None  # None where it is not known
    place: str = "memory"

    @computed_field
    @property
    def peak(self) -> float:
        """Return the bytes at the peak."""
        return sum(self.parts.values())

    @computed_field
    @property
    def fits(self) -> bool:
        """Tell whether the peak fits."""
        return self.room is None or self.peak <= self.room

    def line(self) -> str:
        """Say what it is made of."""
        parts = ", ".join(f"{what} {size(amount)}" for what, amount in self.parts.items())
        room = "" if self.room is None else f" of {size(self.room)}"
        word = "peak of" if self.fits else "DOES NOT FIT:"
        return f"{self.place}: {word} {self.stage} {size(self.peak)}{room} ({parts})"


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

    def memory(self) -> Iterator[StageMemory]:
        """Yield what each stage that computes here holds; merging takes main memory everywhere."""
        config, machine, settings = self.config, self.machine, self.config.train
        teacher, student, kind = config.teacher, self.student, machine.kind
        width, limit = machine.width(config.student.dtype), config.evaluation.max_new_tokens
        room = machine.memory if machine.free is None else machine.free

        def answering(model: Shape, width: int, tokens: float, rows: int | None) -> Parts:
            fixed = sum(answering_bytes(model, width, kind, 0, 0).values())
            beside = 1e15 if room is None else room - fixed
            row = row_bytes(cache_bytes(model, width), model.vocab, width, kind, tokens)
            fitting = fitting_rows(beside, row, kind)
            most = min(fitting, max(1, int(self.work.all_prompts * teacher.n)))
            return answering_bytes(model, width, kind, rows or most, tokens)

        sides = list[Parts]()  # of the evaluation: a teacher that is here is timed too
        if isinstance(teacher, LocalTeacher):
            tokens, rows = self.work.teacher.tokens + teacher.max_new_tokens, teacher.max_batch_size
            model = (shape_of(teacher.model), machine.width(teacher.dtype))
            sides.append(answering(*model, tokens, rows))
            yield StageMemory(stage="generate", parts=sides[0], room=room)
        reader = config.soft_teacher() if config.distributions else None
        read, live = Parts(), 0.0
        if isinstance(reader, LocalTeacher):
            shape, reads = shape_of(reader.model), machine.width(reader.dtype)
            signals = config.signals
            how = (signals.method, bool(signals.temperatures))
            read = reading_bytes(shape, reads, kind, capture_bytes(shape.vocab, reads, kind, *how))
            if config.captures:
                yield StageMemory(stage="signals", parts=read, room=room)
            elif settings.loss.soft:
                live = weight_bytes(shape, reads)
        towards: Towards = "live" if live else "cached" if settings.loss.soft else "tokens"
        training = LoraTraining(
            *(student, settings.lora.r, settings.lora.target_modules, kind, width),
            *(config.student.load_in_4bit, settings.gradient_checkpointing, towards, live),
            length=self.prompt + self.answer,
            dropout=settings.lora.dropout,
        )
        most = training.micro_batch(machine.memory or math.inf, settings.tokens_per_step)
        tokens = settings.micro_batch_tokens or most
        trained = training.parts(min(tokens, settings.tokens_per_step))
        many = kind == "cuda" and (settings.num_processes or 1) > 1
        place = "memory of each GPU, with all of the student (not FSDP2)" if many else "memory"
        yield StageMemory(stage="train", parts=trained, room=room, place=place)
        merged = merging_bytes(student, self._stored_width(), self.adapter)
        main = machine.main_memory
        yield StageMemory(stage="merge", parts=merged, room=main, place="main memory")
        tokens = self.prompt + (limit or teacher.max_new_tokens)
        if config.on_policy.rounds:
            length = self.prompt + config.on_policy.max_new_tokens
            answers = answering(student, width, length, None)
            most = max(answers, read, trained, key=lambda parts: sum(parts.values()))
            yield StageMemory(stage="refine", parts=most, room=room)
        sides.append(answering(student, width, tokens, config.evaluation.max_batch_size))
        sides.append(reading_bytes(student, width, kind))
        most = max(sides, key=lambda parts: sum(parts.values()))
        yield StageMemory(stage="evaluate", parts=most, room=room)

    def _stored_width(self) -> int:
        """Return the bytes of a weight in the student's files: two, but in folders that say so."""
        path = Path(self.config.student.model) / "config.json"
        facts = registry.read_object(path) if path.is_file() else {"dtype": "bfloat16"}
        dtype = facts.get("dtype") or facts.get("torch_dtype") or "float32"
        return 2 if "16" in dtype else 4

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
        sizes["checkpoints"] = (4 * config.train.save_total_limit + 1) * adapter
        sizes["merged"] = self._stored_width() * float(self.student.parameters)
        sizes["release"] = sizes["merged"] + adapter
        if config.captures:
            texts = RETAINED * answers * tokens
            sizes["soft labels"] = texts * expected_bytes(1, config.signals)
        return sizes


def _row(stage: str, what: str, tokens: float | None, seconds: float | None) -> StagePlan:
    return StagePlan(
        stage=stage,
        work=what,
        tokens=None if tokens is None else round(tokens),
        seconds=None if seconds is None or math.isnan(seconds) else round(seconds, 1),
    )

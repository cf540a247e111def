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
from distill.evaluation.suites import amounts, answer_limit
from distill.formatting import count, money, size
from distill.models import arithmetic, download, registry
from distill.models.arithmetic import LoraTraining, Parts
from distill.models.registry import Shape, shape_of
from distill.planning.cost import ANSWER, TeacherCost
from distill.planning.machine import Machine
from distill.planning.work import Work
from distill.records import Record, Usage
from distill.responders.prices import load_prices
from distill.tasks.task import load_task
from distill.training.soft_labels.cache import expected_bytes

FAILED = 0.5  # of the prompts that a student tries, by their checker
RETAINED = 0.85  # of the answers, by the filters: 224 of 264 on the quickstart
READING = 1e6  # bytes of corpus that are cleaned, deduplicated and made into prompts in a second
START = 4.0  # seconds to load a model
TIMED = {"quick": 11.0, "full": 170.0}  # seconds of a model's timings
UNREAD_ROWS = 1000  # of a suite's dataset that is not read for a plan
ITEM = 60  # tokens of a suite's question, those of the template included
STORED = 7  # bytes in files for each byte of text: ids, JSON, responses twice

Effort = tuple[str, float | None, float | None]  # a stage's work in words, its tokens and seconds


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
        self.adapter = arithmetic.adapter_parameters(self.student, lora.r, lora.target_modules)
        expected = work.answer_tokens or ANSWER * config.teacher.max_new_tokens
        self.prompt, self.answer = work.student.tokens, cost.answer_tokens if cost else expected
        self.trained = RETAINED * config.teacher.n * work.prompts["train"]
        self.validated = RETAINED * (work.prompts["validation"] - work.unasked)
        by_checker = config.train.metric_for_best_model == "checker"
        self.checked = work.prompts["validation"] if by_checker else 0.0
        self.own_tokens = 0
        if mine := config.train.self_answers:
            self.own_tokens = mine.max_new_tokens or config.teacher.max_new_tokens
        reader = config.soft_teacher() if config.distributions else None
        self.reader = reader if isinstance(reader, LocalTeacher) else None
        # operations of reading an answer, by a teacher here for its distributions and by the
        # student, and of training on one
        lengths = (self.prompt, self.answer)
        taught = shape_of(self.reader.model) if self.reader else None
        self.taught = arithmetic.answer_flops(taught, *lengths) if taught else 0.0
        self.read = arithmetic.answer_flops(self.student, *lengths)
        saving = config.train.gradient_checkpointing
        self.step = arithmetic.training_flops(self.student, self.adapter, *lengths, saving)

    def stages(self) -> list[StagePlan]:
        """Return what each stage does, and how long that takes."""
        config, reading = self.config, self.work.text_bytes / READING / 2
        rows: dict[str, Effort | None] = {
            "corpus": (f"{count(self.work.documents)} documents", None, reading),
            "prompts": (f"{count(self.work.all_prompts)} prompts", None, reading),
            "select": self.select() if config.prompts.select != "all" else None,
            "generate": self.generate(),
            "filter": (f"keeps about {RETAINED:.0%}", None, 1),
            "signals": self.signals() if config.captures else None,
            "train": self.train(),
            "refine": self.refine() if config.refines else None,
            "evaluate": self.evaluate(),
            "report": ("scorecard and report", None, 1),
        }
        plans = []
        for stage, (text, tokens, seconds) in ((stage, row) for stage, row in rows.items() if row):
            seconds = None if seconds is None or math.isnan(seconds) else round(seconds, 1)
            tokens = None if tokens is None else round(tokens)
            plans.append(StagePlan(stage=stage, work=text, tokens=tokens, seconds=seconds))
        return plans

    def select(self) -> Effort:
        """Count trainings on a quarter and on half of the prompts, and what these students try.

        Where all is checked, FAILED of their answers are expected to be wrong.
        """
        budget, pool, tasks = self.work.prompts["train"], self.work.pool, self.config.prompts.tasks
        if pool is None:
            return "asked in 3 tranches, 2 trainings; the corpus was not read", None, None
        if pool <= budget:
            return f"all of {count(pool)} prompts", None, 0
        checked = bool(tasks) and all(load_task(name).checker for name in tasks)
        needed = (budget / 4, budget / 2)  # as many as there are already
        tries = sum(min(pool - more, more / FAILED if checked else pool) for more in needed)
        flops = tries * arithmetic.answer_flops(self.student, self.prompt, self.answer)
        _, tokens, seconds = self.train()
        seconds = sum(needed) / budget * (seconds or math.nan) + 2 * START
        seconds += self.machine.seconds(flops, self.config.student.dtype, "evaluate")
        text = f"asked in 3 tranches, 2 trainings, {count(tries)} answers of the student"
        return text, (tokens or 0.0) + tries * (self.prompt + self.answer), seconds

    def generate(self) -> Effort:
        """Count the teacher's answers that the store lacks."""
        teacher, cost = self.config.teacher, self.cost
        if cost is None:
            return f"answers of kind {teacher.kind}, none made", None, 0
        seconds = cost.seconds
        if isinstance(teacher, LocalTeacher) and (many := cost.requests):
            sizes = (cost.input_tokens / many, cost.output_tokens / many)
            flops = many * arithmetic.answer_flops(shape_of(teacher.model), *sizes)
            seconds = START + self.machine.seconds(flops, teacher.dtype, "generate")
        text = f"{cost.requests:,} answers" + f", {cost.stored:,} stored" * bool(cost.stored)
        return text, cost.input_tokens + cost.output_tokens, seconds

    def signals(self) -> Effort:
        """Count the answers whose distributions are read, by a teacher here or a server."""
        texts, signals = self.trained + self.validated, self.config.signals
        tokens = texts * (self.prompt + self.answer)
        if signals.from_answers:
            return f"{count(texts)} answers, with their lists", None, 1
        if self.reader:
            seconds = START + self.machine.seconds(texts * self.taught, self.reader.dtype, "train")
            return f"{count(texts)} answers, read once", tokens, seconds
        price = load_prices(self.config.evaluation.prices).teacher(self.config.soft_teacher().model)
        paid = money(price and price.of(Usage(input_tokens=round(tokens))), up=True)
        text = f"{count(texts)} answers, read once by a server, {signals.k} ids a token, {paid}"
        return text, tokens, None

    def train(self, rows: float | None = None) -> Effort:
        """Count the steps over `rows`, else the teacher's, and validation, as the settings say."""
        settings, tokens = self.config.train, self.prompt + self.answer
        live = self.taught if settings.loss.soft and not self.config.captures else 0.0
        samples = (rows or self.trained) * settings.num_train_epochs
        if settings.max_steps:
            samples = settings.max_steps * settings.tokens_per_step / tokens
        steps = max(1, samples * tokens / settings.tokens_per_step)
        times = 1 + steps // (settings.eval_steps or math.inf)
        if self.checked:  # in each epoch, as the teacher is expected to answer
            times = math.ceil(samples / max(1.0, self.trained))
        passes, answers = self.validated * times, self.checked * times
        flops = passes * (self.read + live) + samples * (self.step + live)
        seconds = START + self.machine.seconds(flops, self.config.student.dtype, "train")
        flops = answers * arithmetic.answer_flops(self.student, self.prompt, self.answer)
        seconds += self.machine.seconds(flops, self.config.student.dtype, "evaluate")
        text = f"{count(steps)} steps" + f", {count(answers)} answers checked" * bool(answers)
        return text, samples * tokens, seconds

    def refine(self) -> Effort:
        """Count the student's answers: own ones, of which up to `keep` train it again, and those on
        policy, which the teacher reads and the student learns from."""
        prompts, dtype = self.work.prompts["train"], self.config.student.dtype
        settings, mine, texts = self.config.on_policy, self.config.train.self_answers, list[str]()
        requests, tries, read = settings.rounds * min(settings.prompts, prompts), 0.0, 0.0
        tokens, seconds = 0.0, 3 * settings.rounds * START
        if mine:
            tries, rows = mine.rounds * mine.n * prompts, mine.keep * prompts
            steps, trained, took = self.train(self.trained + rows)
            tokens, read = mine.rounds * (trained or 0), rows * self.taught * self.config.captures
            seconds += mine.rounds * ((took or math.nan) + START)
            texts.append(f"{count(tries)} own answers, then up to {steps} from the base")
        if requests:
            texts.append(f"{settings.rounds} rounds, {count(requests)} answers of the student")
        for many, most in ((tries, self.own_tokens), (requests, settings.max_new_tokens)):
            flops = many * arithmetic.answer_flops(self.student, self.prompt, ANSWER * most)
            seconds += self.machine.seconds(flops, dtype, "evaluate")
            tokens += many * (self.prompt + ANSWER * most)
        seconds += self.machine.seconds(requests * (self.step + self.taught) + read, dtype, "train")
        return "; ".join(texts), tokens, seconds

    def evaluate(self) -> Effort:
        """Base and student answer prompts and suites, read the teacher's answers, are timed.

        A base that was not taught to be short writes more than the teacher.
        """
        config, items = self.config, self.work.prompts["heldout"]
        requests = [(items, self.prompt, (self.answer + ANSWER * answer_limit(config)) / 2)]
        for many, most in amounts(config.evaluation.suites):
            requests.append((UNREAD_ROWS if many is None else many, ITEM, ANSWER * most))
        text = f"{' + '.join(count(many) for many, *_ in requests)} items, two models"
        if tries := config.evaluation.tries:
            requests.append((tries.n * items / 2, *requests[0][1:]))  # of one model
            text += f", at most {count(tries.n * items)} tries"
        flops = sum(many * arithmetic.answer_flops(self.student, p, a) for many, p, a in requests)
        seconds = self.machine.seconds(2 * items * self.read, config.student.dtype, "train")
        seconds += self.machine.seconds(2 * flops, config.student.dtype, "evaluate")
        seconds += (2 + config.teacher.runs_here) * (START + TIMED[config.evaluation.timing])
        return text, 2 * sum(many * (p + a) for many, p, a in requests), seconds

    def memory(self) -> Iterator[StageMemory]:
        """Yield what each stage that computes here holds; merging takes main memory everywhere."""
        config, machine, settings = self.config, self.machine, self.config.train
        teacher, student, reader, kind = config.teacher, self.student, self.reader, machine.kind
        width = machine.width(config.student.dtype)
        room = machine.memory if machine.free is None else machine.free
        peaks = dict[str, Parts]()

        def answering(model: Shape, width: int, tokens: float, rows: int | None) -> Parts:
            weights = sum(arithmetic.answering_bytes(model, width, kind, 0, 0).values())
            cache = arithmetic.cache_bytes(model, width)
            row = arithmetic.row_bytes(cache, model.vocab, width, kind, tokens)
            fitting = arithmetic.fitting_rows(1e15 if room is None else room - weights, row, kind)
            most = min(fitting, max(1, int(self.work.all_prompts * teacher.n)))
            return arithmetic.answering_bytes(model, width, kind, rows or most, tokens)

        def highest(*sides: Parts) -> Parts:
            return max(sides, key=lambda parts: sum(parts.values()))

        if isinstance(teacher, LocalTeacher):
            tokens, rows = self.work.teacher.tokens + teacher.max_new_tokens, teacher.concurrency
            model = (shape_of(teacher.model), machine.width(teacher.dtype))
            peaks["generate"] = answering(*model, tokens, rows)
        live, soft = 0.0, settings.loss.soft
        if reader:
            shape, wide = shape_of(reader.model), machine.width(reader.dtype)
            how = (config.signals.method, bool(config.signals.temperatures))
            logits = arithmetic.capture_bytes(shape.vocab, wide, kind, *how)
            peaks["signals"] = arithmetic.reading_bytes(shape, wide, kind, logits)
            live = arithmetic.weight_bytes(shape, wide) if soft and not config.captures else 0.0
        training = LoraTraining(
            *(student, settings.lora.r, settings.lora.target_modules, kind, width),
            *(config.student.load_in_4bit, settings.gradient_checkpointing),
            towards="live" if live else "cached" if soft else "tokens",
            teacher=live,
            length=self.prompt + self.answer,
            dropout=settings.lora.dropout,
        )
        most = training.micro_batch(machine.memory or math.inf, settings.tokens_per_step)
        tokens = min(settings.micro_batch_tokens or most, settings.tokens_per_step)
        peaks["train"] = training.parts(tokens)
        peaks["merge"] = arithmetic.merging_bytes(student, self.stored_width(), self.adapter)
        if config.refines:
            tokens = self.prompt + max(config.on_policy.max_new_tokens, self.own_tokens)
            answers = answering(student, width, tokens, None)
            peaks["refine"] = highest(answers, peaks.get("signals", {}), peaks["train"])
        tokens = self.prompt + answer_limit(config)
        answers = answering(student, width, tokens, config.evaluation.concurrency)
        if self.checked:  # by the weights with the adapter merged, beside those that are trained
            copy = arithmetic.weight_bytes(student, width)
            peaks["train"] = highest(peaks["train"], {**answers, "weights in training": copy})
        read = arithmetic.reading_bytes(student, width, kind)
        # a teacher that is here is timed too
        peaks["evaluate"] = highest(peaks.get("generate", {}), answers, read)
        if not config.captures:
            peaks.pop("signals", None)
        places = {"merge": ("main memory", machine.main_memory)}
        if kind == "cuda" and (settings.num_processes or 1) > 1:
            place = "memory of each GPU, with all of the student (not FSDP2)"
            places["train"] = (place, room)
        for stage, parts in peaks.items():
            place, limit = places.get(stage, ("memory", room))
            yield StageMemory(stage=stage, parts=parts, room=limit, place=place)

    def stored_width(self) -> int:
        """Return the bytes of a weight in the student's files: two, but in folders that say so."""
        path = Path(self.config.student.model) / "config.json"
        facts = registry.read_object(path) if path.is_file() else {"dtype": "bfloat16"}
        return 2 if "16" in (facts.get("dtype") or facts.get("torch_dtype") or "float32") else 4

    def disk(self) -> dict[str, float]:
        """Return the bytes of what will be written, and of models that are not here yet."""
        from huggingface_hub import try_to_load_from_cache  # a third of a second to import

        config, teacher, fetched = self.config, self.config.teacher, 0.0
        for reference in {reference for reference, _, _ in registry.models_of(config)}:
            info, there = registry.lookup(reference), registry.is_folder(reference)
            if info and info.gguf:
                there = download.converted_folder(info.name, info.gguf).is_dir()
            elif not there:
                revision = info.revision if info else None
                cached = try_to_load_from_cache(reference, "config.json", revision=revision)
                there = isinstance(cached, str)
            fetched += 0 if there else 2 * shape_of(reference).parameters
        adapter, answers = 4.0 * self.adapter, self.work.all_prompts * teacher.n
        tokens = ANSWER * teacher.max_new_tokens * answers
        text = self.work.text_bytes + self.work.all_prompts * self.work.teacher.bytes
        trainings = 3 if config.prompts.select != "all" else 1
        merged = self.stored_width() * float(self.student.parameters)
        sizes = {
            "models to fetch": fetched,
            "run": STORED * (text + 4 * tokens) + 1e6,
            # a checkpoint holds the adapter, its two moments and the best one
            "checkpoints": (4 * config.train.save_total_limit + 1) * adapter * trainings,
            "merged": merged,
            "release": merged + adapter,
        }
        if config.captures:
            sizes["soft labels"] = RETAINED * tokens * expected_bytes(1, config.signals)
        return sizes

"""The look before anything is bought: whether all that a run will need is there and fits together.

`distill plan` shows what it finds, and `distill run` stops over it, as does a stage run alone that
asks, reads or trains: before a request is sent and before the first step. It takes seconds: of
models that are not here yet it fetches tokenizers and configs only.
"""

import os
import resource
from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from pathlib import Path

from distill.config.teachers import EndpointTeacher, LocalTeacher, Teacher
from distill.config.values import SAFE
from distill.corpus.prompts import PLAIN, QUESTION
from distill.errors import DistillError, Exit
from distill.models import loading, registry
from distill.models.devices import pick_dtype, unused_gpu
from distill.pipeline import LEARNING, NAMES, STAGES, checking
from distill.publishing.obligations import agreement_of, license_of, obligations
from distill.records import Prompt
from distill.responders.endpoint.network import trusted
from distill.responders.kinds import identity, make_responder
from distill.responders.prices import load_prices
from distill.responders.terms import require_terms
from distill.storage.files import read_records
from distill.storage.progress import say
from distill.storage.run_folder import Run, Stage
from distill.tasks.task import checkable, load_task
from distill.training.trial import ModelTrial, try_model

TRAINING = frozenset({"recipe", "train", "refine"})
READING = TRAINING | {"signals"}  # the teacher's distributions, if any
COSTLY = READING | {"generate", "evaluate"}  # in money or in time
FILES = 48  # beside connections: libraries, the store, the log


def require(run: Run, stages: Sequence[Stage] = STAGES, redo: Sequence[Stage] = ()) -> None:
    """Stop over all that would keep `stages`, or what follows a costly one, from being done.

    Raises the first problem, with the others as its notes. Where there is none, a server that shall
    tell distributions is asked for those of one short text (exit 4 where it does not).
    """
    look, config = Look(run, stages, redo), run.config
    look.attempt(look.at_programs)
    if look.ahead & COSTLY:
        look.at_all()
    if look.problems:
        raise together(list(look.problems.values()))
    if "signals" in look.now and (config.buys_signals or config.signals.from_answers):
        from distill.training.soft_labels import server_logprobs
        from distill.training.soft_labels.labels import open_teacher

        server_logprobs.probe(config, open_teacher(config)[0])
    if look.loads and (line := unused_gpu()):
        say(f"device: the CPU; {line}")


def together(problems: Sequence[DistillError]) -> DistillError:
    """Return several problems as one error: the first, with the others as its notes."""
    for other in problems[1:]:
        problems[0].add_note(str(other))
    return problems[0]


class Look:
    """What would keep stages of a run from being done: `problems`, each once, by its line.

    What depends on this machine and session (keys, devices, packages) is looked at for the stages
    that are done `now`, what depends on config and files for all that are left from there on,
    `ahead`, and files of models for those that are to be `present`: a stage that trains alone, on
    another machine perhaps, has no need of what answers before and after it. A stale stage is in
    none, as performing it says what differs.
    """

    def __init__(
        self,
        run: Run,
        stages: Sequence[Stage] = STAGES,
        redo: Sequence[Stage] = (),
        here: bool = True,
    ) -> None:
        self.run, self.config = run, run.config
        self.problems: dict[str, DistillError] = {}
        remaining = set[str]()
        for stage in (stage for stage in STAGES if stage.applies(run.config)):
            state = "fresh"
            with suppress(DistillError):  # of a file that is not there: its own check says so
                state = "fresh" if stage in redo else run.state(stage)[0]
            remaining |= set() if state in ("done", "stale") else {stage.name}
        now = remaining.intersection(stage.name for stage in stages)
        now |= remaining.intersection(LEARNING if "select" in now else ())
        first = min((NAMES.index(name) for name in now & COSTLY), default=len(NAMES))
        self.ahead = now | remaining.intersection(NAMES[first:])
        self.now = now if here else set[str]()
        self.present = self.ahead if self.now - TRAINING else self.now
        answers = bool(self.now & COSTLY) and run.config.teacher.runs_here
        self.loads = answers or bool(self.now & {*TRAINING, "evaluate"})  # a model, here and now

    def attempt(self, check: Callable[..., object], *values: object) -> bool:
        """Tell whether a check passes, and record the problem where it does not."""
        try:
            check(*values)
        except DistillError as error:
            self.problems.setdefault(str(error), error)
            return False
        return True

    def at_all(self) -> None:
        """Look at all that costly stages need."""
        self.attempt(self.at_terms)
        for place in (self.run.folder, self.config.store_folder()):
            self.attempt(require_writable, place)
        self.attempt(self.at_prices)
        for key, teacher in self.responders(self.now).items():
            if isinstance(teacher, EndpointTeacher):  # its key, and the price of its budget
                self.attempt(make_responder, teacher, self.config)
                self.attempt(trusted)
                self.attempt(require_files, key, teacher.concurrency)
        if self.config.train.self_answers and "refine" in self.ahead:
            self.attempt(self.at_checkers)
        self.at_models()
        self.at_devices()
        if "evaluate" in self.ahead:
            self.attempt(self.at_suites)
        if "recipe" in self.ahead:
            from distill.planning.search import require_search

            self.attempt(require_search, self.run, "generate" in self.ahead)
        for stage in STAGES:  # what pins it: its corpus, functions of the user's
            if stage.name in self.present:
                self.attempt(stage.identity, self.config)

    def responders(self, stages: Set[str]) -> dict[str, Teacher]:
        """Return who is asked or read in some stages, by the config's key."""
        config, roles = self.config, dict[str, Teacher]()
        if config.distributions and stages & READING:
            roles["signals"] = config.soft_teacher()
        if stages & {"generate", "evaluate"}:
            roles["teacher"] = config.teacher
        if config.evaluation.judge and "evaluate" in stages:
            roles["evaluation.judge"] = config.evaluation.judge
        return roles

    def at_programs(self) -> None:
        """Look whether programs that models wrote may run, where a task is checked by that."""
        from distill.evaluation.suites import tasks_of
        from distill.tasks.checkers import RUNS_CODE
        from distill.tasks.sandbox.programs import allowed

        if not self.now.intersection(checking(self.config)) or allowed() != "no":
            return
        for task in tasks_of(self.config.prompts.tasks, self.config.evaluation.suites):
            if task.checker and task.checker["kind"] in RUNS_CODE:
                what = "is checked by running the programs that models wrote"
                fix = "allow that with --allow-code, which runs them in a sandbox"
                raise DistillError(Exit.CONFIG, f"task {task.name}", what, fix)

    def at_checkers(self) -> None:
        """Look whether own answers can be judged: `generate` sees references of new prompts."""
        settings, path = self.config.prompts, self.run.path("prompts.jsonl")
        names = [*settings.tasks, *([QUESTION] if settings.questions else [])] or [PLAIN]
        tasks = {task.name: task for task in map(load_task, names)}
        there = path.exists() and "prompts" not in self.ahead
        prompts = read_records(path, Prompt) if there else []
        samples = [Prompt.make((), "", name, reference="" if prompts else "any") for name in tasks]
        checkable([*prompts, *samples], tasks.get, "train.self_answers")

    def at_terms(self) -> None:
        """Look whether the answers may train a student, and what its release then owes."""
        config, basis = self.config, self.config.terms.basis
        if config.distributions:
            self.attempt(require_terms, config.soft_teacher(), basis)
        owed = obligations(config.teacher, config.student.model, basis)[1]
        self.attempt(agreement_of, owed, config.terms.agreement)
        if not registry.is_folder(config.student.model):  # which cannot be published in any case
            self.attempt(license_of, config.student.model, config.publish.license, owed)

    def at_prices(self) -> None:
        """Look whether what shall be priced has a price."""
        settings = self.config.evaluation
        book = load_prices(settings.prices)
        for key, price, why_none in (
            ("teacher_price", book.teacher, book.why_no_teacher),
            ("machine", book.machine, book.why_no_machine),
        ):
            if (name := getattr(settings, key)) and price(name) is None:
                fix = "name one of configs/prices.yaml, or add its row to evaluation.prices"
                error = DistillError(Exit.CONFIG, f"evaluation.{key}", why_none(name), fix)
                self.problems.setdefault(str(error), error)

    def at_models(self) -> None:
        """Look whether models are what their folders say, and their tokenizers and templates of
        use; none is opened without limits before it was tried with them."""
        config, student = self.config, self.config.student

        def look(key: str, trial: ModelTrial) -> None:
            for note in try_model(trial):
                say(f"{key}: {note}")
            loading.check_model(trial.reference, trial.trust)

        facts = (student.model, student.revision, student.trust, config.template_date)
        targets = config.train.lora.target_modules if self.ahead & TRAINING else "all-linear"
        how = (targets, student.chat_template_kwargs, config.reasoning)
        sound = self.attempt(look, "student", ModelTrial(*facts, *how))
        for key, teacher in self.responders(self.present | self.ahead & READING).items():
            self.attempt(identity, teacher, self.config.engines)
            if isinstance(teacher, LocalTeacher):
                facts = (teacher.model, teacher.revision, SAFE, config.template_date)
                trial = ModelTrial(*facts, template=teacher.chat_template_kwargs)
                sound &= self.attempt(look, key, trial)
        if sound and config.distributions and self.ahead & READING:
            from distill.training.soft_labels.labels import open_teacher

            self.attempt(open_teacher, config)

    def at_devices(self) -> None:
        """Look whether this machine has what trains the student, and computes in its types."""
        config, train = self.config, self.config.train
        if self.now & TRAINING:
            from distill.training import processes

            self.attempt(processes.check, train.report_to, train.num_processes)
            if config.student.load_in_4bit:
                self.attempt(loading.require_4bit)
        types = dict[str, str]()
        if self.loads:
            types["student.dtype"] = config.student.dtype
            types["train.bf16"] = "bfloat16" if train.bf16 is True else "auto"
        for key, teacher in self.responders(self.now).items():
            if isinstance(teacher, LocalTeacher):
                types[f"{key}.dtype"] = teacher.dtype
        for key, dtype in types.items():
            if dtype != "auto":  # which asks torch, and always can
                self.attempt(pick_dtype, dtype, key)

    def at_suites(self) -> None:
        """Look whether the questions of the evaluation can be read, those of the Hub apart."""
        from distill.evaluation.suites import load_suites, read_suite

        names = self.config.evaluation.suites
        load_suites([n for n in names if all(e.data.path for e in read_suite(n)[0].tasks)])


def require_writable(place: Path) -> None:
    """Stop (exit 5) where a folder cannot be written, or made."""
    path = place.absolute()
    nearest = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        what = "cannot be written" if nearest.is_dir() else "is no folder"
        raise DistillError(Exit.STATE, nearest, what, "name another place: runs=DIR, store=DIR")


def require_files(key: str, connections: int) -> None:
    """Raise this process's limit of open files where that is allowed; DistillError (exit 2)."""
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = connections + FILES
    if soft == resource.RLIM_INFINITY or soft >= need:
        return
    if most != resource.RLIM_INFINITY and most < need:
        what = f"{connections} connections need {need} open files, and {most} are allowed"
        fix = f"ulimit -n {need}, or {key}.concurrency={max(1, most - FILES)}"
        raise DistillError(Exit.CONFIG, f"{key}.concurrency", what, fix)
    resource.setrlimit(resource.RLIMIT_NOFILE, (need, most))

"""The look before anything is bought: whether all that a run will need is there and fits together.

`distill plan` shows what it finds, and `distill run` stops over it, as does a stage run alone that
asks, reads or trains: before a request is sent and before the first step. All problems are listed,
a line each. It takes seconds: of models that are not here yet it fetches tokenizers and configs
only, and it builds the student without weights.

A check yields what is to be tried, or raises its problem itself. What depends on config and files
is held for every stage that is left; what depends on this machine and session (keys, devices,
packages) for the stages that are performed now.
"""

import os
import resource
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from distill.config.teachers import EndpointTeacher, LocalTeacher, Teacher
from distill.config.values import SAFE
from distill.errors import DistillError, Exit
from distill.models import loading, registry
from distill.models.devices import pick_dtype
from distill.models.gpus import unused_gpu
from distill.pipeline import CHECKING, NAMES, STAGES
from distill.publishing.obligations import agreement_of, license_of, obligations
from distill.responders.endpoint.network import trusted
from distill.responders.kinds import identity, make_responder
from distill.responders.prices import load_prices
from distill.responders.terms import require_terms
from distill.storage.progress import say
from distill.storage.run_folder import Run, Stage
from distill.training.trial import try_model

COSTLY = frozenset({"generate", "signals", "train", "refine", "evaluate"})  # in money or in time
ASKING = frozenset({"generate", "evaluate"})
READING = frozenset({"signals", "train", "refine"})  # the teacher's distributions, if any
TRAINING = frozenset({"train", "refine"})
FILES = 48  # beside connections: libraries, the store, the log


class Look(NamedTuple):
    """What is looked at: a run, its stages that are done `now`, and all that are left from there
    on, `ahead`."""

    run: Run
    now: frozenset[str]
    ahead: frozenset[str]

    @property
    def present(self) -> frozenset[str]:
        """Return the stages whose files are to be here: one that trains alone, on another machine
        perhaps, has no need of what answers before and after it."""
        return self.ahead if self.now - TRAINING else self.now

    def responders(self, stages: frozenset[str]) -> dict[str, Teacher]:
        """Return who is asked or read in some stages, by the config's key."""
        config, roles = self.run.config, dict[str, Teacher]()
        if config.distributions and stages & READING:
            roles["signals"] = config.soft_teacher()
        if stages & ASKING:
            roles["teacher"] = config.teacher
        if config.evaluation.judge and "evaluate" in stages:
            roles["evaluation.judge"] = config.evaluation.judge
        return roles


Try = Callable[[], object]
LookCheck = Callable[[Look], Iterator[Try]]


def require(run: Run, stages: Sequence[Stage] = STAGES, redo: Sequence[Stage] = ()) -> None:
    """Stop over all that would keep `stages`, or what follows a costly one, from being done.

    Raises the first problem, with its exit code and the others as its notes. Where there is none, a
    server that shall tell distributions is asked for those of one short text (exit 4 where it does
    not).
    """
    look = look_at(run, stages, redo)
    if found := problems(look, CHECKS if look.ahead & COSTLY else CHECKS[:1]):
        raise together(found)
    config = run.config
    if "signals" in look.now and (config.buys_signals or config.signals.from_answers):
        from distill.training.soft_labels import server_logprobs
        from distill.training.soft_labels.labels import open_teacher

        server_logprobs.probe(config, open_teacher(config)[0])
    loads = look.now & {*TRAINING, "evaluate"} or (look.now & COSTLY and config.teacher.runs_here)
    if loads and (line := unused_gpu()):
        say(f"device: the CPU; {line}")


def foreseen(run: Run, here: bool) -> list[DistillError]:
    """Return what would stop a run, of this machine only where it is planned for `here`."""
    look = look_at(run)
    checks = [check for check in CHECKS if check is not check_programs]  # which a flag allows
    return problems(look if here else look._replace(now=frozenset()), checks)


def together(found: Sequence[DistillError]) -> DistillError:
    """Return several problems as one error: the first, with the others as its notes."""
    for other in found[1:]:
        found[0].add_note(str(other))
    return found[0]


def look_at(run: Run, stages: Sequence[Stage] = STAGES, redo: Sequence[Stage] = ()) -> Look:
    """Return what is left of a run; a stale stage is none, as performing it says what differs."""
    left = set[str]()
    for stage in (stage for stage in STAGES if stage.applies(run.config)):
        try:
            state = "fresh" if stage in redo else run.state(stage)[0]
        except DistillError:  # of a file that is not there: its own check says so
            state = "fresh"
        left |= set() if state in ("done", "stale") else {stage.name}
    now = left.intersection(stage.name for stage in stages)
    first = min((NAMES.index(name) for name in now & COSTLY), default=len(NAMES))
    return Look(run, frozenset(now), frozenset(now | left.intersection(NAMES[first:])))


def problems(look: Look, checks: Sequence[LookCheck]) -> list[DistillError]:
    """Return what the checks find, in their order, each once."""
    found = dict[str, DistillError]()
    for check in checks:
        attempts = check(look)
        while True:
            try:
                if (attempt := next(attempts, None)) is None:
                    break
                attempt()
            except DistillError as error:
                found.setdefault(str(error), error)
    return list(found.values())


def check_programs(look: Look) -> Iterator[Try]:
    """Look whether programs that models wrote may run, where a task is checked by that."""
    from distill.evaluation.suites import tasks_of
    from distill.tasks.checkers import RUNS_CODE
    from distill.tasks.sandbox.programs import allowed

    if not look.now.intersection(CHECKING) or allowed() != "no":
        return
    for task in tasks_of(look.run.config.prompts.tasks, look.run.config.evaluation.suites):
        if task.checker and task.checker["kind"] in RUNS_CODE:
            what = "is checked by running the programs that models wrote"
            fix = "allow that with --allow-code, which runs them in a sandbox"
            raise DistillError(Exit.CONFIG, f"task {task.name}", what, fix)
    yield from ()


def check_places(look: Look) -> Iterator[Try]:
    """Look whether the run's folder and the shared store can be written."""

    def require_writable(place: Path) -> None:
        path = place.absolute()
        nearest = next(p for p in (path, *path.parents) if os.path.lexists(p))
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            what = "cannot be written" if nearest.is_dir() else "is no folder"
            fix = "name another place: runs=DIR, store=DIR"
            raise DistillError(Exit.STATE, nearest, what, fix)

    yield partial(require_writable, look.run.folder)
    yield partial(require_writable, look.run.config.store_folder())


def check_terms(look: Look) -> Iterator[Try]:
    """Look whether the terms let the answers train a student, and what its release then owes."""
    config, basis = look.run.config, look.run.config.terms.basis
    yield partial(require_terms, config.teacher, basis)
    if config.distributions:
        yield partial(require_terms, config.soft_teacher(), basis)
    owed = obligations(config.teacher, config.student.model, basis)[1]
    yield partial(agreement_of, owed, config.terms.agreement)
    if not registry.is_folder(config.student.model):  # which cannot be published in any case
        yield partial(license_of, config.student.model, config.publish.license, owed)


def check_money(look: Look) -> Iterator[Try]:
    """Look whether what shall be priced has a price, and whether a budget can be kept."""
    settings = look.run.config.evaluation
    book, model, machine = load_prices(settings.prices), settings.teacher_price, settings.machine

    def require_price(key: str, found: object, why: str) -> None:
        if found is None:
            fix = "name one of configs/prices.yaml, or add its row to evaluation.prices"
            raise DistillError(Exit.CONFIG, f"evaluation.{key}", why, fix)

    if model:
        yield partial(
            require_price, "teacher_price", book.teacher(model), book.why_no_teacher(model)
        )
    if machine:
        yield partial(require_price, "machine", book.machine(machine), book.why_no_machine(machine))


def check_servers(look: Look) -> Iterator[Try]:
    """Look whether each server that is asked now has its key, and its budget a price, whether what
    shall vouch for it can be read, and whether there are files enough for its connections."""
    for key, teacher in look.responders(look.now).items():
        if isinstance(teacher, EndpointTeacher):
            yield partial(make_responder, teacher, look.run.config)
            yield trusted
            yield partial(require_files, key, teacher.concurrency)


def require_files(key: str, connections: int) -> None:
    """Raise this process's limit of open files where that is allowed; DistillError (exit 2)."""
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = connections + FILES
    if soft != resource.RLIM_INFINITY and soft < need:
        if most != resource.RLIM_INFINITY and most < need:
            what = f"{connections} connections need {need} open files, and {most} are allowed"
            fix = f"ulimit -n {need}, or {key}.concurrency={max(1, most - FILES)}"
            raise DistillError(Exit.CONFIG, f"{key}.concurrency", what, fix)
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, most))


def check_models(look: Look) -> Iterator[Try]:
    """Look whether models are what their folders say, and their tokenizers and templates of use."""
    config, student = look.run.config, look.run.config.student
    own = (student.model, student.revision, student.trust, config.template_date, config.train.lora)
    own += (student.chat_template_kwargs, config.reasoning)
    models: dict[str, tuple[Any, ...]] = {"student": own}
    responders = look.responders(look.present | look.ahead & READING)
    for key, teacher in responders.items():
        if isinstance(teacher, LocalTeacher):
            models[key] = (teacher.model, teacher.revision, SAFE, config.template_date)
            models[key] += (None, teacher.chat_template_kwargs)
    untried = set(models)

    def attempt(key: str) -> None:
        for note in try_model(*models[key]):
            say(f"{key}: {note}")
        untried.remove(key)

    yield from (partial(attempt, key) for key in models)
    if untried:  # then nothing of theirs is opened without limits
        return
    yield partial(loading.check_model, student.model, student.trust)
    for teacher in responders.values():
        yield partial(identity, teacher)
        if isinstance(teacher, LocalTeacher):
            yield partial(loading.check_model, teacher.model)
    if config.distributions and look.ahead & READING:
        from distill.training.soft_labels.labels import open_teacher

        yield partial(open_teacher, config)


def check_training(look: Look) -> Iterator[Try]:
    """Look whether what trains the student is here."""
    config, train = look.run.config, look.run.config.train
    if look.now & TRAINING:
        from distill.training import processes

        yield partial(processes.check, train.report_to, train.num_processes)
        if config.student.load_in_4bit:
            yield loading.require_4bit
    types = dict[str, str]()  # can this machine compute in the types that are stated?
    if look.now & {*TRAINING, "evaluate"} or (look.now & COSTLY and config.teacher.runs_here):
        types["student.dtype"] = config.student.dtype
        types["train.bf16"] = "bfloat16" if train.bf16 is True else "auto"
    for key, teacher in look.responders(look.now).items():
        if isinstance(teacher, LocalTeacher):
            types[f"{key}.dtype"] = teacher.dtype
    for key, dtype in types.items():
        if dtype != "auto":  # which asks torch, and always can
            yield partial(pick_dtype, dtype, key)


def check_suites(look: Look) -> Iterator[Try]:
    """Look whether the questions of the evaluation can be read, those of the Hub apart."""
    if "evaluate" in look.ahead:
        from distill.evaluation.suites import load_suites, read_suite

        names = look.run.config.evaluation.suites
        suites = [(name, read_suite(name)[0]) for name in names]
        local = [name for name, suite in suites if all(e.data.path for e in suite.tasks)]
        yield partial(load_suites, local)


def check_inputs(look: Look) -> Iterator[Try]:
    """Look whether what pins each stage can be read: its corpus, its functions of the user's."""
    yield from (partial(s.identity, look.run.config) for s in STAGES if s.name in look.present)


CHECKS: tuple[LookCheck, ...] = (  # the first is for every stage, the others for costly ones
    *(check_programs, check_terms, check_places, check_money, check_servers),
    *(check_models, check_training, check_suites, check_inputs),
)

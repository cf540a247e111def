"""The stages in their order: what each reads and writes, and how what is left of them is performed.

The work is imported when a stage runs, so `plan` and `status` never load torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

from distill.callables import source_hash
from distill.config.learning import Signals, Student
from distill.config.teachers import TEACHERS, EndpointTeacher, Teacher
from distill.config.tree import Evaluation
from distill.config.yaml_file import parse_config, place_of
from distill.errors import DistillError, Exit
from distill.models import registry
from distill.models.devices import free_frames, release_memory
from distill.storage.files import as_json, sha256_file, write_atomic
from distill.storage.progress import say
from distill.storage.run_folder import Run, Stage

CHECKING = ("filter", "evaluate")  # the stages that check answers


def _lazy(path: str) -> Callable[..., Any]:
    """Return a function of a module, imported at its first call."""
    module, _, name = path.rpartition(".")
    return lambda *values, **options: getattr(import_module(module), name)(*values, **options)


def reader_identity(teacher: Teacher) -> dict[str, str]:
    """Return what pins the teacher whose distributions are captured."""
    facts = _lazy("distill.responders.kinds.identity")(teacher)
    return {"teacher": facts["endpoint"]} if isinstance(teacher, EndpointTeacher) else facts


def capture_identity(teacher: Teacher, student: Student, tokenizer: str | None) -> dict[str, str]:
    """Return what pins a teacher's distributions, and the tokens that they are over."""
    served = tokenizer if not teacher.runs_here else None
    facts = registry.folder_facts("tokenizer", served) if served else {}
    return {**reader_identity(teacher), **student_facts(student), **facts}


def student_facts(student: Student) -> dict[str, str]:
    """Return what a student in a folder is; a pinned one is known by its name and revision."""
    return registry.folder_facts("student", student.model)


def evaluation_identity(
    settings: Evaluation, tasks: Sequence[str], student: Student, teacher: Teacher
) -> dict[str, str]:
    """Return the hashes of the suites, and of the models in folders that answer them or judge."""
    from distill.evaluation.suites import suite_hashes

    facts = {
        **suite_hashes(settings.suites),
        **student_facts(student),
        **checker_identity(tasks, settings.suites),
    }
    for role, responder in (("teacher", teacher), ("judge", settings.judge)):
        if responder and responder.runs_here:
            facts |= registry.folder_facts(role, responder.model)
    return facts


def checker_identity(tasks: Sequence[str], suites: Sequence[str] = ()) -> dict[str, str]:
    """Return the hashes of the checkers that are functions of the user's.

    Raises DistillError (exit 2) where this process was not given one that a task names.
    """
    from distill.evaluation.suites import tasks_of
    from distill.tasks.checkers import KINDS
    from distill.tasks.task import task_path

    # A file that is gone is a difference of the stage `prompts`, and no error here.
    there = [name for name in tasks if task_path(name).is_file()]
    used = {task.checker["kind"] for task in tasks_of(there, suites) if task.checker}
    return {f"checker {kind}": source_hash("checker", kind) for kind in sorted(used - KINDS.keys())}


STUDENT = ("adapter/adapter_model.safetensors", "refined/adapter/adapter_model.safetensors")
DATASET = tuple(f"dataset/{split}.jsonl" for split in ("train", "validation", "heldout"))
# What shapes answers; an endpoint's address is in its identity, and a budget or a timeout may
# change at any time.
TEACHER_KEYS = tuple(
    dict.fromkeys(
        f"teacher.{key}" for kind in TEACHERS for key in (*Teacher.model_fields, *kind.shaping)
    )
)

# What only the report reads: at another price, nothing is measured again.
MONEY = ("machine", "prices", "utilisation", "requests_per_month", "teacher_price")
MEASURED = tuple(f"evaluation.{key}" for key in Evaluation.model_fields if key not in MONEY)

# What shapes distributions; of the training only how long its samples may be. A server is in the
# identity.
SIGNAL_KEYS = (
    *(f"signals.{key}" for key in Signals.model_fields if key != "endpoint"),
    *("teacher.kind", "teacher.model", "teacher.revision", "teacher.dtype"),
    *("teacher.chat_template_kwargs", "student.chat_template_kwargs"),
    *("student.model", "student.revision", "train.max_length", "template_date"),
)

STAGES: tuple[Stage, ...] = (
    Stage(
        "corpus",
        ("corpus", "seed"),
        (),
        ("documents.jsonl", "rejects.jsonl"),
        _lazy("distill.corpus.corpus.main"),
        lambda c: _lazy("distill.corpus.corpus.identity")(c.corpus),
        purpose="read, clean, deduplicate and split the documents",
    ),
    Stage(
        "prompts",
        ("prompts",),
        ("documents.jsonl",),
        ("prompts.jsonl", "tasks.json"),
        _lazy("distill.corpus.prompts.main"),
        lambda c: _lazy("distill.corpus.prompts.identity")(c.prompts.tasks),
        purpose="make the prompts of each task",
    ),
    Stage(
        "generate",
        (*TEACHER_KEYS, "prompts.questions", "template_date"),
        ("documents.jsonl", "prompts.jsonl"),
        ("responses.jsonl", "questions.jsonl"),
        _lazy("distill.generation.generate.main"),
        lambda c: _lazy("distill.responders.kinds.identity")(c.teacher),
        purpose="ask the teacher what the store lacks",
        smaller="lower teacher.max_batch_size",
    ),
    Stage(
        "filter",
        ("filters",),
        ("documents.jsonl", "prompts.jsonl", "questions.jsonl", "responses.jsonl"),
        (*DATASET, "dropped.jsonl", "funnel.json"),
        _lazy("distill.generation.filters.main"),
        lambda c: {
            **_lazy("distill.generation.filters.identity")(c.filters, c.reasoning),
            **checker_identity(c.prompts.tasks),
        },
        purpose="choose the answers that are trained on, with reasons",
    ),
    Stage(
        "signals",
        SIGNAL_KEYS,
        DATASET[:2],
        ("signals.json",),
        _lazy("distill.training.soft_labels.capture.main"),
        lambda c: capture_identity(c.soft_teacher(), c.student, c.signals.tokenizer),
        purpose="keep the teacher's distributions over the answers, for losses that need them",
        applies=lambda config: config.captures,
    ),
    Stage(
        "train",
        ("student", "train", "seed", "template_date"),
        (*DATASET[:2], "signals.json"),
        ("checkpoints", "adapter", "training.json", "merged"),
        _lazy("distill.training.train.main"),
        lambda c: {  # and the teacher that training reads itself
            **student_facts(c.student),
            **(reader_identity(c.soft_teacher()) if c.train.loss.soft and not c.captures else {}),
        },
        purpose="train the student's adapter",
        smaller="lower train.micro_batch_tokens, or set train.gradient_checkpointing: true",
        compares=("student", "teacher"),
    ),
    Stage(
        "refine",
        (
            *("on_policy", "student", "train", "seed", "template_date", "signals"),
            *("teacher.kind", "teacher.model", "teacher.revision", "teacher.dtype"),
            "teacher.chat_template_kwargs",
        ),
        (*DATASET[:2], "dropped.jsonl", "adapter/adapter_model.safetensors"),
        ("refined",),
        _lazy("distill.training.soft_labels.on_policy.main"),
        lambda c: capture_identity(c.soft_teacher(), c.student, c.signals.tokenizer),
        purpose="let the student answer, and train it towards the teacher's distributions there",
        smaller="lower train.micro_batch_tokens, or set train.gradient_checkpointing: true",
        applies=lambda config: config.on_policy.rounds > 0,
    ),
    Stage(
        "evaluate",
        (*MEASURED, "teacher.max_new_tokens"),
        ("dataset/heldout.jsonl", *STUDENT),
        ("answers", "scores", "timings", "requests.jsonl", "evaluation.json"),
        _lazy("distill.evaluation.evaluate.main"),
        lambda c: evaluation_identity(c.evaluation, c.prompts.tasks, c.student, c.teacher),
        purpose="compare student, base and teacher on held-out items",
        smaller="lower evaluation.max_batch_size",
    ),
    Stage(
        "report",
        tuple(f"evaluation.{key}" for key in MONEY),
        (
            *("evaluation.json", "requests.jsonl", "training.json"),
            *("refined/training.json", "funnel.json"),
        ),
        ("prices.json", "scorecard.json", "scorecard.md", "report.html"),
        _lazy("distill.report.report.main"),
        purpose="write the scorecard and the report",
    ),
)
NAMES = tuple(stage.name for stage in STAGES)


def from_stage(name: str) -> tuple[Stage, ...]:
    """Return the stage of that name and all that follow; raises DistillError (exit 2)."""
    if name not in NAMES:
        fix = f"one of {', '.join(NAMES)}"
        raise DistillError(Exit.CONFIG, f"--redo {name}", "no such stage", fix)
    return STAGES[NAMES.index(name) :]


def perform(
    run: Run, stages: Sequence[Stage], redo: Sequence[Stage] = (), allow_inexact: bool = False
) -> None:
    """Do what is left of `stages` under the run's lock, once none of them has other settings.

    `allow_inexact` lets a training resume under other data or libraries, which the card says.
    """
    with run.lock():
        for stage in stages:
            if stage not in redo and stage.applies(run.config):
                run.checked_state(stage)
        path = run.path("config.json")
        text = as_json({**run.config.resolved(), **place_of(run.folder)})
        parse_config(text, path)  # what could not be read again is not written
        run.remake(redo)
        write_atomic(path, text)
        run.note("config_sha256", sha256_file(run.path("config.json")))
        for stage in stages:
            if not stage.applies(run.config):
                say(f"{stage.name}: not needed by this config")
                continue
            require_inputs(run, stage)
            inexact = allow_inexact and stage.name == "train"
            work = partial(stage.main, allow_inexact=True) if inexact else stage.main
            try:
                did = run.perform(replace(stage, main=work))
            except BaseException as error:
                free_frames(error)
                raise
            if did and stage.name in CHECKING:  # whether it could run programs, and how
                allowed = _lazy("distill.tasks.sandbox.programs.allowed")()
                run.note("programs", {**run.manifest().get("programs", {}), stage.name: allowed})
            if did:
                release_memory()  # of its models, for those of the next stage
            say(f"{stage.name}: {'done' if did else 'done before, reused'}")


def require_inputs(run: Run, stage: Stage) -> None:
    """Stop where a file that the stage reads is missing, and name the command that makes it."""
    for missing in (name for name in stage.inputs if not run.path(name).exists()):
        maker = next(s for s in STAGES if any(missing.startswith(name) for name in s.outputs))
        if maker.applies(run.config):
            fix = f"make it: distill {maker.name} CONFIG"
            raise DistillError(Exit.STATE, run.path(missing), "is missing", fix)

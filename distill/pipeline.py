"""The stages in their order, and how what is left is performed; their work is imported late."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

from distill.callables import source_hash
from distill.config.learning import Signals, Train
from distill.config.teachers import TEACHERS, EndpointTeacher, Teacher
from distill.config.tree import Config, Evaluation
from distill.config.yaml_file import load_config, place_of, with_values
from distill.errors import DistillError, Exit
from distill.models import registry
from distill.models.devices import free_frames, release_memory
from distill.storage.files import as_json, sha256_file, write_atomic
from distill.storage.progress import say
from distill.storage.run_folder import Run, Stage, flatten, require_made
from distill.tasks.scoring import answer_limit

# The stages that may check answers
CHECKING = ("select", "filter", "recipe", "train", "refine", "evaluate")
LEARNING = ("generate", "filter", "signals", "train")  # those that a tranche goes through too


def _lazy(path: str) -> Callable[..., Any]:
    """Return a function of a module, imported at its first call."""
    module, _, name = path.rpartition(".")
    return lambda *values, **options: getattr(import_module(module), name)(*values, **options)


def capture_identity(config: Config) -> dict[str, str]:
    """Return what pins the distributions of a teacher, and the tokens that they are over."""
    teacher, student, served = config.soft_teacher(), config.student, config.signals.tokenizer
    facts = _lazy("distill.responders.kinds.identity")(teacher, config.engines)
    facts.pop("engine", None)  # its distributions are read here, whatever answers
    if isinstance(teacher, EndpointTeacher):
        facts = {"teacher": facts["endpoint"]}
    if served and not teacher.runs_here:
        facts |= registry.folder_facts("tokenizer", served)
    return {**facts, **registry.folder_facts("student", student.model)}


def train_identity(config: Config) -> dict[str, str]:
    """Return what a student in a folder is, the teacher that training reads itself, and by what
    validation answers are checked."""
    facts = checking_identity(config)
    if config.train.loss.soft and not config.captures:
        return {**capture_identity(config), **facts}
    return {**registry.folder_facts("student", config.student.model), **facts}


def checking(config: Config) -> set[str]:
    """Return the stages that check answers."""
    idle = set() if config.train.metric_for_best_model == "checker" else {"train"}
    return {*CHECKING} - idle - (set() if config.train.self_answers else {"refine"})


def checking_identity(config: Config) -> dict[str, str]:
    """Return what shapes the checks of validation answers, where they choose the checkpoint."""
    if config.train.metric_for_best_model != "checker":
        return {}
    limit = {"tokens of a validation answer": f"{answer_limit(config)}"}
    return {**checker_identity(config.prompts.tasks), **limit}


def filter_identity(config: Config) -> dict[str, str]:
    """Return what judges answers: the table of refusals, the user's filters and checkers."""
    facts = _lazy("distill.generation.filters.identity")(config.filters, config.reasoning)
    return {**facts, **checker_identity(config.prompts.tasks)}


def refine_identity(config: Config) -> dict[str, object]:
    """Return what reads the student's answers and, where they become rows, what filters them."""
    facts = {**capture_identity(config), **checking_identity(config)}
    if not config.train.self_answers:
        return {**facts}
    return {**facts, **filter_identity(config), **flatten(config.resolved()["filters"], "filters")}


def evaluation_identity(config: Config) -> dict[str, str]:
    """Return the hashes of the suites, and of the models in folders that answer them or judge."""
    from distill.evaluation.suites import suite_hashes

    suites = config.evaluation.suites
    facts = {**suite_hashes(suites), **checker_identity(config.prompts.tasks, suites)}
    facts |= registry.folder_facts("student", config.student.model)
    facts |= _lazy("distill.responders.engines.engine_facts")(
        config.evaluation.engine, config.engines
    )
    for role, responder in (("teacher", config.teacher), ("judge", config.evaluation.judge)):
        if responder and responder.runs_here:
            facts |= registry.folder_facts(role, responder.model)
    return facts


def checker_identity(tasks: Sequence[str], suites: Sequence[str] = ()) -> dict[str, str]:
    """Return the hashes of checkers that are the user's functions; raises DistillError (exit 2)."""
    from distill.evaluation.suites import tasks_of
    from distill.tasks.checkers import KINDS
    from distill.tasks.task import task_path

    # A file that is gone is a difference of the stage `prompts`, and no error here.
    there = [name for name in tasks if task_path(name).is_file()]
    used = {task.checker["kind"] for task in tasks_of(there, suites) if task.checker}
    return {f"checker {kind}": source_hash("checker", kind) for kind in sorted(used - KINDS.keys())}


CHECKED = "validation_prompts.jsonl"  # where a checker chooses the checkpoint
STUDENT = ("adapter/adapter_model.safetensors", "refined/adapter/adapter_model.safetensors")
DATASET = tuple(f"dataset/{split}.jsonl" for split in ("train", "validation", "heldout"))
# What shapes answers; an endpoint's address is in its identity, and a budget or a timeout may
# change at any time.
TEACHER_KEYS = tuple(
    dict.fromkeys(
        f"teacher.{key}" for kind in TEACHERS for key in (*Teacher.model_fields, *kind.shaping)
    )
)

# Where it is `checker`, the teacher is not asked all of validation
METRIC = "train.metric_for_best_model"

# What only the report reads: at another price, nothing is measured again.
MONEY = ("machine", "prices", "utilisation", "requests_per_month", "teacher_price")
MEASURED = tuple(f"evaluation.{key}" for key in Evaluation.model_fields if key not in MONEY)

# What shapes distributions; of the training only how long its samples may be
READER_KEYS = tuple(
    f"teacher.{key}" for key in ("kind", "model", "revision", "dtype", "chat_template_kwargs")
)
SIGNAL_KEYS = (
    *(f"signals.{key}" for key in Signals.model_fields if key != "endpoint"),
    *(*READER_KEYS, "student.model", "student.revision", "student.chat_template_kwargs"),
    *("train.max_length", "template_date"),
)
TRAIN_KEYS = tuple(f"train.{key}" for key in Train.model_fields if key != "self_answers")
SEARCH_KEYS = ("recipe.mode", "recipe.hours", "recipe.seeds")
MORE_MEMORY = "lower train.micro_batch_tokens, or set train.gradient_checkpointing: true"

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
        "select",
        (
            *(*TEACHER_KEYS, *SIGNAL_KEYS, "prompts", "filters", "student", "train", "seed"),
            "evaluation.max_new_tokens",
        ),
        ("documents.jsonl", "prompts.jsonl", "tasks.json"),
        ("selected.jsonl", "tranches"),
        _lazy("distill.training.selection.main"),
        lambda c: {
            key: value
            for stage in STAGES
            if stage.name in LEARNING and stage.applies(c)
            for key, value in stage.identity(c).items()
        },
        purpose="choose the prompts that a student of the first answers fails",
        smaller=MORE_MEMORY,
        applies=lambda config: config.prompts.select != "all",
    ),
    Stage(
        "generate",
        (*TEACHER_KEYS, "prompts.questions", "template_date", METRIC),
        ("documents.jsonl", "prompts.jsonl", "selected.jsonl"),
        ("responses.jsonl", "questions.jsonl"),
        _lazy("distill.generation.generate.main"),
        lambda c: _lazy("distill.responders.kinds.identity")(c.teacher, c.engines),
        purpose="ask the teacher what the store lacks",
        smaller="lower teacher.concurrency",
    ),
    Stage(
        "filter",
        ("filters", METRIC),
        ("documents.jsonl", "prompts.jsonl", "questions.jsonl", "responses.jsonl"),
        (*DATASET, "dropped.jsonl", "funnel.json", CHECKED),
        _lazy("distill.generation.filters.main"),
        filter_identity,
        purpose="choose the answers that are trained on, with reasons",
    ),
    Stage(
        "signals",
        SIGNAL_KEYS,
        DATASET[:2],
        ("signals.json",),
        _lazy("distill.training.soft_labels.capture.main"),
        capture_identity,
        purpose="keep the teacher's distributions over the answers, for losses that need them",
        applies=lambda config: config.captures,
    ),
    Stage(
        "recipe",
        (*SEARCH_KEYS, "student", *TRAIN_KEYS, "seed", "template_date"),
        ("documents.jsonl", *DATASET[:2], "signals.json", CHECKED),
        ("recipe", "recipe.json", "chosen.yaml", "recipe.md", "recipe.html"),
        _lazy("distill.recipe.main"),
        lambda c: {**train_identity(c), "losses of the trials": " ".join(c.arms)},
        purpose="try settings of the training by what the student's answers score, and show them",
        smaller=MORE_MEMORY,
        applies=lambda config: config.recipe.mode == "auto",
        compares=("student", "teacher"),
    ),
    Stage(
        "train",
        ("student", *TRAIN_KEYS, "recipe.mode", "seed", "template_date"),
        (*DATASET[:2], "signals.json", CHECKED, "recipe.json"),
        ("checkpoints", "adapter", "training.json", "training_checks.jsonl", "merged"),
        _lazy("distill.training.train.main"),
        train_identity,
        purpose="train the student's adapter",
        smaller=MORE_MEMORY,
        compares=("student", "teacher"),
    ),
    Stage(
        "refine",
        ("on_policy", "student", "train", "seed", "template_date", "signals", *READER_KEYS),
        (*DATASET[:2], "dropped.jsonl", "adapter/adapter_model.safetensors", CHECKED),
        ("refined",),
        _lazy("distill.training.soft_labels.on_policy.main"),
        refine_identity,
        purpose="let the student answer, and train it on what is right, or as the teacher reads it",
        smaller=MORE_MEMORY,
        applies=lambda config: config.refines,
    ),
    Stage(
        "evaluate",
        (*MEASURED, "teacher.max_new_tokens"),
        ("dataset/heldout.jsonl", *STUDENT, "recipe.json"),
        ("answers", "scores", "timings", "requests.jsonl", "evaluation.json"),
        _lazy("distill.evaluation.evaluate.main"),
        evaluation_identity,
        purpose="compare student, base and teacher on held-out items",
        smaller="lower evaluation.concurrency",
    ),
    Stage(
        "report",
        tuple(f"evaluation.{key}" for key in MONEY),
        (
            "evaluation.json",
            "requests.jsonl",
            "training.json",
            "refined/training.json",
            "funnel.json",
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
    """Do what is left of `stages` under the run's lock, once none of them has other settings."""
    engine = partial(_lazy("distill.responders.engines.settled"), "auto", run.config.engines)
    engines = {key: engine() for key in run.config.auto_engines}
    run.config = with_values(run.config, engines)  # once: a resume elsewhere has the same engine
    with run.lock():
        for stage in stages:
            if stage not in redo and stage.applies(run.config):
                run.checked_state(stage)
        path = run.path("config.json")
        text = as_json({**run.config.user_tree(), **place_of(run.folder)})
        load_config(path, text=text)  # what could not be read again is not written
        run.remake(redo)
        write_atomic(path, text)
        run.note("config_sha256", sha256_file(run.path("config.json")))
        for stage in stages:
            if not stage.applies(run.config):
                say(f"{stage.name}: not needed by this config")
                continue
            for missing in (name for name in stage.inputs if not run.path(name).exists()):
                maker = next(s for s in STAGES if missing.startswith(s.outputs))
                if maker.applies(run.config) and missing != CHECKED:
                    require_made(run.path(missing), maker.name)
            buys = run.config.recipe.mode != "off" and stage.name in ("select", "generate")
            if buys and run.state(stage)[0] != "done":  # a large corpus was not read before
                _lazy("distill.planning.search.require_search")(run, True)
            if allow_inexact and stage.name == "train":
                stage = replace(stage, main=partial(stage.main, allow_inexact=True))
            try:
                did = run.perform(stage)
            except BaseException as error:
                free_frames(error)
                raise
            if did and stage.name in checking(run.config):  # whether it could run programs, and how
                allowed = _lazy("distill.tasks.sandbox.programs.allowed")()
                run.note("programs", {**run.manifest().get("programs", {}), stage.name: allowed})
            if did:
                release_memory()  # of its models, for those of the next stage
            say(f"{stage.name}: {'done' if did else 'done before, reused'}")

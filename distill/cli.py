"""The `distill` command: `distill run CONFIG` does all stages; each stage is also a verb of its own.

A CONFIG is a YAML file or a run's folder; `key.name=value` after it changes a key. A fault is one line on stderr and
its exit code (see `distill.errors`); `--debug` shows the traceback. Work that is done is never done twice.
"""

import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from distill.config_file import load_config, parse_config, place_of
from distill.errors import DistillError, Exit, exit_code
from distill.pipeline import STAGES, require_models
from distill.storage.progress import say
from distill.storage.run_folder import Run, Stage, open_folder
from distill.storage.store import as_json, sha256_file, write_atomic

app = typer.Typer(
    help="Turn a teacher model and a corpus into a small open model, and say what it kept and cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
NAMES = tuple(stage.name for stage in STAGES)
CHECKING = ("filter", "evaluate")  # the stages that check answers
LOADING = ("generate", "signals", "train", "refine", "evaluate")  # the stages that load models
ConfigArgument = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A YAML file, or the folder of a run.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes of the config.")
]
RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="The folder of a run, or its config.")
]

RedoThis = Annotated[bool, typer.Option("--redo", help="Make it again, though it is done.")]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Run generated programs, in a sandbox.")
]
UnsafeCode = Annotated[
    bool, typer.Option("--unsafe-code", help="Run them with limits only; they can read and write.")
]


def open_run(place: Path, overrides: Sequence[str] = ()) -> Run:
    """Return the run of a config file, or of a run's folder (which may have been moved)."""
    return open_folder(place, overrides) if place.is_dir() else Run(load_config(place, overrides))


def permit_code(
    run: Run, stages: Sequence[Stage], redo: Sequence[Stage], sandboxed: bool, unsafe: bool
) -> None:
    """Let generated programs run as asked; raises DistillError (exit 2) where stages need that which are left."""
    from distill.evaluation.suites import tasks_of
    from distill.tasks.checkers import RUNS_CODE
    from distill.tasks.sandbox.programs import allow

    allow("unsafe" if unsafe else "sandbox" if sandboxed else "no")
    checking = [stage for stage in stages if stage.name in CHECKING]
    left = any(stage in redo or run.state(stage)[0] != "done" for stage in checking)
    if not left or sandboxed or unsafe:
        return
    needing = [t.name for t in tasks_of(run.config) if t.checker and t.checker["kind"] in RUNS_CODE]
    if needing:
        what = "is checked by running the programs that models wrote"
        fix = "allow that with --allow-code, which runs them in a sandbox"
        raise DistillError(Exit.CONFIG, f"task {needing[0]}", what, fix)


def perform(run: Run, stages: Sequence[Stage], redo: Sequence[Stage] = ()) -> None:
    """Do what is left of `stages` under the run's lock, after checking all of them for other settings."""
    with run.lock():
        for stage in stages:
            if stage not in redo and stage.applies(run.config):
                run.checked_state(stage)
        loading = [s for s in stages if s.name in LOADING and s.applies(run.config)]
        left = {s.name for s in loading if s in redo or run.state(s)[0] != "done"}
        if left:
            require_models(run.config, left)
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
            if run.perform(stage):
                if stage.name in CHECKING:
                    note_programs(run, stage)
                say(f"{stage.name}: done")
            else:
                say(f"{stage.name}: done before, reused")


def note_programs(run: Run, stage: Stage) -> None:
    """Record in the manifest whether a stage that checks answers could run programs, and how."""
    from distill.tasks.sandbox.programs import allowed

    run.note("programs", {**run.manifest().get("programs", {}), stage.name: allowed()})


def require_inputs(run: Run, stage: Stage) -> None:
    """Stop where a file that the stage reads is missing, and name the command that makes it."""
    for missing in (name for name in stage.inputs if not run.path(name).exists()):
        maker = next(s for s in STAGES if any(missing.startswith(name) for name in s.outputs))
        if maker.applies(run.config):
            fix = f"make it: distill {maker.name} CONFIG"
            raise DistillError(Exit.STATE, run.path(missing), "is missing", fix)


def from_stage(name: str) -> tuple[Stage, ...]:
    """Return the stage of that name and all that follow; raises DistillError (exit 2) for an unknown name."""
    if name not in NAMES:
        raise DistillError(
            Exit.CONFIG, f"--redo {name}", "no such stage", "one of " + ", ".join(NAMES)
        )
    return STAGES[NAMES.index(name) :]


def require_soft_teacher(run: Run, redo: Sequence[Stage]) -> None:
    """Stop before anything is asked where soft labels cannot be had: other tokens (exit 2), or terms (exit 10).

    A server that shall tell distributions is asked for those of one short text (exit 4 where it does not).
    """
    from distill.responders.terms import require_terms
    from distill.training.soft_labels import answer_logprobs, prompt_logprobs
    from distill.training.soft_labels.cache import open_teacher

    config = run.config
    reading = ("signals" if config.captures else "train", "refine")
    left = [s for s in STAGES if s.name in reading and s.applies(config)]
    if config.distributions and any(s in redo or run.state(s)[0] != "done" for s in left):
        require_terms(config.model_copy(update={"teacher": config.soft_teacher()}))
        tokenizer, _ = open_teacher(config)
        if config.buys_signals:
            prompt_logprobs.probe(config, tokenizer)
        elif config.signals.from_answers:
            answer_logprobs.probe(config, tokenizer)


def show_scorecard(run: Run) -> None:
    """Print the run's scorecard and where its report lies."""
    print(run.path("scorecard.md").read_text(encoding="utf-8"))
    print(f"report: {run.path('report.html')}")


@app.command(name="run")
def run_all(
    config: ConfigArgument,
    overrides: Overrides = None,
    redo: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Make STAGE and what follows again.")
    ] = None,
    allow_code: AllowCode = False,
    unsafe_code: UnsafeCode = False,
) -> None:
    """Do every stage that is left, and show the scorecard."""
    from distill.planning.plan import announce
    from distill.responders.terms import require_terms

    run = open_run(config, overrides or ())
    again = from_stage(redo) if redo else ()
    permit_code(run, STAGES, again, allow_code, unsafe_code)
    require_terms(run.config)
    require_soft_teacher(run, again)
    announce(run, again)
    perform(run, STAGES, again)
    show_scorecard(run)


def _stage_command(stage: Stage) -> Callable[..., None]:
    """Return the verb of one stage."""

    def command(
        config: ConfigArgument, overrides: Overrides = None, redo: RedoThis = False
    ) -> None:
        run = open_run(config, overrides or ())
        perform(run, (stage,), (stage,) if redo else ())
        if stage.name == "report":
            show_scorecard(run)

    return command


def _checking_command(stage: Stage) -> Callable[..., None]:
    """Return the verb of a stage that checks answers, and so may run programs."""

    def command(
        config: ConfigArgument,
        overrides: Overrides = None,
        redo: RedoThis = False,
        allow_code: AllowCode = False,
        unsafe_code: UnsafeCode = False,
    ) -> None:
        run = open_run(config, overrides or ())
        again = (stage,) if redo else ()
        permit_code(run, (stage,), again, allow_code, unsafe_code)
        perform(run, (stage,), again)

    return command


def _command(stage: Stage) -> Callable[..., None]:
    return (_checking_command if stage.name in CHECKING else _stage_command)(stage)


for _stage in STAGES:
    app.command(_stage.name, help=f"Do the stage {_stage.name}: {_stage.purpose}.")(
        _command(_stage)
    )


@app.command(name="eval")
def measure(
    config: ConfigArgument,
    overrides: Overrides = None,
    redo: RedoThis = False,
    allow_code: AllowCode = False,
    unsafe_code: UnsafeCode = False,
    lm_eval: Annotated[
        str | None, typer.Option(metavar="TASKS", help="Ask EleutherAI's lm-eval, tasks by commas.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each of its tasks.")] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Further tasks of it; they may hold code.")
    ] = None,
) -> None:
    """Do the stage evaluate; with --lm-eval hand the trained student to EleutherAI's lm-eval instead."""
    if lm_eval is None:
        stage = STAGES[NAMES.index("evaluate")]
        _checking_command(stage)(config, overrides, redo, allow_code, unsafe_code)
        return
    from distill.evaluation import lm_eval as external
    from distill.report import report

    run = open_run(config, overrides or ())
    tasks = tuple(task.strip() for task in lm_eval.split(",") if task.strip())
    with run.lock():
        found = external.main(run.config, run, external.Order(tasks, limit, include_path))
        print(report.external_table(found))
    if run.path("scorecard.json").exists():
        perform(run, STAGES[-1:], STAGES[-1:])


@app.command()
def fetch(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Download and verify the models of a config, so that it can run offline."""
    from distill.models.registry import fetch as fetch_model

    settings = open_run(config, overrides or ()).config
    if settings.teacher.kind == "local":
        fetch_model(settings.teacher.model, settings.teacher.revision)
    student = settings.student
    if settings.distributions and settings.reader()[0] != student.model:
        fetch_model(*settings.reader())
    fetch_model(student.model, student.revision, student.allow_pickle)


@app.command(name="plan")
def show_plan(
    config: ConfigArgument,
    overrides: Overrides = None,
    pilot: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Ask the teacher N of the questions, and keep them."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for a script.")] = False,
) -> None:
    """Say what a run would take: prompts, tokens, dollars, seconds, bytes. Without --pilot it sends nothing."""
    from distill.planning.plan import make_plan, show

    run = open_run(config, overrides or ())
    plan = make_plan(run, _ask_pilot(run, pilot) if pilot else None)
    if as_json:
        print(plan.model_dump_json(indent=2))
    else:
        Console(soft_wrap=True).print(show(plan), markup=False)


def _ask_pilot(run: Run, count: int) -> str:
    """Make the run's prompts where they are missing, ask some of them, and return the teacher's origin."""
    from distill.planning import pilot
    from distill.responders.terms import require_terms

    pilot.require_teacher(run.config)
    require_terms(run.config)
    require_models(run.config, ("generate",))
    perform(run, STAGES[: NAMES.index("generate")])
    with run.lock():
        return pilot.pilot(run, count)


@app.command(name="status")
def show_status(run: RunArgument, overrides: Overrides = None) -> None:
    """Say what is done, what is left, and what it cost so far."""
    from distill.status import status

    Console(soft_wrap=True).print(status(open_run(run, overrides or ()), STAGES), markup=False)


@app.command(name="verify")
def show_verified(
    run: RunArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for a script.")] = False,
    allow_code: AllowCode = False,
    unsafe_code: UnsafeCode = False,
) -> None:
    """Hold a finished run against its own records, and make its scorecard again from the stored answers."""
    from distill import verify
    from distill.tasks.sandbox.programs import allow

    allow("unsafe" if unsafe_code else "sandbox" if allow_code else "no")
    folder = run if run.is_dir() else open_run(run).folder
    checks = verify.verify(folder)
    if as_json:
        print(json.dumps(verify.as_facts(folder, checks), indent=2))
    else:
        Console(soft_wrap=True).print(verify.shown(folder, checks), markup=False)
    verify.require_whole(folder, checks)


@app.command()
def repair(store: Annotated[Path, typer.Argument(metavar="STORE")]) -> None:
    """Copy what is whole in a damaged store; the damaged one is kept beside it."""
    from distill.storage.repair import repair as repair_store

    for line in repair_store(store).explain():
        print(line)


@app.command()
def compact(store: Annotated[Path, typer.Argument(metavar="STORE")]) -> None:
    """Copy a store without what nothing reads any more, and let the copy take its place."""
    from distill.responders.local.plans import worth_keeping
    from distill.storage.repair import compact as compact_store

    for line in compact_store(store, worth_keeping).explain():
        print(line)


@app.command()
def publish(
    run: RunArgument,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload to the Hub, privately.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Upload for everybody.")] = False,
    override: Annotated[
        str | None,
        typer.Option(metavar="REASON", help="Publish against the evidence; the card says why."),
    ] = None,
) -> None:
    """Make the release of a run: adapter, merged model, card; and upload it where that is asked."""
    from distill.publishing.publish import main as make_release

    opened = open_run(run)
    with opened.lock():
        make_release(opened.config, opened, push, public, override)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; `--debug` may stand anywhere."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return exit_code(lambda: _dispatch([word for word in words if word != "--debug"]), debug)


def _dispatch(words: list[str]) -> None:
    """Let typer run the command; its own complaints become ours."""
    try:
        code = app(words, prog_name="distill", standalone_mode=False)
    except typer.exceptions.TyperException as error:
        if not words:  # the help has been shown
            raise SystemExit(Exit.CONFIG) from None
        where = " ".join(["distill", *words[:1]])
        raise DistillError(
            Exit.CONFIG, where, error.format_message(), "see distill --help"
        ) from None
    if code == Exit.INTERRUPTED:
        raise KeyboardInterrupt

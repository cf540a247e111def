"""The `distill` command: `distill run CONFIG` does all stages; each stage is a verb too.

A CONFIG is a YAML file or a run's folder; `key.name=value` after it changes a key. An error is one
line on stderr and its exit code (see `distill.errors`); `--debug` shows the traceback.
"""

import inspect
import json
import signal
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from pydoc import pager
from typing import Annotated

import typer
from rich.console import Console, RenderableType
from typer.models import ArgumentInfo, OptionInfo

from distill.errors import DistillError, Exit, exit_code
from distill.formatting import markdown_table
from distill.pipeline import CHECKING, STAGES, perform
from distill.storage.run_folder import Stage, open_run

app = typer.Typer(
    help="Turn a teacher model and a corpus into a small open one, and say what it kept and cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
RUN, STEP, LOOK, PUBLISH = "Run", "Run one stage", "Look", "Publish"
KEEP = "Keep models and answers"


def argument(metavar: str, text: str) -> ArgumentInfo:
    """Return the description of an argument."""
    return typer.Argument(metavar=metavar, help=text)


def option(metavar: str, text: str) -> OptionInfo:
    """Return the description of an option that takes a value."""
    return typer.Option(metavar=metavar, help=text)


ConfigArgument = Annotated[Path, argument("CONFIG", "A YAML file, or the folder of a run.")]
Overrides = Annotated[list[str] | None, argument("[KEY=VALUE]...", "Changes of the config.")]
RedoThis = Annotated[bool, typer.Option("--redo", help="Make it again, though it is done.")]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Run generated programs in a sandbox.")
]
UnsafeCode = Annotated[
    bool, typer.Option("--unsafe-code", help="Run them with limits only; they can read and write.")
]
AllowInexact = Annotated[
    bool, typer.Option("--allow-inexact", help="Resume a training though something changed.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for a script.")]


def show(view: RenderableType) -> None:
    """Print a table with its notes; where that cannot be printed, `exit_code` says so."""
    console = Console(soft_wrap=True)
    console.width = max(console.width, 80)  # a narrower table would have no words
    with console.capture() as captured:
        console.print(view, markup=False)
    print(captured.get(), end="")


def show_scorecard(folder: Path) -> None:
    """Print the run's scorecard and where its report lies."""
    print((folder / "scorecard.md").read_text(encoding="utf-8"))
    print(f"report: {folder / 'report.html'}")


@app.command(rich_help_panel=RUN)
def init(
    folder: Annotated[Path, argument("FOLDER", "Where the config is written.")],
    corpus: Annotated[Path | None, option("PATH", "Documents or rows; else FOLDER's.")] = None,
    teacher: Annotated[
        str, option("MODEL", "A model here, or a server's name for one.")
    ] = "qwen2.5-coder-0.5b-instruct",
    base_url: Annotated[str | None, option("URL", "Its server, https://HOST/v1.")] = None,
    api_key_env: Annotated[str | None, option("NAME", "Variable with its key.")] = None,
    student: Annotated[str, option("MODEL", "What learns.")] = "smollm2-135m-instruct",
) -> None:
    """Write a commented config from a corpus and a teacher, and show its plan."""
    from distill.planning import plan
    from distill.planning.new_config import write_config

    path = write_config(folder, corpus, teacher, student, base_url, api_key_env)
    print(f"wrote {path}; change it as you like, then: distill run {path}")
    show(plan.show(plan.make_plan(open_run(path))))


@app.command(name="run", rich_help_panel=RUN)
def run_all(
    config: ConfigArgument,
    overrides: Overrides = None,
    redo: Annotated[str | None, option("STAGE", "Remake from it on.")] = None,
    allow_code: AllowCode = False,
    unsafe_code: UnsafeCode = False,
    allow_inexact: AllowInexact = False,
) -> None:
    """Do every stage that is left, and show the scorecard."""
    from distill.api import run

    finished = run(
        *(config, overrides or ()),
        redo=redo,
        allow_code=allow_code,
        unsafe_code=unsafe_code,
        allow_inexact=allow_inexact,
    )
    show_scorecard(finished.folder)


def add_stage(stage: Stage) -> None:
    """Give a stage a verb of its own, with the options that it knows."""

    def command(
        config: ConfigArgument,
        overrides: Overrides = None,
        redo: RedoThis = False,
        allow_code: AllowCode = False,
        unsafe_code: UnsafeCode = False,
        allow_inexact: AllowInexact = False,
        lm_eval: Annotated[str | None, option("TASKS", "Ask the student lm-eval's tasks.")] = None,
        limit: Annotated[int | None, typer.Option(min=1, help="Items of each of these.")] = None,
        include_path: Annotated[Path | None, option("DIR", "More of them, perhaps code.")] = None,
    ) -> None:
        run = open_run(config, overrides or ())
        if lm_eval is not None:
            from distill.evaluation import lm_eval as harness
            from distill.report.tables import harness_rows

            print(markdown_table(*harness_rows(harness.main(run, lm_eval, limit, include_path))))
            if run.path("scorecard.json").exists():  # which then has a row of them
                perform(run, STAGES[-1:], STAGES[-1:])
            return
        from distill.api import perform_alone

        perform_alone(run, stage, redo, allow_code, unsafe_code, allow_inexact)
        if stage.name == "report":
            show_scorecard(run.folder)
        if stage.name == "recipe" and stage.applies(run.config):
            print(run.path("recipe.md").read_text(encoding="utf-8"))

    foreign = {"allow_inexact"} if stage.name != "train" else set[str]()
    foreign |= {"lm_eval", "limit", "include_path"} if stage.name != "evaluate" else set()
    foreign |= {"allow_code", "unsafe_code"} if stage.name not in CHECKING else set()
    signature = inspect.signature(command)
    parameters = [p for name, p in signature.parameters.items() if name not in foreign]
    vars(command)["__signature__"] = signature.replace(parameters=parameters)
    purpose = f"{stage.purpose[:1].upper()}{stage.purpose[1:]}."
    app.command(stage.name, help=purpose, rich_help_panel=STEP)(command)


for _stage in STAGES:
    add_stage(_stage)


@app.command(name="plan", rich_help_panel=LOOK)
def show_plan(
    config: ConfigArgument,
    overrides: Overrides = None,
    pilot: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Ask the teacher N of the questions, and keep them."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a run would take, and what would stop it. Only --pilot sends anything."""
    from distill.planning import cost, plan, preflight

    run = open_run(config, overrides or ())
    origin = cost.pilot(run, pilot) if pilot else None
    estimate, problems = plan.plan_and_problems(run, origin)
    if as_json:
        facts = estimate.model_dump(mode="json") if estimate else {}
        lines = [f"{error} (exit {error.code:d})" for error in problems]
        print(json.dumps({**facts, "problems": lines}, indent=2))
    elif estimate:
        show(plan.show(estimate))
    if problems:
        raise preflight.together(problems)


@app.command(name="status", rich_help_panel=LOOK)
def show_status(run: ConfigArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say what is done, what is left, and what it cost so far."""
    from distill import status

    state = status.read_status(open_run(run, overrides or ()), STAGES)
    if as_json:
        print(state.model_dump_json(indent=2))
    else:
        show(status.show(state))


@app.command(name="verify", rich_help_panel=LOOK)
def show_verified(
    run: ConfigArgument,
    as_json: AsJson = False,
    allow_code: AllowCode = False,
    unsafe_code: UnsafeCode = False,
) -> None:
    """Hold a finished run against its records, and make its scorecard again from its answers."""
    from distill import verify
    from distill.tasks.sandbox.programs import permit

    permit(allow_code, unsafe_code)
    folder = run if run.is_dir() else open_run(run).folder
    checks = verify.verify(folder)
    if as_json:
        print(json.dumps(verify.as_facts(folder, checks), indent=2))
    else:
        show(verify.show(folder, checks))
    verify.require_intact(folder, checks)


@app.command(rich_help_panel=LOOK)
def samples(
    run: ConfigArgument,
    task: Annotated[str | None, option("NAME", "Those of one task.")] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Where the student failed.")] = False,
    disagree: Annotated[bool, typer.Option("--disagree", help="Unlike the teacher.")] = False,
    n: Annotated[int | None, typer.Option("--n", min=1, help="So many at most.")] = None,
) -> None:
    """Page through held-out answers and their scores."""
    from distill.report import look

    pager(f"{look.samples(open_run(run), task, failed, disagree, n)}\n")


@app.command(rich_help_panel=LOOK)
def chat(
    run: ConfigArgument,
    models: Annotated[str | None, option("NAMES", "Of student,teacher,base.")] = None,
) -> None:
    """Talk with student, teacher and base side by side."""
    from distill.report import look

    look.chat(open_run(run), models)


@app.command(rich_help_panel=LOOK)
def compare(
    sides: Annotated[list[Path] | None, argument("[A B]", "Runs, or .jsonl files.")] = None,
    a: Annotated[list[Path] | None, typer.Option("--a", help="Runs of A, by seed.")] = None,
    b: Annotated[list[Path] | None, typer.Option("--b", help="Runs of B, by seed.")] = None,
) -> None:
    """Compare two runs or files on the items that they share; runs of a side are its seeds."""
    from distill.evaluation.compare import compare_paths

    both = [[side] for side in sides or ()] + [runs for runs in (a, b) if runs]
    if len(both) != 2:
        fix = "distill compare A B, or --a A1 --a A2 --b B1 --b B2"
        raise DistillError(Exit.CONFIG, "compare", "needs two sides", fix)
    print(compare_paths(*both))


@app.command(rich_help_panel=LOOK)
def score(
    suite: Annotated[str, argument("SUITE", "A name of eval/suites, a .yaml, or a run.")],
    responder: Annotated[str, option("WHO", "A run, a model, a config, or a file of answers.")],
    data: Annotated[Path | None, option("FILE", "Its questions.")] = None,
    name: Annotated[str | None, typer.Option(help="What the responder is called.")] = None,
    store: Annotated[Path, option("DIR", "Shared answers.")] = Path("runs/.store/responses"),
    out: Annotated[Path, option("DIR", "For scores and answers.")] = Path("runs/.suites"),
    student_view: Annotated[bool, typer.Option("--student-view", help="Ask as a student.")] = False,
    allow_code: AllowCode = False,
) -> None:
    """Ask any responder the questions of a suite, and score its answers."""
    from distill.evaluation.score import score as score_suite
    from distill.evaluation.suites import load_suite
    from distill.tasks.sandbox.programs import permit

    permit(allow_code)
    print(score_suite(load_suite(suite, data), responder, name, store, out, student_view))


@app.command(rich_help_panel=LOOK)
def probe(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Put the probes to the judge of a config: may its verdicts be used?"""
    from distill.evaluation.judge import probed
    from distill.report.tables import probe_rows

    result = probed(open_run(config, overrides or ()).config)
    verdict = "may be used" if result.passed else f"is not used: {result.reason}"
    print(f"{markdown_table(*probe_rows(result))}\nthe judge {verdict}")


@app.command(rich_help_panel=PUBLISH)
def publish(
    run: ConfigArgument,
    overrides: Overrides = None,
    push: Annotated[str | None, option("OWNER/NAME", "Upload to the Hub, privately.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Upload for everybody.")] = False,
    override: Annotated[str | None, option("REASON", "Publish against evidence.")] = None,
    dataset: Annotated[
        bool, typer.Option("--dataset", help="The teacher's answers instead, as a data set.")
    ] = False,
    heldout: Annotated[
        bool, typer.Option("--heldout", help="With the held-out rows, as its split test.")
    ] = False,
    soft_labels: Annotated[
        bool, typer.Option("--soft-labels", help="With the teacher's distributions.")
    ] = False,
) -> None:
    """Make the release of a run: model, card, publish.formats; and upload it where asked."""
    if (override and dataset) or ((heldout or soft_labels) and not dataset):
        what, fix = "do not go together", "--heldout and --soft-labels need --dataset"
        raise DistillError(Exit.CONFIG, "options", what, f"{fix}; --override is for a student")
    if any(not word.strip().startswith("publish.") for word in overrides or ()):
        what, fix = "is no key of publish", "what was made is published as it was made"
        raise DistillError(Exit.CONFIG, "override", what, fix)
    from distill.publishing.dataset import main as make_dataset
    from distill.publishing.publish import main as make_release

    opened = open_run(run, overrides or ())
    with opened.lock():
        if dataset:
            make_dataset(opened, push, public, heldout, soft_labels)
        else:
            make_release(opened, push, public, override)


@app.command(rich_help_panel=KEEP)
def fetch(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Download and verify the models of a config, so that it can run offline."""
    from distill.models import registry

    for model in registry.models_of(open_run(config, overrides or ()).config):
        registry.fetch(*model)


@app.command(rich_help_panel=KEEP)
def repair(store: Annotated[Path, typer.Argument(metavar="STORE")]) -> None:
    """Copy what is intact in a damaged store; the damaged one is kept beside it."""
    from distill.storage.repair import repair as repair_store

    print(*repair_store(store.absolute()), sep="\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; `--debug` may stand anywhere."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    for kind in (signal.SIGTERM, signal.SIGHUP):  # a lost connection, or a closed laptop
        if signal.getsignal(kind) is not signal.SIG_IGN:  # as nohup wants it
            signal.signal(kind, signal.default_int_handler)
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # what has no characters is escaped
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    words = [word for word in words if word != "--debug"]

    def dispatch() -> None:
        try:
            code = app(words, prog_name="distill", standalone_mode=False)
        except typer.exceptions.TyperException as error:
            if not words:  # the help has been shown
                raise SystemExit(Exit.CONFIG) from None
            where, what = " ".join(["distill", *words[:1]]), error.format_message()
            raise DistillError(Exit.CONFIG, where, what, "see distill --help") from None
        if code == Exit.INTERRUPTED:
            raise KeyboardInterrupt

    return exit_code(dispatch, debug)

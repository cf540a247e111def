"""A run from Python: `distill.run("my.yaml")` does what `distill run my.yaml` does."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distill.callables import PROVIDED, provided
from distill.pipeline import STAGES, from_stage, perform
from distill.planning.plan import announce
from distill.planning.preflight import require
from distill.records import Prompt, Response
from distill.storage.run_folder import Run, Stage, open_run
from distill.tasks.sandbox.programs import permit

if TYPE_CHECKING:
    from distill.evaluation.scorecard import Scorecard


class FinishedRun(NamedTuple):
    """A run's folder, and what came out of it."""

    folder: Path
    scorecard: "Scorecard"


def run(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    checkers: Mapping[str, Callable[..., Any]] | None = None,
    filters: Sequence[Callable[[Prompt, Response], str | None]] = (),
    responders: Mapping[str, Callable[[list[dict[str, str]]], str]] | None = None,
    redo: str | None = None,
    allow_code: bool = False,
    unsafe_code: bool = False,
    allow_inexact: bool = False,
) -> FinishedRun:
    """Do every stage that is left of a config's run, or of that in a folder.

    `overrides` are `key=value`; `redo` names the stage from which on all is made again. `checkers`,
    `filters` and `responders` are functions of yours (see `distill.callables`): a task names a
    checker as its `kind`, a teacher of kind `python` its responder, and filters apply after the
    config's. Raises DistillError, with the exit code and the one line of the command.
    """
    with provided(checkers or {}, filters, responders or {}):
        added = [f"filters.python=[{', '.join(PROVIDED['filter'])}]"] if filters else []
        run = open_run(Path(config), [*overrides, *added])
        again = from_stage(redo) if redo else ()
        permit(allow_code, unsafe_code)
        require(run, STAGES, again)
        announce(run, again)
        perform(run, STAGES, again, allow_inexact)
    from distill.evaluation.scorecard import Scorecard  # which loads scipy

    text = run.path("scorecard.json").read_text(encoding="utf-8")
    return FinishedRun(run.folder, Scorecard.model_validate_json(text))


def perform_alone(
    run: Run,
    stage: Stage,
    redo: bool = False,
    allow_code: bool = False,
    unsafe_code: bool = False,
    allow_inexact: bool = False,
) -> None:
    """Do one stage, where it is left or `redo` says so."""
    again = (stage,) if redo else ()
    permit(allow_code, unsafe_code)
    require(run, (stage,), again)
    perform(run, (stage,), again, allow_inexact)

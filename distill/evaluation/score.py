"""Score any responder on a suite: `python eval/run.py SUITE --responder WHO`.

WHO is a run's folder (its student), a model (a Hub id, a name of models.yaml, a folder as ./FOLDER), a config whose
teacher is an endpoint (asked only within its budget), or a file of answers. Answers go through the store that runs
share, so what was asked before is not asked again. `eval/compare.py` reads what is written here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from distill.config import Config
from distill.config_file import load_config
from distill.corpus.readers import Reject, SourceRow, read_file
from distill.errors import DistillError, Exit
from distill.evaluation import results
from distill.evaluation.results import Measured
from distill.evaluation.statistics import USUAL, Certainty
from distill.evaluation.suite_scores import measure_suite, write_answers, write_suite
from distill.evaluation.suites import Suite, is_run
from distill.formatting import figure, markdown_table, share
from distill.records import Response
from distill.responders.ask import Ask
from distill.responders.canned import raw_text
from distill.responders.kinds import make_responder
from distill.responders.responder import Request, Sampling
from distill.storage.run_folder import open_folder

ALONE = "one responder was asked"


@dataclass(frozen=True)
class Place:
    """Where answers are kept (`store`), and where items, scores and answers are written (`out`)."""

    store: Path
    out: Path


def score(
    suite: Suite, who: str, name: str | None, place: Place, certainty: Certainty = USUAL
) -> str:
    """Ask `who` the questions of a suite, write scores and answers, and return the result as a table.

    Raises DistillError: exit 2 where nobody is named, 3 where a file lacks answers, 6 where a paid one has no budget.
    """
    path = Path(who)
    if path.suffix == ".jsonl":
        given, name = read_answers(suite, path), name or path.stem
    else:
        given, asked = _asked(suite, path, who, place.store)
        name = name or asked
    answers = {name: given}
    rows = measure_suite(suite, answers, ALONE)
    write_answers(place.out, suite, answers)
    (written,) = write_suite(place.out, suite, rows, answers)
    return f"{result_table(suite, rows, name, given, certainty)}\n\nscores: {written}"


def _asked(suite: Suite, path: Path, who: str, store: Path) -> tuple[dict[str, Response], str]:
    """Ask a model, a run's student, or the endpoint of a config."""
    from distill.evaluation.answering import ask_suite, student_responder
    from distill.responders.local.local_model import LocalResponder

    if path.suffix in (".yaml", ".yml") and not is_run(path):
        return _bought(suite, load_config(path), store)
    if is_run(path):
        run, name = open_folder(path), path.resolve().name
        responder, _ = student_responder(run.config, run, "student")
    else:
        responder = LocalResponder.load(who)
        name = responder.model
    with Ask(responder, store) as ask:
        return ask_suite(ask, suite), name


def _bought(suite: Suite, config: Config, store: Path) -> tuple[dict[str, Response], str]:
    """Ask the endpoint of a config, whose budget holds for all that is bought under the config's name."""
    from distill.evaluation.answering import ask_suite

    teacher = config.teacher
    if teacher.paid and teacher.budget is None:
        fix = "set teacher.budget_dollars; 0.01 is enough to see what a question costs"
        raise DistillError(Exit.BUDGET, "teacher.budget_dollars", "is not set", fix)
    if not teacher.makes_answers:
        fix = "name a config with a local teacher or an endpoint, or a file of answers"
        raise DistillError(Exit.CONFIG, "teacher.kind", f"{teacher.kind} cannot be asked", fix)
    responder = make_responder(teacher, config)
    with Ask(responder, store) as ask:
        return ask_suite(ask, suite, as_teacher=True), responder.model


def read_answers(suite: Suite, path: Path) -> dict[str, Response]:
    """Read answers from JSON lines, each {"prompt": last user turn, "answer": text} or a stored Response.

    Raises DistillError (exit 3) where a line is neither, or no line answers a question of the suite.
    """
    texts, stored = dict[str, str](), dict[str, Response]()
    for row in read_file(path, str(path)):
        if isinstance(row, Reject):
            raise DistillError(Exit.INPUT, row.where, row.reason, "correct the line")
        _take(row, texts, stored)
    given = {}
    for item in suite.items:
        asked = item.prompt.messages[-1].content
        if item.prompt.id in stored:
            given[item.id] = stored[item.prompt.id]
        elif asked in texts:
            sampling = Sampling(max_new_tokens=suite.limits()[item.id])
            request = Request.make(str(path), item.prompt.id, item.prompt.messages, sampling)
            given[item.id] = raw_text(request, texts[asked], path.stem).response(item.prompt.id)
    if not given:
        what, fix = f"answers no question of {suite.name}", "the prompts must be the suite's own"
        raise DistillError(Exit.INPUT, path, what, fix)
    return given


def _take(row: SourceRow, texts: dict[str, str], stored: dict[str, Response]) -> None:
    """Keep what one line of a file of answers says."""
    prompt, answer = row.value.get("prompt"), row.value.get("answer")
    if isinstance(prompt, str) and isinstance(answer, str):
        texts[prompt] = answer
        return
    try:
        response = Response.model_validate(row.value)
    except ValueError:
        fix = 'write {"prompt": "...", "answer": "..."}'
        raise DistillError(Exit.INPUT, row.where, "is no answer", fix) from None
    stored[response.prompt_id] = response


def result_table(
    suite: Suite,
    rows: Mapping[str, Measured],
    name: str,
    given: Mapping[str, Response],
    certainty: Certainty,
) -> str:
    """Return one responder's results: a row a task, all checks together, and how long its answers are."""
    pooled = results.pool(list(rows.values()))
    shown = dict(rows) | ({"all checks": pooled} if pooled and len(rows) > 1 else {})
    head = ("task", "n", "missing", name, "interval", "cut off", "tokens")
    lines = [_line(task, row, name, given, certainty) for task, row in shown.items()]
    return f"{suite.name}: {suite.facts['description']}\n\n{markdown_table(head, lines)}"


def _line(
    task: str,
    row: Measured,
    name: str,
    given: Mapping[str, Response],
    certainty: Certainty,
) -> tuple[str, ...]:
    mean = results.mean_of(row, name, certainty)
    long = results.answer_lengths([given[i] for i in row.ids() if i in given])
    missing = sum(value is None for value in row.values(name).values())
    low, high = share(mean.low, 1), share(mean.high, 1)
    return (
        f"{task}: {row.metric.replace('_', ' ')}",
        str(len(row.items)),
        str(missing),
        share(mean.value, 1),
        mean.reason or f"{low} to {high}",
        share(long.truncated),
        figure(long.tokens, 0),
    )

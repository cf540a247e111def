"""`distill score SUITE --responder WHO`: score any responder on a suite.

WHO is a run's folder (its student), a model (a Hub id, a name of models.yaml, a folder as
./FOLDER), a config whose teacher can be asked (a paid one only within its budget), or a file of
answers. Answers go through the store that runs share. `distill compare` reads what is written here.
"""

from collections.abc import Mapping
from pathlib import Path

from distill.config.teachers import EndpointTeacher
from distill.config.yaml_file import load_config
from distill.errors import DistillError, Exit
from distill.evaluation import results
from distill.evaluation.scorers import Measured, measure_tasks, write_scores
from distill.evaluation.statistics import USUAL
from distill.evaluation.suites import Suite, is_run, write_answers
from distill.formatting import figure, markdown_table, plain, share
from distill.records import Response
from distill.responders.ask import Ask
from distill.responders.canned import CannedResponder, raw_text
from distill.responders.kinds import make_responder
from distill.responders.responder import Request, Sampling
from distill.storage.files import read_records
from distill.storage.run_folder import open_run

ALONE = "one responder was asked"


def score(
    suite: Suite, who: str, name: str | None, store: Path, out: Path, student_view: bool = False
) -> str:
    """Ask `who` the questions of a suite, write scores and answers, and return a table of results.

    Answers are kept in `store`; items, scores and answers are written below `out`. The teacher of a
    config is asked as a teacher, unless in `student_view`: a student that a server has. Raises
    DistillError: exit 2 where nobody can be asked, 3 where a file lacks answers, 6 without a
    budget.
    """
    path = Path(who)
    if path.suffix == ".jsonl":
        answers, name = read_answers(suite, path), name or path.stem
    else:
        answers, model = ask_responder(suite, path, who, store, student_view)
        name = name or model
    rows = measure_tasks(suite.items, {name: answers}, suite.tasks.get, ALONE)
    write_answers(out, suite, {name: answers})
    folder = out / "scores" / suite.name
    write_scores(folder, [name], rows, suite.items)
    table = result_table(rows, name, answers)
    title = f"{suite.name}: {suite.facts['description']}"
    return f"{title}\n\n{table}\n\nscores: {folder / f'{name}.jsonl'}"


def ask_responder(
    suite: Suite, path: Path, who: str, store: Path, student_view: bool
) -> tuple[dict[str, Response], str]:
    """Ask a run's student, the teacher of a config, or a model; return its answers and its name."""
    from distill.evaluation.answering import ask_suite, student_responder  # which load torch
    from distill.responders.local.local_model import LocalResponder

    name, bought = "", path.suffix in (".yaml", ".yml") and not is_run(path)
    if bought:
        config = load_config(path)
        teacher = config.teacher
        if isinstance(teacher, EndpointTeacher) and teacher.budget_dollars is None:
            fix = "set teacher.budget_dollars; 0.01 is enough to see what a question costs"
            raise DistillError(Exit.BUDGET, "teacher.budget_dollars", "is not set", fix)
        if not teacher.makes_answers:
            fix = "name a config with a local teacher or an endpoint, or a file of answers"
            raise DistillError(Exit.CONFIG, "teacher.kind", f"{teacher.kind} cannot be asked", fix)
        responder = make_responder(teacher, config)
    elif is_run(path):
        name = path.resolve().name
        responder, _ = student_responder(open_run(path), "student")
    else:
        responder = LocalResponder.load(who)
    with Ask(responder, store) as ask:
        answers = ask_suite(ask, suite, as_teacher=bought and not student_view)
        return answers, name or responder.model


def read_answers(suite: Suite, path: Path) -> dict[str, Response]:
    """Read a file of canned answers, or one of responses, such as `answers/` of a run holds.

    Raises DistillError (exit 3) where it is neither, or answers no question of the suite.
    """
    texts, responses, limits = dict[str, str](), dict[str, Response](), suite.limits()
    try:
        responses = {answer.prompt_id: answer for answer in read_records(path, Response)}
    except DistillError:
        texts = CannedResponder.load(path).answers
    answers = {}
    for item in suite.items:
        text = texts.get(item.prompt.messages[-1].content)
        if item.prompt.id in responses:
            answers[item.id] = responses[item.prompt.id]
        elif text is not None:
            sampling = Sampling(max_new_tokens=limits[item.id])
            request = Request.make(str(path), item.prompt.id, item.prompt.messages, sampling)
            answers[item.id] = raw_text(request, text, path.stem).response(item.prompt.id)
    if not answers:
        what, fix = f"answers no question of {suite.name}", "the prompts must be the suite's own"
        raise DistillError(Exit.INPUT, path, what, fix)
    return answers


def result_table(rows: Mapping[str, Measured], name: str, answers: Mapping[str, Response]) -> str:
    """Return a responder's results: a row a task, all checks together, and its answers' lengths."""
    pooled, lines = results.pool(list(rows.values())), []
    if pooled and len(rows) > 1:
        rows = {**rows, "all checks": pooled}
    for task, row in rows.items():
        mean = results.mean_of(row, name, USUAL)
        lengths = results.answer_lengths(answers[i.id] for i in row.items if i.id in answers)
        line = (
            f"{task}: {plain(row.metric)}",
            str(len(row.items)),
            str(list(row.values(name).values()).count(None)),
            share(mean.value, 1),
            mean.reason or f"{share(mean.low, 1)} to {share(mean.high, 1)}",
            share(lengths.truncated),
            figure(lengths.tokens, 0),
        )
        lines.append(line)
    head = ("task", "n", "missing", name, "interval", "cut off", "tokens")
    return markdown_table(head, lines)

"""From answers to results: scores, comparisons and requests, from files alone.

Reads what `evaluate` wrote below `answers/`, asks nothing and loads no model, so that `distill verify` can do it again
and hold every byte against it. Writes `scores/<model>.jsonl`, `requests.jsonl` and `evaluation.json`; of a suite items
and scores in a folder of its name. Results are those of the items that do not stand in the training data; those of all
items are beside them.
"""

from collections.abc import Callable, Mapping, Sequence

from distill.config import Config
from distill.evaluation import results
from distill.evaluation.acceptance import Acceptance, by_checker, requests_of
from distill.evaluation.items import by_item, held_out_items
from distill.evaluation.judging import read_judge
from distill.evaluation.measurements import MODELS, EvaluationResult, Settings, SuiteResult
from distill.evaluation.overlap import Leaks, contamination, kept, without
from distill.evaluation.results import Measured
from distill.evaluation.statistics import Certainty
from distill.evaluation.suite_scores import measure_suite, suite_result, write_suite
from distill.evaluation.suites import Suite
from distill.records import AnswerLoss, Item, Response
from distill.storage.files import read_json, read_records, write_json, write_records
from distill.storage.run_folder import Run
from distill.tasks.checkers import needs_reference
from distill.tasks.task import FindTask, shipped, tasks_of_run

RECORDED = "the teacher's answers were recorded, and it cannot be asked anew"
UNPAID = "a paid teacher is asked the questions of a suite only within teacher.budget_dollars"
UNASKED = "the suite does not ask the teacher"


def read_answers(run: Run, items: Sequence[Item]) -> dict[str, dict[str, Response]]:
    """Read what the models said to the held-out items, by model and item id."""
    return {
        model: by_item(items, read_records(run.path(f"answers/{model}.jsonl"), Response))
        for model in MODELS
    }


def measure(config: Config, run: Run, suites: Sequence[Suite], leaks: Leaks) -> None:
    """Score and compare what was answered; reads and writes files, so `distill verify` can do it again."""
    _, items = held_out_items(run)
    answers, settings = read_answers(run, items), config.evaluation
    certainty = Certainty(
        settings.confidence, settings.bootstrap_samples, config.seed, settings.margin
    )
    find = tasks_of_run(run.folder)
    rows = {t: measure_task(t, items, answers, find) for t in dict.fromkeys(i.task for i in items)}
    for model in answers:
        scores = [s for row in rows.values() for s in row.scores.get(model, [])]
        write_records(run.path(f"scores/{model}.jsonl"), scores)
    clean, clean_rows = kept(items, items, leaks), without(rows, leaks)
    clean_answers = {m: {i.id: given[i.id] for i in clean} for m, given in answers.items()}
    readings = {
        model: kept(
            items, read_records(run.path(f"answers/readings/{model}.jsonl"), AnswerLoss), leaks
        )
        for model in ("base", "student")
    }
    tests = tests_of(clean_rows, find)
    judged = read_judge(config, run, clean, clean_answers, certainty)
    if judged and (word := judged.acceptance(will_do(clean_rows, clean_answers))):
        tests.insert(0, word)  # a checker's word on its task counts for more
    write_records(run.path("requests.jsonl"), requests_of(clean, clean_answers, tests))
    comparison = results.results_of(clean_rows, certainty)
    evaluation = EvaluationResult(
        models=read_json(run.path("answers/models.json")),
        tasks=comparison.tasks,
        overall=comparison.overall,
        agreement=results.agreement_rows(clean, clean_answers, readings, certainty),
        lengths={m: results.answer_lengths(list(a.values())) for m, a in clean_answers.items()},
        samples=tuple(results.samples(clean, list(clean_rows.values()), clean_answers)),
        contamination=contamination(items, leaks, rows, certainty),
        suites={s.name: measured_suite(config, run, s, certainty, leaks) for s in suites},
        judge=judged.result if judged else None,
        settings=Settings(
            **certainty._asdict(),
            items=len(items),
            documents=len({item.cluster for item in items}),
            max_new_tokens=limit(config),
            teacher_temperature=config.teacher.temperature,
            teacher_sees_more=any(item.prompt.teacher_messages for item in items),
        ),
        corpus=run.manifest().get("corpus", {}),
        environment=run.made_with("evaluate").get("environment", {}),
    )
    write_json(run.path("evaluation.json"), evaluation.tree())


def will_do(rows: Mapping[str, Measured], answers: results.AnswersByModel) -> Callable[[str], bool]:
    """Return what tells whether the teacher's own answer is acceptable: it passes its check, or without one is whole."""
    checked = {i: v for row in rows.values() for i, v in row.values("teacher").items()}

    def known(item: str) -> bool:
        given = answers["teacher"][item]
        return (
            checked[item] == 1
            if item in checked
            else given.stop == "end" and bool(given.text.strip())
        )

    return known


def measured_suite(
    config: Config, run: Run, suite: Suite, certainty: Certainty, leaks: Leaks
) -> SuiteResult:
    """Score what was answered to a suite, write its items and scores beside the run's own, and return its results."""
    paths = {model: run.path(f"answers/{suite.name}/{model}.jsonl") for model in MODELS}
    answers = {
        model: by_item(suite.items, read_records(path, Response))
        for model, path in paths.items()
        if path.exists()
    }
    rows = measure_suite(suite, answers, why_no_teacher(config, suite) or "")
    write_suite(run.folder, suite, rows, answers)
    clean = {i.id for i in suite.items if i.id not in leaks}
    given = {m: {i: a for i, a in found.items() if i in clean} for m, found in answers.items()}
    result = suite_result(suite, without(rows, leaks), given, certainty)
    found = contamination(suite.items, leaks, rows, certainty)
    return result.model_copy(update={"contamination": found})


def why_no_teacher(config: Config, suite: Suite) -> str | None:
    """Say why a suite is not put to the teacher, or None where it is.

    A local teacher is asked where the suite says so. A paid one needs a budget besides: nobody who runs an evaluation
    should find a bill for questions that no student learns from.
    """
    if not suite.ask_teacher:
        return UNASKED
    if config.teacher.paid and config.teacher.budget is None:
        return UNPAID
    return None if config.teacher.makes_answers else RECORDED


def limit(config: Config) -> int:
    """Return how many tokens an answer may have: the teacher's limit, where evaluation states none."""
    return config.evaluation.max_new_tokens or config.teacher.max_new_tokens


def measure_task(
    task: str, items: Sequence[Item], answers: results.AnswersByModel, find: FindTask = shipped
) -> Measured:
    """Score all models on a task: by its checker where it has one and what that needs, else by agreement."""
    known = find(task)
    checker = known.checker if known else None
    if checker and needs_reference(checker["kind"]):
        there = any(item.reference for item in items if item.task == task)
        checker = checker if there else None
    return results.measure_task(task, items, answers, (known and known.metric) or "", checker)


def tests_of(rows: Mapping[str, Measured], find: FindTask = shipped) -> list[Acceptance]:
    """Return the tests of what the student answered: the checkers of the tasks that were measured by theirs."""
    tasks = [(row, find(name)) for name, row in rows.items() if row.scores.get("teacher")]
    return [by_checker(row, task.checker) for row, task in tasks if task and task.checker]

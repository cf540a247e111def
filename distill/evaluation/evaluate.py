"""The stage `evaluate`: teacher, base (the student before training) and student answer the held-out prompts.

Answers go through the shared store, so a killed evaluation goes on where it was. Writes
`answers/<model>.jsonl`, `scores/<model>.jsonl` and `evaluation.json`, from which the report is made, and for what that
says of money `requests.jsonl` and `timings/<model>.jsonl`; of a suite answers and scores in a folder of its name.
Results are those of the items that do not stand in the training data; those of all items are beside them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from distill.checkers import NEEDS_REFERENCE
from distill.config import Config
from distill.evaluation import results
from distill.evaluation.acceptance import Acceptance, by_checker, requests_of
from distill.evaluation.answering import (
    Answered,
    Given,
    answer_with_student,
    answer_with_teacher,
    describe_teacher,
    limit,
    time_teacher,
    why_no_teacher,
)
from distill.evaluation.items import by_item, held_out, items_of
from distill.evaluation.leaks import Leaks, find_leaks, kept, refuse_all_leaked, section, without
from distill.evaluation.results import Measured
from distill.evaluation.statistics import Certainty
from distill.evaluation.suite_scores import measure_suite, suite_result, write_suite
from distill.evaluation.suites import Suite, load_suites
from distill.evaluation.words import plain_numbers
from distill.records import Item
from distill.run import Run
from distill.store import write_json, write_records
from distill.tasks import load_task, task_path


def main(config: Config, run: Run) -> None:
    """Answer, score and compare; raises DistillError (exit 8) where too few items can be compared."""
    pairs = held_out(run.path("dataset/heldout.jsonl"))
    items = items_of(pairs, run.path("documents.jsonl"))
    suites = load_suites(config.evaluation.suites)
    leaks = find_leaks(run, [*items, *(item for suite in suites for item in suite.items)])
    refuse_all_leaked(items, leaks)
    described, answered = answer_with_student(config, run, pairs, suites)
    taught = answer_with_teacher(config, run, suites)
    time_teacher(config, run, pairs)
    answers = {
        "teacher": {i.id: p.response for i, p in zip(items, pairs, strict=True)},
        **{m: by_item(items, found.responses) for m, found in answered.items()},
    }
    settings = config.evaluation
    certainty = Certainty(settings.confidence, settings.samples, config.seed, settings.margin)
    rows = {t: measure(t, items, answers) for t in dict.fromkeys(i.task for i in items)}
    for model, given in answers.items():
        scores = [s for row in rows.values() for s in row.scores.get(model, [])]
        write_records(run.path(f"scores/{model}.jsonl"), scores)
        write_records(run.path(f"answers/{model}.jsonl"), given.values())
    clean, clean_rows = kept(items, items, leaks), without(rows, leaks)
    clean_answers = {m: {i.id: given[i.id] for i in clean} for m, given in answers.items()}
    readings = {m: kept(items, found.readings, leaks) for m, found in answered.items()}
    write_records(
        run.path("requests.jsonl"), requests_of(clean, clean_answers, tests_of(clean_rows))
    )
    measured = {
        suite.name: measured_suite(config, run, suite, answered, taught, certainty, leaks)
        for suite in suites
    }
    write_json(
        run.path("evaluation.json"),
        plain_numbers(
            {
                "models": {"teacher": describe_teacher(config), **described},
                **results.compared(clean, clean_answers, clean_rows, readings, certainty),
                "contamination": section(items, leaks, rows, certainty),
                "suites": measured,
                "settings": {**certainty._asdict(), **asked(config, items)},
                "corpus": run.manifest().get("corpus", {}),
                "environment": run.manifest().get("environment", {}),
            }
        ),
    )


def measured_suite(
    config: Config,
    run: Run,
    suite: Suite,
    answered: Mapping[str, Answered],
    taught: Mapping[str, Given],
    certainty: Certainty,
    leaks: Leaks,
) -> dict[str, Any]:
    """Score a suite, write its items, answers and scores beside the run's own, and return its results."""
    answers = {model: found.suites[suite.name] for model, found in answered.items()}
    if suite.name in taught:
        answers = {"teacher": taught[suite.name], **answers}
    rows = measure_suite(suite, answers, why_no_teacher(config, suite) or "")
    write_suite(run.folder, suite, rows, answers)
    clean = {i.id for i in suite.items if i.id not in leaks}
    given = {m: {i: a for i, a in found.items() if i in clean} for m, found in answers.items()}
    return {
        **suite_result(suite, without(rows, leaks), given, certainty),
        "contamination": section(suite.items, leaks, rows, certainty),
    }


def measure(task: str, items: Sequence[Item], answers: results.Models) -> Measured:
    """Score all models on a task: by its checker where it has one and what that needs, else by agreement."""
    known = load_task(task) if task_path(task).is_file() else None
    checker = known.checker if known else None
    if checker and checker["kind"] in NEEDS_REFERENCE:
        there = any(item.reference for item in items if item.task == task)
        checker = checker if there else None
    return results.measure_task(task, items, answers, (known and known.metric) or "", checker)


def tests_of(rows: Mapping[str, Measured]) -> list[Acceptance]:
    """Return the tests of what the student answered: the checkers of the tasks that were measured by theirs."""
    checkers = {
        task: load_task(task).checker for task, row in rows.items() if row.scores.get("teacher")
    }
    return [by_checker(rows[task], checker) for task, checker in checkers.items() if checker]


def asked(config: Config, items: Sequence[Item]) -> dict[str, Any]:
    """Return how the models were asked, and how much."""
    return {
        "items": len(items),
        "documents": len({item.cluster for item in items}),
        "max_new_tokens": limit(config),
        "teacher_temperature": config.teacher.temperature,
        "teacher_sees_more": any(item.prompt.teacher_messages for item in items),
    }

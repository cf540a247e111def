"""The stage `evaluate`: teacher, base (the student before training) and student answer the held-out prompts.

Answers go through the shared store, so a killed evaluation goes on where it was. All that needs a model is done first and
written below `answers/` and `timings/`; `distill.evaluation.measure` makes everything else from that.
"""

from collections.abc import Sequence

from distill.config import Config
from distill.evaluation.answering import (
    answer_with_student,
    answer_with_teacher,
    describe_teacher,
    time_teacher,
)
from distill.evaluation.items import held_out_items
from distill.evaluation.judging import ask_judge
from distill.evaluation.measure import measure, read_answers
from distill.evaluation.overlap import find_leaks, refuse_all_leaked
from distill.evaluation.suite_scores import write_answers, write_suites
from distill.evaluation.suites import Suite, load_suites
from distill.records import Item, Pair
from distill.storage.files import write_json, write_records
from distill.storage.run_folder import Run


def main(config: Config, run: Run) -> None:
    """Answer, score and compare; raises DistillError (exit 8) where too few items can be compared."""
    pairs, items = held_out_items(run)
    suites = load_suites(config.evaluation.suites)
    leaks = find_leaks(run, items, suites)
    refuse_all_leaked(items, leaks)
    answer(config, run, pairs, items, suites)
    measure(config, run, suites, leaks)


def answer(
    config: Config, run: Run, pairs: Sequence[Pair], items: Sequence[Item], suites: Sequence[Suite]
) -> None:
    """Do all that needs a model, and write what came of it below `answers/` and `timings/`."""
    described, answered = answer_with_student(config, run, pairs, suites)
    taught = answer_with_teacher(config, run, suites)
    time_teacher(config, run, pairs)
    write_suites(run.path("answers/suites.json"), suites)
    models = {"teacher": describe_teacher(config), **described}
    write_json(run.path("answers/models.json"), models)
    write_records(run.path("answers/teacher.jsonl"), [pair.response for pair in pairs])
    for model, found in answered.items():
        write_records(run.path(f"answers/{model}.jsonl"), found.responses)
        write_records(run.path(f"answers/readings/{model}.jsonl"), found.readings)
    for suite in suites:
        given = {model: found.suites[suite.name] for model, found in answered.items()}
        if suite.name in taught:
            given = {"teacher": taught[suite.name], **given}
        write_answers(run.folder, suite, given)
    ask_judge(config, run, items, read_answers(run, items))

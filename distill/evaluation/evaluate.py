"""The stage `evaluate`: teacher, base (the student before training) and student on the same items.

All that needs a model is done first and written below `answers/` and `timings/`; from these files
alone `measure` makes `scores/<model>.jsonl`, `requests.jsonl` and `evaluation.json`, so that
`distill verify` can make them again and compare every byte. Results are those of the items that are
not in the training data; those of all items stand beside them.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from distill.corpus.contamination import KINDS, NOT_FOUND, Match, flag_training, of_item
from distill.errors import DistillError, Exit
from distill.evaluation import results
from distill.evaluation.judge import ask_judge, by_judge, read_judge
from distill.evaluation.measurements import (
    MODELS,
    Contamination,
    EvaluationResult,
    MeasuredItems,
    Settings,
    SuiteResult,
)
from distill.evaluation.scorers import (
    SHARE,
    Acceptance,
    AnswersByModel,
    Measured,
    by_checker,
    measure_agreement,
    measure_tasks,
    requests_of,
    write_scores,
)
from distill.evaluation.statistics import Certainty, estimate_mean
from distill.evaluation.suites import (
    Suite,
    answer_limit,
    by_item,
    held_out_items,
    load_suites,
    why_no_teacher,
)
from distill.records import AnswerLoss, Document, Item, Pair, Response, Score
from distill.storage.files import read_json, read_records, write_json, write_records
from distill.storage.run_folder import Run
from distill.tasks.task import FindTask, tasks_of_run

EXAMPLES = 5  # of matches in evaluation.json


class Overlap(NamedTuple):
    """Where the training data holds items, by item id; and those without words to search for."""

    matches: Mapping[str, Sequence[Match]]
    unsearchable: Collection[str] = ()

    def without(self, items: Sequence[Item]) -> list[Item]:
        """Return the items that were not found."""
        return [item for item in items if item.id not in self.matches]


def main(run: Run) -> None:
    """Answer, score and compare; raises DistillError (exit 8) if too few items are comparable."""
    from distill.evaluation.answering import answer  # which loads torch

    pairs, items = held_out_items(run.folder)
    suites = load_suites(run.config.evaluation.suites)
    overlap = find_overlap(run, items, suites)
    if not overlap.without(items):
        what = f"all {len(items)} held-out items stand in the training data"
        fix = "--redo corpus, which leaves documents with their text out"
        raise DistillError(Exit.EVALUATION, "contamination", what, fix)
    answer(run, pairs, suites)
    ask_judge(run, items, read_answers(run, items))
    measure(run, suites, overlap)


def find_overlap(run: Run, items: Sequence[Item], suites: Sequence[Suite] = ()) -> Overlap:
    """Look for the items, and those of suites, in documents, prompts and answers of training."""
    splits = [run.path(f"dataset/{split}.jsonl") for split in ("train", "validation")]
    pairs = [pair for path in splits if path.exists() for pair in read_records(path, Pair)]
    path = run.path("documents.jsonl")
    documents = read_records(path, Document) if path.exists() else []
    texts = [of_item(item) for item in items]
    for part in (part for suite in suites for part in suite.parts):
        texts += [of_item(item, part.task.student.user) for item in part.items]
    return Overlap(*flag_training(texts, documents, pairs))


def read_answers(
    run: Run, items: Sequence[Item], suite: str = ""
) -> dict[str, dict[str, Response]]:
    """Read what the models answered to the held-out items, or those of a suite, by item id."""
    folder = run.path("answers") / suite
    return {
        model: by_item(items, read_records(folder / f"{model}.jsonl", Response))
        for model in MODELS
        if not suite or (folder / f"{model}.jsonl").exists()
    }


def measure(run: Run, suites: Sequence[Suite], overlap: Overlap) -> None:
    """Score and compare what was answered, from files to files."""
    config, settings, (_, items) = run.config, run.config.evaluation, held_out_items(run.folder)
    answers, find = read_answers(run, items), tasks_of_run(run.folder)
    certainty = Certainty(
        settings.confidence, settings.bootstrap_samples, config.seed, settings.margin
    )
    rows = measure_tasks(items, answers, find)
    write_scores(run.path("scores"), answers, rows)
    clean, clean_rows = overlap.without(items), without_overlap(rows, overlap)
    clean_answers = {m: {i.id: by_id[i.id] for i in clean} for m, by_id in answers.items()}
    losses = {}
    for model in ("base", "student"):
        of_items = read_records(run.path(f"answers/readings/{model}.jsonl"), AnswerLoss)
        by_id = {item.id: loss for item, loss in zip(items, of_items, strict=True)}
        losses[model] = [by_id[item.id] for item in clean]
    judge, verdicts = read_judge(run, clean, clean_answers, certainty)
    tests = acceptance_tests(clean_rows, clean_answers, find, verdicts)
    write_records(run.path("requests.jsonl"), requests_of(clean, clean_answers, tests))
    alike = measure_agreement(clean, clean_answers)
    evaluation = EvaluationResult(
        **dict(measured_items(items, answers, rows, overlap, certainty)),
        models=read_json(run.path("answers/models.json")),
        agreement=results.agreement_of(alike, clean, losses, certainty),
        samples=tuple(results.samples(clean_rows.values(), alike, clean_answers)),
        suites={suite.name: measure_suite(run, suite, certainty, overlap) for suite in suites},
        judge=judge,
        settings=Settings(
            **certainty._asdict(),
            items=len(items),
            documents=len({item.cluster for item in items}),
            max_new_tokens=answer_limit(config),
            teacher_temperature=config.teacher.temperature,
            teacher_sees_more=any(item.prompt.teacher_messages for item in items),
        ),
        corpus=run.manifest().get("corpus", {}),
        environment=run.made_with("evaluate").get("environment", {}),
    )
    write_json(run.path("evaluation.json"), evaluation.tree())


def measure_suite(run: Run, suite: Suite, certainty: Certainty, overlap: Overlap) -> SuiteResult:
    """Score what was answered to a suite, write items and scores, and return its results."""
    answers = read_answers(run, suite.items, suite.name)
    no_teacher = why_no_teacher(run.config.teacher, suite) or ""
    rows = measure_tasks(suite.items, answers, suite.tasks.get, no_teacher)
    write_scores(run.path("scores") / suite.name, answers, rows, suite.items)
    measured = measured_items(suite.items, answers, rows, overlap, certainty)
    return SuiteResult.model_validate({**dict(measured), **suite.facts})


def without_overlap(rows: Mapping[str, Measured], overlap: Overlap) -> dict[str, Measured]:
    """Return the rows on the items that were not found; a task without any is left out."""
    clean = {task: replace(row, items=overlap.without(row.items)) for task, row in rows.items()}
    return {task: row for task, row in clean.items() if row.items}


def measured_items(
    items: Sequence[Item],
    answers: AnswersByModel,
    rows: Mapping[str, Measured],
    overlap: Overlap,
    certainty: Certainty,
) -> MeasuredItems:
    """Return the results on the items that were not found, and what was found of the others."""
    flagged = {item.id: overlap.matches[item.id] for item in items if item.id in overlap.matches}
    share = [float(item.id in flagged) for item in items]
    rate = estimate_mean(share, [item.cluster for item in items], certainty, SHARE)
    matches = [match for of_item in flagged.values() for match in of_item]
    clean = results.results_of(without_overlap(rows, overlap), certainty)
    return MeasuredItems(
        tasks=clean.tasks,
        overall=clean.overall,
        lengths={
            model: results.answer_lengths(a for i, a in by_id.items() if i not in flagged)
            for model, by_id in answers.items()
        },
        contamination=Contamination(
            n=len(items),
            flagged=len(flagged),
            unsearchable=sum(item.id in overlap.unsearchable for item in items),
            kinds={kind: sum(match.kind == kind for match in matches) for kind in KINDS},
            rate=results.difference_of(rate),
            items=tuple(sorted(flagged)),
            examples=tuple(match._asdict() for match in matches[:EXAMPLES]),
            method=NOT_FOUND,
            all_items=results.results_of(rows, certainty) if flagged else None,
        ),
    )


def acceptance_tests(
    rows: Mapping[str, Measured], answers: AnswersByModel, find: FindTask, verdicts: Sequence[Score]
) -> list[Acceptance]:
    """Return the tests of the student's answers: the judge's verdicts, then each task's checker.

    The teacher's own answer is acceptable if it passes its check, or without one is complete.
    """
    of_teacher = {i: v for row in rows.values() for i, v in row.values("teacher").items()}

    def acceptable(item: str) -> bool:
        response = answers["teacher"][item]
        complete = response.stop == "end" and bool(response.text.strip())
        return of_teacher[item] == 1 if item in of_teacher else complete

    tests = [by_judge(verdicts, acceptable)] if verdicts else []
    for name, row in rows.items():
        task = find(name)
        if task and task.checker and row.scores.get("teacher"):
            tests.append(by_checker(row, task.checker))
    return tests

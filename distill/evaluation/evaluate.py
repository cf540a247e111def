"""The stage `evaluate`: teacher, base (the student before training) and student on the same items.

All that needs a model is done first and written below `answers/` and `timings/`; from these files
alone `measure` makes `scores/<model>.jsonl`, `requests.jsonl` and `evaluation.json`, so that
`distill verify` can make them again and compare every byte. Results are those of the items that are
not in the training data; those of all items stand beside them.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from distill.config.tree import Config
from distill.corpus.contamination import KINDS, NOT_FOUND, Match, flag_training, of_item
from distill.errors import DistillError, Exit
from distill.evaluation import results
from distill.evaluation.judge import ask_judge, by_judge, read_judge
from distill.evaluation.measurements import (
    MODELS,
    Contamination,
    EvaluationResult,
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
    measure_task,
    requests_of,
    score_suite,
)
from distill.evaluation.statistics import Certainty, estimate_mean
from distill.evaluation.suites import (
    Suite,
    answer_limit,
    by_item,
    held_out_items,
    load_suites,
    why_no_teacher,
    write_scores,
)
from distill.records import AnswerLoss, Document, Item, Pair, Response, Score
from distill.storage.files import read_json, read_records, write_json, write_records
from distill.storage.run_folder import Run
from distill.tasks.checkers import needs_reference
from distill.tasks.task import FindTask, tasks_of_run

EXAMPLES = 5  # of matches in evaluation.json
T = TypeVar("T")


def main(config: Config, run: Run) -> None:
    """Answer, score and compare; raises DistillError (exit 8) if too few items are comparable."""
    from distill.evaluation.answering import answer  # which loads torch

    pairs, items = held_out_items(run)
    suites = load_suites(config.evaluation.suites)
    overlap = find_overlap(run, items, suites)
    if all(item.id in overlap for item in items):
        what = f"all {len(items)} held-out items stand in the training data"
        fix = "--redo corpus, which leaves documents with their text out"
        raise DistillError(Exit.EVALUATION, "contamination", what, fix)
    answer(config, run, pairs, suites)
    ask_judge(config, run, items, read_answers(run, items))
    measure(config, run, suites, overlap)


@dataclass(frozen=True)
class Overlap:
    """Where the training data holds items, by item id; and those without words to search for."""

    matches: Mapping[str, Sequence[Match]]
    unsearchable: Collection[str]

    def __contains__(self, item: str) -> bool:
        return item in self.matches

    def without(self, rows: Mapping[str, Measured]) -> dict[str, Measured]:
        """Return the rows on the items that were not found; a task without any is left out."""
        clean = {}
        for task, row in rows.items():
            items = tuple(item for item in row.items if item.id not in self)
            scores = {
                model: [score for score in of_model if score.item_id not in self]
                for model, of_model in row.scores.items()
            }
            if items:
                clean[task] = replace(row, items=items, scores=scores)
        return clean

    def clean(self, items: Sequence[Item], values: Iterable[T]) -> list[T]:
        """Return those of the values, given in the order of the items, whose item was not found."""
        return [value for item, value in zip(items, values, strict=True) if item.id not in self]


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


def contamination(
    items: Sequence[Item], overlap: Overlap, rows: Mapping[str, Measured], certainty: Certainty
) -> Contamination:
    """Return how many items stand in the training data, by kind, examples, and results on all."""
    flagged = {item.id: overlap.matches[item.id] for item in items if item.id in overlap}
    share = [float(item.id in flagged) for item in items]
    rate = estimate_mean(share, [item.cluster for item in items], certainty, SHARE)
    matches = [match for of_item in flagged.values() for match in of_item]
    return Contamination(
        n=len(items),
        flagged=len(flagged),
        unsearchable=sum(item.id in overlap.unsearchable for item in items),
        kinds={kind: sum(match.kind == kind for match in matches) for kind in KINDS},
        rate=results.difference_of(rate),
        items=tuple(sorted(flagged)),
        examples=tuple(match._asdict() for match in matches[:EXAMPLES]),
        method=NOT_FOUND,
        all_items=results.results_of(rows, certainty) if flagged else None,
    )


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


def measure(config: Config, run: Run, suites: Sequence[Suite], overlap: Overlap) -> None:
    """Score and compare what was answered, from files to files."""
    _, items = held_out_items(run)
    answers, settings, find = read_answers(run, items), config.evaluation, tasks_of_run(run.folder)
    certainty = Certainty(
        settings.confidence, settings.bootstrap_samples, config.seed, settings.margin
    )
    rows = measure_held_out(items, answers, find)
    for model in answers:
        scores = [s for row in rows.values() for s in row.scores.get(model, [])]
        write_records(run.path(f"scores/{model}.jsonl"), scores)
    clean, clean_rows = overlap.clean(items, items), overlap.without(rows)
    clean_answers = {m: {i.id: by_id[i.id] for i in clean} for m, by_id in answers.items()}
    paths = {m: run.path(f"answers/readings/{m}.jsonl") for m in ("base", "student")}
    losses = {m: overlap.clean(items, read_records(paths[m], AnswerLoss)) for m in paths}
    judge, verdicts = read_judge(config, run, clean, clean_answers, certainty)
    tests = acceptance_tests(clean_rows, clean_answers, find, verdicts)
    write_records(run.path("requests.jsonl"), requests_of(clean, clean_answers, tests))
    comparison = results.results_of(clean_rows, certainty)
    alike = measure_agreement(clean, clean_answers)
    evaluation = EvaluationResult(
        models=read_json(run.path("answers/models.json")),
        tasks=comparison.tasks,
        overall=comparison.overall,
        agreement=results.agreement_of(alike, clean, losses, certainty),
        lengths={m: results.answer_lengths(a.values()) for m, a in clean_answers.items()},
        samples=tuple(results.samples(clean_rows.values(), alike, clean_answers)),
        contamination=contamination(items, overlap, rows, certainty),
        suites={s.name: measure_suite(config, run, s, certainty, overlap) for s in suites},
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


def measure_held_out(
    items: Sequence[Item], answers: AnswersByModel, find: FindTask
) -> dict[str, Measured]:
    """Score each task: by its checker where it has one and what that needs, else by agreement."""
    rows = {}
    for name in dict.fromkeys(item.task for item in items):
        task = find(name)
        checker = task.checker if task else None
        if checker and needs_reference(checker["kind"]):
            referenced = any(item.reference for item in items if item.task == name)
            checker = checker if referenced else None
        metric = (task and task.metric) or ""
        rows[name] = measure_task(name, items, answers, metric, checker)
    return rows


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


def measure_suite(
    config: Config, run: Run, suite: Suite, certainty: Certainty, overlap: Overlap
) -> SuiteResult:
    """Score what was answered to a suite, write items and scores, and return its results."""
    answers = read_answers(run, suite.items, suite.name)
    no_teacher = why_no_teacher(config.teacher, suite) or ""
    rows = score_suite(suite, answers, no_teacher)
    scores = {model: [s for row in rows.values() for s in row.scores[model]] for model in answers}
    write_scores(run.folder, suite, scores)
    comparison = results.results_of(overlap.without(rows), certainty)
    lengths = {
        model: results.answer_lengths(a for i, a in by_id.items() if i not in overlap)
        for model, by_id in answers.items()
    }
    return SuiteResult(
        **suite.facts,
        tasks=comparison.tasks,
        overall=comparison.overall,
        lengths=lengths,
        contamination=contamination(suite.items, overlap, rows, certainty),
    )

"""The stage `evaluate`: teacher, base (the student before training) and student on the same items.

All that needs a model is done first and written below `answers/` and `timings/`; from these files
alone `measure` makes scores and results, so that `distill verify` can make them again and compare
every byte. Results are of the items that are not in the training data, and beside them of all.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from distill.corpus.contamination import KINDS, NOT_FOUND, Match, flag_training, of_item
from distill.errors import DistillError, Exit
from distill.evaluation import measurements, results, scorers
from distill.evaluation.judge import ask_judge, read_judge
from distill.evaluation.measurements import MODELS, TRIES, Difference
from distill.evaluation.scorers import SHARE, AnswersByModel, Measured
from distill.evaluation.statistics import Certainty, Estimate, estimate_difference, estimate_mean
from distill.evaluation.suites import Suite, by_item, held_out_items, load_suites, why_no_teacher
from distill.evaluation.tries import choose, tries_result
from distill.records import AnswerLoss, Document, Item, Pair, Response, digest
from distill.storage.files import read_json, read_records, write_json, write_records
from distill.storage.run_folder import Run
from distill.tasks.scoring import answer_limit, score_answer
from distill.tasks.task import checker_of, tasks_of_run

EXAMPLES = 5  # of matches in evaluation.json


class Overlap(NamedTuple):
    """Where the training data holds items, by item id; and those without words to search for."""

    matches: Mapping[str, Sequence[Match]]
    unsearchable: Collection[str] = ()

    def without(self, items: Sequence[Item]) -> list[Item]:
        """Return the items that were not found."""
        return [item for item in items if item.id not in self.matches]

    def clean(self, rows: Mapping[str, Measured]) -> dict[str, Measured]:
        """Return the rows on the items that were not found; a task without any is left out."""
        clean = {task: replace(row, items=self.without(row.items)) for task, row in rows.items()}
        return {task: row for task, row in clean.items() if row.items}


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
    # What is asked and what is right, whatever the teacher says, and the training it is read after
    parts = [i.prompt.model_dump(mode="json", include={"messages", "reference"}) for i in items]
    trained = run.made_with("refine" if run.config.refines else "train").get("marker")
    opening = [digest(sorted(map(digest, parts))), trained]
    before = [other for other in run.manifest().get("heldout_opened", []) if other != opening]
    run.note("heldout_opened", [*before, opening])
    answer(run, pairs, suites)
    ask_judge(run, items, read_answers(run, items))
    measure(run, suites, overlap)
    if recipe := read_json(run.path("evaluation.json")).get("recipe"):
        run.note("recipe", {**run.manifest()["recipe"], **recipe})


def find_overlap(run: Run, items: Sequence[Item], suites: Sequence[Suite] = ()) -> Overlap:
    """Look for the items, and those of suites, in documents, prompts and answers of training."""
    paths = [run.path(f"dataset/{split}.jsonl") for split in ("train", "validation")]
    if run.config.train.self_answers:  # the last holds those of all rounds
        paths += sorted(run.folder.glob("refined/self-*/dataset/train.jsonl"))[-1:]
    pairs = [pair for path in paths if path.exists() for pair in read_records(path, Pair)]
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
    paths = {model: run.path("answers") / suite / f"{model}.jsonl" for model in MODELS}
    return {
        model: by_item(items, read_records(path, Response))
        for model, path in paths.items()
        if not suite or path.exists()
    }


def measure(run: Run, suites: Sequence[Suite], overlap: Overlap) -> None:
    """Score and compare what was answered, from files to files."""
    config, settings, (_, items) = run.config, run.config.evaluation, held_out_items(run.folder)
    answers = read_answers(run, items)
    certainty = Certainty(
        settings.confidence, settings.bootstrap_samples, config.seed, settings.margin
    )
    rows = scorers.measure_tasks(items, answers, tasks_of_run(run.folder))
    scorers.write_scores(run.path("scores"), answers, rows)
    clean, clean_rows = overlap.without(items), overlap.clean(rows)
    losses = {}
    for model in ("base", "student"):
        of_items = read_records(run.path(f"answers/readings/{model}.jsonl"), AnswerLoss)
        losses[model] = {item.id: loss for item, loss in zip(items, of_items, strict=True)}
    judge, verdicts = read_judge(run, clean, answers, certainty)
    tries, choices = None, {}
    if settings.tries:
        by_try = read_records(run.path("answers/tries.jsonl"), Response)
        of_tries, choices = choose(rows, by_try)
        scorers.write_scores(run.path("scores"), [TRIES], of_tries)
        tries = tries_result(settings.tries, overlap.clean(of_tries), certainty)
    with_tries = {**answers, TRIES: choices}
    requests = scorers.requests_of(clean, with_tries, clean_rows.values(), verdicts)
    recipe = measure_recipe(run, clean, answers, certainty)
    write_records(run.path("requests.jsonl"), requests)
    alike = scorers.measure_items(clean, answers)
    evaluation = measurements.EvaluationResult(
        **dict(measured_items(items, answers, rows, overlap, certainty)),
        models=read_json(run.path("answers/models.json")),
        agreement=results.agreement_of(alike, clean, losses, certainty),
        samples=tuple(results.samples(clean_rows.values(), alike, answers)),
        suites={suite.name: measure_suite(run, suite, certainty, overlap) for suite in suites},
        judge=judge,
        tries=tries,
        recipe=recipe,
        settings=measurements.Settings(
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


def measure_recipe(
    run: Run, items: Sequence[Item], answers: AnswersByModel, certainty: Certainty
) -> measurements.RecipeResult | None:
    """Return what a search chose, and how it compares with its default on the held-out items."""
    if run.config.recipe.mode == "off":
        return None
    recipe, manifest = read_json(run.path("recipe.json")), run.manifest()
    find, path = tasks_of_run(run.folder), run.path("answers/default.jsonl")
    kept = recipe["chosen"] == "default"
    heldout = Estimate.unknown(f"The default {'was kept' if kept else 'diverged'}")
    if path.exists():
        by_id = by_item(held_out_items(run.folder)[1], read_records(path, Response))
        pairs = [(item, checker_of(find(item.task), item.prompt)) for item in items]
        pairs = [(item, checker) for item, checker in pairs if checker]
        sides = [
            [score_answer(item, by[item.id], "", checker).value or 0.0 for item, checker in pairs]
            for by in (answers["student"], by_id)
        ]
        clusters = [item.cluster for item, _ in pairs]
        heldout = estimate_difference(sides[0], sides[1], clusters, certainty, SHARE)
    row = next(row for row in recipe["ladder"] if row["trial"] == recipe["chosen"])
    validation = Estimate.model_validate(row["difference"])
    opened = [items for items, _ in manifest["heldout_opened"]]  # the last are these
    entries = run.ledger.entries()[manifest["recipe"]["ledger_before"] :]
    entries = [entry for entry in entries if entry.stage == "recipe"]
    return measurements.RecipeResult(
        chosen=recipe["chosen"],
        trials=recipe["trials"],
        tokens=sum(entry.input_tokens + entry.output_tokens for entry in entries),
        seconds=sum(entry.seconds for entry in entries),
        openings=opened.count(opened[-1]),
        validation=Difference.of(validation),
        heldout=Difference.of(heldout),
        optimism=None if heldout.value is None else (validation.value or 0.0) - heldout.value,
    )


def measure_suite(
    run: Run, suite: Suite, certainty: Certainty, overlap: Overlap
) -> measurements.SuiteResult:
    """Score what was answered to a suite, write items and scores, and return its results."""
    answers = read_answers(run, suite.items, suite.name)
    no_teacher = why_no_teacher(run.config.teacher, suite) or ""
    rows = scorers.measure_tasks(suite.items, answers, suite.tasks.get, no_teacher)
    scorers.write_scores(run.path("scores") / suite.name, answers, rows, suite.items)
    measured = measured_items(suite.items, answers, rows, overlap, certainty)
    return measurements.SuiteResult.model_validate({**dict(measured), **suite.facts})


def measured_items(
    items: Sequence[Item],
    answers: AnswersByModel,
    rows: Mapping[str, Measured],
    overlap: Overlap,
    certainty: Certainty,
) -> measurements.Results:
    """Return the results on the items that were not found, and what was found of the others."""
    flagged = {item.id: overlap.matches[item.id] for item in items if item.id in overlap.matches}
    share = [float(item.id in flagged) for item in items]
    rate = estimate_mean(share, [item.cluster for item in items], certainty, SHARE)
    matches = [match for of_item in flagged.values() for match in of_item]
    contamination = measurements.Contamination(
        n=len(items),
        flagged=len(flagged),
        unsearchable=sum(item.id in overlap.unsearchable for item in items),
        kinds={kind: sum(match.kind == kind for match in matches) for kind in KINDS},
        rate=Difference.of(rate),
        items=tuple(sorted(flagged)),
        examples=tuple(match._asdict() for match in matches[:EXAMPLES]),
        method=NOT_FOUND,
        all_items=results.results_of(rows, certainty) if flagged else None,
    )
    lengths = {
        model: results.answer_lengths(a for i, a in by_id.items() if i not in flagged)
        for model, by_id in answers.items()
    }
    clean = results.results_of(overlap.clean(rows), certainty)
    return clean.model_copy(update={"lengths": lengths, "contamination": contamination})

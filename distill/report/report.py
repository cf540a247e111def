"""The stage `report`: `scorecard.json`, `scorecard.md` and `report.html`, from what evaluation wrote.

Loads no model and asks nothing, so it can be made again at any time (`distill report RUN`); the same inputs give the
same bytes.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from distill.config import Config
from distill.economics.run_economics import money_of
from distill.evaluation import lm_eval
from distill.evaluation.failures import bare, failures, withheld
from distill.evaluation.measurements import Comparison, EvaluationResult
from distill.evaluation.scorecard import Funnel, Scorecard, TrainingSummary
from distill.formatting import duration, markdown_table, money, share
from distill.report import tables
from distill.report.headline import answer, compared, of_judge
from distill.report.page import grouped, page, prices
from distill.report.sources import sources
from distill.report.statement import saving_rows, sensitivity_rows, statement
from distill.storage.files import read_json, write_atomic, write_json
from distill.storage.run_folder import Run

REUSED = 0.01  # of the teacher's answers: more than that is worth a word
NAMED = 6  # places of the scorecard that are named for one reason


def main(config: Config, run: Run) -> None:
    """Write the scorecard and the report; raises DistillError (exit 5) where an input is missing or damaged."""
    training = read_training(config, run)
    evaluation = EvaluationResult.model_validate(read_json(run.path("evaluation.json")))
    tree = scorecard(config, run, evaluation, training).tree()
    card = Scorecard.model_validate(
        tree
    )  # rounded as it is written, so that a later reading says the same
    write_json(run.path("scorecard.json"), tree)
    write_atomic(run.path("scorecard.md"), markdown(card))
    samples = () if withheld(config.corpus.private_text) else evaluation.samples
    write_atomic(run.path("report.html"), page(card, samples, training))
    run.note("sources", sources(run.folder))


def read_training(config: Config, run: Run) -> dict[str, Any]:
    """Return what the training says of itself, with a row a round where the student was refined after it."""
    training = read_json(run.path("training.json"))
    if not config.on_policy.rounds:
        return training
    refined = read_json(run.trained("training.json"))
    sha256, rounds = refined["adapter_sha256"], refined["rounds"]
    return {**training, "adapter_sha256": sha256, "on_policy": rounds}


def scorecard(
    config: Config, run: Run, evaluation: EvaluationResult, training: Mapping[str, Any]
) -> Scorecard:
    """Gather everything that the scorecard states."""
    private = config.corpus.private_text
    worst = failures(evaluation.samples, private)
    if withheld(private):
        evaluation = bare(evaluation)
    cost, economics = money_of(config, run, evaluation.overall)
    validation = [row["loss"] for row in training.get("validation", [])]
    summary = {
        **{key: value for key, value in training.items() if key in TrainingSummary.model_fields},
        "validation_loss_first": validation[0] if validation else None,
        "validation_loss_best": min(validation, default=None),
    }
    student = evaluation.models["student"]
    comparison = {name: getattr(evaluation, name) for name in Comparison.model_fields}
    settings = {"settings": evaluation.settings}
    comparison["environment"] = evaluation.environment.model_copy(update=settings)
    card = Scorecard(
        **comparison,
        name=config.name,
        cost=cost,
        economics=economics,
        failures=worst,
        external=lm_eval.of_this_student(run, student.adapter_sha256),
        funnel=Funnel.model_validate(read_json(run.path("funnel.json"))),
        training=TrainingSummary.model_validate(summary),
    )
    return card.model_copy(update={"reasons": dict(reasons(card.tree()))})


def reasons(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path and the reason of everything that is null."""
    if isinstance(tree, Mapping):
        if tree.get("reason"):
            yield path, tree["reason"]
        for key, reason in (tree.get("reasons") or {}).items():
            yield f"{path}.{key}", reason
        for key, value in tree.items():
            yield from reasons(value, f"{path}.{key}" if path else str(key))


def markdown(card: Scorecard) -> str:
    """Write the scorecard as text that reads well on a terminal and as Markdown."""
    title = f"# {card.name}: scorecard"
    return "\n\n".join([title, *(text for text in parts(card).values() if text)]) + "\n"


def parts(card: Scorecard) -> dict[str, str]:
    """Return the parts of the scorecard's text by name, those that an old scorecard lacks empty."""
    sections = [f"{label}: {text}" for label, text in answer(card).items()]
    apart = any(cost.per_million for cost in (card.cost.teacher, card.cost.student))
    return {
        "compared": f"Compared: {compared(card)}",
        "answer": "\n\n".join(sections),
        "quality": markdown_table(*tables.quality_rows(card)),
        "cost": markdown_table(*tables.cost_rows(card)),
        "made": made(card),
        "tokens": markdown_table(*tables.token_rows(card.cost)) if apart else "",
        "saves": savings_part(card),
        "judge": judge_part(card),
        "external": markdown_table(*lm_eval.table_of(card.external)) if card.external else "",
        "notes": notes(card),
    }


def made(card: Scorecard) -> str:
    """Say what making the student took, and what an earlier run had paid for already."""
    spent = card.cost.distillation
    reused = (
        f" {share(spent.reused)} of the teacher's answers were stored before, and are not in it."
    )
    return (
        f"Making and measuring the student took {duration(spent.seconds)} "
        f"and cost {money(spent.dollars)}.{reused if spent.reused > REUSED else ''}"
    )


def savings_part(card: Scorecard) -> str:
    """Return what the student saves with its tables: the three ways, and what could change the headline."""
    if not card.economics:
        return ""
    lines = statement(card.economics, card.confidence)
    shown = (saving_rows(card.economics), sensitivity_rows(card.economics))
    return "\n\n".join(["## What it saves", *lines, *(markdown_table(*each) for each in shown)])


def judge_part(card: Scorecard) -> str:
    """Return what the judge preferred, or why it is not used, and what it made of its probes."""
    if not card.judge:
        return ""
    duels = [tables.judge_rows(card.judge)] if card.judge.probe.passed else []
    shown = [*duels, tables.probe_rows(card.judge.probe)]
    sentences = " ".join(of_judge(card.judge, card.confidence))
    return "\n\n".join([sentences, *(markdown_table(*each) for each in shown)])


def notes(card: Scorecard) -> str:
    """Say what the figures are, where prices come from, and why something is missing."""
    corpus = card.corpus
    lines = [
        f"Intervals: {share(card.confidence)}, paired on the same items, clustered by document.",
        f"Corpus {str(corpus.corpus_sha256)[:12]}, Python {corpus.python}.",
        tables.contamination_sentence(card.contamination, card.overall),
        *(f"Price: {price}." for price in prices(card)),
    ]
    for reason, paths in grouped(card.reasons):
        more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
        lines.append(f"Not given: {', '.join(paths[:NAMED])}{more}: {reason}.")
    return "\n".join(f"- {line}" for line in lines if line)

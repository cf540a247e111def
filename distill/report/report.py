"""The stage `report`: scorecard.json, scorecard.md and report.html, from what evaluation wrote.

Loads no model and asks nothing, so it can be made again at any time (`distill report RUN`); the
same inputs give the same bytes.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from distill.config.tree import Config
from distill.economics.run_economics import money_of
from distill.evaluation import lm_eval
from distill.evaluation.measurements import Comparison, EvaluationResult
from distill.evaluation.results import bare, failures, withheld
from distill.evaluation.scorecard import Funnel, Scorecard, TrainingSummary
from distill.report.page import page
from distill.report.render import parts
from distill.report.sources import sources
from distill.storage.files import read_json, write_atomic, write_json
from distill.storage.run_folder import Run


def main(config: Config, run: Run) -> None:
    """Write the scorecard and the report; raises DistillError (exit 5) for a damaged input."""
    training = read_json(run.path("training.json"))
    if config.on_policy.rounds:  # the student was refined after training
        refined = read_json(run.trained("training.json"))
        sha256, rounds = refined["adapter_sha256"], refined["rounds"]
        training = {**training, "adapter_sha256": sha256, "on_policy": rounds}
    evaluation = EvaluationResult.model_validate(read_json(run.path("evaluation.json")))
    tree = scorecard(config, run, evaluation, training).tree()
    card = Scorecard.model_validate(tree)  # rounded as it is written: a later reading says the same
    write_json(run.path("scorecard.json"), tree)
    text = "\n\n".join(part for part in parts(card).values() if part)
    write_atomic(run.path("scorecard.md"), f"{text}\n")
    samples = () if withheld(config.corpus.private_text) else evaluation.samples
    write_atomic(run.path("report.html"), page(card, samples, training))
    run.note("sources", sources(run.folder))


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

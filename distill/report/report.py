"""The stage `report`: scorecard.json, scorecard.md and report.html, from what evaluation wrote.

Loads no model and asks nothing, so it can be made again at any time (`distill report RUN`); the
same inputs give the same bytes. The page is one self-contained file; its template escapes whatever
comes from a model, a corpus or a config.
"""

from collections.abc import Iterator
from functools import partial

from distill import formatting
from distill.economics.run_economics import money_of
from distill.evaluation import lm_eval
from distill.evaluation.measurements import MODELS, EvaluationResult
from distill.evaluation.results import bare, failures
from distill.evaluation.scorecard import Failures, Funnel, HarnessResult, Scorecard, TrainingSummary
from distill.report import plots
from distill.report.render import environment, parts
from distill.report.tables import WAYS
from distill.storage.files import read_json, sha256_files, write_atomic, write_json
from distill.storage.run_folder import Run

MAX_SAMPLE = 6000  # characters shown of one text
WITHHELD = "corpus.private_text is keep: samples could hold private text, so they are left out"


def main(run: Run) -> None:
    """Write the scorecard and the report; raises DistillError (exit 5) for a damaged input."""
    config, harness = run.config, run.path(lm_eval.FILE)
    training = read_json(run.path("training.json"))
    if config.refines:
        refined = read_json(run.trained("training.json"))
        refined |= {"on_policy": rounds} if (rounds := refined.pop("rounds")) else {}
        training |= refined
    evaluation = EvaluationResult.model_validate(read_json(run.path("evaluation.json")))
    samples, worst = evaluation.samples, failures(evaluation.samples)
    if config.corpus.private_text == "keep":
        samples, worst = None, Failures(worst=(), reason=WITHHELD)
        evaluation = bare(evaluation)
    external = HarnessResult.model_validate(read_json(harness)) if harness.is_file() else None
    if external and external.adapter_sha256 != evaluation.models["student"].adapter_sha256:
        external = None  # of another student
    cost, economics = money_of(run, evaluation.overall)
    train, validation = (
        [(row["step"], row["loss"]) for row in training.get(key, []) if "loss" in row]
        for key in ("history", "validation")
    )
    rows = [row for row in training.get("validation", []) if "checker" in row]
    shares = [(row["step"], row["checker"]) for row in rows]
    summary = {
        **{key: value for key, value in training.items() if key in TrainingSummary.model_fields},
        "validation_loss_first": validation[0][1] if validation else None,
        "validation_loss_best": min((loss for _, loss in validation), default=None),
    }
    if rows:
        summary["validation_prompts"] = rows[0]["n"]
        summary["validation_right"] = max(row["checker"] for row in rows)
    settings = {"settings": evaluation.settings}
    made_with = {"environment": evaluation.environment.model_copy(update=settings)}
    card = Scorecard(
        **{**dict(evaluation), **made_with},  # of which it ignores what it has no field for
        name=config.name,
        cost=cost,
        economics=economics,
        failures=worst,
        external=external,
        funnel=Funnel.model_validate(read_json(run.path("funnel.json"))),
        training=TrainingSummary.model_validate(summary),
    )
    tree = card.tree() | {"reasons": dict(reasons(card.tree()))}
    card = Scorecard.model_validate(tree)  # rounded as it is written: a later reading says the same
    template = environment(markdown=False).get_template("report.html.j2")
    page = template.render(
        card=card,
        models=MODELS,
        ways=WAYS,
        economics=card.economics,
        marks=plots.marks,
        samples=samples,
        clip=partial(formatting.clip, most=MAX_SAMPLE),
        ticks=plots.ticks,
        cost_plot=plots.quality_against_cost(card),
        curve=plots.training_curve(train, validation),
        checks=plots.checks_curve(shares),
    )
    write_json(run.path("scorecard.json"), tree)
    text = "\n\n".join(part for part in parts(card).values() if part)
    write_atomic(run.path("scorecard.md"), f"{text}\n")
    write_atomic(run.path("report.html"), page)
    # no stage's marker has the hash of what another harness measured
    measured = sha256_files(run.folder, [lm_eval.FILE])
    run.note("sources", {"external": {"evaluate --lm-eval": measured}} if measured else {})


def reasons(tree: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path and the reason of everything that is null."""
    if isinstance(tree, dict):
        if tree.get("reason"):
            yield path, tree["reason"]
        for key, reason in (tree.get("reasons") or {}).items():
            yield f"{path}.{key}", reason
        for key, value in tree.items():
            yield from reasons(value, f"{path}.{key}" if path else str(key))

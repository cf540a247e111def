"""The stage `report`: scorecard.json, scorecard.md and report.html, from what evaluation wrote.

Loads no model and asks nothing, so it can be made again at any time (`distill report RUN`); the
same inputs give the same bytes. Where every number of the scorecard comes from stands in the
manifest under `sources`, as `part -> stage -> file -> SHA-256`.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

from distill.economics.run_economics import money_of
from distill.evaluation import lm_eval
from distill.evaluation.measurements import EvaluationResult
from distill.evaluation.results import bare, failures
from distill.evaluation.scorecard import Failures, Funnel, Scorecard, TrainingSummary
from distill.report.page import page
from distill.report.render import parts
from distill.storage.files import read_json, sha256_files, write_atomic, write_json
from distill.storage.run_folder import Run

Files = Mapping[str, Sequence[str]]  # stage -> files and folders

ITEMS: Files = {
    "corpus": ("documents.jsonl",),
    "prompts": ("tasks.json",),
    "filter": ("dataset/heldout.jsonl",),
}
QUALITY: Files = {**ITEMS, "evaluate": ("answers", "scores", "evaluation.json")}
MONEY: Files = {
    "generate": ("responses.jsonl",),
    "evaluate": ("requests.jsonl", "timings", "evaluation.json"),
    "report": ("prices.json",),
    "all": ("ledger.jsonl",),  # as it was when the report began
}
SOURCES: dict[str, Files] = {  # a part of the scorecard that is not listed here fails a test
    "name": {},
    "models": {
        "train": ("adapter",),
        "refine": ("refined/adapter",),
        "evaluate": ("answers/models.json",),
    },
    **dict.fromkeys(("tasks", "overall", "agreement", "lengths", "suites", "failures"), QUALITY),
    "judge": {**ITEMS, "evaluate": ("answers", "evaluation.json")},
    "contamination": {
        **QUALITY,
        "filter": ("dataset/train.jsonl", "dataset/validation.jsonl", "dataset/heldout.jsonl"),
    },
    "external": {"evaluate --lm-eval": (lm_eval.FILE,)},
    "cost": MONEY,
    "economics": MONEY,
    "corpus": {"corpus": ("documents.jsonl", "rejects.jsonl")},
    "funnel": {"filter": ("funnel.json",)},
    "training": {"train": ("training.json",), "refine": ("refined/training.json",)},
    "environment": {"evaluate": ("evaluation.json",)},
    "reasons": {},  # beside what they explain
}

WITHHELD = "corpus.private_text is keep: samples could hold private text, so they are left out"


def main(run: Run) -> None:
    """Write the scorecard and the report; raises DistillError (exit 5) for a damaged input."""
    config = run.config
    training = read_json(run.path("training.json"))
    if config.on_policy.rounds:  # the student was refined after training
        refined = read_json(run.trained("training.json"))
        sha256, rounds = refined["adapter_sha256"], refined["rounds"]
        training = {**training, "adapter_sha256": sha256, "on_policy": rounds}
    evaluation = EvaluationResult.model_validate(read_json(run.path("evaluation.json")))
    samples, worst = evaluation.samples, failures(evaluation.samples)
    if config.corpus.private_text == "keep":
        samples, worst = None, Failures(worst=(), reason=WITHHELD)
        evaluation = bare(evaluation)
    cost, economics = money_of(run, evaluation.overall)
    validation = [row["loss"] for row in training.get("validation", [])]
    summary = {
        **{key: value for key, value in training.items() if key in TrainingSummary.model_fields},
        "validation_loss_first": validation[0] if validation else None,
        "validation_loss_best": min(validation, default=None),
    }
    student = evaluation.models["student"]
    settings = {"settings": evaluation.settings}
    environment = {"environment": evaluation.environment.model_copy(update=settings)}
    card = Scorecard(
        **{**dict(evaluation), **environment},  # of which it ignores what it has no field for
        name=config.name,
        cost=cost,
        economics=economics,
        failures=worst,
        external=lm_eval.of_this_student(run, student.adapter_sha256),
        funnel=Funnel.model_validate(read_json(run.path("funnel.json"))),
        training=TrainingSummary.model_validate(summary),
    )
    tree = card.tree() | {"reasons": dict(reasons(card.tree()))}
    card = Scorecard.model_validate(tree)  # rounded as it is written: a later reading says the same
    write_json(run.path("scorecard.json"), tree)
    text = "\n\n".join(part for part in parts(card).values() if part)
    write_atomic(run.path("scorecard.md"), f"{text}\n")
    write_atomic(run.path("report.html"), page(card, samples, training))
    run.note("sources", sources(run.folder))


def reasons(tree: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path and the reason of everything that is null."""
    if isinstance(tree, dict):
        if tree.get("reason"):
            yield path, tree["reason"]
        for key, reason in (tree.get("reasons") or {}).items():
            yield f"{path}.{key}", reason
        for key, value in tree.items():
            yield from reasons(value, f"{path}.{key}" if path else str(key))


def sources(folder: Path) -> dict[str, dict[str, dict[str, str]]]:
    """Return the hashes of a run's files by part and stage; missing files are left out."""
    hashed = cache(partial(sha256_files, folder))
    return {
        part: {stage: row for stage, files in stages.items() if (row := hashed(files))}
        for part, stages in SOURCES.items()
    }

"""The stage `report`: `scorecard.json`, `scorecard.md` and `report.html`, from what evaluation wrote.

Loads no model and asks nothing, so it can be made again at any time (`python eval/report.py RUN`); the same inputs
give the same bytes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distill.config import Config
from distill.economics.run_economics import accounts
from distill.evaluation import lm_eval
from distill.evaluation.failures import bare, failures, withheld
from distill.formatting import duration, markdown_table, money, share
from distill.records import Scorecard
from distill.report import tables as rows
from distill.report.headline import answer, compared, of_judge
from distill.report.page import grouped, page
from distill.report.sources import sources
from distill.report.statement import (
    sensitivity_rows,
    statement,
    surplus_rows,
    token_rows,
)
from distill.storage.files import read_json, write_atomic, write_json
from distill.storage.run_folder import Run

REUSED = 0.01  # of the teacher's answers: more than that is worth a word
NAMED = 6  # places of the scorecard that are named for one reason
SUMMARY = (
    "steps",
    "best_step",
    "examples",
    "tokens",
    "seconds",
    "tokens_per_second",
    "dtype",
    "adapter_sha256",
)


def main(config: Config, run: Run) -> None:
    """Write the scorecard and the report; raises DistillError (exit 5) where an input is missing or damaged."""
    training = read_training(config, run)
    evaluation = read_json(run.path("evaluation.json"))
    funnel = read_json(run.path("funnel.json"))
    card = scorecard(config, run, evaluation, training, funnel).model_dump(mode="json")
    write_json(run.path("scorecard.json"), card)
    write_atomic(run.path("scorecard.md"), markdown(card))
    samples = [] if withheld(config.corpus.private_text) else evaluation["samples"]
    write_atomic(run.path("report.html"), page(card, samples, training))
    run.note("sources", sources(run.folder))


def read_training(config: Config, run: Run) -> dict[str, Any]:
    """Return what the training says of itself, with a row a round where the student was refined after it."""
    training = read_json(run.path("training.json"))
    if not config.on_policy.rounds:
        return training
    refined = read_json(run.trained("training.json"))
    kept = ("answers", "ended", "steps", "tokens", "seconds")
    rounds = [{key: each[key] for key in kept} for each in refined["rounds"]]
    return {**training, "adapter_sha256": refined["adapter_sha256"], "on_policy": rounds}


def scorecard(
    config: Config,
    run: Run,
    evaluation: Mapping[str, Any],
    training: Mapping[str, Any],
    funnel: Mapping[str, Any],
) -> Scorecard:
    """Gather everything that the scorecard states."""
    if withheld(config.corpus.private_text):
        evaluation = {**bare(evaluation), "samples": []}
    parts = {
        "models": evaluation["models"],
        "tasks": evaluation["tasks"],
        "overall": evaluation["overall"],
        "agreement": evaluation["agreement"],
        "suites": evaluation.get("suites", {}),
        "judge": evaluation.get("judge") or {},
        **accounts(config, run, evaluation["overall"]),
    }
    validation = [row["loss"] for row in training.get("validation", [])]
    return Scorecard(
        name=config.name,
        **parts,
        lengths=evaluation["lengths"],
        contamination=evaluation.get("contamination", {}),
        failures=failures(evaluation["samples"], config.corpus.private_text),
        external=lm_eval.of_this_student(
            run, evaluation["models"]["student"].get("adapter_sha256")
        ),
        corpus=evaluation["corpus"],
        funnel=dict(funnel),
        training={
            **{key: training.get(key) for key in SUMMARY},
            "validation_loss_first": validation[0] if validation else None,
            "validation_loss_best": min(validation, default=None),
            **{key: training[key] for key in ("loss", "labels", "on_policy") if key in training},
        },
        environment={**evaluation["environment"], "settings": evaluation["settings"]},
        reasons=dict(reasons(parts)),
    )


def reasons(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path and the reason of everything that is null."""
    if isinstance(tree, Mapping):
        if tree.get("reason"):
            yield path, tree["reason"]
        for key, reason in (tree.get("reasons") or {}).items():
            yield f"{path}.{key}", reason
        for key, value in tree.items():
            yield from reasons(value, f"{path}.{key}" if path else str(key))


def markdown(card: Mapping[str, Any]) -> str:
    """Write the scorecard as text that reads well on a terminal and as Markdown."""
    title = f"# {card['name']}: scorecard"
    return "\n\n".join([title, *(text for text in parts(card).values() if text)]) + "\n"


def parts(card: Mapping[str, Any]) -> dict[str, str]:
    """Return the parts of the scorecard's text by name, those that an old scorecard lacks empty."""
    cost, found = card["cost"], card.get("economics")
    judge, confidence = card.get("judge"), card["environment"]["settings"]["confidence"]
    said = [f"{label}: {text}" for label, text in answer(card).items()]
    return {
        "compared": f"Compared: {compared(card)}",
        "answer": "\n\n".join(said),
        "quality": markdown_table(*rows.quality_rows(card)),
        "cost": markdown_table(*rows.cost_rows(card)),
        "made": made(card),
        "tokens": markdown_table(*token_rows(cost)) if "one_at_a_time" in cost["student"] else "",
        "saves": surplus_part(card) if found else "",
        "judge": judge_part(judge, confidence) if judge else "",
        "external": external_table(card.get("external", {})),
        "notes": _notes(card),
    }


def made(card: Mapping[str, Any]) -> str:
    """Say what making the student took, and what an earlier run had paid for already."""
    spent = card["cost"]["distillation"]
    before = spent.get("reused", 0)
    reused = f" {share(before)} of the teacher's answers were stored before, and are not in it."
    return (
        f"Making and measuring the student took {duration(spent['seconds'])} "
        f"and cost {money(spent['dollars'])}.{reused if before > REUSED else ''}"
    )


def surplus_part(card: Mapping[str, Any]) -> str:
    """Return the surplus statement with its tables: the three ways, and what could change the headline."""
    found = card["economics"]
    said = statement(found, card["environment"]["settings"]["confidence"])
    tables = [markdown_table(*surplus_rows(found)), markdown_table(*sensitivity_rows(found))]
    return "\n\n".join(["## What it saves", *said, *tables])


def judge_part(judge: Mapping[str, Any], confidence: float) -> str:
    """Return what the judge preferred, or why it is not used, and what it made of its probes."""
    said = " ".join(of_judge(judge, confidence))
    duels = [rows.judge_rows(judge)] if judge["probe"]["passed"] else []
    tables = [*duels, rows.probe_rows(judge["probe"])]
    return "\n\n".join([said, *(markdown_table(*found) for found in tables)])


def external_table(found: Mapping[str, Any]) -> str:
    """Return what another harness found of the student; nothing where none was asked."""
    return markdown_table(*lm_eval.table_of(found)) if found else ""


def _notes(card: Mapping[str, Any]) -> str:
    """Say what the figures are, where prices come from, and why something is missing."""
    settings, corpus = card["environment"]["settings"], card["corpus"]
    lines = [
        f"Intervals: {share(settings['confidence'])}, paired on the same items, clustered by document.",
        f"Corpus {str(corpus.get('corpus_sha256'))[:12]}, Python {corpus.get('python')}.",
    ]
    lines += rows.leaked(card.get("contamination", {}), card["overall"])
    lines += dict.fromkeys(
        f"Price: {row['price']}." for row in card["cost"].values() if row.get("price")
    )
    lines += [
        f"Not given: {listed(paths)}: {reason}." for reason, paths in grouped(card["reasons"])
    ]
    return "\n".join(f"- {line}" for line in lines)


def listed(paths: Sequence[str]) -> str:
    """Return the first few of what is missing for one reason, and how many more there are."""
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return ", ".join(paths[:NAMED]) + more

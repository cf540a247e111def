"""The stage `report`: `scorecard.json`, `scorecard.md` and `report.html`, from what evaluation wrote.

Loads no model and asks nothing, so it can be made again at any time (`python eval/report.py RUN`); the same inputs
give the same bytes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.config import Config
from distill.evaluation import external
from distill.evaluation.accounts import accounts
from distill.evaluation.page import page
from distill.evaluation.statement import (
    sensitivity_rows,
    statement,
    surplus_rows,
    token_rows,
)
from distill.evaluation.words import (
    answer,
    change,
    duration,
    figure,
    grouped,
    leaked,
    money,
    score,
    share,
)
from distill.records import Scorecard
from distill.run import Run
from distill.store import read_json, write_atomic, write_json

REUSED = 0.01  # of the teacher's answers: more than that is worth a word
AGREEMENT = {"chrf": "chrF", "nats_per_token": "nats a token", "top1": "likeliest token"}
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
    training = read_json(run.path("training.json"))
    evaluation = read_json(run.path("evaluation.json"))
    funnel = read_json(run.path("funnel.json"))
    card = scorecard(config, run, evaluation, training, funnel).model_dump(mode="json")
    write_json(run.path("scorecard.json"), card)
    write_atomic(run.path("scorecard.md"), markdown(card))
    write_atomic(run.path("report.html"), page(card, evaluation["samples"], training))


def scorecard(
    config: Config,
    run: Run,
    evaluation: Mapping[str, Any],
    training: Mapping[str, Any],
    funnel: Mapping[str, Any],
) -> Scorecard:
    """Gather everything that the scorecard states."""
    parts = {
        "models": evaluation["models"],
        "tasks": evaluation["tasks"],
        "overall": evaluation["overall"],
        "agreement": evaluation["agreement"],
        **accounts(config, run, evaluation["overall"]),
    }
    validation = [row["loss"] for row in training.get("validation", [])]
    return Scorecard(
        name=config.name,
        **parts,
        lengths=evaluation["lengths"],
        contamination=evaluation.get("contamination", {}),
        suites=evaluation.get("suites", {}),
        external=external.of_this_student(
            run, evaluation["models"]["student"].get("adapter_sha256")
        ),
        corpus=evaluation["corpus"],
        funnel=dict(funnel),
        training={
            **{key: training.get(key) for key in SUMMARY},
            "validation_loss_first": validation[0] if validation else None,
            "validation_loss_best": min(validation, default=None),
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
    parts = [f"# {card['name']}: scorecard", *answer(card), quality_table(card), cost_table(card)]
    parts += [made(card), table(*token_rows(card["cost"])), *surplus_part(card)]
    parts += [external_table(card.get("external", {})), _notes(card)]
    return "\n\n".join(part for part in parts if part) + "\n"


def made(card: Mapping[str, Any]) -> str:
    """Say what making the student took, and what an earlier run had paid for already."""
    spent = card["cost"]["distillation"]
    reused = (
        f" {share(spent['reused'])} of the teacher's answers were stored before, and are not in it."
    )
    return (
        f"Making and measuring the student took {duration(spent['seconds'])} "
        f"and cost {money(spent['dollars'])}.{reused if spent['reused'] > REUSED else ''}"
    )


def surplus_part(card: Mapping[str, Any]) -> list[str]:
    """Return the surplus statement with its tables: the three ways, and what could change the headline."""
    found = card["economics"]
    said = statement(found, card["environment"]["settings"]["confidence"])
    tables = [table(*surplus_rows(found)), table(*sensitivity_rows(found))]
    return ["## What it saves", *said, *tables]


def quality_table(card: Mapping[str, Any]) -> str:
    """Return the rows of all tasks and of agreement, each with its paired differences."""
    head = (
        "",
        "n",
        "teacher",
        "base",
        "student",
        "student − teacher",
        "student − base",
        "gap recovered",
    )
    rows = [_quality_row(f"{t}: {plain(row['metric'])}", row) for t, row in card["tasks"].items()]
    if card["overall"] and len(card["tasks"]) > 1:
        rows.append(_quality_row("all checks", card["overall"]))
    for name, label in AGREEMENT.items():
        if name in card["agreement"]:
            rows.append(_quality_row(f"agreement: {label}", card["agreement"][name]))
    for name, suite in card.get("suites", {}).items():
        shown = {"": suite["overall"]} if suite["overall"] else suite["tasks"]
        rows += [_quality_row(f"{name} {task}".strip(), row) for task, row in shown.items()]
    return table(head, rows)


def external_table(found: Mapping[str, Any]) -> str:
    """Return what another harness found of the student; nothing where none was asked."""
    head = (found.get("harness", ""), "n", "metric", "student", "standard error")
    return table(head, external.rows(found)) if found else ""


def plain(metric: str) -> str:
    """Return a metric's name as words."""
    return metric.replace("_", " ")


def _quality_row(label: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    metric, gap = row["metric"], row.get("gap_recovered", {})
    between = f" [{share(gap.get('low'))}, {share(gap.get('high'))}]"
    return (
        label,
        str(row["n"]),
        *(score(row[model], metric) for model in ("teacher", "base", "student")),
        change(row.get("student_minus_teacher", {}), metric),
        change(row["student_minus_base"], metric),
        share(gap.get("value")) + (between if gap.get("value") is not None else ""),
    )


def cost_table(card: Mapping[str, Any]) -> str:
    """Return what 1,000 requests take and cost each model, and how long its answers are."""
    head = ("1,000 requests", "time", "dollars", "tokens/s", "tokens an answer", "cut off")
    rows = []
    for model in ("teacher", "base", "student"):
        cost, long = card["cost"][model], card["lengths"][model]
        rows.append(
            (
                model,
                duration(cost["seconds_per_1k"]),
                money(cost["dollars_per_1k"]),
                figure(cost["output_tokens_per_second"], 0),
                figure(long["tokens"], 0),
                share(long["truncated"]),
            )
        )
    return table(head, rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table whose columns line up as plain text; the first is left-aligned."""
    cells = [[_cell(c) for c in row] for row in [head, *rows]]
    widths = [max(3, *(len(row[k]) for row in cells)) for k in range(len(head))]
    lines = [cells[0], [_rule(k, w) for k, w in enumerate(widths)], *cells[1:]]
    return "\n".join(
        f"| {' | '.join(map(_justify, line, widths, range(len(head))))} |" for line in lines
    )


def _justify(text: str, width: int, column: int) -> str:
    return text.rjust(width) if column else text.ljust(width)


def _rule(column: int, width: int) -> str:
    return "-" * width if column == 0 else "-" * (width - 1) + ":"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _notes(card: Mapping[str, Any]) -> str:
    """Say what the figures are, where prices come from, and why something is missing."""
    settings, corpus = card["environment"]["settings"], card["corpus"]
    lines = [
        f"Intervals: {share(settings['confidence'])}, paired on the same items, clustered by document.",
        f"Corpus {str(corpus.get('corpus_sha256'))[:12]}, Python {corpus.get('python')}.",
    ]
    lines += leaked(card["contamination"], card["overall"])
    lines += dict.fromkeys(
        f"Price: {row['price']}." for row in card["cost"].values() if row.get("price")
    )
    lines += [
        f"Not given: {', '.join(paths)}: {reason}." for reason, paths in grouped(card["reasons"])
    ]
    return "\n".join(f"- {line}" for line in lines)


def remake(folder: Path) -> Path:
    """Make the scorecard of a run's folder again, and return the path of its report."""
    config = Config.model_validate(read_json(folder / "config.json"))
    place = {"name": folder.resolve().name, "runs": folder.resolve().parent}
    run = Run(config.model_copy(update=place))
    main(run.config, run)
    return run.path("report.html")

"""The report as one self-contained HTML file: first the answer, then the plots with their numbers, samples, method.

Whatever comes from a model, a corpus or a config is escaped by the template's autoescape. No script, nothing loaded.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from distill import formatting
from distill.evaluation import lm_eval
from distill.evaluation.failures import WITHHELD
from distill.records import SPLITS
from distill.report import headline, statement, tables
from distill.report.plots import Point, Span, quality_against_cost, spans, training_curve

WIDTHS = {"wide": 660, "narrow": 340}  # pixels of a plot on a screen, and on a phone
MODELS = ("teacher", "base", "student")
MAX_SAMPLE = 6000  # characters shown of one text
FORGETTING = "forgetting"  # the suite of what training may have taken away
Row = Mapping[str, Any]


def page(card: Row, samples: Sequence[Row], training: Row) -> str:
    """Return the report's HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    names = ("share", "money", "duration", "figure", "plain")
    environment.globals.update({name: getattr(formatting, name) for name in names})
    environment.globals["within"] = tables.within
    environment.globals.update({"rows": tables, "mark": mark, "marks_of": marks_of})
    environment.globals.update({"on_suite": headline.on_suite, "suite_leaks": suite_leaks})
    environment.globals["shown_in"] = shown_in
    confidence = card["environment"]["settings"]["confidence"]
    return environment.get_template("report.html.j2").render(
        card=card,
        models=MODELS,
        confidence=confidence,
        answer=headline.answer(card),
        compared=headline.compared(card),
        kept=headline.kept(card),
        cost_share=headline.cost_share(card),
        cost_plot=_both(lambda width: cost_plot(card, width)),
        curve=_both(lambda width: _curve(training, width)),
        saved_plot=_both(lambda width: saved_plot(card, width)),
        forgetting=FORGETTING,
        losses=tables.loss_rows(training),
        funnel=funnel_bars(card["funnel"], card["corpus"].get("documents")),
        leaked=list(tables.leaked(card["contamination"], card["overall"])),
        groups=sample_groups(samples),
        judged=headline.of_judge(card["judge"], confidence) if card["judge"] else [],
        withheld=card["failures"].get("reason") == WITHHELD,
        missing=grouped(card["reasons"]),
        prices=prices(card),
        external=lm_eval.table_of(card["external"]) if card["external"] else None,
        **surplus(card["economics"], card["cost"], confidence),
    )


def surplus(economics: Row, cost: Row, confidence: float) -> dict[str, Any]:
    """Return the surplus statement and its tables."""
    return {
        "said": statement.statement(economics, confidence),
        "headline": statement.row_of(economics, economics["headline"]),
        "ways": statement.WAYS,
        "span": statement.span,
        "whole_requests": statement.whole_requests,
        "surplus_rows": statement.surplus_rows(economics),
        "sensitivity_rows": statement.sensitivity_rows(economics),
        "token_rows": statement.token_rows(cost),
    }


def shown_in(suite: Row) -> list[str]:
    """Return the models that have a score in a suite; the teacher is not always asked."""
    return [m for m in MODELS if any(row[m] is not None for row in suite["tasks"].values())]


def suite_leaks(suite: Row) -> list[str]:
    """Return what of a suite's items stands in the training data, where that was looked for."""
    return list(tables.leaked(suite.get("contamination", {}), suite["overall"]))


def prices(card: Row) -> list[str]:
    """Return every price that a figure rests on, with its date and source, once."""
    used = [row.get("price") for row in card["cost"].values()]
    used += [card["economics"][side]["price"] for side in ("teacher", "student")]
    return list(dict.fromkeys(price for price in used if price))


def _both(draw: Callable[[int], Markup]) -> Markup:
    """Draw a plot at both widths; the page's style shows the one that fits."""
    drawn = {name: draw(width) for name, width in WIDTHS.items()}
    if not all(drawn.values()):
        return Markup("")
    return Markup("").join(
        Markup('<div class="{}">{}</div>').format(name, plot) for name, plot in drawn.items()
    )


def cost_plot(card: Row, width: int) -> Markup:
    """Draw quality against the dollars of 1,000 requests, or against their seconds where dollars are unknown."""
    row = card["overall"] or card["agreement"]["chrf"]
    scale = 100.0 if card["overall"] else 1.0
    known = card["cost"]["student"]["dollars_per_1k"] is not None
    key = "dollars_per_1k" if known else "seconds_per_1k"
    points = []
    for model in MODELS:
        x, y = card["cost"][model][key], row[model]
        if x is not None and y is not None:
            low, high = (None if v is None else v * scale for v in row["intervals"][model])
            points.append(Point(model, x, y * scale, low, high))
    unit, form = ("dollars", "${:g}") if known else ("seconds", "{:,.0f}")
    label = "checks passed, %" if card["overall"] else "chrF against the teacher"
    return quality_against_cost(points, width, f"{unit} for 1,000 requests", label, form)


def saved_plot(card: Row, width: int) -> Markup:
    """Draw what 1,000 requests save in each way, with its interval and the line of nothing saved."""
    known = [
        Span(statement.WAYS[row["way"]], amount["value"], amount["low"], amount["high"])
        for row in card["economics"]["rows"]
        if (amount := row["dollars_per_1k"])["value"] is not None
    ]
    return spans(
        known,
        width,
        "dollars saved on 1,000 requests",
        statement.WAYS[card["economics"]["headline"]],
    )


def _curve(training: Row, width: int) -> Markup:
    train = [(row["step"], row["loss"]) for row in training.get("history", [])]
    validation = [(row["step"], row["loss"]) for row in training.get("validation", [])]
    return training_curve(train, validation, training.get("best_step"), width)


def grouped(reasons: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """Return each reason with all that is missing because of it."""
    return [
        (reason, [path for path, why in reasons.items() if why == reason])
        for reason in dict.fromkeys(reasons.values())
    ]


def marks_of(row: Row) -> list[dict[str, Any]]:
    """Return where each model's score of a task stands between 0 and 100, and its interval."""
    scale = 1.0 if row["metric"] == "chrF" else 100.0
    return [
        {
            "model": model,
            "at": row[model] * scale,
            "low": (row["intervals"][model][0] or 0.0) * scale,
            "high": (row["intervals"][model][1] or 0.0) * scale,
        }
        for model in MODELS
        if row[model] is not None
    ]


def funnel_bars(funnel: Row, documents: int | None) -> list[dict[str, Any]]:
    """Return what came in, what was dropped by reason and what was kept, each with its share of the largest."""
    counts = [("documents", documents, "in")] if documents is not None else []
    counts += [(name, funnel[name], "in") for name in ("prompts", "answers")]
    counts += [(f"dropped: {reason}", n, "dropped") for reason, n in funnel["dropped"].items()]
    counts += [(f"kept: {split}", funnel[f"kept_{split}"], "kept") for split in SPLITS]
    most = max(1, *(n for _, n, _ in counts))
    return [{"name": name, "count": n, "share": 100 * n / most, "kind": k} for name, n, k in counts]


def sample_groups(samples: Sequence[Row]) -> list[dict[str, Any]]:
    """Group the samples by task, with their texts cut to a readable length."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        answers = {m: clip(sample["answers"][m]) for m in MODELS if m in sample["answers"]}
        asked = [{**turn, "content": clip(turn["content"])} for turn in sample["messages"]]
        groups.setdefault(sample["task"], []).append(
            {**sample, "answers": answers, "messages": asked}
        )
    return [{"task": task, "samples": found} for task, found in groups.items()]


def mark(sample: Row, model: str) -> str:
    """Return what one sampled answer scored, in a few words; nothing where agreement has no score of the teacher."""
    if model not in sample["scores"]:
        return ""
    value, reason = sample["scores"][model], sample["reasons"][model]
    if value is None:
        return f"not scored: {reason}"
    if sample["metric"] == "chrF":
        return f"chrF {formatting.figure(value, 0)}"
    return f"{'✓' if value else '✗'} {reason}"


def clip(text: str) -> str:
    """Cut a text that is too long to show, and say so."""
    return text if len(text) <= MAX_SAMPLE else f"{text[:MAX_SAMPLE]} […]"

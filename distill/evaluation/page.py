"""The report as one self-contained HTML file: first the answer, then the plots with their numbers, samples, method.

Whatever comes from a model, a corpus or a config is escaped by the template's autoescape. No script, nothing loaded.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from distill.evaluation import words
from distill.evaluation.plots import Point, quality_against_cost, training_curve
from distill.records import SPLITS

WIDTHS = {"wide": 660, "narrow": 350}  # pixels of a plot on a screen, and on a phone
MODELS = ("base", "student", "teacher")
MAX_SAMPLE = 6000  # characters shown of one text


def page(
    card: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], training: Mapping[str, Any]
) -> str:
    """Return the report's HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals.update(
        {
            name: getattr(words, name)
            for name in ("share", "score", "change", "money", "duration", "figure")
        }
    )
    return environment.get_template("report.html").render(
        card=card,
        models=MODELS,
        mark=mark,
        sentences=words.answer(card),
        kept=words.kept(card),
        cost_share=words.cost_share(card),
        cost_plot=_both(lambda width: cost_plot(card, width)),
        curve=_both(lambda width: _curve(training, width)),
        bars=task_bars(card),
        funnel=funnel_bars(card["funnel"]),
        groups=sample_groups(samples),
        missing=words.grouped(card["reasons"]),
        prices=list(
            dict.fromkeys(row["price"] for row in card["cost"].values() if row.get("price"))
        ),
    )


def _both(draw: Any) -> Markup:
    """Draw a plot at both widths; the page's style shows the one that fits."""
    drawn = {name: draw(width) for name, width in WIDTHS.items()}
    if not all(drawn.values()):
        return Markup("")
    return Markup("").join(
        Markup('<div class="{}">{}</div>').format(name, plot) for name, plot in drawn.items()
    )


def cost_plot(card: Mapping[str, Any], width: int) -> Markup:
    """Draw quality against the dollars of 1,000 requests, or against their seconds where dollars are unknown."""
    row = card["overall"] or card["agreement"]["chrf"]
    scale = 100.0 if card["overall"] else 1.0
    key = (
        "dollars_per_1k"
        if card["cost"]["student"]["dollars_per_1k"] is not None
        else "seconds_per_1k"
    )
    points = []
    for model in MODELS:
        x, y = card["cost"][model][key], row[model]
        if x is not None and y is not None:
            low, high = (None if v is None else v * scale for v in row["intervals"][model])
            points.append(Point(model, x, y * scale, low, high))
    unit, form = ("dollars", "${:g}") if key.startswith("dollars") else ("seconds", "{:,.0f}")
    label = "checks passed, %" if card["overall"] else "chrF against the teacher"
    return quality_against_cost(points, width, f"{unit} for 1,000 requests", label, form)


def _curve(training: Mapping[str, Any], width: int) -> Markup:
    train = [(row["step"], row["loss"]) for row in training.get("history", [])]
    validation = [(row["step"], row["loss"]) for row in training.get("validation", [])]
    return training_curve(train, validation, training.get("best_step"), width)


def task_bars(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return, for each task, where base, student and teacher stand between 0 and 100."""
    bars = []
    for task, row in card["tasks"].items():
        scale = 1.0 if row["metric"] == "chrF" else 100.0
        marks = [
            {
                "model": m,
                "at": row[m] * scale,
                "low": (row["intervals"][m][0] or 0.0) * scale,
                "high": (row["intervals"][m][1] or 0.0) * scale,
            }
            for m in MODELS
            if row[m] is not None
        ]
        bars.append(
            {
                "task": task,
                "row": row,
                "metric": row["metric"].replace("_", " "),
                "marks": marks,
            }
        )
    return bars


def funnel_bars(funnel: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what came in, what was dropped by reason and what was kept, with their share of what came in."""
    rows = [(name, funnel[name], "in") for name in ("prompts", "answers")]
    rows += [(f"dropped: {reason}", n, "dropped") for reason, n in funnel["dropped"].items()]
    rows += [(f"kept: {split}", funnel[f"kept_{split}"], "kept") for split in SPLITS]
    most = max(funnel["answers"], 1)
    return [{"name": name, "count": n, "share": 100 * n / most, "kind": k} for name, n, k in rows]


def sample_groups(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Group the samples by task, with their texts cut to a readable length."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        answers = {m: clip(sample["answers"][m]) for m in MODELS if m in sample["answers"]}
        asked = [{**turn, "content": clip(turn["content"])} for turn in sample["messages"]]
        groups.setdefault(sample["task"], []).append(
            {**sample, "answers": answers, "messages": asked}
        )
    return [{"task": task, "samples": found} for task, found in groups.items()]


def mark(sample: Mapping[str, Any], model: str) -> str:
    """Return what one sampled answer scored, in a few words; nothing where agreement has no score of the teacher."""
    if model not in sample["scores"]:
        return ""
    value, reason = sample["scores"][model], sample["reasons"][model]
    if value is None:
        return f"not scored: {reason}"
    if sample["metric"] == "chrF":
        return f"chrF {words.figure(value, 0)}"
    return f"{'✓' if value else '✗'} {reason}"


def clip(text: str) -> str:
    """Cut a text that is too long to show, and say so."""
    return text if len(text) <= MAX_SAMPLE else f"{text[:MAX_SAMPLE]} […]"

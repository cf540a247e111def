"""The report as one self-contained HTML file: answer, plots with their numbers, samples, method.

The template escapes whatever comes from a model, a corpus or a config. No script, nothing loaded.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from markupsafe import Markup

from distill import formatting
from distill.evaluation.measurements import MODELS, MetricRow, Sample
from distill.evaluation.scorecard import Scorecard
from distill.report.plots import Mark, quality_against_cost, training_curve
from distill.report.render import environment
from distill.report.tables import WAYS

MAX_SAMPLE = 6000  # characters shown of one text


def page(card: Scorecard, samples: Sequence[Sample] | None, training: Mapping[str, Any]) -> str:
    """Return the report's HTML; `training` is training.json, whose losses are drawn.

    `samples` is None where they must not be shown.
    """
    economics = card.economics
    assert economics is not None, "a scorecard of this version has its economics"
    train, validation = (
        [(row["step"], row["loss"]) for row in training.get(key, [])]
        for key in ("history", "validation")
    )
    template = environment(markdown=False).get_template("report.html.j2")
    return template.render(
        card=card,
        models=MODELS,
        ways=WAYS,
        economics=economics,
        training=training,
        marks=marks,
        samples=samples,
        clip=partial(formatting.clip, most=MAX_SAMPLE),
        cost_plot=cost_plot(card),
        curve=training_curve(train, validation, training.get("best_step")),
    )


def marks(row: MetricRow) -> list[Mark]:
    """Return where the models that have a score stand, of a share in percent."""
    scale, result = 1.0 if row.metric == "chrF" else 100.0, []
    for model in MODELS:
        mean = row.mean(model)
        if mean is not None:
            ends = row.intervals.get(model, (None, None))
            low, high = (None if end is None else end * scale for end in ends)
            result.append(Mark(model, mean * scale, low, high))
    return result


def cost_plot(card: Scorecard) -> Markup:
    """Draw quality against what 1,000 requests cost, else against their time."""
    row = card.overall or card.agreement["chrf"]
    priced = card.cost.student.dollars_per_1k is not None
    points, placed = [], {mark.name: mark for mark in marks(row)}
    for model in MODELS:
        cost = card.cost.of(model)
        x = cost.dollars_per_1k if priced else cost.seconds_per_1k
        if x is not None and model in placed:
            points.append((float(x), placed[model]))
    unit, form = ("dollars", "${:g}") if priced else ("seconds", "{:,.0f}")
    label = "checks passed, %" if card.overall else "chrF against the teacher"
    return quality_against_cost(points, f"{unit} for 1,000 requests", label, form)

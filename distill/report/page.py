"""The report as one self-contained HTML file: answer, plots with their numbers, samples, method.

The template escapes whatever comes from a model, a corpus or a config. No script, nothing loaded.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from distill import formatting
from distill.evaluation.measurements import MODELS, MetricRow, Model, Sample
from distill.evaluation.results import WITHHELD
from distill.evaluation.scorecard import Economics, RequestCost, Scorecard
from distill.report.plots import Mark, quality_against_cost, spans, training_curve
from distill.report.render import environment
from distill.report.tables import WAYS

WIDTHS = {"wide": 660, "narrow": 340}  # pixels of a plot on a screen, and on a phone
MAX_SAMPLE = 6000  # characters shown of one text


def page(card: Scorecard, samples: Sequence[Sample], training: Mapping[str, Any]) -> str:
    """Return the report's HTML; `training` is training.json, whose losses are drawn."""
    economics = card.economics
    assert economics is not None, "a scorecard of this version has its economics"
    train, validation = (
        [(row["step"], row["loss"]) for row in training.get(key, [])]
        for key in ("history", "validation")
    )
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.task, []).append(sample)
    return (
        environment(markdown=False)
        .get_template("report.html.j2")
        .render(
            card=card,
            models=MODELS,
            ways=WAYS,
            economics=economics,
            cost_plot=_both(lambda width: cost_plot(card, width)),
            curve=_both(
                lambda width: training_curve(train, validation, training.get("best_step"), width)
            ),
            saved_plot=_both(lambda width: saved_plot(economics, width)),
            training=training,
            marks=marks,
            scored=lambda tasks: [
                m for m in MODELS if any(row.mean(m) is not None for row in tasks.values())
            ],
            groups=groups,
            clip=clip,
            verdict=verdict,
            withheld=card.failures.reason == WITHHELD,
        )
    )


def _both(draw: Callable[[int], Markup]) -> Markup:
    """Draw a plot at both widths; the page's style shows the one that fits."""
    plots = {name: draw(width) for name, width in WIDTHS.items()}
    if not all(plots.values()):
        return Markup("")
    return Markup("").join(
        Markup('<div class="{}">{}</div>').format(name, plot) for name, plot in plots.items()
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


def cost_plot(card: Scorecard, width: int) -> Markup:
    """Draw quality against what 1,000 requests cost, else against their time."""
    row = card.overall or card.agreement["chrf"]
    priced = card.cost.student.dollars_per_1k is not None
    costs: dict[str, RequestCost] = {model: card.cost.of(model) for model in MODELS}
    points = []
    for mark in marks(row):
        cost = costs[mark.name]
        x = cost.dollars_per_1k if priced else cost.seconds_per_1k
        if x is not None:
            points.append((float(x), mark))
    unit, form = ("dollars", "${:g}") if priced else ("seconds", "{:,.0f}")
    label = "checks passed, %" if card.overall else "chrF against the teacher"
    return quality_against_cost(points, width, f"{unit} for 1,000 requests", label, form)


def saved_plot(economics: Economics, width: int) -> Markup:
    """Draw what 1,000 requests save in each way, with its interval and the line of 0."""
    drawn = []
    for row in economics.rows:
        amount = row.dollars_per_1k
        if amount.value is not None:
            ends = (None if end is None else float(end) for end in (amount.low, amount.high))
            drawn.append(Mark(WAYS[row.way], float(amount.value), *ends))
    return spans(drawn, width, "dollars saved on 1,000 requests", WAYS[economics.headline])


def verdict(sample: Sample, model: Model) -> str:
    """Say what a sampled answer scored; nothing where agreement has no score of the teacher."""
    if model not in sample.scores:
        return ""
    value, reason = sample.scores[model], sample.reasons[model]
    if value is None:
        return f"not scored: {reason}"
    if sample.metric == "chrF":
        return f"chrF {formatting.count(value)}"
    return f"{'✓' if value else '✗'} {reason}"


def clip(text: str) -> str:
    """Cut a text that is too long to show, and say so."""
    return text if len(text) <= MAX_SAMPLE else f"{text[:MAX_SAMPLE]} […]"

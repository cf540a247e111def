"""The report as one self-contained HTML file: first the answer, then the plots with their numbers, samples, method.

Whatever comes from a model, a corpus or a config is escaped by the template's autoescape. No script, nothing loaded.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from distill import formatting
from distill.evaluation import lm_eval
from distill.evaluation.failures import WITHHELD
from distill.evaluation.measurements import MODELS, MetricRow, Model, Sample, SuiteResult
from distill.evaluation.scorecard import Economics, Funnel, Scorecard, TrainingSummary
from distill.report import headline, statement, tables
from distill.report.plots import Point, Span, quality_against_cost, spans, training_curve

WIDTHS = {"wide": 660, "narrow": 340}  # pixels of a plot on a screen, and on a phone
MAX_SAMPLE = 6000  # characters shown of one text
FORGETTING = "forgetting"  # the suite of what training may have taken away


def page(card: Scorecard, samples: Sequence[Sample], training: Mapping[str, Any]) -> str:
    """Return the report's HTML; `training` is the content of training.json, whose losses are drawn."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    names = ("share", "money", "duration", "figure", "plain", "count")
    environment.globals.update({name: getattr(formatting, name) for name in names})
    environment.globals.update({"rows": tables, "within": tables.within, "statement": statement})
    environment.globals.update({"mark": mark, "marks_of": marks_of, "models_in": models_in})
    environment.globals["on_suite"] = headline.on_suite
    economics = card.economics
    assert economics is not None, "a scorecard of this version has its economics"
    return environment.get_template("report.html.j2").render(
        card=card,
        models=MODELS,
        confidence=card.confidence,
        economics=economics,
        answer=headline.answer(card),
        compared=headline.compared(card),
        checks_kept=headline.checks_kept(card),
        cost_share=headline.cost_share(card),
        cost_plot=_both(lambda width: cost_plot(card, width)),
        curve=_both(lambda width: _curve(training, width)),
        saved_plot=_both(lambda width: saved_plot(economics, width)),
        forgetting=FORGETTING,
        losses=tables.loss_rows(training),
        checkpoint=checkpoint(card.training),
        funnel=funnel_bars(card.funnel, card.corpus.documents),
        contamination=tables.contamination_sentence(card.contamination, card.overall),
        groups=sample_groups(samples),
        judged=headline.of_judge(card.judge, card.confidence) if card.judge else [],
        withheld=card.failures.reason == WITHHELD,
        missing=grouped(card.reasons),
        prices=prices(card),
        external=lm_eval.table_of(card.external) if card.external else None,
    )


def models_in(suite: SuiteResult) -> list[Model]:
    """Return the models that have a score in a suite; the teacher is not always asked."""
    return [m for m in MODELS if any(row.mean(m) is not None for row in suite.tasks.values())]


def prices(card: Scorecard) -> list[str]:
    """Return every price that a figure rests on, with its date and source, once."""
    used = card.cost.prices()
    if card.economics:
        used += [p for p in (card.economics.teacher.price, card.economics.student.price) if p]
    return list(dict.fromkeys(used))


def checkpoint(training: TrainingSummary) -> str:
    """Say which step's adapter is evaluated, and whether it is the best on validation documents."""
    step, best = training.adapter_step, training.best_step
    if step is None or step == best:
        return (
            ""
            if best is None
            else f"The checkpoint of step {best}, the best on validation documents, was kept."
        )
    text = f"The checkpoint of step {step}, the last, was kept"
    return (
        f"{text}; that of step {best} had the lowest validation loss."
        if best is not None
        else f"{text}."
    )


def _both(draw: Callable[[int], Markup]) -> Markup:
    """Draw a plot at both widths; the page's style shows the one that fits."""
    drawn = {name: draw(width) for name, width in WIDTHS.items()}
    if not all(drawn.values()):
        return Markup("")
    return Markup("").join(
        Markup('<div class="{}">{}</div>').format(name, plot) for name, plot in drawn.items()
    )


def cost_plot(card: Scorecard, width: int) -> Markup:
    """Draw quality against the dollars of 1,000 requests, or against their seconds where dollars are unknown."""
    row = card.overall or card.agreement["chrf"]
    scale = 100.0 if card.overall else 1.0
    priced = card.cost.student.dollars_per_1k is not None
    marks = []
    for model in MODELS:
        cost, y = card.cost.of(model), row.mean(model)
        x = cost.dollars_per_1k if priced else cost.seconds_per_1k
        if x is not None and y is not None:
            ends = row.intervals.get(model, (None, None))
            low, high = (None if v is None else v * scale for v in ends)
            marks.append(Point(model, float(x), y * scale, low, high))
    unit, form = ("dollars", "${:g}") if priced else ("seconds", "{:,.0f}")
    label = "checks passed, %" if card.overall else "chrF against the teacher"
    return quality_against_cost(marks, width, f"{unit} for 1,000 requests", label, form)


def saved_plot(economics: Economics, width: int) -> Markup:
    """Draw what 1,000 requests save in each way, with its interval and the line of nothing saved."""
    drawn = []
    for row in economics.rows:
        amount = row.dollars_per_1k
        if amount.value is not None:
            ends = (None if end is None else float(end) for end in (amount.low, amount.high))
            drawn.append(Span(statement.WAYS[row.way], float(amount.value), *ends))
    headline_way = statement.WAYS[economics.headline]
    return spans(drawn, width, "dollars saved on 1,000 requests", headline_way)


def _curve(training: Mapping[str, Any], width: int) -> Markup:
    train = [(row["step"], row["loss"]) for row in training.get("history", [])]
    validation = [(row["step"], row["loss"]) for row in training.get("validation", [])]
    return training_curve(train, validation, training.get("best_step"), width)


def grouped(reasons: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """Return each reason with all that is missing because of it."""
    return [
        (reason, [path for path, why in reasons.items() if why == reason])
        for reason in dict.fromkeys(reasons.values())
    ]


class Mark(NamedTuple):
    """Where a model's score of a task stands between 0 and 100, and its interval."""

    model: Model
    at: float
    low: float
    high: float


def marks_of(row: MetricRow) -> list[Mark]:
    """Return the marks of the models that have a score."""
    scale, marks = 1.0 if row.metric == "chrF" else 100.0, []
    for model in MODELS:
        mean = row.mean(model)
        if mean is not None:
            low, high = row.intervals.get(model, (None, None))
            marks.append(Mark(model, mean * scale, (low or 0.0) * scale, (high or 0.0) * scale))
    return marks


class Bar(NamedTuple):
    """One step of the funnel: its name, count, share of the largest in percent, and whether it came in, went or stayed."""

    name: str
    number: int
    share: float
    kind: str


def funnel_bars(funnel: Funnel, documents: int | None) -> list[Bar]:
    """Return what came in, what was dropped by reason and what was kept."""
    counts = [("documents", documents, "in")] if documents is not None else []
    counts += [("prompts", funnel.prompts, "in"), ("answers", funnel.answers, "in")]
    counts += [(f"dropped: {reason}", n, "dropped") for reason, n in funnel.dropped.items()]
    counts += [("kept: train", funnel.kept_train, "kept")]
    counts += [("kept: validation", funnel.kept_validation, "kept")]
    counts += [("kept: heldout", funnel.kept_heldout, "kept")]
    most = max(1, *(n for _, n, _ in counts))
    return [Bar(name, n, 100 * n / most, kind) for name, n, kind in counts]


def sample_groups(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """Group the samples by task, with their texts cut to a readable length."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        update = {
            "answers": {m: clip(sample.answers[m]) for m in MODELS if m in sample.answers},
            "messages": tuple({**m, "content": clip(m["content"])} for m in sample.messages),
        }
        groups.setdefault(sample.task, []).append(sample.model_copy(update=update))
    return groups


def mark(sample: Sample, model: Model) -> str:
    """Return what one sampled answer scored, in a few words; nothing where agreement has no score of the teacher."""
    if model not in sample.scores:
        return ""
    value, reason = sample.scores[model], sample.reasons[model]
    if value is None:
        return f"not scored: {reason}"
    if sample.metric == "chrF":
        return f"chrF {formatting.figure(value, 0)}"
    return f"{'✓' if value else '✗'} {reason}"


def clip(text: str) -> str:
    """Cut a text that is too long to show, and say so."""
    return text if len(text) <= MAX_SAMPLE else f"{text[:MAX_SAMPLE]} […]"

"""Where the report's plots have what: positions in pixels, ticks, and words for who cannot see it.

The page draws them as inline SVG (`report.html.j2`), so narrow that the text stays readable where a
phone scales it to its screen.
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from distill.evaluation.measurements import MODELS, MetricRow, Model
from distill.evaluation.scorecard import Scorecard

WIDTH, HEIGHT = 480, 320  # in pixels, as are the margins
LEFT, RIGHT, TOP, BOTTOM = 48, 18, 30, 44
Series = Sequence[tuple[float, float]]


class Mark(NamedTuple):
    """A model's value with its interval, where that is known; at a cost, in a plot of these."""

    name: Model
    value: float
    low: float | None
    high: float | None
    cost: float = 0.0

    def line(self) -> str:
        """Return the value and its interval for those who do not see the plot."""
        ends = "" if self.low is None else f" ({self.low:.3g} to {self.high:.3g})"
        return f"{self.value:.3g}{ends}"


class Plot(NamedTuple):
    """A plane by the values at its edges (x begins at 0), its labels, and what it shows."""

    x_high: float
    y_low: float
    y_high: float
    x_label: str
    x_form: str
    y_label: str
    y_form: str
    words: str
    marks: Sequence[Mark] = ()
    lines: Sequence[tuple[str, Series]] = ()  # with the style of each

    def x(self, value: float) -> float:
        """Return the pixel of an x value."""
        return round(LEFT + value / self.x_high * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        """Return the pixel of a y value."""
        part = (value - self.y_low) / (self.y_high - self.y_low)
        return round(HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM), 1)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return round values from `low` to `high`: steps of 1, 2, 2.5 or 5 times a power of ten."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


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


def quality_against_cost(card: Scorecard) -> Plot | None:
    """Show each model's quality, with its interval, at its cost or else its time."""
    priced, points = card.cost.student.dollars_per_1k is not None, list[Mark]()
    for mark in marks(card.overall or card.agreement["chrf"]):
        cost = card.cost.of(mark.name)
        x = cost.dollars_per_1k if priced else cost.seconds_per_1k
        points += [] if x is None else [mark._replace(cost=x)]
    if not points:
        return None
    unit, x_form = ("dollars", "${:g}") if priced else ("seconds", "{:,.0f}")
    x_label = f"{unit} for 1,000 requests"
    y_label = "checks passed, %" if card.overall else "chrF against the teacher"
    highest = max(mark.high or mark.value for mark in points)
    top = 100.0 if highest > 50 else min(100.0, highest * 1.3 + 1)
    values = "; ".join(f"{m.name} at {x_form.format(m.cost)}: {m.line()}" for m in points)
    words = f"Quality against cost. {y_label} by {x_label}: {values}"
    right = max(mark.cost for mark in points) * 1.15 or 1.0
    return Plot(right, 0.0, top, x_label, x_form, y_label, "{:g}", words, points)


def training_curve(train: Series, validation: Series) -> Plot | None:
    """Show the training loss, its running mean, and the validation loss."""
    if len(train) < 2:
        return None
    reach = max(1, len(train) // 40)  # a twentieth of the steps, around each
    smooth = [
        (x, fmean(y for _, y in train[max(0, k - reach) : k + reach + 1]))
        for k, (x, _) in enumerate(train)
    ]
    values = [y for _, y in (*train, *validation)]
    spread = max(values) - min(values) or 1.0
    low, high = max(0.0, min(values) - 0.08 * spread), max(values) + 0.05 * spread
    words = f"Training loss from {train[0][1]:.3g} to {smooth[-1][1]:.3g}"
    if losses := [y for _, y in validation]:
        words += f", validation loss from {losses[0]:.3g} to {losses[-1]:.3g}"
        words += f", least {min(losses):.3g}"
    right, words = max(x for x, _ in (*train, *validation)), f"{words}, in nats a token, by step"
    axes = ("step", "{:,.0f}", "loss, nats a token", "{:.2g}")
    lines = (("raw", train), ("line base", smooth), ("line student", validation))
    return Plot(right, low, high, *axes, words, lines=lines)


def checks_curve(shares: Series) -> Plot | None:
    """Show the shares of validation prompts that the student answered right."""
    if len(shares) < 2:
        return None
    series = [(x, 100 * y) for x, y in shares]
    words = "; ".join(f"{y:.3g} % at step {x:,.0f}" for x, y in series)
    axes = ("step", "{:,.0f}", "validation prompts answered right, %", "{:g}")
    top, lines = min(100.0, 1.2 * max(y for _, y in series) + 1), [("line student", series)]
    return Plot(series[-1][0], 0.0, top, *axes, f"{axes[2]}: {words}", lines=lines)

"""The plots of the report as inline SVG: no script, font or file; colours are the page's variables.

Every text that goes in is escaped. A plot is so narrow that its text stays readable where a phone
scales it to its screen.
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from markupsafe import Markup

from distill.evaluation.measurements import MODELS, MetricRow, Model
from distill.evaluation.scorecard import Scorecard

WIDTH, HEIGHT = 480, 320  # in pixels, as are the margins
LEFT, RIGHT, TOP, BOTTOM = 48, 18, 30, 44
EMPTY = Markup("")
Series = Sequence[tuple[float, float]]


class Mark(NamedTuple):
    """A model's value with its interval, where that is known."""

    name: Model
    value: float
    low: float | None
    high: float | None

    def line(self) -> str:
        """Return the value and its interval for those who do not see the plot."""
        if self.low is None or self.high is None:
            return f"{self.value:.3g}"
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


class Frame(NamedTuple):
    """The plane of a plot, by the values at its edges."""

    x_high: float  # from 0
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        """Return the pixel of an x value."""
        return round(LEFT + value / self.x_high * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        """Return the pixel of a y value."""
        part = (value - self.y_low) / (self.y_high - self.y_low)
        return round(HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM), 1)

    def axes(self, x_label: str, x_form: str, y_label: str, y_form: str = "{:g}") -> list[Markup]:
        """Draw the floor with its ticks, the lines of the y values, and both labels."""
        floor, middle = HEIGHT - BOTTOM, (LEFT + WIDTH - RIGHT) / 2
        parts = [_text(4, 12, y_label, "label"), _text(middle, HEIGHT - 6, x_label, "label mid")]
        for value in ticks(self.y_low, self.y_high, 4):
            y = self.y(value)
            parts.append(_line(LEFT, y, WIDTH - RIGHT, y, "grid"))
            parts.append(_text(LEFT - 8, y + 4, y_form.format(value), "tick end"))
        parts.append(_line(LEFT, floor, WIDTH - RIGHT, floor, "axis"))
        for value in ticks(0.0, self.x_high, 4):
            parts.append(_text(self.x(value), floor + 18, x_form.format(value), "tick mid"))
        return parts


def ticks(low: float, high: float, count: int = 5) -> list[float]:
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


def quality_against_cost(card: Scorecard) -> Markup:
    """Draw each model's quality, with its interval, at its cost or else its time."""
    priced, points = card.cost.student.dollars_per_1k is not None, []
    for mark in marks(card.overall or card.agreement["chrf"]):
        cost = card.cost.of(mark.name)
        x = cost.dollars_per_1k if priced else cost.seconds_per_1k
        if x is not None:
            points.append((x, mark))
    if not points:
        return EMPTY
    unit, x_form = ("dollars", "${:g}") if priced else ("seconds", "{:,.0f}")
    x_label = f"{unit} for 1,000 requests"
    y_label = "checks passed, %" if card.overall else "chrF against the teacher"
    highest = max(mark.high or mark.value for _, mark in points)
    top = 100.0 if highest > 50 else min(100.0, highest * 1.3 + 1)
    frame = Frame(max(x for x, _ in points) * 1.15 or 1.0, 0.0, top)
    parts = frame.axes(x_label, x_form, y_label)
    for cost, mark in points:
        x, y = frame.x(cost), frame.y(mark.value)
        if mark.low is not None and mark.high is not None:
            low, high, kind = frame.y(mark.low), frame.y(mark.high), f"whisker {mark.name}"
            parts += [_line(x, low, x, high, kind)]
            parts += [_line(x - 5, end, x + 5, end, kind) for end in (low, high)]
        parts.append(_dot(mark.name, x, y))
    values = "; ".join(f"{m.name} at {x_form.format(x)}: {m.line()}" for x, m in points)
    return _svg(parts, f"Quality against cost. {y_label} by {x_label}: {values}")


def training_curve(train: Series, validation: Series, best: float | None) -> Markup:
    """Draw the training loss, its running mean, and the validation loss, its best step filled."""
    if len(train) < 2:
        return EMPTY
    reach = max(1, len(train) // 40)  # a twentieth of the steps, around each
    smooth = [
        (x, fmean(y for _, y in train[max(0, k - reach) : k + reach + 1]))
        for k, (x, _) in enumerate(train)
    ]
    values = [y for _, y in (*train, *validation)]
    spread = max(values) - min(values) or 1.0
    low, high = max(0.0, min(values) - 0.08 * spread), max(values) + 0.05 * spread
    frame = Frame(max(x for x, _ in (*train, *validation)), low, high)
    parts = frame.axes("step", "{:,.0f}", "loss, nats a token", "{:.2g}")
    for series, kind in ((train, "raw"), (smooth, "line base"), (validation, "line student")):
        if len(series) > 1:
            path = " ".join(f"{frame.x(x)},{frame.y(y)}" for x, y in series)
            parts.append(Markup('<polyline class="{}" points="{}"/>').format(kind, path))
    for x, y in validation:
        kind = "student" if x == best else "student hollow"
        parts.append(_dot(kind, frame.x(x), frame.y(y), 4.5))
    label = f"Training loss from {train[0][1]:.3g} to {smooth[-1][1]:.3g}"
    if losses := [y for _, y in validation]:
        label += f", validation loss from {losses[0]:.3g} to {losses[-1]:.3g}"
        label += f", least {min(losses):.3g}"
    return _svg(parts, f"{label}, in nats a token, by step")


def _svg(parts: Sequence[Markup], label: str) -> Markup:
    """Return a drawing; `label` says what it shows to those who do not see it."""
    return Markup(
        '<svg class="plot" width="{0}" height="{1}" viewBox="0 0 {0} {1}" role="img"'
        ' aria-label="{2}">{3}</svg>'
    ).format(WIDTH, HEIGHT, label, EMPTY.join(parts))


def _dot(model: str, x: float, y: float, radius: float = 7) -> Markup:
    """Draw a model's mark: the student a disc, the teacher a square, the base a diamond."""
    if model.startswith("student"):
        disc = Markup('<circle class="dot {}" cx="{}" cy="{}" r="{}"/>')
        return disc.format(model, x, y, radius)
    turn = Markup(' transform="rotate(45 {} {})"').format(x, y) if model == "base" else ""
    square = Markup('<rect class="dot {}" x="{}" y="{}" width="12" height="12"{}/>')
    return square.format(model, round(x - 6, 1), round(y - 6, 1), turn)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(kind, x1, y1, x2, y2)


def _text(x: float, y: float, text: str, kind: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(kind, x, y, text)

"""The plots of the report as inline SVG: no script, no font, no file, and colours from the page's own variables.

Every text that goes in is escaped. A plot is drawn for a given width in pixels and is not scaled, so that its text
stays as large as the page's; the page shows the one that fits.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

LEFT, RIGHT, TOP, BOTTOM = 48, 18, 30, 44
LETTER = 8.5  # pixels of a letter of a name, about
EMPTY = Markup("")


class Point(NamedTuple):
    """A model in the plane of cost and quality; `low` and `high` bound its quality where that is known."""

    name: str
    x: float
    y: float
    low: float | None
    high: float | None


class Span(NamedTuple):
    """An amount with its interval, where that is known."""

    name: str
    value: float
    low: float | None
    high: float | None


class Box(NamedTuple):
    """Where a name stands: from left to right, on a line; in pixels."""

    left: float
    right: float
    line: float

    def meets(self, others: "Sequence[Box]") -> bool:
        """Tell whether it would overlap one of the others."""
        return any(
            self.left < o.right and o.left < self.right and abs(self.line - o.line) < 17
            for o in others
        )


class Frame(NamedTuple):
    """The plane of a plot: its size in pixels and the values at its edges."""

    width: int
    height: int
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    left: int = LEFT

    def x(self, value: float) -> float:
        """Return the pixel of an x value."""
        part = (value - self.x_low) / (self.x_high - self.x_low)
        return round(self.left + part * (self.width - self.left - RIGHT), 1)

    def y(self, value: float) -> float:
        """Return the pixel of a y value."""
        part = (value - self.y_low) / (self.y_high - self.y_low)
        return round(self.height - BOTTOM - part * (self.height - TOP - BOTTOM), 1)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round values from `low` to `high`: steps of 1, 2, 2.5 or 5 times a power of ten."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def axes(
    frame: Frame, x_label: str, y_label: str, x_form: str = "{:g}", y_form: str = "{:g}"
) -> Markup:
    """Draw the grid, the ticks with their values, and both labels."""
    parts = []
    for value in ticks(frame.y_low, frame.y_high, 4):
        y = frame.y(value)
        parts.append(_line(LEFT, y, frame.width - RIGHT, y, "grid"))
        parts.append(_text(LEFT - 8, y + 4, y_form.format(value), "tick end"))
    for value in ticks(frame.x_low, frame.x_high, max(2, frame.width // 110)):
        parts.append(
            _text(frame.x(value), frame.height - BOTTOM + 18, x_form.format(value), "tick mid")
        )
    floor = frame.height - BOTTOM
    parts.append(_line(LEFT, floor, frame.width - RIGHT, floor, "axis"))
    middle = (LEFT + frame.width - RIGHT) / 2
    parts.append(_text(middle, frame.height - 6, x_label, "label mid"))
    parts.append(_text(4, 12, y_label, "label"))
    return Markup("").join(parts)


def quality_against_cost(
    points: Sequence[Point], width: int, x_label: str, y_label: str, x_form: str
) -> Markup:
    """Draw each model at its cost and quality, with the interval of its quality."""
    if not points:
        return EMPTY
    highest = max(p.high or p.y for p in points)
    top = 100.0 if highest > 50 else min(100.0, highest * 1.3 + 1)
    frame = Frame(width, 320, 0.0, max(p.x for p in points) * 1.15 or 1.0, 0.0, top)
    parts = [axes(frame, x_label, y_label, x_form)]
    taken: list[Box] = []
    for point in points:
        x, y = frame.x(point.x), frame.y(point.y)
        if point.low is not None and point.high is not None:
            parts += _whisker(x, frame.y(point.low), x, frame.y(point.high), point.name)
        parts.append(mark(point.name, x, y))
        parts.append(_name(point.name, x, y, frame, taken))
    told = "; ".join(_told(p, f"{p.name} at {x_form.format(p.x)}:") for p in points)
    return _svg(frame, parts, f"Quality against cost. {y_label} by {x_label}: {told}")


def spans(found: Sequence[Span], width: int, x_label: str, main: str) -> Markup:
    """Draw amounts with their intervals one below the other, and the line of 0; `main` is drawn filled."""
    if not found:
        return EMPTY
    ends = [0.0, *(end for s in found for end in (s.value, s.low, s.high) if end is not None)]
    room = 0.06 * (max(ends) - min(ends)) or 1.0
    frame = Frame(
        width, 56 * len(found) + BOTTOM + 12, min(ends) - room, max(ends) + room, 0.0, 1.0, 20
    )
    floor = frame.height - BOTTOM
    parts = [_line(frame.x(0.0), 4, frame.x(0.0), floor, "axis zero")]
    for value in ticks(frame.x_low, frame.x_high, max(2, width // 110)):
        parts.append(_text(frame.x(value), floor + 18, dollars(value), "tick mid"))
    parts.append(_line(frame.left, floor, width - RIGHT, floor, "axis"))
    parts.append(_text(width / 2, frame.height - 6, x_label, "label mid"))
    for k, span in enumerate(found):
        x, y = frame.x(span.value), 56.0 * k + 44
        parts.append(_text(frame.left, y - 22, span.name, "name" if span.name == main else "label"))
        if span.low is not None and span.high is not None:
            parts += _whisker(frame.x(span.low), y, frame.x(span.high), y, "student")
        hollow = "" if span.name == main else " hollow"
        parts.append(
            Markup('<circle class="dot student{}" cx="{}" cy="{}" r="7"/>').format(hollow, x, y)
        )
    told = "; ".join(
        f"{s.name} {_told(Point(s.name, 0, s.value, s.low, s.high), '')}" for s in found
    )
    return _svg(frame, parts, f"{x_label}: {told}")


def dollars(value: float) -> str:
    """Return a tick's dollars, the sign before them."""
    return f"−${-value:g}" if value < 0 else f"${value:g}"


def mark(model: str, x: float, y: float) -> Markup:
    """Draw a model's mark: the student a disc, the teacher a square, the base a diamond."""
    if model == "student":
        return Markup('<circle class="dot student" cx="{}" cy="{}" r="7"/>').format(x, y)
    turn = Markup(' transform="rotate(45 {} {})"').format(x, y) if model == "base" else ""
    return Markup('<rect class="dot {}" x="{}" y="{}" width="12" height="12"{}/>').format(
        model, round(x - 6, 1), round(y - 6, 1), turn
    )


def _name(name: str, x: float, y: float, frame: Frame, taken: list[Box]) -> Markup:
    """Write a point's name beside it: on the side where no other name stands, else lower. It is then `taken`."""
    long = LETTER * len(name)
    sides = [Box(x + 14, x + 14 + long, y + 5), Box(x - 14 - long, x - 14, y + 5)]
    inside = [b for b in sides if b.left > LEFT and b.right < frame.width] or sides
    box = next((b for b in inside if not b.meets(taken)), inside[0])
    while box.meets(taken):
        box = box._replace(line=box.line + 4)
    taken.append(box)
    left = box.left < x
    return _text(box.right if left else box.left, box.line, name, "name end" if left else "name")


def _whisker(x1: float, y1: float, x2: float, y2: float, kind: str) -> list[Markup]:
    """Draw an interval with a bar at each end, upright or lying."""
    across, along = (5, 0) if x1 == x2 else (0, 5)
    bars = [
        _line(x - across, y - along, x + across, y + along, f"whisker {kind}")
        for x, y in ((x1, y1), (x2, y2))
    ]
    return [_line(x1, y1, x2, y2, f"whisker {kind}"), *bars]


def _told(point: Point, before: str) -> str:
    between = (
        "" if point.low is None or point.high is None else f" ({point.low:.3g} to {point.high:.3g})"
    )
    return f"{before} {point.y:.3g}{between}".strip()


def training_curve(
    train: Sequence[tuple[float, float]],
    validation: Sequence[tuple[float, float]],
    best: float | None,
    width: int,
) -> Markup:
    """Draw the training loss by step, its running mean, and the validation loss with the best step marked."""
    if len(train) < 2:
        return EMPTY
    smooth = running_mean(train)
    values = [y for _, y in (*train, *validation)]
    spread = max(values) - min(values) or 1.0
    low, high = max(0.0, min(values) - 0.08 * spread), max(values) + 0.05 * spread
    frame = Frame(width, 300, 0.0, max(x for x, _ in (*train, *validation)), low, high)
    parts = [axes(frame, "step", "loss, nats a token", "{:,.0f}", "{:.2g}")]
    parts += [_path(frame, train, "raw"), _path(frame, smooth, "line base")]
    parts.append(_path(frame, validation, "line student"))
    for x, y in validation:
        kind = "dot student" if x == best else "dot student hollow"
        parts.append(
            Markup('<circle class="{}" cx="{}" cy="{}" r="4.5"/>').format(
                kind, frame.x(x), frame.y(y)
            )
        )
    told = f"Training loss from {train[0][1]:.3g} to {smooth[-1][1]:.3g}"
    if validation:
        losses = [y for _, y in validation]
        told += (
            f", validation loss from {losses[0]:.3g} to {losses[-1]:.3g}, least {min(losses):.3g}"
        )
    return _svg(frame, parts, f"{told}, in nats a token, by step")


def running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Smooth a series by the mean of the twentieth of it that surrounds each point."""
    reach = max(1, len(points) // 40)
    smooth = []
    for k, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, k - reach) : k + reach + 1]]
        smooth.append((x, sum(near) / len(near)))
    return smooth


def _svg(frame: Frame, parts: Sequence[Markup], told: str) -> Markup:
    """Return the drawing; `told` says what it shows to those who do not see it."""
    return Markup(
        '<svg class="plot" width="{0}" height="{1}" viewBox="0 0 {0} {1}" role="img" aria-label="{2}">{3}</svg>'
    ).format(frame.width, frame.height, told, Markup("").join(parts))


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(kind, x1, y1, x2, y2)


def _text(x: float, y: float, text: str, kind: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(kind, x, y, escape(text))


def _path(frame: Frame, points: Sequence[tuple[float, float]], kind: str) -> Markup:
    if len(points) < 2:
        return EMPTY
    joined = " ".join(f"{frame.x(x)},{frame.y(y)}" for x, y in points)
    return Markup('<polyline class="{}" points="{}"/>').format(kind, joined)

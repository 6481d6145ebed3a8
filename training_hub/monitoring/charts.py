"""Line charts as SVG text: no script, no library, colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 12, 34
MOST_POINTS = 1200
"""More points than this are thinned: a line of more pixels than that shows nothing further."""


@dataclass(frozen=True)
class Curve:
    """A named line through (x, y) points; `style` is the class of the style sheet that colours it."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "first"


def line_chart(curves: Sequence[Curve], label: str, x_label: str = "step") -> str:
    """An <svg> of `curves` over common axes. `label` is read aloud by screen readers. Points that are not finite
    leave a gap."""
    finite = [point for curve in curves for point in curve.points if math.isfinite(point[1])]
    if not finite:
        return '<p class="empty">No values.</p>'
    frame = _Frame.around(finite)
    drawn = "".join(_drawn(curve, frame) for curve in curves)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label, quote=True)}">'
        f"{_axes(frame, x_label)}{drawn}</svg>"
    )


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that lie in low..high, about `wanted` of them."""
    raw = (high - low) / max(1, wanted)
    if raw <= 0 or not math.isfinite(raw):
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` of the points (give or take the ends): of each stretch its lowest and highest, so that spikes
    stay, and points that are not finite, so that gaps stay."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        gap = next((point for point in stretch if not math.isfinite(point[1])), None)
        finite = [point for point in stretch if math.isfinite(point[1])]
        ends = {min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])} if finite else set()
        kept += sorted(ends | ({gap} if gap is not None else set()), key=lambda point: point[0])
    return kept


@dataclass(frozen=True)
class _Frame:
    """The stretch of numbers that the chart shows."""

    left: float
    right: float
    low: float
    high: float

    @classmethod
    def around(cls, points: Sequence[tuple[float, float]]) -> _Frame:
        xs, ys = [x for x, _ in points], [y for _, y in points]
        low, high = min(ys), max(ys)
        margin = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
        # Nothing shown here is below zero: the margin must not suggest it.
        floor = 0.0 if low >= 0 else -math.inf
        right = max(xs) if max(xs) > min(xs) else min(xs) + 1
        return cls(min(xs), right, max(floor, low - margin), high + margin)

    def x(self, value: float) -> float:
        return LEFT + (value - self.left) / (self.right - self.left) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.low) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)


def _axes(frame: _Frame, x_label: str) -> str:
    parts = []
    for value in ticks(frame.low, frame.high):
        y = f"{frame.y(value):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y}" text-anchor="end" dy="0.32em">{_number(value)}</text>')
    bottom = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    for value in ticks(frame.left, frame.right, 8):
        if value == int(value):
            x = f"{frame.x(value):.1f}"
            parts.append(f'<text class="tick" x="{x}" y="{bottom + 16}" text-anchor="middle">{_number(value)}</text>')
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{escape(x_label)}</text>')
    return "".join(parts)


def _drawn(curve: Curve, frame: _Frame) -> str:
    name = f"<title>{escape(curve.name)}</title>"
    parts = []
    for stretch in _stretches(thinned(curve.points)):
        if len(stretch) > 1:
            path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in stretch)
            parts.append(f'<polyline class="curve {curve.style}" points="{path}">{name}</polyline>')
    # Few points (validations, short runs) are marked, else a single one would not be seen at all.
    if len(curve.points) <= 30:
        for x, y in curve.points:
            if math.isfinite(y):
                at = f'cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}"'
                said = f"<title>{escape(curve.name)} at {_number(x)}: {y:.6g}</title>"
                parts.append(f'<circle class="dot {curve.style}" {at} r="3">{said}</circle>')
    return "".join(parts)


def _stretches(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The points, cut where one is not finite."""
    stretches: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            stretches[-1].append(point)
        elif stretches[-1]:
            stretches.append([])
    return [stretch for stretch in stretches if stretch]


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:,.6f}".rstrip("0").rstrip(".") if abs(value) < 100 else f"{value:,.0f}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"

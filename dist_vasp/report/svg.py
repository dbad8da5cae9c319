"""Charts as SVG shapes without a script: lines with bands, grouped bars, stacked bars.

Colours are classes (`s1` to `s6`) that the page's style sheet gives a light and a dark value, so a
chart follows the reader's scheme. The values of a chart have a tip, which browsers show and screen
readers speak. The page's template writes the shapes and escapes their texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dist_vasp.report.axis import Scale, linear, logarithmic

WIDTH, HEIGHT = 420, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 40
_FLOOR = HEIGHT - _BOTTOM  # y of the horizontal axis
_MOST_POINTS = 220

Format = Callable[[float], str]


@dataclass(frozen=True)
class Line:
    """`points` are (x, y) or (x, y, half width of the band); `marks` draws a dot at each."""

    name: str
    points: Sequence[tuple[float, ...]]
    colour: int = 1  # 1 to 6
    dashed: bool = False
    marks: bool = False


@dataclass(frozen=True)
class Bars:
    """One value for each label."""

    name: str
    values: Sequence[float]
    colour: int = 1


@dataclass(frozen=True)
class Shape:
    """One SVG element: its tag, its attributes, its text, and the tip that a browser shows."""

    tag: str
    attributes: dict[str, str | float]
    text: str = ""
    tip: str = ""


@dataclass
class Drawing:
    """The shapes of a chart, and what a screen reader says about it."""

    label: str
    shapes: list[Shape] = field(default_factory=list)
    width: int = WIDTH
    height: int = HEIGHT

    def add(self, tag: str, text: str = "", tip: str = "", **attributes: str | float) -> None:
        """Add a shape; numbers are rounded to a tenth, `kind` is the class."""
        named = {name.replace("_", "-"): value for name, value in attributes.items()}
        named["class"] = named.pop("kind")
        rounded = {k: round(v, 1) if isinstance(v, float) else v for k, v in named.items()}
        self.shapes.append(Shape(tag, rounded, text, tip))

    def add_tick(self, x: float, text: str) -> None:
        """Write a label below the horizontal axis."""
        self.add("text", text, kind="tick", x=x, y=_FLOOR + 17, text_anchor="middle")

    def add_grid(self, y: Scale, x_name: str, y_format: Format) -> None:
        """Draw the horizontal lines with their values, the axis and its name."""
        for tick in y.ticks:
            at = y(tick)
            self.add("line", kind="grid", x1=_LEFT, x2=WIDTH - _RIGHT, y1=at, y2=at)
            text = y_format(tick)
            self.add("text", text, kind="tick", x=_LEFT - 7, y=at + 4, text_anchor="end")
        self.add("line", kind="axis", x1=_LEFT, x2=WIDTH - _RIGHT, y1=_FLOOR, y2=_FLOOR)
        middle = (_LEFT + WIDTH - _RIGHT) / 2
        self.add("text", x_name, kind="axis-name", x=middle, y=HEIGHT - 5, text_anchor="middle")

    def add_bar(self, left: float, width: float, top: float, height: float, **more: str) -> None:
        """Draw a bar at least half a pixel wide."""
        wide, high = max(0.5, width - 1), max(0.0, height)
        self.add("rect", x=left, y=top, rx=1.5, width=wide, height=high, **more)


def lines(
    series: Sequence[Line],
    x_name: str,
    y_format: Format,
    zero: bool = False,
    log_x: bool = False,
    log_y: bool = False,
    title: str = "",
) -> Drawing | None:
    """Draw lines over a common x axis; None where none has a point.

    `zero`: the y axis begins at 0.
    """
    series = [
        s if s.marks else Line(s.name, thin(s.points), s.colour, s.dashed)
        for s in series
        if len(s.points)
    ]
    if not series:
        return None
    points = [p for s in series for p in s.points]
    xs = [p[0] for p in points]
    # a band does not reach below what is possible
    floor = min(0.0, *(p[1] for p in points)) if zero else -math.inf
    ys = [y for p in points for y in (max(p[1] - _half(p), floor), p[1] + _half(p))]
    x_axis = logarithmic if log_x and min(xs) > 0 else linear
    y_axis = logarithmic if log_y and min(ys) > 0 else linear
    x = x_axis(min(xs), max(xs), (_LEFT, WIDTH - _RIGHT), 6, tight=True)
    y = y_axis(min([*ys, 0.0] if zero else ys), max(ys), (_FLOOR, _TOP), 5, zero=zero)
    drawing = Drawing(title or ", ".join(s.name for s in series))
    drawing.add_grid(y, x_name, y_format)
    for tick in x.ticks:
        drawing.add_tick(x(tick), short(tick))
    for s in series:
        _add_band(drawing, s, x, y, y.low if y.log else floor)
        _add_line(drawing, s, x, y)
        if s.marks or len(s.points) == 1:
            _add_dots(drawing, s, x, y, x_name, y_format)
    return drawing


def _add_band(drawing: Drawing, s: Line, x: Scale, y: Scale, floor: float) -> None:
    if any(_half(p) for p in s.points):
        upper = [(x(p[0]), y(p[1] + _half(p))) for p in s.points]
        lower = [(x(p[0]), y(max(p[1] - _half(p), floor))) for p in s.points]
        drawing.add("path", kind=f"band s{s.colour}", d=_path([*upper, *reversed(lower)]) + "Z")


def _add_line(drawing: Drawing, s: Line, x: Scale, y: Scale) -> None:
    if len(s.points) > 1:
        kind = f"line s{s.colour}{' dashed' if s.dashed else ''}"
        drawing.add("path", tip=s.name, kind=kind, d=_path([(x(p[0]), y(p[1])) for p in s.points]))


def _add_dots(drawing: Drawing, s: Line, x: Scale, y: Scale, x_name: str, y_format: Format) -> None:
    for p in s.points:
        band = f" \N{PLUS-MINUS SIGN} {y_format(_half(p))}" if _half(p) else ""
        tip = f"{s.name}, {short(p[0])} {x_name}: {y_format(p[1])}{band}"
        drawing.add("circle", tip=tip, kind=f"dot s{s.colour}", cx=x(p[0]), cy=y(p[1]), r=2.6)


def bars(
    labels: Sequence[str],
    groups: Sequence[Bars],
    y_format: Format,
    x_name: str,
    markers: Sequence[Bars] = (),
) -> Drawing:
    """Draw grouped bars; `markers` are short lines over a group, to compare its bars with."""
    top = max([v for group in (*groups, *markers) for v in group.values], default=0.0) or 1.0
    y = linear(0.0, top, (_FLOOR, _TOP), 5, zero=True)
    step = (WIDTH - _LEFT - _RIGHT) / max(len(labels), 1)
    wide = step * 0.72 / max(len(groups), 1)
    drawing = Drawing(f"{', '.join(g.name for g in groups)} by {x_name}")
    drawing.add_grid(y, x_name, y_format)
    for i, label in enumerate(labels):
        left = _LEFT + i * step + step * 0.14
        for g, group in enumerate(groups):
            at = y(group.values[i])
            tip = f"{label}, {group.name}: {y_format(group.values[i])}"
            kind = f"bar s{group.colour}"
            drawing.add_bar(left + g * wide, wide, at, y(0) - at, kind=kind, tip=tip)
        for marker in markers:
            at = y(marker.values[i])
            tip = f"{label}, {marker.name}: {y_format(marker.values[i])}"
            end = left + step * 0.72 + 2
            drawing.add("line", tip=tip, kind="marker", x1=left - 2, x2=end, y1=at, y2=at)
        drawing.add_tick(_LEFT + (i + 0.5) * step, label)
    return drawing


def stacked(labels: Sequence[str], parts: Sequence[Bars], y_format: Format, x_name: str) -> Drawing:
    """Draw one bar for each label, with the parts on top of each other."""
    totals = [sum(part.values[i] for part in parts) for i in range(len(labels))]
    y = linear(0.0, max(totals, default=1.0) or 1.0, (_FLOOR, _TOP), 5, zero=True)
    step = (WIDTH - _LEFT - _RIGHT) / max(len(labels), 1)
    wide = min(step * 0.6, 64)
    drawing = Drawing(f"{', '.join(p.name for p in parts)} by {x_name}")
    drawing.add_grid(y, x_name, y_format)
    for i, label in enumerate(labels):
        middle = _LEFT + (i + 0.5) * step
        base = 0.0
        for part in parts:
            value = part.values[i]
            if value > 0:
                height = max(0.0, y(base) - y(base + value) - 1)  # a gap of one pixel
                tip = f"{label}, {part.name}: {y_format(value)}"
                kind = f"bar s{part.colour}"
                top = y(base) - height
                drawing.add_bar(middle - wide / 2, wide, top, height, kind=kind, tip=tip)
                base += value
        drawing.add_tick(middle, label)
    return drawing


def thin(points: Sequence[tuple[float, ...]], most: int = _MOST_POINTS) -> list[tuple[float, ...]]:
    """Return at most `most` points: means over equal stretches.

    The band of a mean is that of its points, or their standard deviation where they have none.
    """
    if len(points) <= most:
        return list(points)
    found: list[tuple[float, ...]] = []
    for i in range(most):
        part = points[i * len(points) // most : (i + 1) * len(points) // most]
        x, y = (math.fsum(p[k] for p in part) / len(part) for k in (0, 1))
        spread = math.sqrt(math.fsum((p[1] - y) ** 2 for p in part) / len(part))
        band = spread if len(part[0]) < 3 else math.fsum(p[2] for p in part) / len(part)
        found.append((x, y, band))
    return found


def short(value: float) -> str:
    """Return a number for an axis: 0, 0.05, 12, 1.5k, 3M, 1e-5."""
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")


def percent(value: float) -> str:
    """Return a share as a percentage."""
    return f"{100 * value:.3g}%"


def _half(point: tuple[float, ...]) -> float:
    """Return half the width of the band at a point."""
    return point[2] if len(point) > 2 else 0.0


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{px:.1f},{py:.1f}" for px, py in points)

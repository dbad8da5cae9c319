"""Small drawings as inline SVG, without a script: lines with bands, bars, stacked bars.

Colours are classes (`s1` to `s6`) that the page's style sheet gives a light and a dark value, so a
drawing follows the reader's scheme. Values in the drawing have a `<title>`, which browsers show as
a tooltip and readers of screens can speak.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dist_vasp.text import escape

WIDTH, HEIGHT = 420, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 40
_MOST_POINTS = 220

Format = Callable[[float], str]


@dataclass(frozen=True)
class Line:
    """`points` are (x, y) or (x, y, half width of the band).

    `marks`: draw a dot with a tooltip at each.
    """

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


@dataclass
class _Scale:
    """Data to pixels, on a linear or a logarithmic axis."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    ticks: list[float] = field(default_factory=list)

    def __call__(self, value: float) -> float:
        low, high, v = (
            math.log(max(x, 1e-300)) if self.log else x for x in (self.low, self.high, value)
        )
        return self.start + (self.end - self.start) * (
            (v - low) / (high - low) if high > low else 0.5
        )


def lines(
    series: Sequence[Line],
    x_name: str,
    y_format: Format,
    zero: bool = False,
    log_x: bool = False,
    log_y: bool = False,
    title: str = "",
) -> str:
    """Lines over a common x axis; the empty string where none has a point."""
    series = [
        s if s.marks else Line(s.name, thin(s.points), s.colour, s.dashed)
        for s in series
        if len(s.points)
    ]
    if not series:
        return ""
    xs = [p[0] for s in series for p in s.points]
    floor = (
        min(0.0, *(p[1] for s in series for p in s.points)) if zero else -math.inf
    )  # a band goes no further down than what may be
    ys = [
        v for s in series for p in s.points for v in (max(p[1] - _half(p), floor), p[1] + _half(p))
    ]
    log_x, log_y = log_x and min(xs) > 0, log_y and min(ys) > 0
    x = _axis(min(xs), max(xs), _LEFT, WIDTH - _RIGHT, log_x, 6, False, tight=True)
    y = _axis(min([*ys, 0.0] if zero else ys), max(ys), HEIGHT - _BOTTOM, _TOP, log_y, 5, zero)
    drawn = [_grid(x, y, x_name, short, y_format)]
    for s in series:
        drawn.append(_line(s, x, y, y_format, x_name, floor))
    return _svg(drawn, title or ", ".join(s.name for s in series))


def bars(
    labels: Sequence[str],
    groups: Sequence[Bars],
    y_format: Format,
    x_name: str,
    markers: Sequence[Bars] = (),
) -> str:
    """Grouped bars; `markers` are short horizontal lines over the group, for what the bars are held
    against."""
    top = max([v for group in (*groups, *markers) for v in group.values], default=0.0) or 1.0
    y = _axis(0.0, top, HEIGHT - _BOTTOM, _TOP, False, 5, True)
    step = (WIDTH - _LEFT - _RIGHT) / max(len(labels), 1)
    drawn = [_grid(None, y, x_name, short, y_format)]
    wide = step * 0.72 / max(len(groups), 1)
    for i, label in enumerate(labels):
        left = _LEFT + i * step + step * 0.14
        for g, group in enumerate(groups):
            drawn.append(
                _bar(
                    left + g * wide,
                    wide,
                    y(0),
                    y(group.values[i]),
                    group,
                    f"{label}, {group.name}: {y_format(group.values[i])}",
                )
            )
        for marker in markers:
            at = y(marker.values[i])
            tip = escape(f"{label}, {marker.name}: {y_format(marker.values[i])}")
            drawn.append(
                f'<line class="marker" x1="{left - 2:.1f}" x2="{left + step * 0.72 + 2:.1f}" y1="{at:.1f}" y2="{at:.1f}">'
                f"<title>{tip}</title></line>"
            )
        middle = _LEFT + (i + 0.5) * step
        drawn.append(
            f'<text class="tick" x="{middle:.1f}" y="{HEIGHT - _BOTTOM + 17}" text-anchor="middle">{escape(label)}</text>'
        )
    return _svg(drawn, f"{', '.join(g.name for g in groups)} by {x_name}")


def stacked(labels: Sequence[str], parts: Sequence[Bars], y_format: Format, x_name: str) -> str:
    """One bar for each label, made of the parts one upon the other."""
    totals = [sum(part.values[i] for part in parts) for i in range(len(labels))]
    y = _axis(0.0, max(totals, default=1.0) or 1.0, HEIGHT - _BOTTOM, _TOP, False, 5, True)
    step = (WIDTH - _LEFT - _RIGHT) / max(len(labels), 1)
    drawn = [_grid(None, y, x_name, short, y_format)]
    for i, label in enumerate(labels):
        wide = min(step * 0.6, 64)
        left, base = _LEFT + (i + 0.5) * step - wide / 2, 0.0
        for part in parts:
            if part.values[i] > 0:
                tip = f"{label}, {part.name}: {y_format(part.values[i])}"
                drawn.append(
                    _bar(left, wide, y(base), y(base + part.values[i]), part, tip, gap=1.0)
                )
                base += part.values[i]
        drawn.append(
            f'<text class="tick" x="{left + wide / 2:.1f}" y="{HEIGHT - _BOTTOM + 17}" text-anchor="middle">{escape(label)}</text>'
        )
    return _svg(drawn, f"{', '.join(p.name for p in parts)} by {x_name}")


def thin(points: Sequence[tuple[float, ...]], most: int = _MOST_POINTS) -> list[tuple[float, ...]]:
    """At most `most` points: means over equal stretches, with the standard deviation in each as its
    band where there is none yet."""
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
    """A number for an axis: 0, 0.05, 12, 1.5k, 3M, 1e-5."""
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")


def percent(value: float) -> str:
    return f"{100 * value:.3g}%"


# --- parts -----------------------------------------------------------------------------------------------------------


def _axis(
    low: float,
    high: float,
    start: float,
    end: float,
    log: bool,
    n: int,
    zero: bool,
    tight: bool = False,
) -> _Scale:
    """An axis whose ends are ticks, unless it is tight."""
    if log:
        if high <= low:
            low, high = low / 3, high * 3
        scale = _Scale(low, high, start, end, True)
        decades = math.log10(scale.high / scale.low)
        steps = (1,) if decades > 2.5 else (1, 2, 5)
        powers = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
        candidates = [m * 10.0**k for k in powers for m in steps]
        if not tight:
            scale.low, scale.high = (
                max([c for c in candidates if c <= low * 1.0001], default=low),
                min([c for c in candidates if c >= high * 0.9999], default=high),
            )
        scale.ticks = [c for c in candidates if scale.low * 0.999 <= c <= scale.high * 1.001]
        return scale
    if high <= low:
        pad = abs(high) * 0.1 or 1.0
        low, high = (low if zero else low - pad), high + pad
    raw = (high - low) / n
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999), 10 * power)
    if not tight:
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    first = math.ceil(low / step - 1e-9)
    ticks = [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]
    return _Scale(low, high, start, end, False, [0.0 if abs(t) < step * 1e-6 else t for t in ticks])


def _grid(x: _Scale | None, y: _Scale, x_name: str, x_format: Format, y_format: Format) -> str:
    drawn = []
    for tick in y.ticks:
        at = y(tick)
        drawn.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        )
        drawn.append(
            f'<text class="tick" x="{_LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{escape(y_format(tick))}</text>'
        )
    for tick in x.ticks if x else []:
        assert x is not None
        drawn.append(
            f'<text class="tick" x="{x(tick):.1f}" y="{HEIGHT - _BOTTOM + 17}" text-anchor="middle">{escape(x_format(tick))}</text>'
        )
    drawn.append(
        f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{HEIGHT - _BOTTOM}" y2="{HEIGHT - _BOTTOM}"/>'
    )
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    drawn.append(
        f'<text class="axis-name" x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_name)}</text>'
    )
    return "".join(drawn)


def _line(s: Line, x: _Scale, y: _Scale, y_format: Format, x_name: str, floor: float) -> str:
    at = [(x(p[0]), y(p[1])) for p in s.points]
    drawn = []
    if any(_half(p) for p in s.points):
        low = y.low if y.log else floor
        upper = [(x(p[0]), y(p[1] + _half(p))) for p in s.points]
        lower = [(x(p[0]), y(max(p[1] - _half(p), low))) for p in s.points]
        drawn.append(f'<path class="band s{s.colour}" d="{_path([*upper, *reversed(lower)])}Z"/>')
    if len(at) > 1:
        dashed = " dashed" if s.dashed else ""
        drawn.append(
            f'<path class="line s{s.colour}{dashed}" d="{_path(at)}"><title>{escape(s.name)}</title></path>'
        )
    if s.marks or len(at) == 1:
        for (px, py), p in zip(at, s.points, strict=True):
            band = f" \N{PLUS-MINUS SIGN} {y_format(_half(p))}" if _half(p) else ""
            tip = escape(f"{s.name}, {short(p[0])} {x_name}: {y_format(p[1])}{band}")
            drawn.append(
                f'<circle class="dot s{s.colour}" cx="{px:.1f}" cy="{py:.1f}" r="2.6"><title>{tip}</title></circle>'
            )
    return "".join(drawn)


def _half(point: tuple[float, ...]) -> float:
    """Half the width of the band at a point."""
    return point[2] if len(point) > 2 else 0.0


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{px:.1f},{py:.1f}" for px, py in points)


def _bar(
    left: float, width: float, base: float, top: float, group: Bars, tip: str, gap: float = 0.0
) -> str:
    height = max(0.0, base - top - gap)
    return (
        f'<rect class="bar s{group.colour}" x="{left:.1f}" y="{base - height:.1f}" width="{max(0.5, width - 1):.1f}" height="{height:.1f}" '
        f'rx="1.5"><title>{escape(tip)}</title></rect>'
    )


def _svg(drawn: Sequence[str], label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(drawn)}</svg>'

"""The page of a comparison, report.html: what report.md says, in the style of a run's report."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from dist_vasp.compare.report import best_first, estimate_of, seeds_of, word_of
from dist_vasp.compare.statistics import LIMIT, METRICS, NAMES, PRIMARY, Estimate
from dist_vasp.config.metric_names import metric_or_none
from dist_vasp.ranking.per_user import THIRDS
from dist_vasp.report import words
from dist_vasp.report.axis import linear
from dist_vasp.report.charts import Card, Key
from dist_vasp.report.page import environment, in_ascii
from dist_vasp.report.svg import Drawing, short

SECTIONS = {
    "failures": "Failed runs",
    "metrics": "Metrics",
    "asked": "Further metrics",
    "tail": "Head, middle and tail",
    "cost": "Cost",
    "made": "How this was made",
}  # each is a template, comparison_NAME.html
_WIDTH, _ROW, _LEFT, _RIGHT, _TOP, _LONGEST = 480, 24, 140, 18, 8, 20
_COLOURS = {"better": 3, "no difference": 1, "worse": 2}


@dataclass(frozen=True)
class Row:
    """A model of the comparison; `difference` is None of the reference."""

    name: str
    what: str
    seeds: str
    is_reference: bool
    is_winner: bool
    metrics: dict[str, Estimate]
    differences: dict[str, Estimate] | None
    seed_sd: float | None
    raw: dict[str, Any]

    @property
    def difference(self) -> Estimate | None:
        """Return the difference from the reference in NDCG@100."""
        return None if self.differences is None else self.differences[PRIMARY]

    @property
    def word(self) -> str:
        """Return what the difference amounts to."""
        return "reference" if self.difference is None else word_of(self.difference)


def comparison_page(found: dict[str, Any], date: str) -> str:
    """Return the page for what `compare.gather` returns, in ASCII."""
    templates = environment()
    rows = [_row(model, found) for model in best_first(found)]
    asked = [metric for name in found["metrics_asked"] if (metric := metric_or_none(name))]
    values = {
        "found": found,
        "rows": rows,
        "date": date,
        "names": {metric: NAMES[metric] for metric in METRICS},
        "primary": PRIMARY,
        "thirds": THIRDS,
        "asked": asked,
        "chart": _chart(rows, found["reference"]),
        "verdict": _bold(found["verdict"]),
    }
    sections = {}
    for name, title in SECTIONS.items():
        text = templates.get_template(f"comparison_{name}.html").render(values).strip()
        if text:
            sections[name] = (title, Markup(text))
    page = templates.get_template("comparison_page.html").render(values, sections=sections)
    return in_ascii(page)


def _row(model: dict[str, Any], found: dict[str, Any]) -> Row:
    differences = model.get("difference")
    return Row(
        model["name"],
        model["what"],
        seeds_of(model),
        model["name"] == found["reference"],
        model["name"] == found["winner"],
        {name: estimate_of(raw) for name, raw in model["metrics"].items()},
        differences and {name: estimate_of(raw) for name, raw in differences.items()},
        model["metrics"][PRIMARY]["seed_sd"],
        model,
    )


def _bold(text: str) -> Markup:
    """Return a text in which `**` begins and ends bold words."""
    parts = [escape(part) for part in text.replace("+-", words.PLUS_MINUS).split("**")]
    return Markup("").join(
        Markup("<b>{}</b>").format(part) if i % 2 else part for i, part in enumerate(parts)
    )


def _chart(rows: list[Row], reference: str) -> Card | None:
    """Return the paired differences as a chart, a line of two standard errors each way for each
    model; None where there is nothing to compare. Baselines are far off, and left out."""
    shown = [
        (row, row.difference)
        for row in rows
        if row.difference is not None and not math.isnan(row.difference.se) and row.raw["trained"]
    ]
    if not shown:
        return None
    ends = [d.mean + sign * LIMIT * d.se for _, d in shown for sign in (-1, 1)]
    x = linear(min(0.0, *ends), max(0.0, *ends), (_LEFT, _WIDTH - _RIGHT), 4)
    floor = _TOP + _ROW * len(shown)
    title = f"{NAMES[PRIMARY]} less that of {reference}"
    drawing = Drawing(title, width=_WIDTH, height=floor + 36)
    for tick in x.ticks:
        kind = "axis" if tick == 0 else "grid"
        drawing.add("line", kind=kind, x1=x(tick), x2=x(tick), y1=_TOP, y2=floor)
        drawing.add("text", short(tick), kind="tick", x=x(tick), y=floor + 18, text_anchor="middle")
    for i, (row, d) in enumerate(shown):
        y = _TOP + _ROW * (i + 0.5)
        name = row.name if len(row.name) <= _LONGEST else f"{row.name[: _LONGEST - 3]}..."
        drawing.add("text", name, kind="tick", x=_LEFT - 12, y=y + 4, text_anchor="end")
        kind, tip = f"s{_COLOURS[row.word]}", f"{row.name}: {d.mean:+.4f} +- {d.se:.4f}"
        left, right = (x(d.mean + sign * LIMIT * d.se) for sign in (-1, 1))
        drawing.add("line", tip=tip, kind=f"line {kind}", x1=left, x2=right, y1=y, y2=y)
        drawing.add("circle", tip=tip, kind=f"dot {kind}", cx=x(d.mean), cy=y, r=4)
    text = "trained models, paired by user; the line reaches two standard errors each way"
    keys = [Key(f"s{number}", word) for word, number in _COLOURS.items()]
    return Card(title, text, drawing, keys)

"""The charts of a report: learning curves, popularity, scaling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dist_vasp.config.metric_names import DEFAULT_METRICS, metric_or_none
from dist_vasp.report.gather import Run
from dist_vasp.report.svg import Bars, Drawing, Format, Line, bars, lines, percent, short, stacked
from dist_vasp.report.view import View

PATHS = {
    "decoder": "decoder head R d",
    "latent": "latent head Q z",
    "nease": "shallow path W x",
}  # in this order; other paths follow under their own names
_MOST_PATHS = 6


@dataclass(frozen=True)
class Key:
    """An entry of a legend; `mark` is the class of its swatch: s1 to s6, or marker-key."""

    mark: str
    name: str


@dataclass(frozen=True)
class Card:
    """A chart with its title, what it shows, and its legend."""

    title: str
    text: str
    drawing: Drawing
    legend: list[Key] = field(default_factory=list)


@dataclass(frozen=True)
class _Curve:
    """A chart of one quantity of every training step, in `unit`s or as a share."""

    name: str
    title: str
    text: str
    unit: float = 1.0
    share: bool = False
    zero: bool = False
    log: bool = False
    only_if_not_0: bool = False

    def show(self, value: float) -> str:
        return percent(value) if self.share else short(value / self.unit)


_CURVES = (
    _Curve("focal", "Reconstruction", "{loss}, summed over items"),
    _Curve(
        "kl",
        "KL divergence",
        "mean over rows and latent dimensions",
        zero=True,
        only_if_not_0=True,
    ),
    _Curve("lr", "Learning rate", "of trunk and item matrices", log=True),
    _Curve(
        "grad_norm",
        "Gradient norm",
        "trunk and item matrices together, before clipping",
        zero=True,
    ),
    _Curve("users_per_second", "Throughput", "users a second, all ranks", zero=True),
    _Curve("data_wait", "Waiting for data", "share of a step", share=True, zero=True),
    _Curve("memory", "Memory", "resident size of rank 0, GB", unit=1e9, zero=True),
    _Curve("device_memory", "Device memory", "peak so far of rank 0, GB", unit=1e9, zero=True),
    _Curve(
        "bytes_moved",
        "Communication",
        "MB that rank 0 sends in a step, the trunk's own excluded",
        unit=1e6,
        zero=True,
        only_if_not_0=True,
    ),
)
_EVALUATED = ("ndcg@100", "recall@20", "recall@50")
_PATHS_AFTER = "grad_norm"


def learning(runs: Sequence[Run]) -> list[Card]:
    """Return the learning curves of all runs, a colour each; the paths' logits of a single run."""
    cards = [_evaluations(runs, name, title) for name, title in _evaluated(runs).items()]
    for curve in _CURVES:
        cards.append(_per_step(runs, curve))
        if curve.name == _PATHS_AFTER and len(runs) == 1:
            cards.append(_paths(runs[0]))
    return [card for card in cards if card]


def _evaluated(runs: Sequence[Run]) -> dict[str, str]:
    """Return the metrics that have a chart, with their titles: three default ones, then those that
    a run has asked for."""
    asked = dict.fromkeys(key for run in runs for line in run.evaluations for key in line)
    default = {str(metric) for metric in DEFAULT_METRICS}
    names = (*_EVALUATED, *(key for key in asked if key not in default))
    return {str(metric): metric.title for name in names if (metric := metric_or_none(name))}


def _evaluations(runs: Sequence[Run], name: str, title: str) -> Card | None:
    """Return a metric of validation users by epoch; by lambda where all runs are closed forms."""
    drawn = [Line(run.name, run.evaluated(name), i + 1, marks=True) for i, run in enumerate(runs)]
    text = "validation users; the band is one standard error"
    if all(run.closed_form for run in runs):
        drawn = _as_levels(drawn, [run.has_lambda for run in runs])
        return _lines_card(
            title, text, drawn, lines(drawn, "lambda", short, log_x=True, title=title)
        )
    drawn = _as_levels(drawn, [not run.closed_form for run in runs])
    return _lines_card(title, text, drawn, lines(drawn, "epochs", short, title=title))


def _per_step(runs: Sequence[Run], curve: _Curve) -> Card | None:
    series = [run.series(curve.name) for run in runs]
    if curve.only_if_not_0 and not any(value for points in series for _, value in points):
        return None
    kinds = {str(run.at("loss", "kind", "")) for run in runs}
    loss = f"{kinds.pop()} loss of the training rows" if len(kinds) == 1 else ""
    text = curve.text.format(loss=loss or "loss of the training rows")
    drawn = [Line(run.name, series[i], i + 1) for i, run in enumerate(runs)]
    x_name = "lambda" if all(run.closed_form for run in runs) else "epochs"
    drawing = lines(
        drawn, x_name, curve.show, curve.zero, x_name == "lambda", curve.log, curve.title
    )
    return _lines_card(curve.title, text, drawn, drawing)


def _lines_card(
    title: str, text: str, drawn: Sequence[Line], drawing: Drawing | None
) -> Card | None:
    """Return a card with a legend where there are several lines; None where nothing is drawn."""
    if drawing is None:
        return None
    named = [line for line in drawn if line.points] if len(drawn) > 1 else []
    return Card(title, text, drawing, [Key(f"s{line.colour}", line.name) for line in named])


def _as_levels(drawn: Sequence[Line], on_axis: Sequence[bool]) -> list[Line]:
    """Replace the points of a run without the x axis of the others (a closed form has no epochs,
    and some have no lambda) by the level of its best one.

    The level reaches from the first to the last point of the others.
    """
    pairs = list(zip(drawn, on_axis, strict=True))
    xs = [point[0] for line, is_on_axis in pairs if is_on_axis for point in line.points]
    found = []
    for line, is_on_axis in pairs:
        if line.points and not is_on_axis:
            best = max(line.points, key=lambda p: p[1])
            level = [(x, *best[1:]) for x in (min(xs), max(xs))] if xs else []
            line = replace(line, points=level, dashed=True, marks=False)
        found.append(line)
    return found


def _paths(run: Run) -> Card | None:
    """Return the mean logit of each path with its spread over items and rows."""
    drawn = []
    ending = "_logit_mean"
    logged = {name for line in run.steps[:1] for name in line if name.endswith(ending)}
    others = sorted(name.removesuffix(ending) for name in logged)
    paths = dict.fromkeys([*PATHS, *others])
    for i, path in enumerate(list(paths)[:_MOST_PATHS]):
        spread = dict(run.series(f"{path}_logit_std"))
        points = [(x, value, spread.get(x, 0.0)) for x, value in run.series(f"{path}_logit_mean")]
        if points:
            drawn.append(Line(PATHS.get(path, path), points, i + 1))
    drawing = lines(drawn, "epochs", short)
    if drawing is None:
        return None
    text = "mean over a sample of the items; the band is one deviation"
    legend = [Key(f"s{line.colour}", line.name) for line in drawn]
    return Card("The paths' logits", text, drawing, legend)


def popularity(views: Sequence[View]) -> Card:
    """Return the share of the recommended places by decile of popularity, and what users took.

    Every view has lists.
    """
    found = [(view, view.lists.popularity) for view in views if view.lists.popularity]
    first = found[0][1]
    labels = [str(i + 1) for i in range(len(first.recommended))]
    groups = [
        Bars(view.run.name if len(views) > 1 else "recommended", one.recommended, view.colour)
        for view, one in found
    ]
    held_out = Bars("held-out items", first.held_out)
    legend = [Key(f"s{group.colour}", group.name) for group in groups]
    return Card(
        "Where the lists go",
        "share of the first 20 places of all lists by tenth of the catalogue, 1 the most popular; "
        "the line is what the users took",
        bars(labels, groups, percent, "tenth of the catalogue", [held_out]),
        [*legend, Key("marker-key", held_out.name)],
    )


def scaling(benchmark: dict[str, Any]) -> list[Card]:
    """Return throughput and efficiency by the number of ranks, and the parts of a step."""
    by_mode: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(benchmark["rows"], key=lambda row: row["ranks"]):
        by_mode.setdefault(row["mode"], []).append(row)
    modes = list(dict.fromkeys(row["mode"] for row in benchmark["rows"]))
    legend = [Key(f"s{i + 1}", f"{mode} scaling") for i, mode in enumerate(modes)]

    def by_ranks(name: str) -> list[Line]:
        return [
            Line(mode, [(row["ranks"], row[name]) for row in by_mode[mode]], i + 1, marks=True)
            for i, mode in enumerate(modes)
        ]

    rows = by_mode[modes[0]]
    speed = rows[0]["users_per_second"] / rows[0]["ranks"]
    ideal = Line("ideal", [(row["ranks"], speed * row["ranks"]) for row in rows], 6, dashed=True)
    throughput = [*by_ranks("users_per_second"), ideal]
    charts: list[tuple[str, str, Format, list[Line]]] = [
        (
            "Throughput",
            "users a second; dashed: as many times faster as there are ranks",
            short,
            throughput,
        ),
        (
            "Efficiency",
            "throughput of a rank against the fewest ranks",
            percent,
            by_ranks("efficiency"),
        ),
    ]
    cards = [
        Card(title, text, drawing, legend)
        for title, text, show, drawn in charts
        if (drawing := lines(drawn, "ranks", show, zero=True))
    ]
    return [*cards, _parts(modes[0], rows)]


def _parts(mode: str, rows: Sequence[dict[str, Any]]) -> Card:
    """Return the parts of a step, without those below 0.2% of it."""
    names = dict.fromkeys(name for row in rows for name in row["parts"])
    least = 0.002 * rows[0]["step_seconds"]
    values = {name: [row["parts"].get(name, 0.0) for row in rows] for name in names}
    shown = [name for name, seconds in values.items() if any(s > least for s in seconds)]
    parts = [Bars(name, values[name], i % 6 + 1) for i, name in enumerate(shown)]
    labels = [f"{row['ranks']} rank{'s' * (row['ranks'] > 1)}" for row in rows]
    return Card(
        "Where a step's time goes",
        f"seconds of the slowest rank, {mode} scaling",
        stacked(labels, parts, short, "ranks"),
        [Key(f"s{part.colour}", part.name) for part in parts],
    )

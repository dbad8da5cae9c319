"""Which drawings a report has: learning curves, popularity, scaling.

Each is a card: a title, what it says, the drawing, a legend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dist_vasp.report.gather import Run
from dist_vasp.report.lists import Popularity
from dist_vasp.report.svg import Bars, Format, Line, bars, lines, percent, short, stacked
from dist_vasp.text import escape

PATHS = (
    ("decoder", "decoder head R d"),
    ("latent", "latent head Q z"),
    ("nease", "shallow path W x"),
)


def card(title: str, says: str, drawing: str, legend: Sequence[tuple[int | str, str]] = ()) -> str:
    """A drawing with its words; nothing where there is nothing to draw."""
    if not drawing:
        return ""
    keys = "".join(
        f'<span class="key"><i class="{_swatch(colour)}"></i>{escape(name)}</span>'
        for colour, name in legend
    )
    named = f'<p class="legend">{keys}</p>' if legend else ""
    return f'<figure class="card"><figcaption><h3>{escape(title)}</h3><p>{escape(says)}</p></figcaption>{named}{drawing}</figure>'


def _swatch(colour: int | str) -> str:
    return f"swatch s{colour}" if isinstance(colour, int) else f"swatch {colour}"


def learning(runs: Sequence[Run]) -> list[str]:
    """Learning curves of all runs, one colour each; of a single run also what only makes sense for
    one."""
    x_name = "lambda" if all(run.at("model", "kind") == "ease" for run in runs) else "epochs"

    def drawn_card(
        title: str,
        says: str,
        drawn: list[Line],
        show: Format = short,
        zero: bool = False,
        log: bool = False,
    ) -> str:
        legend = (
            [(line.colour, line.name) for line in drawn if line.points] if len(runs) > 1 else []
        )
        return card(
            title, says, lines(drawn, x_name, show, zero, x_name == "lambda", log, title), legend
        )

    cards = []
    for name, title in (
        ("ndcg@100", "NDCG@100"),
        ("recall@20", "Recall@20"),
        ("recall@50", "Recall@50"),
    ):
        drawn = [
            Line(run.name, run.evaluated(name), i + 1, marks=True) for i, run in enumerate(runs)
        ]
        if x_name == "epochs":
            drawn = _closed_form_across(runs, drawn)
        cards.append(drawn_card(title, "validation users; the band is one standard error", drawn))
    kind = {str(run.at("loss", "kind", "")) for run in runs}
    named = (
        f"{kind.pop()} loss of the training rows" if len(kind) == 1 else "loss of the training rows"
    )

    def per_step(
        name: str,
        title: str,
        says: str,
        show: Format = short,
        zero: bool = False,
        log: bool = False,
    ) -> str:
        return drawn_card(
            title,
            says,
            [Line(run.name, run.series(name), i + 1) for i, run in enumerate(runs)],
            show,
            zero,
            log,
        )

    cards += [
        per_step("focal", "Reconstruction", f"{named}, summed over items"),
        per_step("kl", "KL divergence", "mean over rows and latent dimensions", zero=True)
        if _varies(runs, "kl")
        else "",
        per_step("lr", "Learning rate", "of trunk and item matrices", log=True),
        per_step(
            "grad_norm",
            "Gradient norm",
            "trunk and item matrices together, before clipping",
            zero=True,
        ),
        _paths(runs[0]) if len(runs) == 1 else "",
        per_step("users_per_second", "Throughput", "users a second, all ranks", zero=True),
        per_step("data_wait", "Waiting for data", "share of a step", percent, zero=True),
        per_step(
            "memory", "Memory", "resident size of rank 0, GB", lambda v: short(v / 1e9), zero=True
        ),
        per_step(
            "device_memory",
            "Device memory",
            "peak so far of rank 0, GB",
            lambda v: short(v / 1e9),
            zero=True,
        ),
        per_step(
            "bytes_moved",
            "Communication",
            "MB that rank 0 sends in a step, the trunk's own excluded",
            lambda v: short(v / 1e6),
            zero=True,
        )
        if _varies(runs, "bytes_moved")
        else "",
    ]
    return [c for c in cards if c]


def _closed_form_across(runs: Sequence[Run], drawn: Sequence[Line]) -> list[Line]:
    """Beside runs that take epochs the closed form is a level: the best of its lambdas, from the
    first epoch to the last."""
    closed = [run.at("model", "kind") == "ease" for run in runs]
    xs = [
        p[0]
        for line, is_closed in zip(drawn, closed, strict=True)
        for p in line.points
        if not is_closed
    ]
    across = []
    for line, is_closed in zip(drawn, closed, strict=True):
        if is_closed and line.points and xs:
            best = max(line.points, key=lambda p: p[1])
            line = Line(
                line.name, [(x, *best[1:]) for x in (min(xs), max(xs))], line.colour, dashed=True
            )
        across.append(line)
    return across


def _varies(runs: Sequence[Run], name: str) -> bool:
    return any(value for run in runs for _, value in run.series(name))


def _paths(run: Run) -> str:
    """Mean logit of each path with its spread over items and rows."""
    drawn, legend = [], []
    for i, (path, name) in enumerate(PATHS):
        spread = dict(run.series(f"{path}_logit_std"))
        points = [(x, value, spread.get(x, 0.0)) for x, value in run.series(f"{path}_logit_mean")]
        if points:
            drawn.append(Line(name, points, i + 1))
            legend.append((i + 1, name))
    return card(
        "The paths' logits",
        "mean over a sample of the items; the band is one deviation",
        lines(drawn, "epochs", short),
        legend,
    )


def popularity(views: Sequence[tuple[int, str, Popularity]]) -> str:
    """Share of the recommended places by decile of popularity, against what users took; `views` are
    (colour, name, view)."""
    labels = [str(i + 1) for i in range(len(views[0][2].recommended))]
    groups = [
        Bars(name if len(views) > 1 else "recommended", view.recommended, colour)
        for colour, name, view in views
    ]
    markers = [Bars("held-out items", views[0][2].held_out)]
    legend: list[tuple[int | str, str]] = [
        *((group.colour, group.name) for group in groups),
        ("marker-key", "held-out items"),
    ]
    return card(
        "Where the lists go",
        "share of the first 20 places of all lists by tenth of the catalogue, 1 the most popular; the line is what the users took",
        bars(labels, groups, percent, "tenth of the catalogue", markers),
        legend,
    )


def scaling(benchmark: dict[str, Any]) -> list[str]:
    """Throughput and efficiency over the number of ranks, and where the time of a step went."""
    rows = benchmark["rows"]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    legend = [(i + 1, f"{mode} scaling") for i, mode in enumerate(modes)]
    throughput, efficiency = [], []
    for i, mode in enumerate(modes):
        own = sorted((row for row in rows if row["mode"] == mode), key=lambda row: row["ranks"])
        throughput.append(
            Line(mode, [(row["ranks"], row["users_per_second"]) for row in own], i + 1, marks=True)
        )
        efficiency.append(
            Line(mode, [(row["ranks"], row["efficiency"]) for row in own], i + 1, marks=True)
        )
    own = sorted((row for row in rows if row["mode"] == modes[0]), key=lambda row: row["ranks"])
    first = own[0]
    ideal = [
        (row["ranks"], first["users_per_second"] / first["ranks"] * row["ranks"]) for row in own
    ]
    names = list(dict.fromkeys(name for row in own for name in row["parts"]))
    parts = [
        Bars(name, [row["parts"].get(name, 0.0) for row in own], i % 6 + 1)
        for i, name in enumerate(names)
    ]
    parts = [
        part
        for part in parts
        if any(value > 0.002 * first["step_seconds"] for value in part.values)
    ]
    parts = [Bars(part.name, part.values, i % 6 + 1) for i, part in enumerate(parts)]
    return [
        card(
            "Throughput",
            "users a second; dashed: as many times faster as there are ranks",
            lines([*throughput, Line("ideal", ideal, 6, dashed=True)], "ranks", short, zero=True),
            legend,
        ),
        card(
            "Efficiency",
            "throughput of a rank against the fewest ranks",
            lines(efficiency, "ranks", percent, zero=True),
            legend,
        ),
        card(
            "Where a step's time goes",
            f"seconds of the slowest rank, {modes[0]} scaling",
            stacked(
                [f"{row['ranks']} rank{'s' * (row['ranks'] > 1)}" for row in own],
                parts,
                short,
                "ranks",
            ),
            [(part.colour, part.name) for part in parts],
        ),
    ]

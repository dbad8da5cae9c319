"""Write the report as one HTML page that opens from disk: no script and no request.

A run's files may hold anything, item titles above all. The templates escape every text; the page's
own policy forbids scripts and every address.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import jinja2
from markupsafe import Markup

from dist_vasp.config.metric_names import DEFAULT_METRICS, metric_or_none
from dist_vasp.config.schema import Config
from dist_vasp.recognise import begins_with
from dist_vasp.report import charts, words
from dist_vasp.report.gather import Run
from dist_vasp.report.lists import Lists
from dist_vasp.report.measured import QUALITY
from dist_vasp.report.verdict import judge
from dist_vasp.report.view import View
from dist_vasp.text import printable

SECTIONS = {
    "results": "Results",
    "members": "Members",
    "search": "Search",
    "learning": "Learning curves",
    "popularity": "Popularity",
    "thirds": "Head, middle and tail",
    "users": "Users",
    "scaling": "Scaling",
    "configuration": "Configuration",
    "environment": "Environment",
}  # each is a template
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_START = (  # reports are recognised by it
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
)

is_report = begins_with(_START.encode())


@dataclass(frozen=True)
class Fact:
    """A name with its value; `changed` values are bold."""

    name: str
    value: str
    changed: bool = False


def metric_titles(runs: Sequence[Run]) -> dict[str, str]:
    """Return the metrics that a page shows, with their titles: the default ones, then those that a
    run has asked for."""
    asked = [key for run in runs for _, metrics in run.splits for key in metrics]
    found = [metric for key in asked if (metric := metric_or_none(key))]
    return {str(metric): metric.title for metric in (*DEFAULT_METRICS, *found)}


def page(runs: Sequence[Run], lists: Sequence[Lists], date: str) -> str:
    """Return the whole page in ASCII: other characters are written as references."""
    templates = environment()
    views = [View(i, run, one) for i, (run, one) in enumerate(zip(runs, lists, strict=True), 1)]
    values = {
        "title": runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        "views": views,
        "runs": runs,
        "several": len(runs) > 1,
        "date": date,
        "metric_names": metric_titles(runs),
        "verdict": judge(views),
    }
    sections = {}
    for name, title in SECTIONS.items():
        text = templates.get_template(f"{name}.html").render(values).strip()
        if text:
            sections[name] = (title, Markup(text))
    return in_ascii(templates.get_template("page.html").render(values, sections=sections))


def in_ascii(html: str) -> str:
    """Return a page with characters beyond ASCII as references."""
    return html.encode("ascii", "xmlcharrefreplace").decode()


@functools.cache
def environment() -> jinja2.Environment:
    """Return the templates; control characters of a value are written as escape sequences."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("dist_vasp.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    assert found.loader is not None
    style = found.loader.get_source(found, "style.css")[0]
    found.globals |= {
        "start": Markup(_START),
        "style": Markup(style),
        "dash": words.DASH,
        "charts": charts,
        "quality": QUALITY,
        "tiles": _tiles,
        "defaults": _configuration,
        "differences": _differences,
        "facts": _facts,
        "versions": _versions,
    }
    filters = ("fixed", "grouped", "percent", "count", "duration", "is_number", "signed", "size")
    found.filters |= {name: getattr(words, name) for name in filters}
    return found


@dataclass(frozen=True)
class Tiles:
    """The figures at the head of a report: those of `split`, the training, and the throughput."""

    split: str
    metrics: dict[str, Any]
    steps: str
    rate: float | None


def _tiles(run: Run) -> Tiles:
    """Return the metrics of test where there are some, else of validation, else the last ones."""
    finished = [(split, metrics) for split, metrics in run.splits if metrics.get("n_users")]
    last = run.evaluations[-1] if run.evaluations else {}
    split, metrics = [*finished, ("validation", last)][0]
    rates = [rate for _, rate in run.series("users_per_second")]
    steps = f"{run.steps[-1]['step']:g}" if run.steps else ""
    return Tiles(split, metrics, steps, median(rates) if rates else None)


def _configuration(run: Run) -> dict[str, list[Fact]]:
    """Return the configuration by section; values that differ from the defaults are `changed`."""
    default = asdict(Config())
    sections = {name: part for name, part in run.config.items() if isinstance(part, dict)}
    alone = {name: part for name, part in run.config.items() if not isinstance(part, dict)}
    found = {}
    for section, keys in {**sections, **({"general": alone} if alone else {})}.items():
        usual = default if section == "general" else default.get(section)
        usual = usual if isinstance(usual, dict) else {}  # a file may have a section for one value
        found[section] = [
            Fact(key, words.plain(value), value != _as_yaml(usual.get(key)))
            for key, value in keys.items()
        ]
    return found


def _as_yaml(value: Any) -> Any:
    """Return a default as YAML would give it back."""
    return list(value) if isinstance(value, tuple) else value


def _differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the values of the runs, in their order, of every key in which they differ."""
    keys = {
        f"{section}.{key}": (section, key)
        for run in runs
        for section, part in run.config.items()
        if isinstance(part, dict)
        for key in part
    }
    missing = object()
    found = {}
    for name, (section, key) in keys.items():
        values = [run.at(section, key, missing) for run in runs]
        if any(value != values[0] for value in values):
            found[name] = [words.DASH if v is missing else words.plain(v) for v in values]
    return found


def _facts(run: Run) -> list[Fact]:
    """Return what environment.json says about the last start of a run."""
    if not run.starts:
        return []
    last = run.starts[-1]
    found = [
        Fact(key.removesuffix("_bytes").replace("_", " "), words.fact(key, value))
        for key, value in last.items()
        if value is not None and key not in ("versions", "after_step", "command", "commit")
    ]
    if len(run.starts) > 1:
        after = words.count(last.get("after_step", 0))
        found.append(Fact("starts", f"{len(run.starts)}, the last after step {after}", True))
    if run.result.get("checkpoint"):
        found.append(Fact("checkpoint", str(run.result["checkpoint"])))
    return found


def _versions(run: Run) -> list[Fact]:
    """Return the versions of the libraries at the last start of a run."""
    found = run.starts[-1].get("versions") if run.starts else None
    if not isinstance(found, dict):
        return []
    return [Fact(name, words.plain(version)) for name, version in found.items()]

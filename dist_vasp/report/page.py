"""The report as one HTML page that opens from disk: no script, no request, every text escaped.

What a run has left may be anything, item titles above all; the page's own policy forbids scripts
and every address besides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from dist_vasp.config import Config
from dist_vasp.recognise import begins_with
from dist_vasp.report import charts
from dist_vasp.report.gather import Run
from dist_vasp.report.lists import Pick, Popularity, Sample
from dist_vasp.report.style import STYLE
from dist_vasp.text import escape

METRICS = (
    ("ndcg@100", "NDCG@100"),
    ("ndcg@20", "NDCG@20"),
    ("recall@20", "Recall@20"),
    ("recall@50", "Recall@50"),
    ("coverage@100", "Coverage@100"),
)
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_START = (  # by which a report is known
    f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
)
_SHOWN_HISTORY = 14
_DASH = "\N{EN DASH}"


@dataclass
class Looked:
    """What the model of one run recommends; without it the page says why."""

    popularity: Popularity | None = None
    samples: list[Sample] = field(default_factory=list)
    why_not: str = ""


is_report = begins_with(_START.encode())


def page(runs: Sequence[Run], looked: Sequence[Looked], date: str) -> str:
    """The whole page, in ASCII: other characters are written as references."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    parts = [
        ("Results", "results", _results(runs)),
        ("Learning curves", "learning", _learning(runs)),
        ("Popularity", "popularity", _popularity(runs, looked)),
        ("Users", "users", _users(runs, looked)),
        ("Scaling", "scaling", "".join(_scaling(run, len(runs) > 1) for run in runs)),
        ("Configuration", "configuration", _configuration(runs)),
        ("Environment", "environment", _environment(runs)),
    ]
    parts = [part for part in parts if part[2]]
    nav = "".join(f'<a href="#{anchor}">{name}</a>' for name, anchor, _ in parts)
    body = "".join(
        f'<section id="{anchor}"><h2>{name}</h2>{content}</section>'
        for name, anchor, content in parts
    )
    notes = "".join(
        f"<p>{_named(run, runs)}{escape(note)}</p>" for run in runs for note in run.notes
    )
    html = (
        f"{_START}"
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="referrer" content="no-referrer">'
        f"<title>{escape(title)} {_DASH} training report</title><style>{STYLE}</style></head><body>"
        f'<header><h1>{escape(title)}</h1><p class="lead">{_lead(runs)}</p>'
        f"{_tiles(runs[0]) if len(runs) == 1 else ''}{f'<div class=notes>{notes}</div>' if notes else ''}"
        f'<nav aria-label="Sections">{nav}</nav></header><main>{body}</main>'
        f"<footer>Written {escape(date)} by launch/report.py. Standard errors are over users.</footer></body></html>\n"
    )
    return html.encode("ascii", "xmlcharrefreplace").decode()


# --- results ---------------------------------------------------------------------------------------------------------


def _lead(runs: Sequence[Run]) -> str:
    said = []
    for run in runs:
        size = (
            f", H {run.at('model', 'hidden')}, L {run.at('model', 'latent')}"
            if run.at("model", "kind") in ("vasp", "flvae")
            else ""
        )
        kind = f"{run.at('model', 'kind', 'model')}{size}, loss {run.at('loss', 'kind', '?')}, {run.at('data', 'batch_size', '?')} users a step"
        if run.at("model", "kind") == "ease":
            kind = "closed-form EASE"
        said.append(_named(run, runs) + escape(kind))
    return "<br>".join(said)


def _named(run: Run, runs: Sequence[Run]) -> str:
    return f"<b>{escape(run.name)}</b>: " if len(runs) > 1 else ""


def _tiles(run: Run) -> str:
    split, metrics = _best_split(run)
    tiles = [
        (name, f"{_four(metrics[key])}{_error(metrics, key)}")
        for key, name in METRICS
        if key != "ndcg@20" and key in metrics
    ]
    result = run.result or {}
    if isinstance(result.get("seconds_training"), int | float):
        tiles.append(
            (
                "Training",
                f"{_duration(result['seconds_training'])} <small>{_count(result.get('epochs'))} epochs</small>",
            )
        )
    elif run.steps:
        tiles.append(("Training so far", f"{run.steps[-1]['step']:g} <small>steps</small>"))
    rates = [rate for _, rate in run.series("users_per_second")]
    if rates:
        tiles.append(("Throughput, median", f"{median(rates):,.0f} <small>users/s</small>"))
    says = f'<p class="says of">Metrics of the {escape(split)} users</p>' if metrics else ""
    return f'{says}<dl class="tiles">{"".join(f"<div class=tile><dt>{escape(k)}</dt><dd>{v}</dd></div>" for k, v in tiles)}</dl>'


def _best_split(run: Run) -> tuple[str, dict[str, Any]]:
    """Test where there is one, else validation, else the last evaluation."""
    for split in ("test", "validation"):
        metrics = (run.result or {}).get(split)
        if isinstance(metrics, dict) and metrics.get("n_users"):
            return split, metrics
    return "validation", run.evaluations[-1] if run.evaluations else {}


def _results(runs: Sequence[Run]) -> str:
    rows = []
    for i, run in enumerate(runs):
        for split in ("test", "validation"):
            metrics = (run.result or {}).get(split)
            if not isinstance(metrics, dict):
                continue
            cells = "".join(
                f'<td class="n">{_four(metrics.get(key))}{_error(metrics, key)}</td>'
                for key, _ in METRICS
            )
            users = _count(metrics.get("n_users"))
            name = (
                f'<th scope="row" class="run"><i class="swatch s{i + 1}"></i>{escape(run.name)}</th>'
                if len(runs) > 1
                else ""
            )
            rows.append(
                f'<tr>{name}<td>{split}</td>{cells}<td class="n">{users}</td><td class="n">{_seconds(run)}</td></tr>'
            )
    if not rows:
        return ""
    heads = ["Run"] * (len(runs) > 1) + ["Users of"]
    heads_html = "".join(f"<th>{h}</th>" for h in heads)
    heads_html += (
        "".join(f'<th class="n">{name}</th>' for _, name in METRICS)
        + '<th class="n">Users</th><th class="n">Training</th>'
    )
    denominator = {str(run.at("run", "recall_denominator", "min")) for run in runs}
    says = (
        "The best checkpoint by validation NDCG@100. Recall@k divides by "
        f"{'all held-out items' if denominator == {'held_out'} else 'min(k, held-out items)'}. The small figure is one standard error"
        + (
            "; launch/compare.py pairs the users of several models, which is sharper than these errors say."
            if len(runs) > 1
            else "."
        )
    )
    return f'<p class="says">{says}</p>{_scroll(f"<table><thead><tr>{heads_html}</tr></thead><tbody>{chr(10).join(rows)}</tbody></table>", "Metrics")}'


def _seconds(run: Run) -> str:
    seconds = (run.result or {}).get("seconds_training")
    return _duration(seconds) if isinstance(seconds, int | float) else _DASH


def _learning(runs: Sequence[Run]) -> str:
    cards = charts.learning(runs)
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


# --- lists -----------------------------------------------------------------------------------------------------------


def _popularity(runs: Sequence[Run], looked: Sequence[Looked]) -> str:
    views = [
        (i, run.name, one.popularity)
        for i, (run, one) in enumerate(zip(runs, looked, strict=True), 1)
        if one.popularity
    ]
    reasons = "".join(
        f'<p class="says">{_named(run, runs)}{escape(one.why_not)}</p>'
        for run, one in zip(runs, looked, strict=True)
        if one.why_not
    )
    if not views:
        return reasons
    head = '<tr><th>Tenth</th><th class="n">Training interactions</th><th class="n">Held-out items</th>'
    head += (
        "".join(
            f'<th class="n">Recommended{": " + escape(name) if len(views) > 1 else ""}</th>'
            for _, name, _ in views
        )
        + "</tr>"
    )
    first = views[0][2]
    rows = [
        f'<tr><td>{i + 1}{" (most popular)" if i == 0 else ""}</td><td class="n">{_percent(first.trained[i])}</td>'
        f'<td class="n">{_percent(first.held_out[i])}</td>'
        + "".join(f'<td class="n">{_percent(view.recommended[i])}</td>' for _, _, view in views)
        + "</tr>"
        for i in range(len(first.trained))
    ]
    coverage = "".join(
        f"<p>{_named(run, runs)}"
        + "; ".join(
            f"{_percent(share)} of the catalogue is in somebody's first {length}"
            for length, share in one.popularity.coverage.items()
        )
        + f" ({one.popularity.n_users:,} users).</p>"
        for run, one in zip(runs, looked, strict=True)
        if one.popularity
    )
    table = f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="says">{coverage}</div>{reasons}<div class="pair">{charts.popularity(views)}{_scroll(table, "Popularity")}</div>'


def _users(runs: Sequence[Run], looked: Sequence[Looked]) -> str:
    """Each user once, with the list of every run that has seen the same user."""
    drawn = []
    for sample in next((one.samples for one in looked if one.samples), []):
        shown = sample.history[:_SHOWN_HISTORY]
        more = (
            f" and {len(sample.history) - len(shown)} more"
            if len(sample.history) > len(shown)
            else ""
        )
        history = ", ".join(f"<b>{escape(name)}</b>" for name in shown)
        lists = []
        for i, (run, one) in enumerate(zip(runs, looked, strict=True)):
            own = next((s for s in one.samples if s.user == sample.user), None)
            if own:
                name = (
                    f'<h4 class="run"><i class="swatch s{i + 1}"></i>{escape(run.name)}</h4>'
                    if len(runs) > 1
                    else ""
                )
                lists.append(name + _picks(own.picks, f"List of user {sample.user}"))
        drawn.append(
            f'<article class="user"><h3>User {escape(sample.user)}</h3><p class="history">Knows {len(sample.history)} items: {history}{more}. '
            f"{sample.n_held_out} more are held out.</p>{''.join(lists)}</article>"
        )
    if not drawn:
        return ""
    says = (
        "Test users with a short, a middling and a long history, popular items first, and what the model would show them. A held-out item "
        "in the list is a hit. The score is the product of the two paths, so both must agree; the reasons are the past items that add most "
        "to the shallow path's logit."
    )
    return f'<p class="says">{says}</p>{"".join(drawn)}'


def _picks(picks: Sequence[Pick], name: str) -> str:
    deep = any(pick.why and pick.why.p_flvae is not None for pick in picks)
    shallow = any(pick.why and pick.why.p_nease is not None for pick in picks)
    heads = ["", "Item", *(["Hit"] if any(p.held_out for p in picks) else []), "Score"]
    heads += (["Deep"] if deep else []) + (["Shallow"] if shallow else []) + ["Because of"]
    hits = "Hit" in heads
    rows = []
    for i, pick in enumerate(picks):
        why = pick.why
        cells = [f'<td class="n">{i + 1}</td><td class="item">{escape(pick.label)}</td>']
        if hits:
            cells.append(f'<td class="hit">{"hit" if pick.held_out else ""}</td>')
        cells.append(f'<td class="n">{pick.score:.3f}</td>')
        for path, has in (("p_flvae", deep), ("p_nease", shallow)):
            if has:
                value = getattr(why, path) if why else None
                cells.append(f'<td class="n">{_DASH if value is None else f"{value:.3f}"}</td>')
        reasons = why.reasons if why else []
        named = ", ".join(
            f"{escape(r.title or f'item {r.item}')}&nbsp;({r.weight:+.2f})" for r in reasons
        )
        cells.append(f'<td class="because">{named or _DASH}</td>')
        rows.append(f"<tr{' class=hit-row' if pick.held_out else ''}>{''.join(cells)}</tr>")
    head = "".join(
        f"<th{'' if h in ('Item', 'Hit', 'Because of') else ' class=n'}>{h}</th>" for h in heads
    )
    return _scroll(
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>", name
    )


# --- scaling, configuration, environment -----------------------------------------------------------------------------


def _scaling(run: Run, several: bool) -> str:
    if not run.benchmark:
        return ""
    rows = run.benchmark["rows"]
    floors = any(isinstance(row.get("ratio_to_floor"), int | float) for row in rows)
    heads = [
        "Ranks",
        "Users a step",
        "Users/s",
        "Efficiency",
        "Step, s",
        "MB sent a step",
        "Peak, GB",
    ] + ["Times the floor"] * floors
    body = []
    for row in rows:
        values = [
            f"{row['ranks']:,}",
            f"{row['users_per_step']:,}",
            f"{row['users_per_second']:,.0f}",
            _percent(row["efficiency"]),
        ]
        values += [
            f"{row['step_seconds']:.3f}",
            f"{row['bytes_moved'] / 1e6:,.1f}",
            f"{row['peak_memory'] / 1e9:.2f}",
        ]
        ratio = row.get("ratio_to_floor")
        values += [f"{ratio:.2f}" if isinstance(ratio, int | float) else _DASH] * floors
        body.append(
            f"<tr><td>{escape(row['mode'])}</td>{''.join(f'<td class=n>{v}</td>' for v in values)}</tr>"
        )
    head = "<tr><th>Scaling</th>" + "".join(f'<th class="n">{h}</th>' for h in heads) + "</tr>"
    table = _scroll(
        f"<table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>", "Scaling"
    )
    threads, cores = run.benchmark.get("threads_per_rank"), run.benchmark.get("cores")
    says = f"{_count(threads)} threads a rank on {_count(cores)} cores; medians. Weak scaling keeps the users of a rank, strong those of a step."
    name = f"<h3>{escape(run.name)}</h3>" if several else ""
    return f'{name}<p class="says">{says}</p><div class="cards">{"".join(charts.scaling(run.benchmark))}</div>{table}'


def _configuration(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return _differences(runs)
    default, drawn = asdict(Config()), []
    sections = {k: v for k, v in runs[0].config.items() if isinstance(v, dict)}
    alone = {k: v for k, v in runs[0].config.items() if not isinstance(v, dict)}
    for section, keys in {**sections, **({"general": alone} if alone else {})}.items():
        usual = default.get(section, default if section == "general" else {})
        drawn.append(
            _section(
                section, ((key, _value(v), v != _plain(usual.get(key))) for key, v in keys.items())
            )
        )
    if not drawn:
        return ""
    return f'<p class="says">As resolved when the run began; what differs from the defaults is bold.</p><div class="sections">{"".join(drawn)}</div>'


def _differences(runs: Sequence[Run]) -> str:
    keys = {
        f"{s}.{k}": (s, k)
        for run in runs
        for s, section in run.config.items()
        if isinstance(section, dict)
        for k in section
    }
    rows, missing = [], object()
    for name, (section, key) in keys.items():
        values = [run.at(section, key, missing) for run in runs]
        if any(value != values[0] for value in values):
            cells = "".join(
                f"<td>{_DASH if v is missing else escape(_value(v))}</td>" for v in values
            )
            rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    if not rows:
        return '<p class="says">The runs have one configuration.</p>'
    head = "<tr><th>Key</th>" + "".join(f"<th>{escape(run.name)}</th>" for run in runs) + "</tr>"
    return f'<p class="says">The keys in which the runs differ.</p>{_scroll(f"<table><thead>{head}</thead><tbody>{chr(10).join(rows)}</tbody></table>", "Configuration")}'


def _environment(runs: Sequence[Run]) -> str:
    drawn = []
    for run in runs:
        if not run.starts:
            continue
        last = dict(run.starts[-1])
        versions = last.pop("versions", None)
        after = last.pop("after_step", 0)
        facts = [
            (key.removesuffix("_bytes").replace("_", " "), _fact(key, value), False)
            for key, value in last.items()
            if value is not None
        ]
        if len(run.starts) > 1:
            facts.append(
                ("starts", f"{len(run.starts)}, the last after step {_count(after)}", True)
            )
        if (run.result or {}).get("checkpoint"):
            facts.append(("checkpoint", str((run.result or {})["checkpoint"]), False))
        drawn.append(_section(run.name if len(runs) > 1 else "machine", facts))
        if isinstance(versions, dict):
            title = f"{run.name}: versions" if len(runs) > 1 else "versions"
            drawn.append(_section(title, ((k, _value(v), False) for k, v in versions.items())))
    return f'<div class="sections">{"".join(drawn)}</div>' if drawn else ""


def _section(name: str, facts: Iterable[tuple[str, str, bool]]) -> str:
    rows = "".join(
        f"<dt>{escape(k)}</dt><dd{' class=changed' if bold else ''}>{escape(v)}</dd>"
        for k, v, bold in facts
    )
    return f'<div class="section"><h3>{escape(name)}</h3><dl>{rows}</dl></div>'


# --- words -----------------------------------------------------------------------------------------------------------


def _scroll(table: str, name: str) -> str:
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}">{table}</div>'
    )


def _plain(value: Any) -> Any:
    """A default as YAML would give it back."""
    return list(value) if isinstance(value, tuple) else value


def _value(value: Any) -> str:
    if value in ("", None):
        return _DASH
    if (
        isinstance(value, list)
        and value
        and all(isinstance(v, dict) and {"epochs", "lr"} <= set(v) for v in value)
    ):
        return ", ".join(f"{stage['epochs']} at {stage['lr']}" for stage in value)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _fact(key: str, value: Any) -> str:
    if key.endswith("_bytes") and isinstance(value, int | float):
        return f"{value / 1e9:.1f} GB"
    if key == "date" and isinstance(value, str):
        return value[:16].replace("T", " ") + " UTC"
    return _value(value)


def _four(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else _DASH


def _error(metrics: dict[str, Any], key: str) -> str:
    error = metrics.get(f"{key}_se")
    return (
        f" <small class=se>\N{PLUS-MINUS SIGN}{error:.4f}</small>"
        if isinstance(error, int | float)
        else ""
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _count(value: Any) -> str:
    return f"{value:,g}" if isinstance(value, int | float) else _DASH


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {s} s"

"""The report as Markdown, for somebody who sees the project for the first time: verdict, metrics,
long tail, cost, how it was made."""

from __future__ import annotations

import math
from typing import Any

from dist_vasp.compare.runs import count_runs
from dist_vasp.compare.statistics import METRICS, NAMES, PRIMARY, Estimate
from dist_vasp.config.metric_names import metric_or_none
from dist_vasp.ranking.per_user import THIRDS


def markdown(found: dict[str, Any]) -> str:
    """Return report.md for what `gather` returns."""
    parts = [
        [
            f"# Comparison on {found['data']['shards']}",
            "",
            found["verdict"],
            "",
            found["against_reference"],
        ],
        _failures(found),
        _metrics(found),
        _asked(found),
        _long_tail(found),
        _cost(found),
        _made(found),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _failures(found: dict[str, Any]) -> list[str]:
    if not found["failures"]:
        return []
    lines = [f"{count_runs(len(found['failures']))} failed, not counted in what follows:", ""]
    return lines + [
        f"- {f['run']}, status {f['status']}: {f['reason']} ({f['log']})" for f in found["failures"]
    ]


def _metrics(found: dict[str, Any]) -> list[str]:
    n = found["models"][0]["metrics"][PRIMARY]["n_users"]
    reference = found["reference"]
    lines = [
        "## Metrics",
        "",
        f"Means over {n:,} test users, averaged over seeds first, +- one standard error over "
        "users; best first. The last two columns are "
        f"NDCG@100 less that of the reference **{reference}** for the same users, and what that "
        "amounts to at two standard errors.",
        "",
    ]
    rows = []
    for model in best_first(found):
        cells = [_of(model["metrics"][metric]) for metric in METRICS]
        sd = model["metrics"][PRIMARY]["seed_sd"]
        cells += [seeds_of(model), "-" if sd is None else f"{sd:.4f}"]
        rows.append([_name(model, reference), *cells, *_against(model)])
    header = [
        "model",
        *(NAMES[metric] for metric in METRICS),
        "seeds",
        "sd of NDCG@100 over seeds",
        "paired difference",
        "verdict",
    ]
    return lines + _table(header, rows)


def _asked(found: dict[str, Any]) -> list[str]:
    """Return a table of the metrics asked for, and what they differ by from the reference."""
    asked = [metric for name in found["metrics_asked"] if (metric := metric_or_none(name))]
    if not asked:
        return []
    lines = [
        "## Further metrics",
        "",
        "Means over users +- one standard error, and below them the paired difference from the "
        f"reference **{found['reference']}**. Coverage, Gini and diversity are one number for all "
        "lists (docs/metrics.md).",
        "",
    ]
    rows = []
    for model in best_first(found):
        cells = [
            _four(model[str(m)]["mean"]) if m.of_all_lists else _of(model["metrics"][str(m)])
            for m in asked
        ]
        rows.append([_name(model, found["reference"]), *cells])
    lines += _table(["model", *(metric.title for metric in asked)], rows)
    of_user = [metric for metric in asked if not metric.of_all_lists]
    rows = [
        [model["name"], *(_signed(estimate_of(model["difference"][str(m)])) for m in of_user)]
        for model in best_first(found)
        if "difference" in model
    ]
    if of_user and rows:
        header = ["paired difference", *(metric.title for metric in of_user)]
        lines += ["", *_table(header, rows)]
    return lines


def _four(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _against(model: dict[str, Any]) -> list[str]:
    if "difference" not in model:
        return ["reference", ""]
    d = estimate_of(model["difference"][PRIMARY])
    return [_signed(d), f"{word_of(d)} ({_ratio(d)})"]


def word_of(d: Estimate) -> str:
    """Return what a paired difference amounts to at two standard errors."""
    return "no difference" if not d.differs else "better" if d.mean > 0 else "worse"


def _ratio(d: Estimate) -> str:
    return "infinite" if math.isinf(d.ratio) else f"{d.ratio:+.1f} SE"


def _long_tail(found: dict[str, Any]) -> list[str]:
    thirds = found["data"]["thirds"]
    sizes = ", ".join(
        f"{name} {thirds[name]['items']:,} items with {thirds[name]['interactions']:,}"
        for name in THIRDS
    )
    tail = {m["name"]: m["metrics"][f"{PRIMARY}_tail"]["mean"] for m in found["models"]}
    scored = {name: value for name, value in tail.items() if value is not None}
    lines = ["## Long tail", ""]
    if scored:
        best = max(found["models"], key=lambda model: scored.get(model["name"], -math.inf))
        told = (
            f"Niche items are found best by {best['name']}: {NAMES[PRIMARY]} "
            f"{scored[best['name']]:.4f} on tail items"
        )
        if "difference" in best:
            d = estimate_of(best["difference"][f"{PRIMARY}_tail"])
            verb = "differs" if d.differs else "does not differ"
            told += (
                f", which {verb} from the reference {found['reference']} at two standard errors "
                f"({_signed(d)})"
            )
        lines += [f"{told}.", ""]
    lines += [
        "Items by descending popularity, cut where they hold a third of the training interactions "
        f"each ({sizes} of them). "
        "A column counts only the held-out items of its third; the lists are the same. Coverage is "
        "the share of the catalogue that "
        "is in anybody's first hundred.",
        "",
    ]
    for metric in (PRIMARY, METRICS[1]):
        header = ["model", *(f"{NAMES[metric]} {third}" for third in THIRDS)]
        header += [
            f"paired difference, {THIRDS[-1]}",
            *(["coverage@100"] if metric == PRIMARY else []),
        ]
        rows = []
        for model in best_first(found):
            row = [
                _name(model, found["reference"]),
                *(_of(model["metrics"][f"{metric}_{third}"]) for third in THIRDS),
            ]
            row += [
                _signed(estimate_of(model["difference"][f"{metric}_tail"]))
                if "difference" in model
                else "reference"
            ]
            row += [f"{model['coverage@100']['mean']:.4f}"] if metric == PRIMARY else []
            rows.append(row)
        lines += [*_table(header, rows), ""]
    return lines[:-1]


def _cost(found: dict[str, Any]) -> list[str]:
    lines = [
        "## Cost",
        "",
        "Training is the time of the steps alone, fastest to slowest seed: all do the same work, "
        "other work on the machine adds to it, "
        "and the verdict uses the fastest. The job adds start-up, evaluation and saving (fastest "
        "seed). Memory is the sum over ranks of "
        "the largest resident size, that of the host and the libraries' own included. Users/s: "
        "median over steps, fastest seed. "
        "Of an ensemble: the sum of its members' trainings, and the memory of ranking with all of "
        "them.",
        "",
    ]
    rows = []
    for model in best_first(found):
        c = model["cost"]
        ranks = ", ".join(map(str, c["ranks"]))
        if c["seconds_training"] is None:
            rows.append([_name(model, found["reference"]), *["-"] * 6, ranks])
            continue
        rate = "-" if c["users_per_second"] is None else f"{c['users_per_second']:,.0f}"
        rows.append(
            [
                _name(model, found["reference"]),
                f"{c['parameters']:,}",
                f"{c['epochs']:g}",
                f"{c['seconds_training']:.1f}"
                + (f" to {c['seconds_training_slowest']:.1f}" if len(model["seeds"]) > 1 else ""),
                f"{c['seconds_job']:.1f}",
                f"{c['peak_memory'] / 1e9:.2f}",
                rate,
                ranks,
            ]
        )
    header = [
        "model",
        "parameters",
        "epochs",
        "training, s",
        "job, s",
        "peak memory, GB",
        "users/s",
        "ranks",
    ]
    return lines + _table(header, rows)


def _made(found: dict[str, Any]) -> list[str]:
    data, made = found["data"], found["made"]
    splits = "; ".join(
        f"{name} {s['users']:,} users, {s['interactions']:,} interactions"
        + (f" and {s['heldout']:,} held out" if name != "train" else "")
        for name, s in data["splits"].items()
    )
    divisor = (
        "min(k, held-out items)" if found["recall_denominator"] == "min" else "all held-out items"
    )
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    lines = [
        "## How this was made",
        "",
        f"    {made['command']}",
        "",
        f"- Data: {data['shards']}, protocol {data['protocol']}, {data['n_items']:,} items; "
        f"{splits}.",
        "- Every run is `launch/train.py` on its own folder; the checkpoint that validation "
        f"{found['best_by']} chose is tested, where nothing was "
        "evaluated on the way the last one.",
        f"- Seen items are left out of the lists; Recall@k divides by {divisor}, NDCG's ideal has "
        "min(100, held-out items) "
        "hits; users without a held-out item are not scored.",
        f"- Python {made['python']}, {versions}; {made['cores']} cores"
        + (f"; commit {made['commit']}." if made["commit"] else "."),
        f"- Configurations, logs and per-user files are in {made['output']}/runs; all numbers are "
        "in report.json, all users in "
        "per_user.parquet.",
        "",
    ]
    rows = []
    for model in found["models"]:
        what = model["what"]
        changed = ", ".join(f"{key} {value}" for key, value in model["overrides"].items()) or "-"
        rows.append([model["name"], what, model["source"], changed, seeds_of(model)])
    return lines + _table(["model", "what", "configuration", "with", "seeds"], rows)


# --- pieces ---------------------------------------------------------------------------------------


def best_first(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the models, the best one by NDCG@100 first."""
    return sorted(found["models"], key=lambda model: -model["metrics"][PRIMARY]["mean"])


def _name(model: dict[str, Any], reference: str) -> str:
    return f"**{model['name']}**" if model["name"] == reference else model["name"]


def seeds_of(model: dict[str, Any]) -> str:
    """Return the seeds of a trained model as text."""
    return "-" if not model["trained"] else ", ".join(map(str, model["seeds"]))


def estimate_of(raw: dict[str, Any]) -> Estimate:
    """Return an estimate of report.json; what is missing there is NaN."""
    mean, se = (math.nan if raw[name] is None else raw[name] for name in ("mean", "se"))
    return Estimate(mean, se, raw["n_users"])


def _of(raw: dict[str, Any]) -> str:
    return str(estimate_of(raw))


def _signed(d: Estimate) -> str:
    return "-" if math.isnan(d.mean) else f"{d.mean:+.4f} +- {d.se:.4f}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]

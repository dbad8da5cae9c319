"""Everything a report tells, as one dictionary: report.json is this, report.md its text."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean, median
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dist_vasp.bounded_json import parse_json, read_json
from dist_vasp.compare.config import Comparison, Model, Run
from dist_vasp.compare.runs import Failure
from dist_vasp.compare.statistics import (
    METRICS,
    Cost,
    Estimate,
    Scores,
    against_reference,
    paired,
    read_scores,
    verdict,
    winner,
)
from dist_vasp.config.metric_names import Metric
from dist_vasp.data.items import load_items
from dist_vasp.data.manifest import Manifest
from dist_vasp.model.build import measure_size
from dist_vasp.ranking.per_user import THIRDS, popularity_thirds
from dist_vasp.training.environment import commit
from dist_vasp.versions import version

COLUMNS = (*METRICS, *(f"{metric}_{third}" for third in THIRDS for metric in METRICS))


def gather(
    comparison: Comparison, output: Path, failures: Sequence[Failure], command: str
) -> dict[str, Any]:
    """Read what the finished runs have left.

    ValueError when the reference has no result, or no user could be scored.
    """
    failed = {failure.run.stem for failure in failures}
    finished: dict[str, list[Run]] = {model.name: [] for model in comparison.models}
    for run in comparison.runs(output):
        if run.stem not in failed:
            finished[run.model.name].append(run)
    models = [model for model in comparison.models if finished[model.name]]
    scores = {
        m.name: read_scores(
            m.name, {run.seed: run.file("per_user.parquet") for run in finished[m.name]}
        )
        for m in models
    }
    if comparison.reference not in scores:
        raise ValueError(
            f"no report: the reference {comparison.reference} has no finished run; fix it and "
            "start the same command"
        )
    reference = scores[comparison.reference]
    if not reference.estimate(METRICS[0]).n:
        raise ValueError(
            f"{comparison.shards} has no test user with a held-out item; prepare the data with some"
        )
    manifest = Manifest.load(comparison.shards)
    costs: dict[str, dict[str, Any]] = {}
    for m in models:
        costs[m.name] = (
            _sum(finished[m.name], m, costs)
            if m.members
            else _cost(finished[m.name], m, manifest.n_items)
        )
    briefly = {name: Cost(c["seconds_training"], c["peak_memory"]) for name, c in costs.items()}
    return {
        "verdict": verdict(list(scores.values()), comparison.reference, briefly),
        "winner": winner(list(scores.values()), comparison.reference),
        "against_reference": against_reference(list(scores.values()), comparison.reference),
        "reference": comparison.reference,
        "models": [
            _model(
                m, scores[m.name], reference, finished[m.name], costs[m.name], comparison.metrics
            )
            for m in models
        ],
        "metrics_asked": [str(metric) for metric in comparison.metrics],
        "best_by": comparison.best_by,
        "failures": [_failure(failure) for failure in failures],
        "recall_denominator": comparison.recall_denominator,
        "data": _data(comparison.shards, manifest),
        "made": _made(comparison, output, command),
    }


def _failure(failure: Failure) -> dict[str, Any]:
    run = failure.run
    log = str(run.file("log"))
    return {"run": run.stem, "status": failure.status, "reason": failure.reason, "log": log}


def _made(comparison: Comparison, output: Path, command: str) -> dict[str, Any]:
    """Return how the comparison was made."""
    libraries = ("torch", "deepspeed", "numpy")
    return {
        "command": command,
        "config": comparison.path,
        "output": str(output),
        "versions": {name: found for name in libraries if (found := version(name))},
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "commit": commit(),
    }


def _model(
    model: Model,
    scores: Scores,
    reference: Scores,
    runs: Sequence[Run],
    cost: dict[str, Any],
    asked: Sequence[Metric],
) -> dict[str, Any]:
    of_user = (str(metric) for metric in asked if not metric.of_all_lists)
    columns = tuple(dict.fromkeys((*COLUMNS, *of_user)))
    tests = [read_json(run.file("test.json"))["test"] for run in runs]
    found: dict[str, Any] = {
        "name": model.name,
        "what": model.what,
        "trained": not model.is_baseline,
        "seeds": list(scores.seeds),
    }
    found |= {"source": model.source, "overrides": model.overrides}
    found["metrics"] = {
        column: {
            **_estimate(scores.estimate(column)),
            "by_seed": [_number(value) for value in scores.by_seed(column)],
            "seed_sd": _number(scores.seed_sd(column)),
        }
        for column in columns
    }
    for name in ("coverage@100", *(str(metric) for metric in asked if metric.of_all_lists)):
        by_seed = [test[name] for test in tests]
        known = [value for value in by_seed if value is not None]
        found[name] = {"mean": fmean(known) if known else None, "by_seed": by_seed}
    if model.name != reference.name:
        found["difference"] = {
            column: _estimate(paired(scores, reference, column)) for column in columns
        }
    return found | {"cost": cost}


def _estimate(e: Estimate) -> dict[str, Any]:
    return {"mean": _number(e.mean), "se": _number(e.se), "n_users": e.n}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


# --- cost -----------------------------------------------------------------------------------------


def _cost(runs: Sequence[Run], model: Model, n_items: int) -> dict[str, Any]:
    """Return seconds of the fastest run and memory of the largest; None where nothing is trained.

    Memory is the sum of the peaks of a run's ranks.
    """
    jobs = [read_json(run.file("job.json")) for run in runs]
    cost: dict[str, Any] = dict.fromkeys(
        (
            "seconds_training",
            "seconds_training_slowest",
            "seconds_job",
            "peak_memory",
            "users_per_second",
            "parameters",
            "epochs",
        )
    )
    cost["ranks"] = sorted({job["ranks"] for job in jobs})
    if model.config is None:
        return cost
    results = [read_json(run.dir / "result.json") for run in runs]
    rates = [
        rate for run in runs if (rate := _users_per_second(run.dir / "metrics.jsonl")) is not None
    ]
    seconds = [result["seconds_training"] for result in results]
    cost["seconds_training"], cost["seconds_training_slowest"] = min(seconds), max(seconds)
    cost["seconds_job"] = min(job["seconds"] for job in jobs)
    cost["peak_memory"] = max(sum(job["peak_memory"]) for job in jobs)
    cost["users_per_second"] = max(rates) if rates else None
    cost["parameters"] = measure_size(model.config, n_items).parameters
    cost["epochs"] = fmean(result["epochs"] for result in results)
    return cost


def _sum(runs: Sequence[Run], model: Model, costs: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what an ensemble costs: its members' trainings, and ranking with all of them."""
    jobs = [read_json(run.file("job.json")) for run in runs]
    members = [costs[name] for name, _ in model.members]
    summed = ("seconds_training", "seconds_training_slowest", "seconds_job", "parameters", "epochs")
    cost: dict[str, Any] = {key: sum(member[key] for member in members) for key in summed}
    cost["peak_memory"] = max(sum(job["peak_memory"]) for job in jobs)
    return cost | {"users_per_second": None, "ranks": sorted({job["ranks"] for job in jobs})}


def _users_per_second(metrics: Path) -> float | None:
    """Return the median over the steps; None for a model that takes none."""
    if not metrics.is_file():
        return None
    rates = [
        line["users_per_second"]
        for line in _lines(metrics)
        if isinstance(line.get("users_per_second"), float)
    ]
    return median(rates) if rates else None


def _lines(metrics: Path) -> Iterator[dict[str, Any]]:
    """Return the lines of metrics.jsonl that are objects, without damaged ones."""
    for text in metrics.read_bytes().splitlines():
        try:
            line = parse_json(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            yield line


# --- data -----------------------------------------------------------------------------------------


def _data(shards: str, manifest: Manifest) -> dict[str, Any]:
    popularity = load_items(shards, manifest).popularity
    thirds = popularity_thirds(popularity)
    return {
        "shards": shards,
        "n_items": manifest.n_items,
        "protocol": manifest.preparation.get("protocol"),
        "splits": {
            name: {"users": s.users, "interactions": s.interactions, "heldout": s.heldout}
            for name, s in manifest.splits.items()
        },
        "thirds": {
            name: {
                "items": int((thirds == i).sum()),
                "interactions": int(popularity[thirds == i].sum()),
            }
            for i, name in enumerate(THIRDS)
        },
    }


def write_per_user(
    file: BinaryIO, comparison: Comparison, output: Path, failed: Mapping[str, Any] | set[str]
) -> None:
    """Write all per-user files as one Parquet file with columns `model` and `seed` before theirs,
    one run at a time."""
    with ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        for run in comparison.runs(output):
            if run.stem in failed:
                continue
            table = pq.read_table(run.file("per_user.parquet"))
            table = table.add_column(0, "seed", pa.array(np.full(len(table), run.seed)))
            table = table.add_column(0, "model", pa.array([run.model.name] * len(table)))
            writer = writer or stack.enter_context(pq.ParquetWriter(file, table.schema))
            writer.write_table(table)


def is_per_user_of_all(path: Path) -> bool:
    """Whether a file is one that `write_per_user` wrote."""
    return pq.read_schema(path).names[:3] == ["model", "seed", "key"]

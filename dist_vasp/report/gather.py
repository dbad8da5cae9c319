"""Read what a run has left for its report. The files may hold anything; nothing is evaluated."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dist_vasp.config.schema import RunConfig, SearchConfig
from dist_vasp.model.kind import ClosedForm
from dist_vasp.model.registry import KINDS
from dist_vasp.ranking.model_card import evaluation_of
from dist_vasp.report.files import is_drawable, plain, read_config, read_file, read_lines

MOST_RUNS = 6  # as many as there are colours that people tell apart
_SEARCHED = [name for name in SearchConfig().lists if name != "ease_lambda"]
ENSEMBLE, EXPORT = "ensemble.json", "export.json"


@dataclass(frozen=True)
class Run:
    """One run directory, or an ensemble; `steps` and `evaluations` are lines of metrics.jsonl."""

    name: str
    folder: Path
    config: dict[str, Any]
    """The configuration; of the first member where the run is an ensemble."""
    starts: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    """result.json, or {split: metrics} of an ensemble; empty where there is none."""
    benchmark: dict[str, Any] | None = None
    members: list[Member] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def closed_form(self) -> bool:
        """Whether the model was computed in closed form instead of by steps."""
        return self._closed_form is not None

    @property
    def has_lambda(self) -> bool:
        """Whether the model is a closed form that is computed for a lambda."""
        return self._closed_form is not None and bool(self._closed_form.walked)

    @property
    def _closed_form(self) -> ClosedForm | None:
        kind = KINDS.get(str(self.at("model", "kind")))
        return kind.closed_form if kind else None

    @property
    def is_plain_ease(self) -> bool:
        """Whether the model is EASE as published: the whole matrix, with lambda as its only key."""
        keys = [key for key in _SEARCHED if self._closed_form and key in self._closed_form.keys]
        more = [self.at(section, key) for key in keys for section in ("model", "search")]
        more.append(self.at("model", "neighbours"))
        return self.has_lambda and not self.members and not any(more)

    @property
    def takes_largest_lambda(self) -> bool:
        """Whether the largest lambda within one standard error of the best is taken."""
        return bool(self.at("search", "rule") == "one_standard_error")

    @property
    def has_trunk(self) -> bool:
        """Whether the model has layers of widths H and L."""
        kind = KINDS.get(str(self.at("model", "kind")))
        return kind is not None and bool(kind.size_keys)

    @property
    def recall_denominator(self) -> str:
        """Return what Recall@k divides by: min or held_out."""
        return str(self.at("run", "recall_denominator", "min"))

    @property
    def best_by(self) -> str:
        """Return the validation metric that has decided which checkpoint is the best."""
        return str(self.at("run", "best_by", RunConfig.best_by))

    @property
    def splits(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the final metrics as (split, metrics): test, then validation."""
        found = ((split, self.result.get(split)) for split in ("test", "validation"))
        return [(split, metrics) for split, metrics in found if isinstance(metrics, dict)]

    def at(self, section: str, key: str, default: Any = None) -> Any:
        """Return the value of a key of the configuration."""
        part = self.config.get(section)
        return part.get(key, default) if isinstance(part, dict) else default

    @property
    def steps_per_epoch(self) -> int:
        counts: dict[int, int] = {}
        for line in self.steps:
            counts[line.get("epoch", 0)] = counts.get(line.get("epoch", 0), 0) + 1
        return max(counts.values(), default=1)

    def series(self, name: str) -> list[tuple[float, float]]:
        """Return (epochs done, value) of every step that has a finite number of this name."""
        per = self.steps_per_epoch
        return [
            (line["step"] / per, float(line[name]))
            for line in self.steps
            if is_drawable(line.get(name))
        ]

    @property
    def searched(self) -> list[str]:
        """Return the keys, besides lambda, in which the settings of a closed form differ."""
        return [k for k in _SEARCHED if len({str(line.get(k)) for line in self.evaluations}) > 1]

    def settings(self, most: int = 20) -> list[dict[str, Any]]:
        """Return the evaluations of a closed form's settings, the best ones first."""
        found = [line for line in self.evaluations if is_drawable(line.get(self.best_by))]
        return sorted(found, key=lambda line: -line[self.best_by])[:most]

    def evaluated(self, name: str) -> list[tuple[float, float, float]]:
        """Return (epochs done, value, standard error or 0) of every evaluation on validation.

        A closed form has lambda in place of epochs; of a search these are the lambdas that were
        tried with the best values of the other keys.
        """
        per = self.steps_per_epoch
        found = []
        best = self.settings(1)[:1] if self.searched else []
        for line in self.evaluations:
            if best and any(line.get(name) != best[0].get(name) for name in self.searched):
                continue
            if is_drawable(line.get(name)):
                x = (
                    line["ease_lambda"]
                    if is_drawable(line.get("ease_lambda"))
                    else line["step"] / per
                )
                error = line.get(f"{name}_se")
                found.append(
                    (
                        float(x),
                        float(line[name]),
                        float(error) if error is not None and is_drawable(error) else 0.0,
                    )
                )
        return sorted(found)


@dataclass(frozen=True)
class Member:
    """A member of an ensemble; `run` is None where its folder cannot be read."""

    folder: str
    """As ensemble.json names it."""
    weight: float
    run: Run | None
    note: str = ""
    """What is not known about it."""


def read_run(folder: str | Path, benchmark: dict[str, Any] | None = None) -> Run:
    """Return a run directory or an ensemble, finished or not; ValueError for another folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; pass the run.dir of a training")
    if (folder / ENSEMBLE).is_file():
        return _read_ensemble(folder)
    lines, damaged = read_lines(folder / "metrics.jsonl")
    config = read_config(folder / "config.yaml")
    if not config and not lines:
        raise ValueError(
            f"{folder} holds neither config.yaml nor metrics.jsonl; pass the run.dir of a training"
        )
    evaluations = [
        plain(line) for line in lines if "loss" not in line and line.get("split") == "validation"
    ]
    environment = read_file(folder / "environment.json")
    starts = environment.get("starts") if isinstance(environment, dict) else None
    result = read_file(folder / "result.json")
    notes = []
    if not isinstance(result, dict):
        result = {}
        exists = (folder / "result.json").exists()
        notes.append(
            "result.json cannot be read and is left out."
            if exists
            else "The run has not come to its end: there is no result.json."
        )
    if damaged:
        notes.append(f"{damaged} lines of metrics.jsonl could not be read and are left out.")
    return Run(
        folder.resolve().name,
        folder,
        config,
        [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else [],
        [line for line in lines if "loss" in line],
        evaluations,
        result,
        benchmark or read_benchmark(folder / "benchmark.json", missing_ok=True),
        notes=notes,
    )


def _read_ensemble(folder: Path) -> Run:
    """Return an ensemble: its members with what their runs left, and its own evaluation."""
    found = read_file(folder / ENSEMBLE)
    listed = found.get("members") if isinstance(found, dict) else None
    if not isinstance(listed, list) or not all(
        isinstance(one, dict) and isinstance(one.get("run"), str) and is_drawable(one.get("weight"))
        for one in listed
    ):
        raise ValueError(
            f"{folder / ENSEMBLE} lists no members; write it again with launch/ensemble.py"
        )
    members = [_read_member(folder, one["run"], one["weight"]) for one in listed]
    config = next((one.run.config for one in members if one.run and one.run.config), {})
    result, notes = _own_evaluation(folder)
    return Run(folder.resolve().name, folder, config, result=result, members=members, notes=notes)


def _read_member(folder: Path, name: str, weight: float) -> Member:
    path = folder / name
    if (path / EXPORT).is_file():
        return Member(name, weight, None, "an export, which holds no figures of its training")
    if (path / ENSEMBLE).is_file():
        return Member(name, weight, None, "an ensemble, which cannot be a member")
    try:
        run = read_run(path)
    except ValueError as error:
        return Member(name, weight, None, str(error))
    return Member(name, weight, run, " ".join(run.notes))


def _own_evaluation(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Return what `evaluate --json` wrote into the folder or beside it, and what is not known."""
    result = plain(evaluation_of(folder))
    if result:
        return result, []
    command = f"launch/evaluate.py --run {folder} --json {folder / 'evaluation.json'}"
    return {}, [f"No evaluation of the ensemble itself is known; {command} writes one."]


def read_runs(folders: list[str], benchmarks: list[str]) -> list[Run]:
    """Return all runs of a report, under names that differ.

    A benchmark given by name belongs to the first run.
    """
    if len(folders) > MOST_RUNS:
        raise ValueError(
            f"{len(folders)} runs were given, expected at most {MOST_RUNS}; compare fewer at a time"
        )
    given = None
    for path in benchmarks:
        found = read_benchmark(Path(path))
        if given is None or found is None:
            given = found
        else:
            given = {**given, "rows": given["rows"] + found["rows"]}
    runs = [read_run(folder, given if i == 0 else None) for i, folder in enumerate(folders)]
    names = [run.name for run in runs]
    return [
        replace(run, name="/".join(run.folder.resolve().parts[-2:]))
        if names.count(run.name) > 1
        else run
        for run in runs
    ]


def read_benchmark(path: Path, missing_ok: bool = False) -> dict[str, Any] | None:
    """Return benchmark.json of launch/benchmark.py; ValueError where it is something else.

    None where there is no file and `missing_ok`.
    """
    if missing_ok and not path.exists():
        return None
    found = read_file(path / "benchmark.json" if path.is_dir() else path)
    rows = found.get("rows") if isinstance(found, dict) else None
    needed = (
        "ranks",
        "users_per_second",
        "efficiency",
        "step_seconds",
        "users_per_step",
        "bytes_moved",
        "peak_memory",
    )
    good = isinstance(rows, list) and all(
        isinstance(row, dict)
        and all(is_drawable(row.get(name)) for name in needed)
        and isinstance(row.get("mode"), str)
        and isinstance(row.get("parts"), dict)
        and all(is_drawable(part) for part in row["parts"].values())
        and row["ranks"] >= 1
        for row in rows
    )
    if not good or not rows:
        raise ValueError(
            f"{path} is no benchmark.json of launch/benchmark.py; name one, or remove it"
        )
    assert isinstance(found, dict)
    return found

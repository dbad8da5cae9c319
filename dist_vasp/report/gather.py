"""What a run has left, read for the report: nothing of it is believed more than it has to be, and
no line is ever evaluated."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_vasp.bounded_json import parse_json, read_json
from dist_vasp.config import read_yaml

_LARGEST = 1e18  # of a number that is drawn
_LONGEST, _DEEPEST, _MOST_VALUES = 2000, 8, 50_000  # of a text, of the nesting, of a file's values
MOST_RUNS = 6  # as many as there are colours that people tell apart


@dataclass
class Run:
    """One run directory. `steps` and `evaluations` are the lines of metrics.jsonl."""

    name: str
    folder: Path
    config: dict[str, Any]
    starts: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    result: dict[str, Any] | None
    benchmark: dict[str, Any] | None
    damaged_lines: int = 0
    notes: list[str] = field(default_factory=list)

    def at(self, section: str, key: str, default: Any = None) -> Any:
        """A key of the configuration."""
        part = self.config.get(section)
        return part.get(key, default) if isinstance(part, dict) else default

    @property
    def steps_per_epoch(self) -> int:
        counts: dict[int, int] = {}
        for line in self.steps:
            counts[line.get("epoch", 0)] = counts.get(line.get("epoch", 0), 0) + 1
        return max(counts.values(), default=1)

    def series(self, name: str) -> list[tuple[float, float]]:
        """(epochs done, value) of every step that has a finite number of this name."""
        per = self.steps_per_epoch
        return [
            (line["step"] / per, float(line[name]))
            for line in self.steps
            if _number(line.get(name))
        ]

    def evaluated(self, name: str) -> list[tuple[float, float, float]]:
        """(epochs done, or lambda of the closed form; value; standard error or 0) of every
        evaluation on validation."""
        per = self.steps_per_epoch
        found = []
        for line in self.evaluations:
            if _number(line.get(name)):
                x = line["ease_lambda"] if _number(line.get("ease_lambda")) else line["step"] / per
                error = line.get(f"{name}_se")
                found.append(
                    (
                        float(x),
                        float(line[name]),
                        float(error) if error is not None and _number(error) else 0.0,
                    )
                )
        return sorted(found)


def read_run(folder: str | Path, benchmark: dict[str, Any] | None = None) -> Run:
    """A run directory as it is, finished or not; ValueError where the folder is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; pass the run.dir of a training")
    lines, damaged = _lines(folder / "metrics.jsonl")
    config = _config(folder / "config.yaml")
    if not config and not lines:
        raise ValueError(
            f"{folder} holds neither config.yaml nor metrics.jsonl; pass the run.dir of a training"
        )
    found = benchmark or read_benchmark(folder / "benchmark.json", missing_ok=True)
    steps = [line for line in lines if "loss" in line]
    evaluations = [
        _plain(line, [_MOST_VALUES])
        for line in lines
        if "loss" not in line and line.get("split") == "validation"
    ]
    environment = _json(folder / "environment.json")
    starts = environment.get("starts") if isinstance(environment, dict) else None
    starts = (
        [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []
    )
    run = Run(
        folder.resolve().name, folder, config, starts, steps, evaluations, None, found, damaged
    )
    result = _json(folder / "result.json")
    run.result = result if isinstance(result, dict) else None
    if run.result is None and (folder / "result.json").exists():
        run.notes.append("result.json cannot be read and is left out.")
    elif run.result is None:
        run.notes.append("The run has not come to its end: there is no result.json.")
    if damaged:
        run.notes.append(f"{damaged} lines of metrics.jsonl could not be read and are left out.")
    return run


def read_runs(folders: list[str], benchmarks: list[str]) -> list[Run]:
    """All runs of a report, under names that differ.

    A benchmark given by name belongs to the first run.
    """
    if len(folders) > MOST_RUNS:
        raise ValueError(
            f"{len(folders)} runs were given, expected at most {MOST_RUNS}; compare fewer at a time"
        )
    given = None
    for path in benchmarks:
        found = read_benchmark(Path(path))
        given = (
            found
            if given is None or found is None
            else {**given, "rows": given["rows"] + found["rows"]}
        )
    runs = [read_run(folder, given if i == 0 else None) for i, folder in enumerate(folders)]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = "/".join(run.folder.resolve().parts[-2:])
    return runs


def read_benchmark(path: Path, missing_ok: bool = False) -> dict[str, Any] | None:
    """benchmark.json of launch/benchmark.py, or None where there is none; ValueError where it is
    something else."""
    if missing_ok and not path.exists():
        return None
    found = _json(path / "benchmark.json" if path.is_dir() else path)
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
        and all(_number(row.get(name)) for name in needed)
        and isinstance(row.get("mode"), str)
        and isinstance(row.get("parts"), dict)
        and all(_number(part) for part in row["parts"].values())
        and row["ranks"] >= 1
        for row in rows
    )
    if not good or not rows:
        raise ValueError(
            f"{path} is no benchmark.json of launch/benchmark.py; name one, or remove it"
        )
    assert isinstance(found, dict)
    return found


def _number(value: Any) -> bool:
    """Whether a value is a number that can be drawn: finite, neither huge nor all but 0."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return value == 0 or 1 / _LARGEST**2 <= abs(value) <= _LARGEST


def _plain(value: Any, left: list[int], depth: int = 0) -> Any:
    """What a file holds, fit to be shown: names are text, numbers that cannot be drawn are None.

    `left` counts down the values that are still taken: a file may repeat a part of itself without end.
    """
    left[0] -= 1
    if depth > _DEEPEST or left[0] < 0:
        return None
    if isinstance(value, dict):
        return {
            _text(name): _plain(v, left, depth + 1)
            for name, v in list(value.items())[: max(left[0], 0)]
        }
    if isinstance(value, list):
        return [_plain(v, left, depth + 1) for v in value[: max(left[0], 0)]]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value if _number(value) else None
    return value if isinstance(value, bool | None) else _text(value)


def _text(value: Any) -> str:
    return (
        "a long number" if isinstance(value, int) and not _number(value) else str(value)[:_LONGEST]
    )


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of metrics.jsonl that are objects with a step, and how many are not."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return [], 0
    found, damaged = [], 0
    for line in text.splitlines():
        try:
            record = parse_json(line)
            good = (
                isinstance(record, dict)
                and _number(record.get("step"))
                and _number(record.get("epoch", 0))
            )
        except ValueError:
            good = False
        if good:
            found.append(record)
        else:
            damaged += 1
    return found, damaged


def _config(path: Path) -> dict[str, Any]:
    try:
        found = _plain(read_yaml(path, "the configuration of a run"), [_MOST_VALUES])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _json(path: Path) -> Any:
    try:
        return _plain(read_json(path), [_MOST_VALUES])
    except (OSError, ValueError):
        return None

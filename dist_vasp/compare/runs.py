"""The runs of a comparison, one after another: train what is not finished, evaluate it user by
user, note what it cost.

Beside each run.dir `runs/NAME-seedK` lie its files:

    .yaml              the configuration it is trained with
    .log               what training and evaluation printed
    .job.json          wall seconds and peak memory of the training, hash of the data
    .test.json         the metrics that evaluate.py wrote
    .per_user.parquet  the metrics of each user

An ensemble's folder holds ensemble.json, and what is taken down of it is its evaluation.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from dist_vasp.bounded_json import read_json
from dist_vasp.checkpoint import folder as folders
from dist_vasp.compare.config import Comparison, Run
from dist_vasp.compare.jobs import Ended, Jobs, Stopped
from dist_vasp.config.command_line import from_dict
from dist_vasp.config.yaml_file import read_yaml
from dist_vasp.data.manifest import SPLITS, Manifest
from dist_vasp.files import replace_text

_REMEDY = "choose another --output"
DONE, TRAINED, BEGUN, NEW = "done", "trained", "begun", "new"  # what is there of a run


@dataclass(frozen=True)
class Failure:
    """A run that ended with an error."""

    run: Run
    status: int
    reason: str


def data_sha256(manifest: Manifest) -> str:
    """Return a hash of the vocabulary and of every shard of every split."""
    digest = hashlib.sha256(manifest.vocabulary_sha256.encode())
    for split in SPLITS:
        for shard in manifest.splits[split].shards:
            digest.update(shard.sha256.encode())
    return digest.hexdigest()


def state_of(run: Run, data: str) -> str:
    """Return how far a run on the data with hash `data` has come.

    A result of another configuration or of other data does not count: train.py is started then,
    which resumes where it may and refuses where it must not.
    """
    evaluated = _is_evaluated(run)
    same_data = _job(run).get("data_sha256") == _data_of(run, data)
    if run.members:
        same = (
            evaluated
            and same_data
            and run.file("yaml").is_file()
            and run.file("yaml").read_text() == _members_of(run)
        )
        newest = max(_changed(member.dir / "result.json") for member in run.members)
        as_they_are = newest <= _changed(run.file("test.json")) and all(
            state_of(member, data) == DONE for member in run.members
        )
        return DONE if same and as_they_are else NEW
    if run.config is None:
        return DONE if evaluated and same_data else NEW
    if (run.dir / "result.json").is_file() and same_data and _same_config(run):
        return DONE if evaluated else TRAINED
    return BEGUN if folders.newest(run.dir / "checkpoints") else NEW


def _data_of(run: Run, data: str) -> str:
    """Return a hash of the comparison's data, and of the run's auxiliary data where it has some;
    "" where these are gone."""
    folder = run.config.data.auxiliary if run.config else ""
    try:
        return f"{data} {data_sha256(Manifest.load(folder))}" if folder else data
    except ValueError:
        return ""


def _is_evaluated(run: Run) -> bool:
    """Return whether the files of an evaluation are there, with every metric asked for."""
    if not run.file("test.json").is_file() or not run.file("per_user.parquet").is_file():
        return False
    try:
        found = read_json(run.file("test.json"))["test"]
        return all(str(metric) in found for metric in run.metrics)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _members_of(run: Run) -> str:
    """Return the members of an ensemble and their weights, as its .yaml says."""
    weights = {
        member.stem: weight
        for member, (_, weight) in zip(run.members, run.model.members, strict=True)
    }
    fit = {"fit": run.model.fit} if run.model.fit else {}
    return yaml.safe_dump({"ensemble": weights, **fit}, sort_keys=False)


def _same_config(run: Run) -> bool:
    assert run.config is not None
    try:
        found = asdict(from_dict(read_yaml(run.dir / "config.yaml", "the configuration of a run")))
    except ValueError:
        return False
    wanted = asdict(run.config)
    for config in (found, wanted):
        config["run"].pop("dir")  # the folder may have been moved
        for folder in ("shards", "auxiliary"):
            config["data"].pop(folder)  # their hashes are compared
    return found == wanted


def _job(run: Run) -> dict[str, Any]:
    try:
        found = read_json(run.file("job.json"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def plan(comparison: Comparison, output: Path, data: str) -> str:
    """Return what would be trained and what is there already, as text."""
    runs = comparison.runs(output)
    states = [state_of(run, data) for run in runs]
    lines = []
    for run, state in zip(runs, states, strict=True):
        newest = folders.newest(run.dir / "checkpoints") if run.config else None
        there = {
            DONE: "done",
            TRAINED: "trained, to be evaluated",
            BEGUN: f"begun, resumes from {newest.name if newest else ''}",
            NEW: "to be trained" if run.config else "to be evaluated",
        }[state]
        lines.append(f"  {run.stem:<30}  {run.model.what:<54}  {there}")
    n_done = states.count(DONE)
    lines.append(
        f"{len(runs)} runs of {len(comparison.models)} models, {n_done} done, {len(runs) - n_done} "
        "to do; "
        f"reference {comparison.reference}; results go to {output}"
    )
    return "\n".join(lines)


def carry_out(
    runs: Sequence[Run],
    comparison: Comparison,
    data: str,
    ranks: int,
    jobs: Jobs,
    say: Callable[[str], None],
    device: str = "auto",
) -> list[Failure]:
    """Bring every run to its end, one after another; a failed run is printed and the others go on.

    Raises Stopped.
    """
    failures: list[Failure] = []
    seconds: dict[str, list[float]] = {}  # by model, of what was done here
    to_do = [run for run in runs if state_of(run, data) != DONE]
    if len(to_do) < len(runs):
        say(f"{len(runs) - len(to_do)} of {len(runs)} runs are done already")
    for place, run in enumerate(to_do):
        run.folder.mkdir(parents=True, exist_ok=True)
        state = state_of(run, data)
        doing = {
            TRAINED: "evaluating",
            BEGUN: "resuming the training",
            NEW: "training" if run.config else "evaluating",
        }[state]
        left = _time_left(to_do[place:], seconds)
        say(
            f"[{place + 1}/{len(to_do)}] {run.stem}: {doing}; {count_runs(len(to_do) - place - 1)} "
            f"after it{left}; log {run.file('log')}"
        )
        start = time.monotonic()
        failure = _carry_out_one(run, state, comparison, data, ranks, jobs, device)
        took = time.monotonic() - start
        if failure is None:
            seconds.setdefault(run.model.name, []).append(took)
            metrics = read_json(run.file("test.json"))["test"]
            say(
                f"[{place + 1}/{len(to_do)}] {run.stem}: done in {took:.0f} s, test NDCG@100 "
                f"{_four(metrics['ndcg@100'])}"
            )
        else:
            failures.append(failure)
            say(
                f"[{place + 1}/{len(to_do)}] {run.stem}: FAILED with status {failure.status}: "
                f"{failure.reason}"
            )
    return failures


def _carry_out_one(
    run: Run, state: str, comparison: Comparison, data: str, ranks: int, jobs: Jobs, device: str
) -> Failure | None:
    """Train and evaluate one run as far as that is not done. Return None, or how it failed."""
    log_before = run.file("log").stat().st_size if run.file("log").exists() else 0
    if state != TRAINED:
        for ending in ("test.json", "per_user.parquet"):  # of an earlier result
            run.file(ending).unlink(missing_ok=True)
        before = _job(run) if state == BEGUN else {}
        replace_text(
            run.file("job.json"), json.dumps({**before, "data_sha256": None}) + "\n", _REMEDY
        )  # not finished from here on
    if run.config is not None and state != TRAINED:
        replace_text(run.file("yaml"), run.config.to_yaml(), _REMEDY)
        result_before = _changed(run.dir / "result.json")
        try:
            training = ["train", "--config", str(run.file("yaml"))]
            ended = jobs.run(training, ranks, run.file("log"))
        except Stopped as stopped:
            if stopped.args:
                _note(run, stopped.args[0], None, ranks)
            raise
        finished = ended.status == 0 and _changed(run.dir / "result.json") != result_before
        _note(run, ended, data if finished else None, ranks)
        if not finished:
            return Failure(run, ended.status, _reason(run.file("log"), log_before))
    if run.members:
        members = ["--members", *(str(member.dir) for member in run.members)]
        if run.model.is_fitted:
            first = run.members[0].config
            assert first is not None
            by = [run.model.fit] if run.model.fit else []
            weights = ["--fit", *by, "--shards", comparison.shards, "--device", first.device]
        else:
            weights = ["--weights", *(str(weight) for _, weight in run.model.members)]
        combining = ["ensemble", *members, *weights, "--output", str(run.dir)]
        ended = jobs.run(combining, 1, run.file("log"))
        if ended.status:
            return Failure(run, ended.status, _reason(run.file("log"), log_before))
        replace_text(run.file("yaml"), _members_of(run), _REMEDY)
    what = (
        ["--run", str(run.dir)] if run.config or run.members else ["--baseline", run.model.source]
    )
    device = device if run.config is None else run.config.device
    arguments = [*what, "--shards", comparison.shards, "--device", device]
    arguments += ["--recall_denominator", comparison.recall_denominator]
    arguments += ["--json", str(run.file("test.json"))]
    arguments += ["--per_user", str(run.file("per_user.parquet"))]
    if run.metrics:
        arguments += ["--metrics", ",".join(map(str, run.metrics))]
    ended = jobs.run(["evaluate", *arguments], ranks, run.file("log"))
    if ended.status:
        return Failure(run, ended.status, _reason(run.file("log"), log_before))
    if run.config is None:
        _note(run, ended, data, ranks)
    return None


def _note(run: Run, ended: Ended, data: str | None, ranks: int) -> None:
    """Add one start of the training to what is noted: a run that was interrupted has several."""
    before = _job(run)
    peaks = ended.peak_memory
    if len(before.get("peak_memory", [])) == len(peaks):
        peaks = [max(pair) for pair in zip(peaks, before["peak_memory"], strict=True)]
    noted = {
        "seconds": before.get("seconds", 0.0) + ended.seconds,
        "peak_memory": peaks,
        "ranks": ranks,
        "data_sha256": data and _data_of(run, data),
    }
    replace_text(run.file("job.json"), json.dumps(noted, indent=1) + "\n", _REMEDY)


def _changed(path: Path) -> int:
    """Return when a file was last written, 0 where there is none."""
    return path.stat().st_mtime_ns if path.exists() else 0


def _reason(log: Path, start: int) -> str:
    """Return the last error that a log reports after byte `start`, else its last line."""
    lines = [
        line
        for line in log.read_bytes()[start:].decode(errors="replace").splitlines()
        if line.strip()
    ]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it printed nothing"])[-1].removeprefix("error: ")


def _time_left(runs: Sequence[Run], seconds: dict[str, list[float]]) -> str:
    """Return `, about 0:02:10 left` for all of `runs`.

    Each takes as long as its model took before, else as long as a mean model.
    """
    if not seconds:
        return ""
    mean = fmean(fmean(taken) for taken in seconds.values())
    total = int(sum(fmean(seconds.get(run.model.name, [mean])) for run in runs))
    return f", about {total // 3600}:{total // 60 % 60:02d}:{total % 60:02d} left in all"


def count_runs(n: int) -> str:
    return f"{n} run" if n == 1 else f"{n} runs"


def _four(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"

"""The arithmetic of a comparison: means with standard errors, paired differences, and the sentence
of verdict.

For a metric, x[s, u] is what the run of seed s gave user u. A model's value for a user is the mean
over its seeds, x[u]; its metric the mean over the n scored users; the standard error sd(x[u]) /
sqrt(n), which is that of another draw of users.

Two models are compared user by user: d[u] = x_a[u] - x_b[u], its mean and sd(d[u]) / sqrt(n). Users
are hard or easy for both, so this is smaller than the two standard errors suggest. sd is the sample
standard deviation (n - 1).

The spread over seeds is the sd of the seeds' metrics: what another seed would change. The paired
standard error does not hold it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

METRICS = ("ndcg@100", "recall@20", "recall@50")
PRIMARY = METRICS[0]
NAMES = {"ndcg@100": "NDCG@100", "recall@20": "Recall@20", "recall@50": "Recall@50"}
LIMIT = 2.0  # standard errors of the paired difference that make a difference


@dataclass(frozen=True)
class Estimate:
    """A mean over users and its standard error; NaN where there are too few."""

    mean: float
    se: float
    n: int

    @property
    def ratio(self) -> float:
        """Return by how many standard errors the mean differs from zero."""
        if self.se > 0:
            return self.mean / self.se
        return 0.0 if self.mean == 0 else math.copysign(math.inf, self.mean)

    @property
    def differs(self) -> bool:
        return self.n > 1 and abs(self.ratio) > LIMIT

    def __str__(self) -> str:
        return "-" if math.isnan(self.mean) else f"{self.mean:.4f} +- {self.se:.4f}"


def estimate(values: np.ndarray) -> Estimate:
    """Return mean and standard error over the values that are not NaN."""
    scored = values[~np.isnan(values)]
    n = len(scored)
    if not n:
        return Estimate(math.nan, math.nan, 0)
    return Estimate(
        float(scored.mean()), float(scored.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan, n
    )


@dataclass(frozen=True)
class Scores:
    """A model's metrics of every user: by column of the per-user files, (seeds, users) float64 with
    NaN where not scored."""

    name: str
    seeds: tuple[int, ...]
    keys: np.ndarray  # (users,) uint64
    values: Mapping[str, np.ndarray]

    def per_user(self, column: str) -> np.ndarray:
        """Return the mean over the seeds, (users,)."""
        return self.values[column].mean(axis=0)

    def estimate(self, column: str) -> Estimate:
        return estimate(self.per_user(column))

    def by_seed(self, column: str) -> list[float]:
        """Return the metric of each seed."""
        return [estimate(row).mean for row in self.values[column]]

    def seed_sd(self, column: str) -> float:
        """Return the standard deviation over the seeds; NaN with one."""
        found = self.by_seed(column)
        return float(np.std(found, ddof=1)) if len(found) > 1 else math.nan


def read_scores(name: str, files: Mapping[int, Path]) -> Scores:
    """Stack the per-user files of a model, {seed: file}.

    ValueError where they do not hold the same users in the same order.
    """
    tables = {seed: _read(path) for seed, path in files.items()}
    first_seed, first = next(iter(tables.items()))
    keys = np.asarray(first.column("key"))
    for seed, table in tables.items():
        if not np.array_equal(np.asarray(table.column("key")), keys):
            raise ValueError(
                f"{files[seed]} and {files[first_seed]} are of different users; remove both and "
                "start again"
            )
    columns = [c for c in first.column_names if "@" in c]
    values = {
        c: np.stack([table.column(c).to_numpy(zero_copy_only=False) for table in tables.values()])
        for c in columns
    }
    return Scores(name, tuple(tables), keys, values)


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read ({error}); remove it and start again") from None


def paired(a: Scores, b: Scores, column: str) -> Estimate:
    """Return a less b, user by user."""
    if not np.array_equal(a.keys, b.keys):
        raise ValueError(
            f"{a.name} and {b.name} were evaluated on different users; remove their "
            ".per_user.parquet and start again"
        )
    return estimate(a.per_user(column) - b.per_user(column))


def seed_noise(a: Scores, b: Scores, column: str) -> float:
    """Return the standard error of a difference that the choice of seeds alone makes.

    NaN where neither model has several seeds.
    """
    parts = [x.seed_sd(column) ** 2 / len(x.seeds) for x in (a, b) if len(x.seeds) > 1]
    return math.sqrt(sum(parts)) if parts else math.nan


def best_of(models: Sequence[Scores], column: str = PRIMARY) -> Scores:
    return max(models, key=lambda model: model.estimate(column).mean)


@dataclass(frozen=True)
class Cost:
    """What a model's training took; None where nothing was trained or measured."""

    seconds: float | None = (
        # of the fastest seed: all seeds do the same work, and a busy machine can only add to it
        None
    )
    peak_memory: float | None = None  # bytes


def rivals(models: Sequence[Scores], reference: str) -> tuple[Scores, Scores] | None:
    """Return the best model by NDCG@100 and the one it is compared with; None of a single model.

    That is the reference; where the reference is the best, the second best.
    """
    first = best_of(models)
    others = [model for model in models if model.name != first.name]
    if not others:
        return None
    if first.name == reference:
        return first, best_of(others)
    return first, next(model for model in others if model.name == reference)


def winner(models: Sequence[Scores], reference: str) -> str:
    """Return the best model where it is ahead of its rival by more than two standard errors, else
    nothing."""
    pair = rivals(models, reference)
    return pair[0].name if pair and paired(*pair, PRIMARY).differs else ""


def verdict(models: Sequence[Scores], reference: str, costs: Mapping[str, Cost]) -> str:
    """Return who wins, by how much, whether that exceeds two standard errors, and at what cost.

    The best by NDCG@100 is compared with the reference; where the reference is the best, with the
    second best. The difference is paired, user by user.
    """
    pair = rivals(models, reference)
    if pair is None:
        return f"There is nothing to compare: {models[0].name} alone has results."
    first, second = pair
    d = paired(first, second, PRIMARY)
    against = (
        f"the reference {second.name}"
        if second.name == reference
        else f"{second.name}, the best of the others,"
    )
    who = "it" if d.differs else first.name
    amount = (
        f"{who} is ahead of {against} by {d} in {NAMES[PRIMARY]} "
        f"({first.estimate(PRIMARY).mean:.4f} against "
        f"{second.estimate(PRIMARY).mean:.4f}), {_standard_errors(d.ratio)} of the paired "
        "difference"
    )
    text = (
        f"**{first.name} wins**: {amount}."
        if d.differs
        else f"**No winner**: {amount}, which does not exceed two."
    )
    noise = seed_noise(first, second, PRIMARY)
    if d.differs and not math.isnan(noise) and d.mean <= LIMIT * noise:
        text += (
            f" But the choice of seeds moves that difference by {noise:.4f} (one standard error): "
            "more seeds could turn it."
        )
    return " ".join([text, _other_metrics(first, second), _cost(first.name, second.name, costs)])


def _standard_errors(ratio: float) -> str:
    return "without any spread" if math.isinf(ratio) else f"{abs(ratio):.1f} standard errors"


def _other_metrics(first: Scores, second: Scores) -> str:
    """Return what the other metrics say about the same two models."""
    found = []
    for column in METRICS[1:]:
        d = paired(first, second, column)
        says = (
            f"favours {first.name if d.mean > 0 else second.name}"
            if d.differs
            else "shows no difference"
        )
        found.append(f"{NAMES[column]} {says} ({d.mean:+.4f} +- {d.se:.4f})")
    return f"{', '.join(found)}."


def _cost(first: str, second: str, costs: Mapping[str, Cost]) -> str:
    a, b = costs.get(first, Cost()), costs.get(second, Cost())
    told = []
    if a.seconds and b.seconds:
        told.append(
            f"{a.seconds / b.seconds:.2f} times the training time ({a.seconds:.1f} s against "
            f"{b.seconds:.1f} s)"
        )
    elif a.seconds:
        told.append(f"{a.seconds:.1f} s of training, where {second} needs none")
    elif b.seconds:
        told.append(f"no training, where {second} takes {b.seconds:.1f} s")
    if a.peak_memory and b.peak_memory:
        gb = f"{a.peak_memory / 1e9:.2f} GB against {b.peak_memory / 1e9:.2f} GB"
        told.append(f"{a.peak_memory / b.peak_memory:.2f} times the memory ({gb})")
    return f"{first} costs {' and '.join(told)}." if told else "What the two cost was not measured."


def against_reference(models: Sequence[Scores], reference: str) -> str:
    """Return which other models are better, worse or no different by NDCG@100.

    They differ where the paired difference exceeds two standard errors.
    """
    base = next(model for model in models if model.name == reference)
    groups: dict[str, list[str]] = {"better": [], "no different": [], "worse": []}
    for model in models:
        if model.name != reference:
            d = paired(model, base, PRIMARY)
            groups["no different" if not d.differs else "better" if d.mean > 0 else "worse"].append(
                model.name
            )
    told = [f"{group}: {', '.join(names)}" for group, names in groups.items() if names]
    return (
        f"Against the reference {reference}, by {NAMES[PRIMARY]} at two standard errors: "
        f"{'; '.join(told)}."
        if told
        else ""
    )

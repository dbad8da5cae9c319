"""How fast a step is on 1, 2, ... ranks: rows of a benchmark, their table and their plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import BinaryIO

from dist_vasp.measure.step import LABELS, Measured

Rounds = Sequence[Sequence[Measured]]  # what each rank measured, round by round


@dataclass(frozen=True)
class Job:
    """One job of a benchmark. Weak scaling keeps the users per rank, strong those of a step."""

    mode: str
    ranks: int
    users_per_step: int

    @property
    def size(self) -> tuple[int, int]:
        """Return what is measured: jobs of the same size are run once."""
        return self.ranks, self.users_per_step


@dataclass(frozen=True)
class Machine:
    """What the ranks of all jobs have at hand."""

    threads_per_rank: int
    cores: int


@dataclass(frozen=True)
class Row:
    """Medians of one job over its rounds, as benchmark.json holds them; times are in seconds."""

    mode: str
    ranks: int
    users_per_step: int
    users_per_second: float
    step_seconds: float
    parts: dict[str, float]
    bytes_moved: float
    bytes_by_collective: dict[str, float]
    peak_memory: float
    rates: dict[str, float]
    floor: dict[str, float]
    floor_seconds: float
    ratio_to_floor: float
    useful_gflops_per_second: float
    cores_per_rank: float
    efficiency: float
    """Users per second and rank, divided by those of the first job of the same mode."""


def summarise(
    jobs: Sequence[Job], measured: dict[tuple[int, int], list[list[Measured]]], machine: Machine
) -> list[Row]:
    """Return a Row for each job; `measured` holds the rounds of each size."""
    rows: list[Row] = []
    for job in jobs:
        rounds = measured[job.size]
        speed = _speed(rounds)
        base = next(other for other in jobs if other.mode == job.mode)
        base_speed = _speed(measured[base.size])
        efficiency = speed / base_speed * base.ranks / job.ranks
        cores = min(machine.threads_per_rank, machine.cores / job.ranks)
        rows.append(_row(job, rounds, cores, efficiency))
    return rows


def _speed(rounds: Rounds) -> float:
    return median(ranks[0].users_per_second for ranks in rounds)


def _row(job: Job, rounds: Rounds, cores_per_rank: float, efficiency: float) -> Row:
    """Return the medians over the rounds; the slowest rank counts, and the largest."""

    def largest(value: Callable[[Measured], float]) -> float:
        return median(max(value(rank) for rank in ranks) for ranks in rounds)

    def of_rank_0(values: Callable[[Measured], dict[str, float]]) -> dict[str, float]:
        names = values(rounds[0][0])
        return {name: median(values(ranks[0])[name] for ranks in rounds) for name in names}

    def part(label: str) -> float:
        return largest(lambda rank: rank.parts[label])

    step_seconds = largest(lambda rank: rank.step_seconds)
    rates = of_rank_0(lambda rank: rank.rates)
    floor = of_rank_0(lambda rank: rank.floor)
    useful = floor["matrix products"] * rates["flops"]
    return Row(
        mode=job.mode,
        ranks=job.ranks,
        users_per_step=job.users_per_step,
        users_per_second=_speed(rounds),
        step_seconds=step_seconds,
        parts={label: part(label) for label in LABELS},
        bytes_moved=largest(lambda rank: sum(rank.bytes_moved.values())),
        bytes_by_collective=rounds[0][0].bytes_moved,
        peak_memory=largest(lambda rank: rank.peak_memory),
        rates=rates,
        floor=floor,
        floor_seconds=median(sum(ranks[0].floor.values()) for ranks in rounds),
        ratio_to_floor=median(
            max(rank.step_seconds for rank in ranks) / sum(ranks[0].floor.values())
            for ranks in rounds
        ),
        useful_gflops_per_second=useful / step_seconds / 1e9,
        cores_per_rank=cores_per_rank,
        efficiency=efficiency,
    )


def table(rows: Sequence[Row], machine: Machine, with_floor: bool) -> str:
    """Return time, traffic and memory of a step as Markdown; `with_floor` adds the least times."""
    head = ["scaling", "ranks", "cores a rank", "users a step", "users/s", "efficiency", "step s"]
    head += [*LABELS, "MB moved", "peak GB", "GFLOP/s useful", "of measured"]
    body = [
        [
            row.mode,
            str(row.ranks),
            f"{row.cores_per_rank:g}",
            str(row.users_per_step),
            f"{row.users_per_second:.0f}",
            f"{row.efficiency:.0%}",
            f"{row.step_seconds:.3f}",
            *(f"{row.parts[label]:.3f}" for label in LABELS),
            f"{row.bytes_moved / 1e6:.1f}",
            f"{row.peak_memory / 1e9:.2f}",
            f"{row.useful_gflops_per_second:.0f}",
            f"{row.rates['flops'] / 1e9:.0f}",
        ]
        for row in rows
    ]
    lines = [
        f"{machine.threads_per_rank} threads a rank on {machine.cores} cores; medians. "
        "Parts of a step in seconds.",
        "",
        *_markdown(head, body),
    ]
    if with_floor:
        lines += ["", *_floor_table(rows)]
    return "\n".join(lines) + "\n"


def _floor_table(rows: Sequence[Row]) -> list[str]:
    head = ["ranks", "users a step", "copy GB/s", "gather GB/s", *rows[0].floor]
    head += ["floor s", "step s", "step / floor"]
    body = [
        [
            str(row.ranks),
            str(row.users_per_step),
            f"{row.rates['copy'] / 1e9:.1f}",
            f"{row.rates['gather'] / 1e9:.1f}",
            *(f"{seconds:.3f}" for seconds in row.floor.values()),
            f"{row.floor_seconds:.3f}",
            f"{row.step_seconds:.3f}",
            f"{row.ratio_to_floor:.2f}",
        ]
        for row in rows
    ]
    return _markdown(head, body)


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *body)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def plot(rows: Sequence[Row], file: BinaryIO) -> None:
    """Write a PNG: users per second against ranks with the ideal line, and the parts of a step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for mode in dict.fromkeys(row.mode for row in rows):
        mine = [row for row in rows if row.mode == mode]
        speeds = [row.users_per_second for row in mine]
        left.plot([row.ranks for row in mine], speeds, marker="o", label=f"{mode} scaling")
    ranks = sorted({row.ranks for row in rows})
    ideal = [rows[0].users_per_second * n / rows[0].ranks for n in ranks]
    left.plot(ranks, ideal, linestyle="--", color="grey", label="ideal")
    left.set(xlabel="ranks", ylabel="users per second", ylim=(0, None))
    left.legend()
    names = [f"{row.mode} {row.ranks}" for row in rows]
    bottom = [0.0] * len(rows)
    for label in LABELS:
        heights = [row.parts[label] for row in rows]
        right.bar(names, heights, bottom=bottom, label=label)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    right.set(ylabel="seconds of a step")
    right.legend(fontsize="small")
    figure.savefig(file, format="png", dpi=120)
    plt.close(figure)

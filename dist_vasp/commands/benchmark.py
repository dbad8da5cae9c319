"""Scaling of a config: python launch/benchmark.py --config configs/X.yaml --ranks 1,2 --output DIR
[--floor]

Starts one job per number of ranks, in turn and several times over, and writes benchmark.json,
benchmark.md and scaling.png. Weak scaling keeps the users per rank, strong scaling the users per
step.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO

from dist_vasp.bounded_json import read_json
from dist_vasp.config import Config, make_parser, parse
from dist_vasp.data.manifest import Manifest
from dist_vasp.files import parents, replace_text, replacing_all, sole_writer
from dist_vasp.parallel.local_ranks import LocalRanks
from dist_vasp.parallel.partition import Layout
from dist_vasp.parallel.start import init_ranks
from dist_vasp.places import check_file
from dist_vasp.progress import duration
from dist_vasp.recognise import is_json
from dist_vasp.training.benchmark import LABELS, measure

RESULT = "benchmark.json"
_REMEDY = "choose another --output"


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("benchmark.py", __doc__ or "")
    parser.add_argument("--ranks", default="1", help="numbers of ranks, such as 1,2,4")
    parser.add_argument(
        "--output",
        default="",
        metavar="DIR",
        help="folder for benchmark.json, benchmark.md, scaling.png",
    )
    parser.add_argument("--steps", type=int, default=6, help="measured steps of a job")
    parser.add_argument("--rounds", type=int, default=3, help="times every job is run, in turn")
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        help="threads of a rank; 0: cores / largest number of ranks",
    )
    parser.add_argument("--modes", default="weak,strong", help="weak, strong or both")
    parser.add_argument(
        "--users_per_rank",
        type=int,
        default=0,
        help="of weak scaling; 0: data.batch_size / largest number of ranks",
    )
    parser.add_argument(
        "--floor",
        action="store_true",
        help="print what the machine's rates, measured in the same run, set as the least time of a step",
    )
    parser.add_argument("--job", default="", help="internal: folder that one job's ranks write to")
    config, arguments = parse(parser, argv)
    if config.model.linear:
        raise ValueError(
            "model.kind is 'ease', expected a model that is trained in steps; python -m benchmarks.bench_ease times ease"
        )
    if arguments.job:
        _job(config, arguments)
        return
    world_sizes = _world_sizes(arguments.ranks)
    for option, low in (("steps", 1), ("rounds", 1), ("threads", 0), ("users_per_rank", 0)):
        if arguments[option] < low:
            raise ValueError(
                f"--{option} is {arguments[option]}, expected at least {low}; raise it"
            )
    modes = [mode for mode in arguments.modes.split(",") if mode]
    if not modes or not set(modes) <= {"weak", "strong"}:
        raise ValueError(f"--modes is {arguments.modes!r}, expected weak, strong or weak,strong")
    if not config.data.shards:
        raise ValueError(
            "data.shards is not set; pass --data.shards with a folder written by `python -m data_tools.shard`"
        )
    Manifest.load(config.data.shards)
    for n in world_sizes:
        Layout.of(n, config.parallel.partitions, config.parallel.replicas)
    folder = _output(arguments.output)
    with parents(folder / RESULT, "--output"), sole_writer(folder / RESULT, "--output"):
        _measure(config, arguments, world_sizes, modes, folder)


def _measure(
    config: Config, arguments: Any, world_sizes: list[int], modes: list[str], folder: Path
) -> None:
    """Run all jobs in turn, write the results and print the table."""
    threads = arguments.threads or max(1, len(os.sched_getaffinity(0)) // max(world_sizes))
    per_rank = arguments.users_per_rank or config.data.batch_size // max(world_sizes)

    jobs = [
        (mode, n, n * per_rank if mode == "weak" else config.data.batch_size)
        for mode in modes
        for n in world_sizes
    ]
    jobs = [
        job for i, job in enumerate(jobs) if job[1:] not in [j[1:] for j in jobs[:i]]
    ]  # at one rank both may be the same
    measured: dict[tuple[int, int], list[list[dict[str, Any]]]] = {job[1:]: [] for job in jobs}
    done, start = 0, time.monotonic()
    for round_ in range(arguments.rounds):
        for _, n, batch in jobs:
            left = (
                duration((time.monotonic() - start) / done * (arguments.rounds * len(jobs) - done))
                if done
                else ""
            )
            about = f", about {left} left" if done else ""
            print(
                f"round {round_ + 1} of {arguments.rounds}: {n} ranks, {batch} users a step{about}",
                flush=True,
            )
            measured[n, batch].append(_start(config, arguments, n, batch, threads, folder))
            done += 1
    rows = [
        _summarise(mode, n, batch, measured[n, batch])
        for mode in modes
        for n in world_sizes
        for batch in [n * per_rank if mode == "weak" else config.data.batch_size]
    ]
    cores = len(os.sched_getaffinity(0))
    for row in rows:
        base = next(r for r in rows if r["mode"] == row["mode"])
        row["cores_per_rank"] = min(threads, cores / row["ranks"])
        row["efficiency"] = (
            row["users_per_second"] / base["users_per_second"] * base["ranks"] / row["ranks"]
        )
    result = {
        "config": arguments.config and str(arguments.config[0]),
        "threads_per_rank": threads,
        "cores": cores,
        "rows": rows,
    }
    table = _markdown(result, arguments.floor)
    with replacing_all(folder, (RESULT, "benchmark.md", "scaling.png"), _REMEDY) as (
        result_file,
        table_file,
        plot_file,
    ):
        result_file.write((json.dumps(result, indent=1) + "\n").encode())
        table_file.write(table.encode())
        _plot(rows, plot_file)
    print(table)


def _world_sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
        if min(sizes) < 1:
            raise ValueError
    except ValueError:
        raise ValueError(f"--ranks is {text!r}, expected numbers of ranks such as 1,2,4") from None
    return sizes


def _output(path: str) -> Path:
    if not path:
        raise ValueError("--output is not set; pass a folder for the results")
    recognised = {RESULT: _is_result, "benchmark.md": _is_table, "scaling.png": _is_beside_result}
    for name, ours in recognised.items():
        check_file(Path(path) / name, "--output", ours=ours, make_parents=True)
    return Path(path)


_is_result = is_json(lambda found: {"threads_per_rank", "cores", "rows"} <= set(found))


def _is_beside_result(path: Path) -> bool:
    return _is_result(path.with_name(RESULT))


def _is_table(path: Path) -> bool:
    with open(path, "rb") as handle:
        return b" threads a rank on " in handle.readline(200)


def _start(
    config: Config, arguments: Any, n: int, batch: int, threads: int, folder: Path
) -> list[dict[str, Any]]:
    """Run one job under torchrun and return what its ranks measured."""
    with tempfile.TemporaryDirectory(prefix=".job-", dir=folder) as job:
        return _run_job(config, arguments, n, batch, threads, Path(job))


def _run_job(
    config: Config, arguments: Any, n: int, batch: int, threads: int, job: Path
) -> list[dict[str, Any]]:
    replace_text(job / "config.yaml", config.to_yaml(), _REMEDY)
    command = [
        "benchmark",
        "--config",
        str(job / "config.yaml"),
        f"--data.batch_size={batch}",
        f"--job={job}",
        f"--steps={arguments.steps}",
        f"--threads={threads}",
    ]
    log = job / "log"
    with open(log, "wb") as output, LocalRanks(command, n, [output] * n, threads) as ranks:
        status = ranks.wait()
    if status:
        printed = log.read_text(errors="replace").splitlines()
        lines = [line for line in printed if line.startswith("error:")] or printed[-3:]
        raise ValueError(f"the job of {n} ranks failed: {' '.join(lines)}")
    return [read_json(path) for path in sorted(job.glob("rank-*.json"))]


def _job(config: Config, arguments: Any) -> None:
    p = config.parallel
    ranks = init_ranks(
        p.partitions, p.replicas, config.device, threads=arguments.threads, interface=p.interface
    )
    result = measure(config, ranks, arguments.steps)
    replace_text(Path(arguments.job) / f"rank-{ranks.rank:04d}.json", json.dumps(result), _REMEDY)


def _summarise(mode: str, n: int, batch: int, rounds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the rounds; of the ranks the slowest counts, and the largest."""

    def middle(value: Any) -> float:
        return median(max(value(rank) for rank in ranks) for ranks in rounds)

    row: dict[str, Any] = {"mode": mode, "ranks": n, "users_per_step": batch}
    row["users_per_second"] = median(ranks[0]["users_per_second"] for ranks in rounds)
    row["step_seconds"] = middle(lambda rank: rank["step_seconds"])
    row["parts"] = {
        label: middle(lambda rank, label=label: rank["parts"][label]) for label in LABELS
    }
    row["bytes_moved"] = middle(lambda rank: sum(rank["bytes_moved"].values()))
    row["bytes_by_collective"] = rounds[0][0]["bytes_moved"]
    row["peak_memory"] = middle(lambda rank: rank["peak_memory"])
    row["rates"] = {
        name: median(ranks[0]["rates"][name] for ranks in rounds)
        for name in ("flops", "copy", "gather")
    }
    row["floor"] = {
        name: median(ranks[0]["floor"][name] for ranks in rounds) for name in rounds[0][0]["floor"]
    }
    row["floor_seconds"] = median(sum(ranks[0]["floor"].values()) for ranks in rounds)
    row["ratio_to_floor"] = median(
        max(r["step_seconds"] for r in ranks) / sum(ranks[0]["floor"].values()) for ranks in rounds
    )
    useful = row["floor"]["matrix products"] * row["rates"]["flops"]
    row["useful_gflops_per_second"] = useful / row["step_seconds"] / 1e9
    return row


def _markdown(result: dict[str, Any], floor: bool) -> str:
    """The table for people: time, traffic and memory of a step; with `floor`, what the machine
    could do at best."""
    more = ("MB moved", "peak GB", "GFLOP/s useful", "of measured")
    head = (
        "scaling",
        "ranks",
        "cores a rank",
        "users a step",
        "users/s",
        "efficiency",
        "step s",
        *LABELS,
        *more,
    )
    lines = [
        f"{result['threads_per_rank']} threads a rank on {result['cores']} cores; medians. Parts of a step in seconds.",
        "",
    ]
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in result["rows"]:
        rates, useful = row["rates"], row["useful_gflops_per_second"]
        parts = " | ".join(f"{row['parts'][label]:.3f}" for label in LABELS)
        lines.append(
            f"| {row['mode']} | {row['ranks']} | {row['cores_per_rank']:g} | {row['users_per_step']} | {row['users_per_second']:.0f} | "
            f"{row['efficiency']:.0%} | {row['step_seconds']:.3f} | {parts} | {row['bytes_moved'] / 1e6:.1f} | "
            f"{row['peak_memory'] / 1e9:.2f} | {useful:.0f} | {rates['flops'] / 1e9:.0f} |"
        )
    if floor:
        head = (
            "ranks",
            "users a step",
            "copy GB/s",
            "gather GB/s",
            *result["rows"][0]["floor"],
            "floor s",
            "step s",
            "step / floor",
        )
        lines += ["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for row in result["rows"]:
            rates, parts = (
                row["rates"],
                " | ".join(f"{seconds:.3f}" for seconds in row["floor"].values()),
            )
            lines.append(
                f"| {row['ranks']} | {row['users_per_step']} | {rates['copy'] / 1e9:.1f} | {rates['gather'] / 1e9:.1f} | {parts} | "
                f"{row['floor_seconds']:.3f} | {row['step_seconds']:.3f} | {row['ratio_to_floor']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def _plot(rows: list[dict[str, Any]], file: BinaryIO) -> None:
    """Users per second against ranks with the ideal line, and the parts of a step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for mode in dict.fromkeys(row["mode"] for row in rows):
        mine = [row for row in rows if row["mode"] == mode]
        ranks = [row["ranks"] for row in mine]
        left.plot(
            ranks, [row["users_per_second"] for row in mine], marker="o", label=f"{mode} scaling"
        )
    first = rows[0]
    ideal = [
        first["users_per_second"] * n / first["ranks"]
        for n in sorted({row["ranks"] for row in rows})
    ]
    left.plot(
        sorted({row["ranks"] for row in rows}), ideal, linestyle="--", color="grey", label="ideal"
    )
    left.set(xlabel="ranks", ylabel="users per second", ylim=(0, None))
    left.legend()
    names = [f"{row['mode']} {row['ranks']}" for row in rows]
    bottom = [0.0] * len(rows)
    for label in LABELS:
        heights = [row["parts"][label] for row in rows]
        right.bar(names, heights, bottom=bottom, label=label)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    right.set(ylabel="seconds of a step")
    right.legend(fontsize="small")
    figure.savefig(file, format="png", dpi=120)
    plt.close(figure)

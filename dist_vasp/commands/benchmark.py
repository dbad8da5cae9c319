"""Measure how a configuration scales with the number of ranks.

Starts one job per number of ranks, in turn and several times over, and writes benchmark.json,
benchmark.md and scaling.png. Weak scaling keeps the users per rank, strong scaling the users per
step.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_vasp.bounded_json import read_json
from dist_vasp.command_line import program
from dist_vasp.config.command_line import ConfigParser, make_parser, parse
from dist_vasp.config.schema import Config
from dist_vasp.data.manifest import Manifest
from dist_vasp.extras import require_library
from dist_vasp.files import parents, replace_text, replacing_all, sole_writer
from dist_vasp.measure.scaling import Job, Machine, plot, summarise, table
from dist_vasp.measure.step import Measured, measure
from dist_vasp.model.registry import kind_of
from dist_vasp.parallel.local_ranks import LocalRanks
from dist_vasp.parallel.partition import Layout
from dist_vasp.parallel.start import init_ranks
from dist_vasp.places import check_file
from dist_vasp.progress import duration
from dist_vasp.recognise import is_json

RESULT = "benchmark.json"
_REMEDY = "choose another --output"


@dataclass(frozen=True)
class _Task:
    """What is measured and where the results go."""

    config: Config
    jobs: list[Job]
    steps: int
    rounds: int
    machine: Machine
    folder: Path


def main(argv: Sequence[str] | None = None) -> None:
    config, arguments = _parse(argv)
    if arguments.job:
        _one_rank(config, arguments)
        return
    task = _check(config, arguments)
    with parents(task.folder / RESULT, "--output"), sole_writer(task.folder / RESULT, "--output"):
        _benchmark(task, arguments)


def parser() -> ConfigParser:
    parser = make_parser(program("benchmark"), __doc__ or "")
    add = parser.add_argument
    add("--ranks", default="1", help="numbers of ranks, such as 1,2,4")
    add(
        "--output",
        default="",
        metavar="DIR",
        help="folder for benchmark.json, benchmark.md, scaling.png",
    )
    add("--steps", type=int, default=6, help="measured steps of a job")
    add("--rounds", type=int, default=3, help="times every job is run, in turn")
    add(
        "--threads",
        type=int,
        default=0,
        help="threads of a rank; 0: cores / largest number of ranks",
    )
    add("--modes", default="weak,strong", help="weak, strong or both")
    add(
        "--users_per_rank",
        type=int,
        default=0,
        help="of weak scaling; 0: data.batch_size / largest number of ranks",
    )
    add(
        "--floor",
        action="store_true",
        help="add the least time of a step, from the machine's rates measured in the same run",
    )
    add("--job", default="", help=argparse.SUPPRESS)
    return parser


def _parse(argv: Sequence[str] | None) -> tuple[Config, Any]:
    """Return the configuration and the arguments."""
    config, arguments = parse(parser(), argv)
    if kind_of(config.model.kind).closed_form:
        raise ValueError(
            f"model.kind is {config.model.kind!r}, expected a model that is trained in steps; "
            "python -m benchmarks.bench_ease times ease"
        )
    return config, arguments


def _check(config: Config, arguments: Any) -> _Task:
    """Return what is measured; ValueError where an option does not fit."""
    require_library("matplotlib", "scaling.png")
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
            "data.shards is not set; pass --data.shards with a folder written by "
            "`python -m data_tools.shard`"
        )
    Manifest.load(config.data.shards)
    for n in world_sizes:
        Layout.of(n, config.parallel.partitions, config.parallel.replicas)
    cores = len(os.sched_getaffinity(0))
    threads = arguments.threads or max(1, cores // max(world_sizes))
    per_rank = arguments.users_per_rank or config.data.batch_size // max(world_sizes)
    jobs = [
        Job(mode, n, n * per_rank if mode == "weak" else config.data.batch_size)
        for mode in modes
        for n in world_sizes
    ]
    machine = Machine(threads, cores)
    folder = _output(arguments.output)
    return _Task(config, jobs, arguments.steps, arguments.rounds, machine, folder)


def _benchmark(task: _Task, arguments: Any) -> None:
    """Run all jobs in turn, write the results and print the table."""
    rows = summarise(task.jobs, _measure_all(task), task.machine)
    result = {
        "config": arguments.config and str(arguments.config[0]),
        "threads_per_rank": task.machine.threads_per_rank,
        "cores": task.machine.cores,
        "rows": [asdict(row) for row in rows],
    }
    text = table(rows, task.machine, arguments.floor)
    with replacing_all(task.folder, (RESULT, "benchmark.md", "scaling.png"), _REMEDY) as files:
        result_file, table_file, plot_file = files
        result_file.write((json.dumps(result, indent=1) + "\n").encode())
        table_file.write(text.encode())
        plot(rows, plot_file)
    print(text)


def _measure_all(task: _Task) -> dict[tuple[int, int], list[list[Measured]]]:
    """Return what every rank measured, round by round, for each size of a job."""
    measured: dict[tuple[int, int], list[list[Measured]]] = {job.size: [] for job in task.jobs}
    n_jobs = task.rounds * len(measured)
    done, start = 0, time.monotonic()
    for round_ in range(task.rounds):
        for n_ranks, batch in measured:
            about = ""
            if done:
                left = (time.monotonic() - start) / done * (n_jobs - done)
                about = f", about {duration(left)} left"
            print(
                f"round {round_ + 1} of {task.rounds}: {n_ranks} ranks, "
                f"{batch} users a step{about}",
                flush=True,
            )
            with tempfile.TemporaryDirectory(prefix=".job-", dir=task.folder) as folder:
                measured[n_ranks, batch].append(_run_job(task, n_ranks, batch, Path(folder)))
            done += 1
    return measured


def _run_job(task: _Task, n_ranks: int, batch: int, folder: Path) -> list[Measured]:
    """Run one job and return what its ranks measured."""
    replace_text(folder / "config.yaml", task.config.to_yaml(), _REMEDY)
    threads = task.machine.threads_per_rank
    command = [
        "benchmark",
        "--config",
        str(folder / "config.yaml"),
        f"--data.batch_size={batch}",
        f"--job={folder}",
        f"--steps={task.steps}",
        f"--threads={threads}",
    ]
    log = folder / "log"
    with (
        open(log, "wb") as output,
        LocalRanks(command, n_ranks, [output] * n_ranks, threads) as ranks,
    ):
        status = ranks.wait()
    if status:
        printed = log.read_text(errors="replace").splitlines()
        lines = [line for line in printed if line.startswith("error:")] or printed[-3:]
        # Its log lies in the same folder: on a full disk even the reason is lost.
        silence = f"it could not write to {task.folder}; if the disk is full, free some space"
        raise ValueError(f"the job of {n_ranks} ranks failed: {' '.join(lines) or silence}")
    return [Measured(**read_json(path)) for path in sorted(folder.glob("rank-*.json"))]


def _one_rank(config: Config, arguments: Any) -> None:
    """Be one rank of a job: measure, and write what was measured."""
    p = config.parallel
    ranks = init_ranks(
        p.partitions, p.replicas, config.device, threads=arguments.threads, interface=p.interface
    )
    measured = measure(config, ranks, arguments.steps)
    path = Path(arguments.job) / f"rank-{ranks.rank:04d}.json"
    replace_text(path, json.dumps(asdict(measured)), _REMEDY)


def _world_sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
        if min(sizes) < 1:
            raise ValueError
    except ValueError:
        raise ValueError(f"--ranks is {text!r}, expected numbers of ranks such as 1,2,4") from None
    return sizes


def _output(path: str) -> Path:
    """Return the folder; ValueError where it holds other files under the names of the results."""
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

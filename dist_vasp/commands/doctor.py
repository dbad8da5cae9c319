"""Check this machine, the data and the configuration before a job is submitted.

Without a launcher it starts a few ranks itself; under a launcher it checks every host of the job.
Exit status: 0, 1 where something would fail, 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dist_vasp.command_line import program
from dist_vasp.config.command_line import ConfigParser, make_parser, parse
from dist_vasp.config.schema import Config
from dist_vasp.doctor.findings import Finding, error, table
from dist_vasp.doctor.job import check_job
from dist_vasp.doctor.machine import check_machine
from dist_vasp.doctor.roundtrip import judge, measure, start_here
from dist_vasp.files import new_file
from dist_vasp.parallel.comm import Ranks, all_gather_bytes
from dist_vasp.parallel.launched import launched_world, threads_per_rank
from dist_vasp.parallel.start import init_ranks
from dist_vasp.places import check_file
from dist_vasp.progress import counting
from dist_vasp.recognise import is_json

_CAPACITY = 1 << 16


def main(argv: Sequence[str] | None = None) -> int:
    config, arguments = _parse(argv)
    if arguments.round_trip:
        _one_rank(config, Path(arguments.round_trip))
        return 0

    _, world_size, local_rank, local_world_size = launched_world()
    has_cuda = config.device != "cpu" and torch.cuda.is_available()
    n_gpus = torch.cuda.device_count() if has_cuda else 0
    n_ranks = arguments.ranks or (world_size if world_size > 1 else n_gpus or 2)
    ranks = None
    if world_size > 1:
        ranks = init_ranks(device=config.device, interface=config.parallel.interface)
    findings: list[Finding] = []
    if local_rank == 0:
        findings += check_machine(config.device, config.parallel.compile == "always")
    if ranks:
        findings = [*_of_all_hosts(findings, ranks), judge(measure(ranks))]
    else:
        here = min(n_ranks, n_gpus) if n_gpus else n_ranks
        findings.append(start_here(here, config.device, threads_per_rank(here)))
    if ranks is None or ranks.is_main:
        if arguments.config or config.data.shards or config.run.dir:
            local_ranks = local_world_size if ranks else n_ranks
            with counting("checking shards", "shard") as show:
                findings += check_job(config, n_ranks, local_ranks, arguments.checksums, show)
        _print(findings, arguments.json)
    return int(any(finding.level == "error" for finding in findings))


def parser() -> ConfigParser:
    parser = make_parser(program("doctor"), __doc__ or "")
    parser.add_argument(
        "--ranks",
        type=int,
        default=0,
        help="ranks of the job; default: those of the launcher, else one per GPU, else 2",
    )
    parser.add_argument(
        "--shards", default="", metavar="DIR", help="data folder, in place of data.shards"
    )
    parser.add_argument("--checksums", action="store_true", help="read every byte of the shards")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        default="",
        metavar="FILE",
        help="the findings as JSON, to FILE or in place of the table",
    )
    parser.add_argument(
        "--round_trip",
        default="",
        metavar="FILE",
        help=argparse.SUPPRESS,  # be one rank of the round trip and write what it measures
    )
    return parser


def _parse(argv: Sequence[str] | None) -> tuple[Config, Any]:
    """Return the configuration, with --shards in it, and the arguments."""
    config, arguments = parse(parser(), argv)
    if arguments.ranks < 0:
        raise ValueError(f"--ranks is {arguments.ranks}, expected at least 1")
    if arguments.json not in ("", "-"):
        check_file(arguments.json, "--json", ours=_are_findings)
    if arguments.shards:
        config = replace(config, data=replace(config.data, shards=arguments.shards))
    return config, arguments


def _one_rank(config: Config, result: Path) -> None:
    """Take part in the round trip of `start_here`; rank 0 writes what it measures."""
    ranks = init_ranks(device=config.device)
    measured = measure(ranks)
    if ranks.is_main:
        result.write_text(json.dumps(measured))


def _of_all_hosts(findings: list[Finding], ranks: Ranks) -> list[Finding]:
    """Return rank 0's findings and those of other hosts that are not ok.

    The first rank of each host has checked it. All ranks call this together.
    """
    worst = [asdict(f) for f in findings if f.level != "ok"] if ranks.rank else []
    texts = all_gather_bytes(json.dumps(worst).encode(), ranks.world, ranks.device, _CAPACITY)
    for rank, text in enumerate(texts):
        try:
            found = [Finding(**f) for f in json.loads(text)]
        except (ValueError, TypeError):
            too_many = "more findings than fit a message"
            found = [error("hosts", too_many, "start doctor.py on that host alone")]
        findings += [replace(f, text=f"on the host of rank {rank}: {f.text}") for f in found]
    return findings


def _print(findings: list[Finding], where: str) -> None:
    """Print the findings; `where` is a JSON file to write as well, or - for JSON alone."""
    text = json.dumps([asdict(finding) for finding in findings], indent=1)
    if where == "-":
        print(text)
        return
    if where:
        with new_file(where, "--json", ours=_are_findings) as file:
            file.write(text.encode() + b"\n")
    print(table(findings))


_are_findings = is_json(
    lambda found: all(set(finding) == {"check", "level", "text", "do"} for finding in found)
)

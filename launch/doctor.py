"""Checks before a job is submitted: [deepspeed [launcher flags]] launch/doctor.py [--config
configs/X.yaml] [--ranks N] [--json]

Without a launcher it looks at this machine and starts a few ranks itself; under the launcher at
every host of the job. With a config, or with keys of it, also at data, disk and memory. Exit status
0, 1 where something would fail, 2 for a wrong command line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

try:
    import torch

    from dist_vasp.config import Config, make_parser, parse
    from dist_vasp.doctor.findings import Finding, error, table
    from dist_vasp.doctor.job import check_job
    from dist_vasp.doctor.machine import check_machine
    from dist_vasp.doctor.roundtrip import judge, measure, start_here
    from dist_vasp.files import new_file
    from dist_vasp.parallel.comm import Ranks, all_gather_bytes
    from dist_vasp.parallel.launched import launched_world, threads_per_rank
    from dist_vasp.parallel.start import init_ranks
    from dist_vasp.places import check_file, is_json
    from dist_vasp.training.progress import counting
    from launch.cli import run
except ImportError as missing:
    print(
        f"error    imports  {missing}\n         -> pip install -c constraints.txt -e .",
        file=sys.stderr,
    )
    sys.exit(1)

_CAPACITY = 1 << 16


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser("doctor.py", __doc__ or "")
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
        "--round_trip", action="store_true", help="internal: one rank of the round trip"
    )
    config, arguments = parse(parser, argv)
    if arguments.ranks < 0:
        raise ValueError(f"--ranks is {arguments.ranks}, expected at least 1")
    if arguments.json not in ("", "-"):
        check_file(arguments.json, "--json", ours=_are_findings)
    if arguments.shards:
        config = Config(
            **{
                **vars(config),
                "data": type(config.data)(**{**vars(config.data), "shards": arguments.shards}),
            }
        )
    if arguments.round_trip:
        print(json.dumps(measure(init_ranks(device=config.device))))
        return 0

    _, world, local_rank, local_world = launched_world()
    gpus = torch.cuda.device_count() if config.device != "cpu" and torch.cuda.is_available() else 0
    n = arguments.ranks or (world if world > 1 else gpus or 2)
    ranks = (
        init_ranks(device=config.device, interface=config.parallel.interface) if world > 1 else None
    )
    is_main = ranks is None or ranks.is_main
    findings = (
        list(check_machine(config.device, config.parallel.compile == "always"))
        if local_rank == 0
        else []
    )
    if ranks:
        findings = [*_of_all_hosts(findings, ranks), judge(measure(ranks))]
    else:
        here = min(n, gpus) if gpus else n
        findings.append(start_here(Path(__file__), here, config.device, threads_per_rank(here)))
    if is_main and (arguments.config or config.data.shards or config.run.dir):
        findings += _job(config, n, local_world if ranks else n, arguments.checksums)
    if is_main:
        _tell(findings, arguments.json)
    return int(any(finding.level == "error" for finding in findings))


def _job(config: Config, n: int, here: int, checksums: bool) -> list[Finding]:
    with counting("checking shards", "shard") as show:
        return list(check_job(config, n, here, checksums, show))


def _of_all_hosts(findings: list[Finding], ranks: Ranks) -> list[Finding]:
    """Rank 0's findings and what is not ok elsewhere; every host's first rank has looked."""
    worst = [asdict(f) for f in findings if f.level != "ok"] if ranks.rank else []
    texts = all_gather_bytes(json.dumps(worst).encode(), ranks.world, ranks.device, _CAPACITY)
    for rank, text in enumerate(texts):
        try:
            found = [Finding(**f) for f in json.loads(text)]
        except (ValueError, TypeError):
            found = [
                error(
                    "hosts",
                    "more findings than fit a message",
                    "start doctor.py on that host alone",
                )
            ]
        findings += [
            Finding(f.check, f.level, f"on the host of rank {rank}: {f.text}", f.do) for f in found
        ]
    return findings


def _tell(findings: list[Finding], where: str) -> None:
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


if __name__ == "__main__":
    run(main)

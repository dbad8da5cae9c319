"""Train a model, or resume its training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dist_vasp.command_line import add_ranks, program
from dist_vasp.config.command_line import ConfigParser, make_parser, parse
from dist_vasp.config.schema import Config
from dist_vasp.model.registry import kind_of
from dist_vasp.parallel.agree import any_rank
from dist_vasp.parallel.start import init_ranks
from dist_vasp.ranking.metrics import summary
from dist_vasp.signals import INTERRUPTED
from dist_vasp.training.stop import StopRequest
from dist_vasp.training.train import dry_run, train


def main(argv: Sequence[str] | None = None) -> int:
    config, arguments = _parse(argv)
    parallel = config.parallel
    ranks = init_ranks(
        parallel.partitions,
        parallel.replicas,
        config.device,
        interface=parallel.interface,
        shared=config.run.dir,
    )
    if arguments.dry_run:
        text = dry_run(config, ranks)
        if ranks.is_main:
            print(text)
        return 0
    stop = StopRequest()
    result = train(config, ranks, arguments.init_from, arguments.allow_leak, stop)
    if result is None:  # saved, and said so
        return INTERRUPTED if any_rank(stop.interrupted, ranks) else 0
    if ranks.is_main:
        for split in ("validation", "test"):
            if result[split]:
                print(f"{split}: {summary(result[split], config.run.told_metrics)}")
        print(
            f"{config.run.dir}/result.json: {result['seconds_training']:.1f} s of training, "
            f"checkpoint {result['checkpoint']}"
        )
    return 0


def parser() -> ConfigParser:
    parser = make_parser(program("train"), __doc__ or "")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="check everything, say what would be trained, and stop",
    )
    parser.add_argument(
        "--init_from",
        metavar="RUN_DIR",
        help="start a new run from this run's weights, items matched by original id",
    )
    parser.add_argument(
        "--allow_leak",
        action="store_true",
        help="with --init_from: start also where that run was trained on users held out now",
    )
    add_ranks(parser)
    return parser


def _parse(argv: Sequence[str] | None) -> tuple[Config, Any]:
    """Return the configuration and the checked arguments."""
    config, arguments = parse(parser(), argv)
    init_from, from_ease = arguments.init_from, config.model.init_from_ease
    if kind_of(config.model.kind).closed_form and init_from:
        raise ValueError(
            f"--init_from is {init_from}, but model.kind {config.model.kind} is computed from the "
            "shards alone; leave it out"
        )
    if arguments.allow_leak and not init_from:
        raise ValueError("--allow_leak belongs to --init_from RUN_DIR; leave it out")
    if from_ease and init_from:
        raise ValueError(
            f"--init_from is {init_from} and model.init_from_ease is {from_ease}: "
            "W can start from one of them; leave one out"
        )
    return config, arguments

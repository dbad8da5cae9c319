"""Train a model: deepspeed [launcher flags] launch/train.py --config configs/X.yaml [--section.key
value ...] [--dry_run]"""

from __future__ import annotations

from collections.abc import Sequence

from dist_vasp.config import make_parser, parse
from dist_vasp.parallel.start import init_ranks
from dist_vasp.training import closed_form
from dist_vasp.training.train import dry_run, summary, train


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("train.py", __doc__ or "")
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
    config, arguments = parse(parser, argv)
    parallel = config.parallel
    closed = config.model.linear
    if closed and arguments.init_from:
        raise ValueError(
            f"--init_from is {arguments.init_from}, but model.kind ease is computed from the shards alone; leave it out"
        )
    if config.model.init_from_ease and arguments.init_from:
        raise ValueError(
            f"--init_from is {arguments.init_from} and model.init_from_ease is {config.model.init_from_ease}: W can start from one of "
            "them; leave one out"
        )
    ranks = init_ranks(
        parallel.partitions,
        parallel.replicas,
        config.device,
        interface=parallel.interface,
        shared=config.run.dir,
    )
    if arguments.dry_run:
        text = closed_form.dry_run(config, ranks) if closed else dry_run(config, ranks)
        if ranks.is_main:
            print(text)
        return
    result = (
        closed_form.solve(config, ranks) if closed else train(config, ranks, arguments.init_from)
    )
    if ranks.is_main and result:
        for split in ("validation", "test"):
            if result[split]:
                print(f"{split}: {summary(result[split])}")
        print(
            f"{config.run.dir}/result.json: {result['seconds_training']:.1f} s of training, checkpoint {result['checkpoint']}"
        )

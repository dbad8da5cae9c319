"""Evaluate a run, or a baseline: deepspeed [launcher flags] launch/evaluate.py --run RUN_DIR
[--split test|validation] [--json FILE]"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack

from dist_vasp.data.items import load_items
from dist_vasp.data.manifest import Manifest
from dist_vasp.files import finish, new_file
from dist_vasp.parallel.agree import agreed
from dist_vasp.parallel.start import init_ranks
from dist_vasp.places import check_file, is_json
from dist_vasp.ranking.ensemble import load_ranker
from dist_vasp.ranking.evaluate import evaluate, popularity_scorer
from dist_vasp.ranking.load import check_vocabulary, shards_of
from dist_vasp.ranking.per_user import PerUserFile, is_per_user
from dist_vasp.training.progress import Progress
from dist_vasp.training.train import summary
from launch.cli import make_argument_parser, run


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_argument_parser("evaluate.py", __doc__ or "")
    parser.add_argument(
        "--run", metavar="RUN_DIR", help="folder of a training run, an export, or an ensemble"
    )
    parser.add_argument(
        "--checkpoint",
        metavar="NAME",
        help="a folder under RUN_DIR/checkpoints; default: best, else the newest",
    )
    parser.add_argument(
        "--baseline", choices=["popularity"], help="evaluate this in place of a run; needs --shards"
    )
    parser.add_argument(
        "--shards", metavar="DIR", help="data folder; default: the one the run was trained on"
    )
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument(
        "--recall_denominator",
        choices=["min", "held_out"],
        help="recall@k divides by min(k, held-out items), or by all held-out items; default: what the run says, else min",
    )
    parser.add_argument("--json", metavar="FILE", help="write {split: metrics} to this file")
    parser.add_argument(
        "--per_user",
        metavar="FILE.parquet",
        help="write each user's metrics, also by popularity of the target",
    )
    arguments = parser.parse_args(argv)
    if (arguments.run is None) == (arguments.baseline is None):
        raise ValueError(
            "expected either --run RUN_DIR or --baseline popularity; pass one of the two"
        )
    if arguments.baseline and not arguments.shards:
        raise ValueError(
            "--baseline needs data; pass --shards DIR, a folder written by `python -m data_tools.shard`"
        )
    _check_outputs(arguments.json, arguments.per_user)

    ranks = init_ranks(
        device=arguments.device, interface=arguments.interface, shared=arguments.run or ""
    )
    ranker = load_ranker(arguments.run, arguments.checkpoint, ranks) if arguments.run else None
    with agreed(ranks):
        folder, remark = arguments.shards, ""
        if ranker and not folder:
            folder, remark = shards_of(ranker.members[0])
        manifest = Manifest.load(folder)
        if ranker:
            check_vocabulary(ranker.members[0], folder, manifest)
            scorer, name = ranker.scorer(), ranker.name
        else:
            scorer = popularity_scorer(load_items(folder, manifest), ranks)
            name = arguments.baseline
        if not manifest.splits[arguments.split].users:
            raise ValueError(
                f"{folder} has no {arguments.split} users; choose another --split or prepare the data with some"
            )
        denominator = arguments.recall_denominator or (
            ranker.config.run.recall_denominator if ranker else "min"
        )

    with ExitStack() as outputs:  # they appear when all went well
        per_user, json_file = None, None
        with agreed(ranks):
            if arguments.json and ranks.is_main:
                json_file = outputs.enter_context(
                    new_file(arguments.json, "--json", ours=_is_evaluation)
                )
            if arguments.per_user and ranks.is_main:
                items = load_items(folder, manifest)
                file = PerUserFile(
                    arguments.per_user, folder, arguments.split, manifest, items, denominator
                )
                per_user = outputs.enter_context(file)
        if remark and ranks.is_main:
            print(remark)
        n_users = manifest.splits[arguments.split].users
        progress = Progress(f"evaluating {arguments.split}", n_users, "user", show=ranks.is_main)
        each_block = per_user.write if per_user else None
        found = evaluate(
            scorer,
            folder,
            arguments.split,
            ranks,
            progress.update,
            recall_denominator=denominator,
            each_block=each_block,
            manifest=manifest,
        )
        progress.close()
        assert found is not None
        metrics = found.result()
        if json_file:
            json_file.write((json.dumps({arguments.split: metrics}, indent=1) + "\n").encode())
            finish(json_file)
    if ranks.is_main:
        print(f"{name} on {arguments.split}: {summary(metrics)}")


def _check_outputs(json_path: str | None, per_user_path: str | None) -> None:
    """ValueError unless both files may be written, before any work is done."""
    if json_path:
        check_file(json_path, "--json", ours=_is_evaluation)
    if per_user_path:
        check_file(per_user_path, "--per_user", ours=is_per_user, endings=(".parquet",))
    if (
        json_path
        and per_user_path
        and os.path.realpath(json_path) == os.path.realpath(per_user_path)
    ):
        raise ValueError(f"--json and --per_user are both {json_path}; name two files")


_is_evaluation = is_json(
    lambda found: (
        set(found) <= {"test", "validation"} and all("n_users" in found[name] for name in found)
    )
)


if __name__ == "__main__":
    run(main)

"""Compute the metrics of a run, or of a baseline."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from dist_vasp.command_line import Parser, add_ranks
from dist_vasp.commands.ending import rank_parser
from dist_vasp.config.metric_names import Metric, computed_metrics, parse_metrics
from dist_vasp.data.items import load_items
from dist_vasp.data.manifest import Manifest
from dist_vasp.data.shard import check_ratings
from dist_vasp.files import new_file
from dist_vasp.parallel.agree import agreed
from dist_vasp.parallel.comm import Ranks
from dist_vasp.parallel.start import init_ranks
from dist_vasp.places import check_file
from dist_vasp.progress import Progress
from dist_vasp.ranking.ensemble import load_ranker
from dist_vasp.ranking.evaluate import Scorer, evaluate, popularity_scorer, user_metrics
from dist_vasp.ranking.load import check_vocabulary, shards_of
from dist_vasp.ranking.metrics import summary
from dist_vasp.ranking.per_user import PerUserFile, is_per_user
from dist_vasp.recognise import is_json
from dist_vasp.temporary import finish


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    _check(arguments)
    ranks = init_ranks(
        device=arguments.device, interface=arguments.interface, shared=arguments.run or ""
    )
    task = _load(arguments, ranks)
    metrics = _evaluate(task, arguments, ranks)
    if ranks.is_main:
        print(f"{task.name} on {arguments.split}: {summary(metrics, task.asked)}")


def parser() -> Parser:
    parser = rank_parser("evaluate", __doc__ or "")
    add = parser.add_argument
    add("--run", metavar="RUN_DIR", help="folder of a training run, an export, or an ensemble")
    add(
        "--checkpoint",
        metavar="NAME",
        help="a folder under RUN_DIR/checkpoints; default: best, else the newest",
    )
    add(
        "--baseline", choices=["popularity"], help="evaluate this in place of a run; needs --shards"
    )
    add("--shards", metavar="DIR", help="data folder; default: the one the run was trained on")
    add("--split", choices=["test", "validation"], default="test")
    add(
        "--recall_denominator",
        choices=["min", "held_out"],
        help="recall@k divides by min(k, held-out items), or by all held-out items; "
        "default: what the run says, else min",
    )
    add(
        "--metrics",
        metavar="NAMES",
        default="",
        help="further metrics, by name and list length: ndcg@10,recall@20,hr@10,mrr@10,map@10,"
        "precision@10,novelty@10,coverage@10,gini@10,diversity@10; default: what the run says",
    )
    add("--json", metavar="FILE", help="write {split: metrics} to this file")
    add(
        "--per_user",
        metavar="FILE.parquet",
        help="write each user's metrics, also by popularity of the target",
    )
    add_ranks(parser)
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """Raise ValueError for options that exclude each other, or a file that may not be written."""
    if (arguments.run is None) == (arguments.baseline is None):
        raise ValueError(
            "expected either --run RUN_DIR or --baseline popularity; pass one of the two"
        )
    if arguments.baseline and not arguments.shards:
        raise ValueError(
            "--baseline needs data; pass --shards DIR, a folder written by "
            "`python -m data_tools.shard`"
        )
    parse_metrics(arguments.metrics, "--metrics")
    json_path, per_user_path = arguments.json, arguments.per_user
    if json_path:
        check_file(json_path, "--json", ours=_is_evaluation)
    if per_user_path:
        check_file(per_user_path, "--per_user", ours=is_per_user, endings=(".parquet",))
    if not json_path or not per_user_path:
        return
    if os.path.realpath(json_path) == os.path.realpath(per_user_path):
        raise ValueError(f"--json and --per_user are both {json_path}; name two files")


@dataclass(frozen=True)
class _Task:
    """What is evaluated, on which data."""

    name: str
    scorer: Scorer
    folder: str
    manifest: Manifest
    recall_denominator: str
    asked: tuple[Metric, ...]
    """Metrics beyond the default ones."""
    remark: str
    """Printed before the evaluation; "" says nothing."""
    ratings: bool
    """Whether the model reads ratings, and its scores are compared with those of the targets."""


def _load(arguments: argparse.Namespace, ranks: Ranks) -> _Task:
    """Load the run or the baseline and the manifest of its data. All ranks call this together."""
    ranker = load_ranker(arguments.run, arguments.checkpoint, ranks) if arguments.run else None
    with agreed(ranks):
        folder, remark, ratings = arguments.shards, "", False
        asked = parse_metrics(arguments.metrics, "--metrics")
        if ranker and not folder:
            folder, remark = shards_of(ranker.members[0])
        manifest = Manifest.load(folder)
        if ranker:
            check_vocabulary(ranker.members[0].checkpoint.header, folder, manifest)
            scorer: Scorer = ranker.model.scores
            name = ranker.name
            ratings = ranker.config.ratings
            if ratings:
                check_ratings(folder, manifest)
            denominator = ranker.config.run.recall_denominator
            asked = asked or ranker.config.run.asked_metrics
        else:
            scorer = popularity_scorer(load_items(folder, manifest), ranks)
            name, denominator = arguments.baseline, "min"
        if not manifest.splits[arguments.split].users:
            raise ValueError(
                f"{folder} has no {arguments.split} users; "
                "choose another --split or prepare the data with some"
            )
        denominator = arguments.recall_denominator or denominator
        return _Task(name, scorer, folder, manifest, denominator, asked, remark, ratings)


def _evaluate(task: _Task, arguments: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """Return the metrics and write the files that were asked for, which appear at the end."""
    split, metrics = arguments.split, computed_metrics(task.asked)
    with ExitStack() as outputs:
        per_user = json_file = None
        with agreed(ranks):
            if arguments.json and ranks.is_main:
                json_file = outputs.enter_context(
                    new_file(arguments.json, "--json", ours=_is_evaluation)
                )
            if arguments.per_user and ranks.is_main:
                items = load_items(task.folder, task.manifest)
                of_users = user_metrics(
                    metrics, task.recall_denominator, task.folder, task.manifest, items
                )
                file = PerUserFile(
                    arguments.per_user, task.folder, split, task.manifest, items, of_users
                )
                per_user = outputs.enter_context(file)
        if task.remark and ranks.is_main:
            print(task.remark)
        n_users = task.manifest.splits[split].users
        with Progress(f"evaluating {split}", n_users, "user", show=ranks.is_main) as progress:
            found = evaluate(
                task.scorer,
                task.folder,
                split,
                ranks,
                progress.update,
                recall_denominator=task.recall_denominator,
                each_block=per_user.write if per_user else None,
                manifest=task.manifest,
                metrics=metrics,
                ratings=task.ratings,
            )
        assert found is not None
        result = found.result()
        if json_file:
            json_file.write((json.dumps({split: result}, indent=1) + "\n").encode())
            finish(json_file)
    return result


_is_evaluation = is_json(
    lambda found: (
        set(found) <= {"test", "validation"} and all("n_users" in found[name] for name in found)
    )
)

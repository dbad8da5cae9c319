"""Combine several runs into one model, whose score is the product of theirs.

Score = sum over members of weight * log p (of ease: weight * x B). The commands evaluate,
recommend, export and report take the folder as --run. With --fit the weights are those that predict
the held-out items of validation users best, or those with the best metric of their lists.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from dist_vasp.command_line import Parser, program
from dist_vasp.config.metric_names import target_metric
from dist_vasp.files import parents, replace_text, sole_writer
from dist_vasp.parallel.start import init_ranks
from dist_vasp.places import check_belongs_to_nothing
from dist_vasp.progress import Progress
from dist_vasp.ranking.ensemble import describe_ensemble, is_ensemble
from dist_vasp.ranking.fit_by_metric import FittedByMetric, gather, search
from dist_vasp.ranking.fit_weights import Fitted, fit_on_validation
from dist_vasp.ranking.load import ENSEMBLE, load_model, shards_of
from dist_vasp.recognise import is_json

LIKELIHOOD = "likelihood"  # the objective of --fit without a metric


def parser() -> Parser:
    parser = Parser(prog=program("ensemble"), description=__doc__)
    parser.add_argument(
        "--members",
        "--run",
        nargs="+",
        required=True,
        metavar="RUN",
        help="folders of training runs or exports",
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        type=float,
        metavar="W",
        help="one for each member, in the same order; default: 1 each",
    )
    parser.add_argument(
        "--fit",
        nargs="?",
        const=LIKELIHOOD,
        metavar="METRIC",
        help="fit the weights on validation users: by their likelihood, or by a metric of their "
        "lists such as ndcg@20; a member that adds nothing is left out",
    )
    parser.add_argument(
        "--shards",
        metavar="DIR",
        help="data folder of --fit; default: that of the first member's training",
    )
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="folder to write; one that holds an ensemble is replaced",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    folder, runs = Path(arguments.output), list(arguments.members)
    weights = arguments.weights or [1.0] * len(runs)
    _check(arguments)
    _check_output(folder)
    text = describe_ensemble(folder, runs, weights)
    if arguments.fit is not None:
        runs, weights = _fit(runs, arguments)
        text = describe_ensemble(folder, runs, weights)
    file = folder / ENSEMBLE
    with parents(file, "--output"), sole_writer(file, "--output"):
        _check_output(folder)  # another command may have written it until now
        replace_text(file, text, "choose another --output")
    listed = ", ".join(f"{weight:g} x {run}" for run, weight in zip(runs, weights, strict=True))
    print(f"{folder / ENSEMBLE}: {len(json.loads(text)['members'])} members, {listed}")


def _check(arguments: argparse.Namespace) -> None:
    """Raise ValueError for options that exclude each other."""
    if arguments.fit is not None and arguments.weights:
        raise ValueError("--fit finds the weights, so --weights cannot be given, too; drop one")
    if arguments.shards and arguments.fit is None:
        raise ValueError("--shards is the data of --fit; pass --fit, or leave --shards out")
    if arguments.fit not in (None, LIKELIHOOD):
        target_metric(arguments.fit, "--fit")


def _fit(runs: list[str], arguments: argparse.Namespace) -> tuple[list[str], list[float]]:
    """The members that add something, and their weights."""
    ranks, shards = init_ranks(device=arguments.device), arguments.shards
    if not shards:
        shards, remark = shards_of(load_model(runs[0], None, ranks))
        if remark:
            print(remark)
    fitted: Fitted | FittedByMetric
    if arguments.fit == LIKELIHOOD:
        with Progress("scoring validation users", len(runs), "member") as progress:
            fitted = fit_on_validation(runs, shards, ranks, progress.update)
    else:
        metric = target_metric(arguments.fit, "--fit")
        with Progress("scoring validation users", 2 * len(runs), "member") as progress:
            candidates, metrics = gather(runs, shards, metric, ranks, progress.update)
        with Progress("searching weights", None, "change") as progress:
            fitted = search(candidates, metrics, progress.update)
        for run, value in zip(runs, fitted.alone, strict=True):
            print(f"{metric.title} {value:.4f}: {run} alone")
        print(f"{metric.title} {fitted.value:.4f}: together, with the weights")
    print(f"weights fitted on {fitted.n_users:,} of {fitted.all_users:,} validation users")
    kept = [(run, w) for run, w in zip(runs, fitted.weights, strict=True) if w]
    for run in (run for run, w in zip(runs, fitted.weights, strict=True) if not w):
        print(f"left out, because its weight is 0: {run}")
    return [run for run, _ in kept], [w for _, w in kept]


def _check_output(folder: Path) -> None:
    """Raise ValueError unless the folder is new, empty, or holds an ensemble to replace."""
    check_belongs_to_nothing(folder, "--output")
    file = folder / ENSEMBLE
    ours = (
        is_ensemble(folder)
        and not file.is_symlink()
        and (not file.stat().st_size or _holds_members(file))
    )
    if (
        folder.exists()
        and not ours
        and (not folder.is_dir() or any(p.name != f".{ENSEMBLE}.lock" for p in folder.iterdir()))
    ):
        raise ValueError(
            f"--output {folder} holds something else than an ensemble; choose another folder"
        )


_holds_members = is_json(lambda found: "members" in found and "vocabulary_sha256" in found)

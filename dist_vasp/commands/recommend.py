"""Write top-N lists for histories."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from dist_vasp.command_line import Parser, add_ranks
from dist_vasp.commands.ending import rank_parser
from dist_vasp.data.tables.inputs import expand
from dist_vasp.data.tables.options import add_reading_options, reading_of
from dist_vasp.parallel.agree import agreed
from dist_vasp.parallel.start import init_ranks
from dist_vasp.progress import Progress
from dist_vasp.ranking.ensemble import Ranker, load_ranker
from dist_vasp.ranking.explain import model_explainer
from dist_vasp.ranking.filters import allowed_items
from dist_vasp.ranking.history_columns import history_columns
from dist_vasp.ranking.history_file import HistoryFile, open_histories
from dist_vasp.ranking.load import refuse_ratings
from dist_vasp.ranking.recommend import recommend_to_file
from dist_vasp.ranking.writers import check_output
from dist_vasp.text import one_line

_MOST_REASONS = 1000  # past items of a row, each with two columns


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    reading_of(arguments)  # a wrong delimiter or encoding is reported before the model is loaded
    inputs = _check(arguments)
    ranks = init_ranks(device=arguments.device, interface=arguments.interface, shared=arguments.run)
    ranker = load_ranker(arguments.run, arguments.checkpoint, ranks)
    with ExitStack() as stack:
        with agreed(ranks):
            refuse_ratings(ranker.config, arguments.run)
            _check_explain(arguments, ranker)
            if arguments.with_titles and ranker.items.titles is None:
                raise ValueError(
                    f"--with_titles: the items of {arguments.run} have no titles; prepare the data "
                    "with --titles FILE, or leave it out"
                )
            histories, allowed, notes = _open(arguments, ranker, stack)
        if ranks.is_main:
            for note in notes:
                print(one_line(note))
        progress = stack.enter_context(
            Progress("recommending", histories.n_users, "user", show=ranks.is_main)
        )
        report = recommend_to_file(
            ranker.model.scores,
            histories,
            ranker.items,
            min(arguments.k, len(ranker.items.keys)),
            arguments.output,
            ranks,
            progress.update,
            arguments.show,
            np.exp if ranker.model.is_probability else np.asarray,
            arguments.explain,
            model_explainer(ranker.model),
            allowed,
            arguments.keep_seen,
            overwrite=arguments.overwrite,
            inputs=inputs,
            titles=arguments.with_titles,
        )
    if ranks.is_main:
        print(report)


def parser() -> Parser:
    parser = rank_parser("recommend", __doc__ or "")
    add = parser.add_argument
    add(
        "--run",
        metavar="DIR",
        required=True,
        help="folder of a training run, an export, or an ensemble",
    )
    add(
        "--checkpoint",
        metavar="NAME",
        help="a folder under RUN_DIR/checkpoints; default: best, else the newest",
    )
    add(
        "--histories",
        metavar="FILE",
        nargs="+",
        required=True,
        help="CSV or Parquet files, folders or globs with original ids; "
        "ratings follow the rule of the shards, everything seen is masked",
    )
    add("--format", choices=("csv", "parquet"), help="of the histories; default: by their names")
    add("--user_column", metavar="NAME", help="default: that of the shards, else user")
    add("--item_column", metavar="NAME", help="default: that of the shards, else item")
    add(
        "--rating_column",
        metavar="NAME",
        help="default: that of the shards; without it every row is a like",
    )
    add(
        "--time_column",
        metavar="NAME",
        help="default: that of the shards, where the last rating of an item counts",
    )
    add("--all_positive", action="store_true", help="every row is a like, whatever its rating")
    _add_lists(parser)
    parser.hide(*add_reading_options(parser), "checkpoint", "format", "time_column", "all_positive")
    add_ranks(parser)
    return parser


def _add_lists(parser: argparse.ArgumentParser) -> None:
    """Add the options about the lists that are written."""
    add = parser.add_argument
    add("--k", type=int, default=20, help="items per user (default 20)")
    add(
        "--output",
        metavar="FILE",
        required=True,
        help=".csv, .parquet or .jsonl: user, rank, item, score",
    )
    add(
        "--filter_items",
        metavar="FILE",
        help="never list these items: CSV or Parquet with the item column, "
        "or .txt with one id a line",
    )
    add(
        "--restrict_to", metavar="FILE", help="list these items alone; a file as for --filter_items"
    )
    add("--keep_seen", action="store_true", help="list items that the user has seen, too")
    add(
        "--explain",
        type=int,
        default=0,
        metavar="N",
        help="add the paths' factors of the score and the N past items that add most",
    )
    add(
        "--show",
        type=int,
        default=0,
        metavar="N",
        help="print the first N users with their histories and lists",
    )
    add("--with_titles", action="store_true", help="write the titles of items, too")
    add("--overwrite", action="store_true", help="replace an existing output file")


def _check(arguments: argparse.Namespace) -> list[tuple[str, str | Path]]:
    """Return the input files with their options.

    ValueError where a number is out of range or the output is one of the inputs.
    """
    if arguments.k < 1:
        raise ValueError(f"--k is {arguments.k}, expected at least 1")
    if not 0 <= arguments.explain <= _MOST_REASONS:
        raise ValueError(
            f"--explain is {arguments.explain}, expected 0 to {_MOST_REASONS:,} past items"
        )
    if arguments.show < 0:
        raise ValueError(f"--show is {arguments.show}, expected 0 or more users")
    inputs: list[tuple[str, str | Path]] = [
        ("--histories", path) for text in arguments.histories for path in expand(text)
    ]
    for option in ("filter_items", "restrict_to"):
        named = getattr(arguments, option)
        if named == "":
            raise ValueError(
                f"--{option} is empty, expected a file of item ids; "
                "name one, or leave the option out"
            )
        if named is not None:
            inputs.append((f"--{option}", named))
    check_output(arguments.output, arguments.overwrite, inputs)
    return inputs


def _check_explain(arguments: argparse.Namespace, ranker: Ranker) -> None:
    """Raise ValueError where --explain is given and the model has nothing to explain."""
    if arguments.explain and not ranker.model.has_reasons:
        raise ValueError(
            "--explain needs an items x items matrix, which model.kind "
            f"{ranker.config.model.kind} does not have; leave it out"
        )


def _open(
    arguments: argparse.Namespace, ranker: Ranker, stack: ExitStack
) -> tuple[HistoryFile, np.ndarray | None, list[str]]:
    """Return the histories, open until `stack` closes, the items that may be listed, and notes."""
    rule = ranker.positives
    reading = reading_of(arguments)
    if rule is not None and rule.missing is not None:
        reading = reading_of(arguments, rule.missing)
    asked = {
        role: getattr(arguments, f"{role}_column") for role in ("user", "item", "rating", "time")
    }
    columns, notes = history_columns(
        arguments.histories, reading, rule, asked, arguments.all_positive, arguments.format
    )
    allowed, counted = allowed_items(
        ranker.items,
        arguments.filter_items,
        arguments.restrict_to,
        columns.item or "item",
        reading,
    )
    scratch = Path(arguments.output).parent
    histories = stack.enter_context(
        open_histories(arguments.histories, scratch, columns, reading, rule, arguments.format)
    )
    likes = [] if rule is None or columns.rating is None else [str(rule)]
    return histories, allowed, [*histories.table.notes(), *notes, *likes, *counted]

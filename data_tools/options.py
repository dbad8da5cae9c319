"""The options of data_tools.shard: parser, types, and which options go together."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from data_tools.readers import FORMATS
from data_tools.times import moment
from dist_vasp import command_line
from dist_vasp.data.positives import REPEATS
from dist_vasp.data.tables.options import add_reading_options

PROTOCOLS = ("liang", "hashed", "given", "time", "last")
TABLE = "table"  # an input format of --engine spark alone
ENGINES = ("local", "spark")
ON_SPARK = ("hashed", "given", "time", "last")  # the protocols of --engine spark
MEMORY_LIMIT = "800MB"
BY_TIME = ("time", "last")  # the interactions of a user are ordered by time
_FILTERED = ("liang", "hashed", "time", "last")
_BELONGS_TO = {
    **dict.fromkeys(("rating_column", "min_rating", "min_items", "min_users", "core"), _FILTERED),
    **dict.fromkeys(("val_users", "test_users"), ("liang",)),
    **dict.fromkeys(("val_fraction", "test_fraction"), ("hashed",)),
    "split_column": ("given",),
    "keep_ratings": ("given",),
    "validation_fraction": ("given", "time"),
    **dict.fromkeys(("split_time", "split_quantile"), ("time",)),
    "like": ("liang", "hashed"),
}  # an option, and the protocols that take it


_RARE = (  # --help leaves them out
    "split_column",
    "keep_ratings",
    "repeats",
    "val_fraction",
    "test_fraction",
    "split_time",
    "split_quantile",
    "validation_fraction",
    "users_per_shard",
    "engine",
    "master",
    "memory_limit",
    "core",
    "seed",
    "like",
    "min_users",
)


def parser() -> command_line.Parser:
    result = command_line.Parser(
        prog=command_line.program("shard", "python -m data_tools.{}"),
        description="Turn raw interactions into shards.",
    )
    add = result.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="files, folders, globs or archives to read")
    add("output", type=Path, metavar="OUT_DIR", help="folder to write, also as --output OUT_DIR")
    help = "default: inferred from the name of INPUT; table: INPUT is a table that Spark knows"
    add("--format", choices=(*FORMATS, TABLE), help=help)
    _add_columns(result)
    _add_protocol(result)
    help = "CSV or Parquet with the item column and title; default: the titles of INPUT, if any"
    add("--titles", type=Path, metavar="FILE", help=help)
    result.hide(*add_reading_options(result), *_RARE)
    add("--seed", type=command_line.seed, default=98765, help="default 98765")
    add(
        "--users_per_shard",
        type=command_line.at_least(1),
        help="default min(4096, train users / 64)",
    )
    help = "spark: on a Spark cluster, with the same bytes (docs/cluster.md); default local"
    add("--engine", choices=ENGINES, default="local", help=help)
    help = "spark: the cluster, such as local[4] or spark://host:7077; default: Spark's own"
    add("--master", metavar="URL", help=help)
    help = f"local: memory for the sort, which spills to disk; default {MEMORY_LIMIT}"
    add("--memory_limit", type=_memory, help=help)
    help = "replace OUT_DIR if it is a folder that this command wrote"
    add("--overwrite", action="store_true", help=help)
    add("--dry_run", action="store_true", help="print what would be written, write nothing")
    return result


def _add_columns(result: command_line.Parser) -> None:
    add = result.add_argument
    add("--user_column", metavar="NAME", help="csv, parquet: default user")
    add("--item_column", metavar="NAME", help="csv, parquet: default item")
    help = (
        "not given, unless with --keep_ratings: default rating; without such a column every row "
        "counts (implicit feedback)"
    )
    add("--rating_column", metavar="NAME", help=help)
    help = (
        "orders the rows of a user and an item; default for --repeats last, --protocol time and "
        "last: timestamp, if any"
    )
    add("--time_column", metavar="NAME", help=help)
    help = "given: default split; 0 or train, 1 or test, 2 or validation"
    add("--split_column", metavar="NAME", help=help)
    help = "given: keep the ratings of --rating_column beside the items, for model.kind autorec"
    add("--keep_ratings", action="store_true", default=None, help=help)


def _add_protocol(result: command_line.Parser) -> None:
    add = result.add_argument
    help = (
        "liang and hashed split users, given follows a column, time cuts at a moment, last holds "
        "out the last items of each user; default liang"
    )
    add("--protocol", choices=PROTOCOLS, default="liang", help=help)
    add(
        "--min_rating",
        type=command_line.number,
        help="not given: keep ratings of at least this; default 4",
    )
    help = "which of several rows of a user and an item counts; default first"
    add("--repeats", choices=REPEATS, default="first", help=help)
    at_least_one, count = command_line.at_least(1), command_line.at_least(0)
    help = "not given: keep users with at least this many items; default 5"
    add("--min_items", type=at_least_one, help=help)
    help = "not given: keep items with at least this many users; default 1"
    add("--min_users", type=at_least_one, help=help)
    help = "not given: apply --min_items and --min_users until nothing changes"
    add("--core", action="store_true", default=None, help=help)
    help = "liang: default a tenth of the users, at most 10,000"
    add("--val_users", type=count, help=help)
    add("--test_users", type=count, help=help)
    help = "hashed: fraction of the users; default 0.1, with --like that of OLD_SHARDS"
    add("--val_fraction", type=_fraction, help=help)
    add("--test_fraction", type=_fraction, help=help)
    help = "liang, hashed: users of this data folder keep their split"
    add("--like", type=Path, metavar="OLD_SHARDS", help=help)
    help = "time: training ends before this time, a number or a date, as in the input"
    add("--split_time", type=moment, metavar="TIME", help=help)
    help = "time: training ends before this quantile of the times"
    add("--split_quantile", type=_quantile, metavar="Q", help=help)
    help = (
        "given, time: fraction of a user's train items moved to validation (time: the latest); "
        "default 0.1, 0 moves none"
    )
    add("--validation_fraction", type=_fraction, help=help)


def _fraction(text: str) -> float:
    value = command_line.number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0 and below 1")
    return value


def _quantile(text: str) -> float:
    value = _fraction(text)
    if not value:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and below 1")
    return value


def _memory(text: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)?\s*([KMGT]i?B)", text, re.IGNORECASE):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an amount of memory; write 1GB, 500MB, ..."
        )
    return text


def check_engine(args: argparse.Namespace) -> None:
    """ValueError where an option does not go with --engine."""
    if args.engine == "local":
        if args.master is not None:
            raise ValueError(
                "--master names a Spark cluster, but the engine is local; pass --engine spark, or "
                "leave --master out"
            )
        if args.format == TABLE:
            raise ValueError(
                "--format table names tables of a Spark cluster, but the engine is local; pass "
                "--engine spark, or name files"
            )
        return
    if args.memory_limit is not None:
        raise ValueError(
            "--memory_limit is for the sort of --engine local, but the engine is spark, whose "
            "memory spark.executor.memory sets; leave --memory_limit out"
        )
    if args.protocol not in ON_SPARK:
        raise ValueError(
            f"--engine spark takes --protocol {_or(ON_SPARK)}, but the protocol is "
            f"{args.protocol}, which draws the held-out items of one user after another; pass "
            "--protocol hashed, or --engine local"
        )


def check_protocol(args: argparse.Namespace) -> None:
    """ValueError where an option does not go with --protocol or --repeats."""
    if args.protocol == "given" and args.repeats == "max":
        raise ValueError(
            "--repeats max takes ratings, which --protocol given does not read; pass first or last"
        )
    if args.repeats == "max" and args.time_column is not None and args.protocol not in BY_TIME:
        raise ValueError(
            "--time_column orders the rows for --repeats first and last, but it is max; leave one "
            "of them out"
        )
    for name, protocols in _BELONGS_TO.items():
        if name == "rating_column" and args.keep_ratings:
            continue
        if getattr(args, name) is not None and args.protocol not in protocols:
            raise ValueError(
                f"--{name} belongs to --protocol {_or(protocols)}, but the protocol is "
                f"{args.protocol}; leave one of them out"
            )
    if args.protocol == "time" and (args.split_time is None) == (args.split_quantile is None):
        problem = "both say" if args.split_time is not None else "say"
        raise ValueError(
            f"--protocol time: --split_time and --split_quantile {problem} where training ends; "
            "pass one of the two, such as --split_quantile 0.9"
        )
    if args.like is not None:
        for name in ("val_users", "test_users"):
            if getattr(args, name) is not None:
                raise ValueError(
                    f"--{name} chooses among all users, but with --like only new users get a "
                    "split, in the shares of the earlier shards; leave one of them out"
                )


def _or(names: Sequence[str]) -> str:
    """Return `liang, hashed or given`."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last

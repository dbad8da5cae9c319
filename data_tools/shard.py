"""Turn raw interactions into the shards that training reads.

python -m data_tools.shard INPUT [INPUT ...] OUT_DIR [--format csv|parquet|movielens|netflix]
[--protocol liang|given] ...
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_tools import cli
from data_tools.interactions import Interactions, collect
from data_tools.rare_items import drop_rare_items
from data_tools.readers import FORMATS, Columns, Source, infer_format, open_source
from data_tools.split import GivenPlan, LiangPlan, Plan
from data_tools.titles import read_titles
from data_tools.writer import check_unique_keys, count_split, write_folder
from dist_vasp.data import ids
from dist_vasp.data.format import SPLITS, SplitEntry, default_users_per_shard, files_of
from dist_vasp.data.positives import (
    DEFAULT_MIN_RATING,
    REPEATS,
    PositiveRule,
    from_json,
    unused_columns,
)
from dist_vasp.data.tables.inputs import expand
from dist_vasp.data.tables.options import add_reading_options, reading_of
from dist_vasp.files import new_folder
from dist_vasp.places import check_folder

_LIANG_ONLY = (
    "rating_column",
    "min_rating",
    "min_items",
    "min_users",
    "core",
    "val_users",
    "test_users",
)
_GIVEN_ONLY = ("split_column", "validation_fraction")


def _fraction(text: str) -> float:
    value = cli.number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0 and below 1")
    return value


def _memory(text: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)?\s*([KMGT]i?B)", text, re.IGNORECASE):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an amount of memory; write 1GB, 500MB, ..."
        )
    return text


def _parser() -> cli.Parser:
    parser = cli.Parser(
        prog="python -m data_tools.shard", description="Turn raw interactions into shards."
    )
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="files, folders, globs or archives of interactions",
    )
    add(
        "output",
        type=Path,
        metavar="OUT_DIR",
        help="folder to write; it appears whole or not at all",
    )
    add("--format", choices=FORMATS, help="default: by the name of INPUT")
    add("--user_column", metavar="NAME", help="csv, parquet: default user")
    add("--item_column", metavar="NAME", help="csv, parquet: default item")
    add(
        "--rating_column",
        metavar="NAME",
        help="liang: default rating; where there is none, every row counts (implicit feedback)",
    )
    add(
        "--time_column",
        metavar="NAME",
        help="orders the rows of a user and an item; default for --repeats last: timestamp, if any",
    )
    add(
        "--split_column",
        metavar="NAME",
        help="given: default split; 0 or train, 1 or test, 2 or validation",
    )
    add(
        "--protocol",
        choices=("liang", "given"),
        default="liang",
        help="liang splits users, given follows a column; default liang",
    )
    add("--min_rating", type=cli.number, help="liang: keep ratings of at least this; default 4")
    add(
        "--repeats",
        choices=REPEATS,
        default="first",
        help="which of several rows of a user and an item counts; default first",
    )
    add(
        "--min_items",
        type=cli.at_least(1),
        help="liang: keep users with at least so many items; default 5",
    )
    add(
        "--min_users",
        type=cli.at_least(1),
        help="liang: keep items with at least so many users; default 1",
    )
    add(
        "--core",
        action="store_true",
        default=None,
        help="liang: apply --min_items and --min_users until nothing changes",
    )
    add(
        "--val_users",
        type=cli.at_least(0),
        help="liang: default a tenth of the users, at most 10,000",
    )
    add(
        "--test_users",
        type=cli.at_least(0),
        help="liang: default a tenth of the users, at most 10,000",
    )
    add(
        "--validation_fraction",
        type=_fraction,
        help="given: share of train items moved to validation; default 0.1, 0 moves none",
    )
    add(
        "--titles",
        type=Path,
        metavar="FILE",
        help="CSV or Parquet with the item column and title; default: those of INPUT, if any",
    )
    add_reading_options(parser)
    add("--seed", type=cli.seed, default=98765, help="default 98765")
    add("--users_per_shard", type=cli.at_least(1), help="default min(4096, train users / 64)")
    add(
        "--memory_limit",
        type=_memory,
        default="800MB",
        help="of the out-of-core sort, which spills to disk; default 800MB",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace OUT_DIR if it is a folder that this command wrote",
    )
    add("--dry_run", action="store_true", help="print what would be written, write nothing")
    return parser


def _check_protocol(args: argparse.Namespace) -> None:
    if args.protocol == "given" and args.repeats == "max":
        raise ValueError(
            "--repeats max takes ratings, which --protocol given does not read; pass first or last"
        )
    if args.repeats == "max" and args.time_column is not None:
        raise ValueError(
            "--time_column orders the rows for --repeats first and last, but it is max; leave one "
            "of them out"
        )
    for name in _LIANG_ONLY if args.protocol == "given" else _GIVEN_ONLY:
        if getattr(args, name) is not None:
            other = "given" if args.protocol == "liang" else "liang"
            raise ValueError(
                f"--{name} belongs to --protocol {other}, but the protocol is {args.protocol}; "
                "leave one of them out"
            )


@contextmanager
def _scratch_in(folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=folder) as scratch:
        yield Path(scratch)


def _plan(
    args: argparse.Namespace, source: Source, scratch: Path
) -> tuple[Interactions, Plan, dict[str, Any]]:
    """The interactions, who goes where, and what the manifest says of it."""
    dropped: dict[str, int] = {}
    if args.protocol == "liang":
        min_rating = DEFAULT_MIN_RATING if args.min_rating is None else args.min_rating
        min_items, min_users = args.min_items or 5, args.min_users or 1
        data = collect(source.batches(), scratch, min_rating, args.memory_limit, args.repeats)
        counts = data.counts
        data, dropped = drop_rare_items(data, min_users, min_items, bool(args.core))
        plan: Plan = LiangPlan(data, min_items, args.val_users, args.test_users, args.seed)
        arguments: dict[str, Any] = {
            "min_rating": min_rating,
            "min_items": min_items,
            "min_users": min_users,
            "core": bool(args.core),
        }
        arguments |= {
            "val_users": len(plan.users["validation"]),
            "test_users": len(plan.users["test"]),
        }
    else:
        data = collect(source.batches(), scratch, float("-inf"), args.memory_limit, args.repeats)
        counts = data.counts
        given = GivenPlan(data, args.validation_fraction, args.seed)
        plan, arguments = given, {"validation_fraction": given.fraction}
    check_unique_keys(data, plan)
    names, _ = source.look()
    for role, found in (("user", data.user_ids), ("item", data.item_ids)):
        for remark in ids.remarks(role, found, names.get(role, role)):
            print(remark)
    left_out = {
        **source.left_out,
        "rows_below_min_rating": counts.below_min_rating,
        "duplicate_rows": counts.duplicates,
        **dropped,
        **plan.left_out,
    }
    preparation = {
        "protocol": args.protocol,
        "input": ", ".join(Path(text).name for text in args.inputs),
        "positives": _rule(args, data, source).to_json(),
        "arguments": {**arguments, "seed": args.seed},
        "rows_read": counts.rows + sum(source.left_out.values()),
        "left_out": left_out,
    }
    return data, plan, preparation


def _rule(args: argparse.Namespace, data: Interactions, source: Source) -> PositiveRule:
    """What made the positives of `data`, in the words of the input's columns."""
    names, _ = source.look()
    rated = data.has_ratings and args.protocol == "liang"
    return PositiveRule(
        names.get("user", "user"),
        names.get("item", "item"),
        names.get("rating", "rating") if rated else None,
        names.get("time"),
        min_rating=(DEFAULT_MIN_RATING if args.min_rating is None else args.min_rating)
        if rated
        else None,
        repeats=args.repeats,
        missing=reading_of(args).missing,
    )


def _unused(args: argparse.Namespace, source: Source) -> list[str]:
    """A line on the columns that are not used, and the options that would use them."""
    names, unused = source.look()
    roles = []
    if args.protocol == "liang":
        roles = ["split"] if "rating" in names else ["rating", "split"]
    if args.repeats == "last" and "time" not in names:
        roles.append("time")
    return unused_columns([*names.values(), *unused], names.values(), roles)


def _summary(
    args: argparse.Namespace,
    plan: Plan,
    splits: dict[str, SplitEntry],
    preparation: dict[str, Any],
    seconds: float,
    notes: Sequence[str],
) -> None:
    print(f"{args.output}{' would hold' if args.dry_run else ''}: {len(plan.vocabulary):,} items")
    for name, split in splits.items():
        heldout = f", {split.heldout:,} held out" if name != "train" else ""
        print(
            f"  {name:<10} {split.users:,} users, {split.interactions:,} interactions{heldout}, "
            f"{len(split.shards)} shards"
        )
    for note in (from_json(preparation["positives"]), *notes):
        print(f"  {note}")
    left_out, n_read = preparation["left_out"], preparation["rows_read"]
    rows = {reason: n for reason, n in left_out.items() if n and _counts_rows(reason)}
    n_used = _used(args.protocol, splits)
    assert n_read == n_used + sum(rows.values()), (n_read, n_used, left_out)
    print(f"  read {n_read:,} rows in {seconds:.1f} s, used {n_used:,}; left out:")
    for reason, count in rows.items():
        print(f"    {count:,} {reason.replace('_', ' ')}")
    if not rows:
        print("    nothing")
    others = [
        f"{n:,} {reason.replace('_', ' ')}"
        for reason, n in left_out.items()
        if n and not _counts_rows(reason)
    ]
    if others:
        print(f"  with them {', '.join(others)}")


def _counts_rows(reason: str) -> bool:
    """Whether a count of what was left out is one of rows, not of the users or items that went with
    them."""
    return not reason.startswith(("users_", "items_"))


def _used(protocol: str, splits: dict[str, SplitEntry]) -> int:
    """The rows that the shards hold; in `given` the fold-in of a user is his train row again."""
    held_out = splits["validation"].heldout + splits["test"].heldout
    fold_in = (
        0
        if protocol == "given"
        else splits["validation"].interactions + splits["test"].interactions
    )
    return splits["train"].interactions + fold_in + held_out


def _command(args: argparse.Namespace) -> int:
    start = time.monotonic()
    _check_protocol(args)
    inputs = [
        *(("INPUT", path) for text in args.inputs for path in expand(text)),
        ("--titles", args.titles),
    ]
    check_folder(args.output, "", args.overwrite, files_of, inputs, make_parents=True)
    split_column = (args.split_column or "split") if args.protocol == "given" else None
    fixed = args.user_column is None and args.item_column is None and args.rating_column is None
    rating_column = args.rating_column
    if args.min_rating is not None and (args.format or infer_format(args.inputs)) in (
        "csv",
        "parquet",
    ):
        rating_column = rating_column or "rating"  # who asks for a rating has a column of them
    columns = Columns(
        args.user_column or "user",
        args.item_column or "item",
        rating_column,
        split_column,
        args.time_column,
        optional_rating=args.protocol == "liang",
    )
    titles = read_titles(args.titles, columns.item or "item") if args.titles else None
    source = open_source(
        args.inputs,
        args.format,
        columns if split_column or rating_column or not fixed else Columns(time=args.time_column),
        reading_of(args),
    )
    if args.repeats == "last" and args.time_column is None:
        source.read_times()

    if args.dry_run:
        with tempfile.TemporaryDirectory() as scratch:
            _, plan, preparation = _plan(args, source, Path(scratch))
            per_shard = args.users_per_shard or default_users_per_shard(len(plan.users["train"]))
            splits = {split: count_split(plan, split, per_shard) for split in SPLITS}
    else:
        opened = new_folder(args.output, "", args.overwrite, files_of, inputs, make_parents=True)
        with opened as folder, _scratch_in(folder) as scratch_folder:
            data, plan, preparation = _plan(args, source, scratch_folder)
            per_shard = args.users_per_shard or default_users_per_shard(len(plan.users["train"]))
            preparation["arguments"]["users_per_shard"] = per_shard
            splits = write_folder(
                folder, data, plan, titles or source.titles(), per_shard, preparation
            ).splits
    for note in source.notes:
        print(note)
    _summary(args, plan, splits, preparation, time.monotonic() - start, _unused(args, source))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_parser(), _command, argv)


if __name__ == "__main__":
    sys.exit(main())

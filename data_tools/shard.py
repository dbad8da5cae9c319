"""Turn raw interactions into the shards that training reads.

python -m data_tools.shard INPUT [INPUT ...] OUT_DIR [--format csv|parquet|movielens|netflix]
[--protocol liang|hashed|given|time|last] ...
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_tools import cli, options
from data_tools.engine import Asked, Engine, LocalEngine
from data_tools.interactions import Interactions, Summary
from data_tools.like import OldSplit, read_old_split
from data_tools.plan import Plan
from data_tools.protocols import make_plan, min_rating_of
from data_tools.readers import Columns, Source, infer_format, open_source
from data_tools.shard_report import Prepared, report
from data_tools.titles import read_titles
from data_tools.writer import check_unique_keys, write_folder
from dist_vasp.data import ids
from dist_vasp.data.manifest import (
    KEEP_RATINGS,
    SPLITS,
    SplitEntry,
    default_users_per_shard,
    files_of,
)
from dist_vasp.data.positives import PositiveRule
from dist_vasp.data.tables.inputs import expand
from dist_vasp.data.tables.options import reading_of
from dist_vasp.files import new_folder
from dist_vasp.places import check_folder


def _command(args: argparse.Namespace) -> int:
    start = time.monotonic()
    options.check_engine(args)
    options.check_protocol(args)
    check_folder(args.output, "", args.overwrite, files_of, _inputs(args), make_parents=True)
    titles = read_titles(args.titles, args.item_column or "item") if args.titles else None
    old = read_old_split(args.like) if args.like else None
    with ExitStack() as stack:
        engine = stack.enter_context(engine_of(args))
        if args.format == options.TABLE:
            from data_tools.spark.tables import tables_as_files

            args = stack.enter_context(tables_as_files(args, engine))
        source = _open_source(args)
        prepared, splits = _write(args, source, old, titles, engine)
        report(args, source, prepared, splits, time.monotonic() - start)
    return 0


def _inputs(args: argparse.Namespace) -> list[tuple[str, Path | None]]:
    """Return what the command reads, with the options that name it."""
    files = [] if args.format == options.TABLE else args.inputs
    return [
        *(("INPUT", path) for text in files for path in expand(text)),
        ("--titles", args.titles),
        ("--like", args.like),
    ]


def _write(
    args: argparse.Namespace,
    source: Source,
    old: OldSplit | None,
    titles: dict[int | str, str] | None,
    engine: Engine,
) -> tuple[Prepared, dict[str, SplitEntry]]:
    """Write the folder; of a dry run, count what it would hold."""
    if args.dry_run:
        beside = engine.scratch_beside(args.output)
        with tempfile.TemporaryDirectory(prefix=".scratch-", dir=beside) as scratch:
            prepared = _prepare(args, source, old, engine, Path(scratch))
            per_shard = prepared.users_per_shard
            count = partial(engine.count_split, prepared.data, prepared.plan)
            return prepared, {split: count(split, per_shard) for split in SPLITS}
    inputs = _inputs(args)
    opened = new_folder(args.output, "", args.overwrite, files_of, inputs, make_parents=True)
    with opened as folder, tempfile.TemporaryDirectory(prefix="scratch-", dir=folder) as scratch:
        prepared = _prepare(args, source, old, engine, Path(scratch))
        prepared.preparation["arguments"]["users_per_shard"] = prepared.users_per_shard
        manifest = write_folder(
            folder,
            prepared.data,
            prepared.plan,
            titles or source.titles(),
            prepared.users_per_shard,
            prepared.preparation,
            partial(engine.write_split, folder, prepared.data, prepared.plan),
        )
    return prepared, manifest.splits


@contextmanager
def engine_of(args: argparse.Namespace) -> Iterator[Engine]:
    """Yield the engine of --engine; what it started ends with the block."""
    if args.engine == "local":
        yield LocalEngine(args.memory_limit or options.MEMORY_LIMIT)
        return
    from data_tools.spark.engine import SparkEngine

    with SparkEngine(args.master, args.seed) as engine:
        yield engine


def _open_source(args: argparse.Namespace) -> Source:
    """Return the reader of the inputs, with the columns that the options name."""
    split_column = (args.split_column or "split") if args.protocol == "given" else None
    rating_column = args.rating_column
    if args.min_rating is not None and rating_column is None:
        is_table = (args.format or infer_format(args.inputs)) in ("csv", "parquet")
        rating_column = "rating" if is_table else None  # a minimum needs the column
    if args.keep_ratings:
        rating_column = rating_column or "rating"
    names_columns = bool(
        split_column
        or rating_column
        or args.user_column is not None
        or args.item_column is not None
        or args.rating_column is not None
    )
    columns = Columns(time=args.time_column)
    if names_columns:
        columns = Columns(
            args.user_column or "user",
            args.item_column or "item",
            rating_column,
            split_column,
            args.time_column,
            optional_rating=args.protocol != "given",
        )
    source = open_source(args.inputs, args.format, columns, reading_of(args))
    if args.time_column is None and (args.repeats == "last" or args.protocol in options.BY_TIME):
        found = source.read_times()
        if args.protocol == "time" and found is None:
            raise ValueError(
                "--protocol time needs the time of every row, and the input has no column "
                "'timestamp'; pass --time_column NAME"
            )
    return source


def _prepare(
    args: argparse.Namespace, source: Source, old: OldSplit | None, engine: Engine, scratch: Path
) -> Prepared:
    """Read the interactions, apply the protocol, and describe both for the manifest."""
    by_time = args.protocol in options.BY_TIME
    asked = Asked(min_rating_of(args), args.repeats, by_time, bool(args.keep_ratings))
    data, summary = engine.collect(source, scratch, asked)
    planned = make_plan(args, data, old)
    data, plan = planned.data, planned.plan
    check_unique_keys(data, plan)
    if old:
        print(_told_of_like(old, data, plan))
    names, _ = source.match_columns()
    for role, values in (("user", data.user_ids), ("item", data.item_ids)):
        for remark in ids.remarks(role, values, names.get(role, role)):
            print(remark)
    preparation = {
        "protocol": args.protocol,
        "input": ", ".join(Path(text).name for text in args.inputs),
        "positives": _rule(args, summary, source).to_json(),
        "arguments": {
            **planned.arguments,
            **({KEEP_RATINGS: True} if args.keep_ratings else {}),
            "seed": args.seed,
        },
        "rows_read": summary.rows + sum(source.left_out.values()),
        "left_out": {
            **source.left_out,
            "rows_below_min_rating": summary.below_min_rating,
            "duplicate_rows": summary.duplicates,
            **planned.dropped,
            **plan.left_out,
        },
    }
    per_shard = args.users_per_shard or default_users_per_shard(len(plan.users["train"]))
    return Prepared(data, plan, preparation, per_shard)


def _told_of_like(old: OldSplit, data: Interactions, plan: Plan) -> str:
    """Return a line on how many users keep their split."""
    ranks = np.concatenate(list(plan.users.values()))
    n_known = old.n_known(data.user_ids.take(pa.array(ranks)))
    return (
        f"{n_known:,} users keep their split of {old.folder}, {len(ranks) - n_known:,} users are "
        "new there"
    )


def _rule(args: argparse.Namespace, summary: Summary, source: Source) -> PositiveRule:
    """Return the rule that made the positives, with the names of the input's columns."""
    names, _ = source.match_columns()
    rated = summary.has_ratings and args.protocol != "given"
    return PositiveRule(
        names.get("user", "user"),
        names.get("item", "item"),
        names.get("rating", "rating") if rated else None,
        names.get("time"),
        min_rating=min_rating_of(args) if rated else None,
        repeats=args.repeats,
        missing=reading_of(args).missing,
    )


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(options.parser(), _command, argv)


if __name__ == "__main__":
    sys.exit(main())

"""`--engine spark`: a Spark cluster reads the input, groups its rows by user and writes the tars.

1. Tasks read pieces of the input. Each row goes to the part that the hash of its user names.
2. Tasks sort the parts by the hash of the user and write scratch files (parts.py).
3. The driver applies the filters and the protocol, by the code of the local engine. It holds the
   user and item index, and reads the scratch files block by block.
4. Tasks write the tars under temporary names and rename them. The driver writes the other files,
   the manifest last.

The scratch files lie in the output's temporary folder, which all machines must see.
"""

from __future__ import annotations

import os
import secrets
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_tools.collect import grouping_of, nothing_kept, only_positives
from data_tools.engine import Asked
from data_tools.grouping import Grouping
from data_tools.interactions import Interactions, Store, Summary
from data_tools.plan import BlockMaker, Plan
from data_tools.readers import Source, TableSource
from data_tools.shards import Shard, count_shard, shards_of, write_shard
from data_tools.spark.parts import gather
from data_tools.spark.session import session, stage
from data_tools.spark.tasks import PartGrouping, Reading, Salted, clear, read_reports, sees
from data_tools.writer import split_entry
from dist_vasp.data.manifest import ShardEntry, SplitEntry
from dist_vasp.data.tables.read import Table

_BYTES_PER_PART = 1 << 26  # of the input
_TASKS_PER_CORE = 4
_IDS = ("user", "item")
_TYPES = {"split": pa.int8(), "rating": pa.float64(), "time": pa.float64()}
_DDL = {
    pa.int8(): "tinyint",
    pa.int64(): "bigint",
    pa.float64(): "double",
    pa.string(): "string",
}


class SparkEngine:
    """Runs on Spark; the first stage starts the session, which ends with the process."""

    def __init__(self, master: str | None, seed: int):
        """seed: of the hash that orders the users."""
        self._master = master
        self._seed = seed
        self._opened = ExitStack()
        self._spark: Any = None

    def __enter__(self) -> SparkEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def scratch_beside(self, output: Path) -> Path:
        """Return the nearest folder above the output that exists."""
        return next(p for p in output.absolute().parents if p.is_dir())

    def collect(self, source: Source, folder: Path, asked: Asked) -> tuple[Interactions, Summary]:
        """See `Engine`."""
        if not isinstance(source, TableSource):
            raise ValueError(
                "--engine spark reads tables, but the format of the input is netflix; pass "
                "--engine local"
            )
        table, folder = source.table, folder.absolute()  # executors work in folders of their own
        everything = range(len(table.files))
        peeked = table.part(everything)
        first = next(iter(peeked.batches()), None)
        names = None if first is None else first.schema.names
        grouping = grouping_of(
            names, asked.min_rating, asked.repeats, asked.by_time, asked.keep_ratings
        )
        summary = Summary(has_ratings=names is not None and "rating" in names)
        data = None
        if first is not None:
            self.started(folder)
            texts = {role for role in _IDS if pa.types.is_string(first[role].type)}
            checked = peeked.part(everything)
            self._group(checked, grouping, texts, folder, summary)
            table.add_counts(checked.rows, checked.left_out, checked.unused, checked.n_broken)
            data = gather(folder, grouping.beside, summary)
        if data is None or not data.sizes.any():
            raise ValueError(nothing_kept(summary, asked.min_rating, asked.repeats))
        return only_positives(data, grouping, summary), summary

    def started(self, folder: Path) -> Any:
        """Return the SparkSession; ValueError where its tasks do not see the folder."""
        if self._spark is not None:
            return self._spark
        self._spark = self._opened.enter_context(session(self._master))
        context = self._spark.sparkContext
        with stage(f"starting, on {context.master} (progress: {context.uiWebUrl or 'no UI'})"):
            n = max(2 * context.defaultParallelism, 2)
            seen = context.parallelize(range(n), n).map(partial(sees, folder)).collect()
        if not all(seen):
            raise ValueError(
                "OUT_DIR is not on a file system that the driver and all executors share (an "
                f"executor does not see {folder}); choose another place"
            )
        return self._spark

    def _group(
        self,
        table: Table,
        grouping: Grouping,
        texts: set[str],
        folder: Path,
        summary: Summary,
    ) -> None:
        """Write the parts to `folder` and add to the counts of `table` and `summary`.

        texts: those of user and item whose ids are text. Where the tasks find others, all starts
        again. ValueError for bad input: the first one in the order of the input.
        """
        while True:
            self._shuffle(table, grouping, texts, folder)
            reports = read_reports(folder)
            others = {role for report in reports for role in report.texts} - texts
            if not others:
                break
            texts = texts | others
            print(f"spark: some ids of the column {' and '.join(sorted(others))} are text; again")
            clear(folder)
        for report in reports:
            if report.error is not None:
                raise ValueError(report.error)
            table.add_counts(report.rows, report.left_out, report.unused, report.n_broken)
            summary.rows += report.rows - sum(report.left_out.values())
            summary.below_min_rating += report.rows_below_min_rating
        table.check_ids()

    def _shuffle(self, table: Table, grouping: Grouping, texts: set[str], folder: Path) -> None:
        """Read all pieces, and write all parts of the users."""
        spark = self._spark
        n_pieces = len(table.files)
        n_bytes = sum(file.path.stat().st_size for file in table.files)
        n_parts = max(n_bytes // _BYTES_PER_PART, spark.sparkContext.defaultParallelism)
        schema = pa.schema(
            [
                ("salt", pa.int64()),
                ("place", pa.int64()),
                *((role, pa.string() if role in texts else pa.int64()) for role in _IDS),
                ("position", pa.int64()),
                *((name, _TYPES[name]) for name in grouping.extra),
            ]
        )
        ddl = ", ".join(f"{field.name} {_DDL[field.type]}" for field in schema)
        salted = Salted(schema, self._salts(n_parts), self._seed)
        reading = Reading(table, grouping, salted, folder, Path.cwd())
        parts = PartGrouping(grouping, n_parts, folder)
        with stage(f"reading {n_pieces:,} files, grouping their rows by user in {n_parts:,} parts"):
            rows = spark.range(0, n_pieces, 1, n_pieces).mapInArrow(reading.rows, ddl)
            by_part = rows.repartition(n_parts, "salt")
            in_order = by_part.sortWithinPartitions("place", "user", "position")
            in_order.mapInArrow(parts.write, "part int").collect()

    def _salts(self, n_parts: int) -> list[int]:
        """Return, for each part, a value that `repartition` sends to a partition of its own."""
        found: dict[int, int] = {}
        n = 32 * n_parts
        while len(found) < n_parts:
            numbers = self._spark.range(n)
            placed = numbers.selectExpr("id", f"pmod(hash(id), {n_parts}) AS part").collect()
            found = {row["part"]: row["id"] for row in placed}
            n *= 4
        return [found[part] for part in range(n_parts)]

    def write_split(
        self, folder: Path, data: Interactions, plan: Plan, split: str, users_per_shard: int
    ) -> SplitEntry:
        """See `Engine`."""
        return self._run_shards("writing", folder, data, plan, split, users_per_shard)

    def count_split(
        self, data: Interactions, plan: Plan, split: str, users_per_shard: int
    ) -> SplitEntry:
        """See `Engine`."""
        return self._run_shards("counting", None, data, plan, split, users_per_shard)

    def _run_shards(
        self,
        doing: str,
        folder: Path | None,
        data: Interactions,
        plan: Plan,
        split: str,
        users_per_shard: int,
    ) -> SplitEntry:
        shards = list(shards_of(data, plan, split, users_per_shard))
        if not shards:
            return split_entry([])
        context = self._spark.sparkContext
        with stage(f"{doing} {len(shards):,} shards of {split}"):
            make = context.broadcast(plan.maker(split))
            task = _ShardTask(data.store, make, folder and folder.absolute())
            # a task costs more than a small shard
            n_tasks = min(len(shards), _TASKS_PER_CORE * context.defaultParallelism)
            entries = context.parallelize(shards, n_tasks).map(task).collect()
            make.unpersist()
        return split_entry(entries)


@dataclass(frozen=True)
class _ShardTask:
    """Writes one shard, or counts its interactions where there is no folder."""

    store: Store
    make: Any  # the broadcast of a BlockMaker
    folder: Path | None

    def __call__(self, shard: Shard) -> ShardEntry:
        make: BlockMaker = self.make.value
        if self.folder is None:
            return count_shard(shard, self.store, make)
        # the scratch folder goes before the output appears, so a late attempt finds no place
        temporary = self.store.folder / f"{shard.name}.{secrets.token_hex(8)}.tmp"
        entry = write_shard(temporary, shard, self.store, make)
        os.replace(temporary, self.folder / shard.name)
        return entry

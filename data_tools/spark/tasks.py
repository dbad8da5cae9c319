"""What Spark's tasks run to read the input and to group its rows by user.

A task may run more than once, at the same time or after a failure. It writes under a name of its
own and renames the result, which is the same each time.

Shapes: E rows of a batch.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_tools.collect import extra_columns, kept_rows
from data_tools.grouping import Grouping, ScratchWriter, whole_users
from data_tools.interactions import Summary
from dist_vasp.data import ids
from dist_vasp.data.hashing import hash64, keys_of_ids
from dist_vasp.data.tables.read import Table

FAILED = "failed"  # a file in the scratch folder: the input is bad, or its ids are of another type
_SIGN = np.uint64(1 << 63)
_PIECE_BITS = 40  # rows of one piece of the input


@dataclass
class Report:
    """What the reading of one piece of the input found."""

    rows: int = 0
    rows_below_min_rating: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    n_broken: int = 0
    texts: list[str] = field(default_factory=list)  # of user and item: holds ids that are text
    error: str | None = None

    def write(self, folder: Path, piece: int) -> None:
        """Write the report; in any order of attempts the file is whole."""
        if self.error is not None or self.texts:
            (folder / FAILED).touch()
        temporary = folder / f"read-{secrets.token_hex(8)}.tmp"
        temporary.write_text(json.dumps(asdict(self)))
        os.replace(temporary, folder / f"read-{piece:06d}.json")


def read_reports(folder: Path) -> list[Report]:
    """Return the reports of all pieces, in the order of the input."""
    return [Report(**json.loads(p.read_text())) for p in sorted(folder.glob("read-*.json"))]


def sees(folder: Path, _: int) -> bool:
    """Return whether this machine sees the folder."""
    return folder.is_dir()


def clear(folder: Path) -> None:
    """Remove what the tasks wrote, before they start again."""
    for pattern in (FAILED, "read-*"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    for path in folder.glob("part-*"):
        shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class Reading:
    """Reads some pieces of the input; what `mapInArrow` runs over their numbers."""

    table: Table  # each of its files is a piece
    grouping: Grouping
    salted: Salted
    folder: Path
    home: Path  # where the driver works; names of the input may be relative to it

    def rows(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield the rows of all pieces; a report on each is written to the folder."""
        with suppress(OSError):  # the input may have absolute names
            os.chdir(self.home)
        for batch in batches:
            for number in batch.column(0).to_pylist():
                yield from self._read(number)

    def _read(self, number: int) -> Iterator[pa.RecordBatch]:
        table, summary, report = self.table.part([number]), Summary(), Report()
        position = number << _PIECE_BITS
        try:
            for batch in table.read():
                kept = kept_rows(batch, self.grouping.rule, summary)
                extra = extra_columns(kept, self.grouping.extra)
                if len(kept):
                    report.texts = self.salted.unexpected_texts(kept)
                    if report.texts:
                        break
                    yield self.salted.rows(kept, extra, position)
                position += len(kept)
        except ValueError as error:
            report.error = str(error)
        report.rows, report.left_out = table.rows, table.left_out
        report.rows_below_min_rating = summary.below_min_rating
        report.unused, report.n_broken = table.unused, table.n_broken
        report.write(self.folder, number)


def part_of(hashes: np.ndarray, n_parts: int) -> np.ndarray:
    """Return the part of the users with these hashes, int64: each part is a range of hashes."""
    return ((hashes >> np.uint64(32)) * np.uint64(n_parts) >> np.uint64(32)).astype(np.int64)


@dataclass(frozen=True)
class Salted:
    """Rows with what Spark shuffles and sorts by."""

    schema: pa.Schema
    salts: list[int]  # by part: a value that Spark's hash sends there
    seed: int

    def unexpected_texts(self, batch: pa.RecordBatch) -> list[str]:
        """Return those of user and item that are text, but numbers in the schema."""
        return [
            role
            for role in ("user", "item")
            if pa.types.is_integer(self.schema.field(role).type) and ids.is_text(batch[role].type)
        ]

    def rows(
        self, batch: pa.RecordBatch, extra: dict[str, pa.Array], position: int
    ) -> pa.RecordBatch:
        """Return the rows, of which the first has this position in the input."""
        columns = {role: batch[role] for role in ("user", "item")}
        distinct = batch["user"].cast(self.schema.field("user").type).dictionary_encode()
        hashes = hash64(self.seed, keys_of_ids(distinct.dictionary))[np.asarray(distinct.indices)]
        part = part_of(hashes, len(self.salts))
        columns |= {
            "salt": pa.array(np.array(self.salts, np.int64)[part]),
            "place": pa.array((hashes ^ _SIGN).view(np.int64)),  # Spark has no unsigned integers
            "position": pa.array(np.arange(position, position + len(batch))),
            **extra,
        }
        arrays = [columns[f.name].cast(f.type) for f in self.schema]
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)


@dataclass(frozen=True)
class PartGrouping:
    """Writes the positives of one part of the users; what `mapInArrow` runs over its sorted
    rows."""

    grouping: Grouping
    n_parts: int
    folder: Path

    def write(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Write the folder `part-NNNNNN`, with scratch files, ids and counts; yield its number."""
        if (self.folder / FAILED).exists():
            return
        coder = _Coder()
        temporary = self.folder / f"part-{secrets.token_hex(8)}.tmp"
        temporary.mkdir()
        summary = Summary()
        with ScratchWriter(temporary, self.grouping, summary) as scratch:
            for rows in whole_users(coder.coded(batches), ["user", "item", *self.grouping.extra]):
                scratch.add(rows, np.arange(len(coder.item_ids), dtype=np.uint32))
            sizes = scratch.sizes
        if coder.place is None:  # no rows
            shutil.rmtree(temporary)
            return
        users = pa.table({"id": ids.join(coder.user_ids), "size": sizes})
        pq.write_table(users, temporary / "users.parquet")
        pq.write_table(pa.table({"id": coder.item_ids}), temporary / "items.parquet")
        counts = {"duplicates": summary.duplicates, "below_min_rating": summary.below_min_rating}
        (temporary / "counts.json").write_text(json.dumps(counts))
        hashes = np.array([coder.place], np.int64).view(np.uint64) ^ _SIGN
        number = int(part_of(hashes, self.n_parts)[0])
        try:
            os.rename(temporary, self.folder / f"part-{number:06d}")
        except OSError:
            if not (self.folder / f"part-{number:06d}").is_dir():
                raise
            shutil.rmtree(temporary)  # another attempt was faster
        yield pa.RecordBatch.from_arrays([pa.array([number], pa.int32())], ["part"])


class _Coder:
    """Numbers the users and items of sorted rows in order of first appearance."""

    def __init__(self) -> None:
        self.place: int | None = None  # of the last user
        self.user_ids: list[pa.Array] = []
        self._last: pa.Scalar | None = None
        self._n_users = 0
        self._items = ids.IdIndex()

    @property
    def item_ids(self) -> pa.Array:
        return self._items.ids

    def coded(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            if not len(batch):
                continue
            user = batch["user"]
            is_new = np.ones(len(user), bool)
            is_new[1:] = np.asarray(pc.not_equal(user[1:], user[:-1]))
            is_new[0] = self._last is None or user[0].as_py() != self._last.as_py()
            codes = np.cumsum(is_new) + (self._n_users - 1)
            self._n_users = int(codes[-1]) + 1
            self._last, self.place = user[-1], batch["place"][-1].as_py()
            self.user_ids.append(user.filter(pa.array(is_new)))
            columns: dict[str, Any] = {
                "user": pa.array(codes),
                "item": self._items.encode(batch["item"]),
            }
            others = set(batch.schema.names) - {"user", "item", "salt", "place", "position"}
            columns |= {name: batch[name] for name in others}
            yield pa.record_batch(columns)

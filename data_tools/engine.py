"""What differs between the engines: who groups the rows by user, and who writes the shards.

The filters, the protocols and all files but the tars are the same code for every engine, so the
engines write the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from data_tools import writer
from data_tools.collect import collect
from data_tools.interactions import Interactions, Summary
from data_tools.plan import Plan
from data_tools.readers import Source
from dist_vasp.data.manifest import SplitEntry


@dataclass(frozen=True)
class Asked:
    """What the options say about the rows to keep; see `collect`."""

    min_rating: float
    repeats: str
    by_time: bool
    keep_ratings: bool


class Engine(Protocol):
    """Groups rows by user and writes shards."""

    def collect(self, source: Source, folder: Path, asked: Asked) -> tuple[Interactions, Summary]:
        """Group the positives of `source` by user, with scratch files in `folder`.

        ValueError for bad input, as in `collect`.
        """
        ...

    def write_split(
        self, folder: Path, data: Interactions, plan: Plan, split: str, users_per_shard: int
    ) -> SplitEntry:
        """Write the tars of one split to `folder`."""
        ...

    def count_split(
        self, data: Interactions, plan: Plan, split: str, users_per_shard: int
    ) -> SplitEntry:
        """Return what `write_split` would, without the sizes and checksums of the tars."""
        ...

    def scratch_beside(self, output: Path) -> Path | None:
        """Return where a dry run may keep scratch files; None: where temporary files go."""
        ...


@dataclass(frozen=True)
class LocalEngine:
    """One process; the sort takes at most `memory_limit` and spills to disk."""

    memory_limit: str

    def collect(self, source: Source, folder: Path, asked: Asked) -> tuple[Interactions, Summary]:
        return collect(
            source.batches(),
            folder,
            asked.min_rating,
            self.memory_limit,
            asked.repeats,
            asked.by_time,
            asked.keep_ratings,
        )

    def write_split(
        self, folder: Path, data: Interactions, plan: Plan, split: str, users_per_shard: int
    ) -> SplitEntry:
        return writer.write_split(folder, data, plan, split, users_per_shard)

    def count_split(
        self, data: Interactions, plan: Plan, split: str, users_per_shard: int
    ) -> SplitEntry:
        return writer.count_split(data, plan, split, users_per_shard)

    def scratch_beside(self, output: Path) -> Path | None:
        return None

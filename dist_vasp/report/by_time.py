"""Put the histories of a report's users in order of time, from the table the shards were made of.

The shards themselves keep no times.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dist_vasp.data.positives import PositiveRule
from dist_vasp.data.tables.columns import Reading
from dist_vasp.data.tables.read import Table, open_table
from dist_vasp.ranking.history_columns import history_columns
from dist_vasp.report.lists import Lists, Sample

DEFAULT_COLUMN = "timestamp"
Times = dict[tuple[str, str], float]  # of a user and an item


def open_times(path: str, rule: PositiveRule | None, time_column: str | None) -> Table:
    """Open the table of a history file with its columns for user, item and time.

    The time column is the named one, else that of the rule, else `timestamp`. ValueError where a
    column is missing.
    """
    column = time_column or (rule and rule.time_column) or DEFAULT_COLUMN
    columns, _ = history_columns([path], Reading(), rule, {}, all_positive=True)
    columns = replace(columns, time=column, rating=None)
    table = open_table([path], columns, Reading())
    table.match_columns()  # what is missing is told before lists are made
    return table


def times_of(table: Table, users: Iterable[str]) -> Times:
    """Return the latest time of each pair of one of the users and an item; reads the table once."""
    wanted = pa.array(sorted(set(users)), pa.string())
    found: Times = {}
    for batch in table.batches():
        user = batch.column("user").cast(pa.string())
        part = batch.filter(pc.is_in(user, wanted))
        if not len(part):
            continue
        names = (part.column(name).cast(pa.string()).to_pylist() for name in ("user", "item"))
        times = np.asarray(part.column("time").cast(pa.float64(), safe=False))
        for pair, time in zip(zip(*names, strict=True), times.tolist(), strict=True):
            if time == time:  # not NaN
                found[pair] = max(time, found.get(pair, time))
    return found


def latest_first(lists: Sequence[Lists], times: Times) -> list[Lists]:
    """Return the lists with the histories of their users in order of time, the latest first.

    Items without a time come last. A user without any keeps the order.
    """
    return [
        replace(one, samples=[_latest_first(sample, times) for sample in one.samples])
        for one in lists
    ]


def _latest_first(sample: Sample, times: Times) -> Sample:
    found = [times.get((sample.user, str(item)), -np.inf) for item in sample.past]
    if max(found, default=-np.inf) == -np.inf:
        return sample
    order = np.argsort(-np.array(found), kind="stable").tolist()
    past, history = ([named[i] for i in order] for named in (sample.past, sample.history))
    return replace(sample, past=past, history=history, by_time=True)

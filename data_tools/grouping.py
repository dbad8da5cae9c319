"""Write the positives of whole users to scratch files: what every engine does with sorted rows.

Shapes: U users, E rows of a part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_tools.interactions import FolderStore, Summary
from dist_vasp.data.positives import PositiveRule, positive_rows


@dataclass(frozen=True)
class Grouping:
    """What becomes of the rows of a user."""

    rule: PositiveRule
    extra: tuple[str, ...]  # of split, rating and time: the columns besides user and item
    beside: tuple[str, ...]  # what is kept beside the items, as in `Store`


class ScratchWriter:
    """Appends the positives of whole users to the scratch files of a store."""

    def __init__(self, folder: Path, grouping: Grouping, summary: Summary):
        """`summary` counts the rows that are left out."""
        self._folder = folder
        self._grouping = grouping
        self._summary = summary
        self._sizes: list[np.ndarray] = []
        with ExitStack() as stack:
            self._files = {
                name: stack.enter_context(open(folder / name, "wb"))
                for name in ("items", *grouping.beside)
            }
            self._opened = stack.pop_all()

    def add(self, rows: Mapping[str, np.ndarray], item_numbers: np.ndarray) -> None:
        """Add the rows of some users in input order: user (E,) ascends without gaps, item (E,).

        `item_numbers` (I,) uint32 is what is written for every item.
        """
        rule, beside = self._grouping.rule, self._grouping.beside
        user, item = rows["user"], rows["item"]
        local = user - user[0]
        pairs = local.astype(np.int64) * len(item_numbers) + item
        kept = positive_rows(rule, pairs, rows.get("rating"), rows.get("time"))
        self._count_left_out(pairs, len(kept))
        if "times" in beside:
            kept = kept[np.lexsort((rows["time"][kept], local[kept]))]  # ties: input order
        self._files["items"].write(item_numbers[item[kept]].tobytes())
        for name in beside:
            self._files[name].write(rows[name.removesuffix("s")][kept].tobytes())
        self._sizes.append(np.bincount(local[kept], minlength=int(local[-1]) + 1))

    def _count_left_out(self, pairs: np.ndarray, n_kept: int) -> None:
        rule, n_pairs = self._grouping.rule, n_kept
        if rule.repeats == "last" and not rule.is_implicit:
            n_pairs = len(np.unique(pairs))
        self._summary.duplicates += len(pairs) - n_pairs
        self._summary.below_min_rating += n_pairs - n_kept

    @property
    def sizes(self) -> np.ndarray:
        """The positives of every user so far, (U,) int64."""
        return np.concatenate([np.empty(0, np.int64), *self._sizes]).astype(np.int64)

    def store(self) -> FolderStore:
        """Close the files and return them as a store."""
        self._opened.close()
        return FolderStore(self._folder, self._grouping.beside)

    def __enter__(self) -> ScratchWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()


def whole_users(
    stream: Iterable[pa.RecordBatch], names: Sequence[str]
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the columns `names` of `stream` in parts that end where the user changes, so that the
    rows of a user are never in two parts."""
    waiting: list[dict[str, np.ndarray]] = []  # rows of one user, whose end has not come
    for batch in stream:
        if not len(batch):
            continue
        columns = {name: np.asarray(batch[name]) for name in names}
        user = columns["user"]
        cut = int(np.searchsorted(user, user[-1]))
        if cut:
            waiting.append({name: column[:cut] for name, column in columns.items()})
            yield _joined(waiting)
            waiting = []
        elif waiting and waiting[-1]["user"][-1] != user[0]:
            yield _joined(waiting)
            waiting = []
        waiting.append({name: column[cut:] for name, column in columns.items()})
    if waiting:
        yield _joined(waiting)


def _joined(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

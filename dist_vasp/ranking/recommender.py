"""Lists, similar items and explanations of a trained model in Python: no launcher, no GPU, no
second copy of the weights.

    from dist_vasp import Recommender
    r = Recommender.load("runs/mine")
    ids, scores = r.recommend([[17, 23], [5]], k=10)

Original ids come in and go out: ints where the vocabulary is numeric, else strings. The item
matrices are mapped (ranking/mapped.py), so that loading costs one reading of the files for their
checksums and no memory of their size.

Shapes: U users, I items, K list length.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import scipy.sparse
import torch

from dist_vasp.checkpoint.header import ModelHeader
from dist_vasp.checkpoint.read import Checkpoint
from dist_vasp.checkpoint.read import verify as verify_files
from dist_vasp.checkpoint.weights import check_numbers
from dist_vasp.config import from_dict
from dist_vasp.data.ids import of_column
from dist_vasp.data.items import ItemTable, read_items_file
from dist_vasp.data.manifest import ITEMS_FILE
from dist_vasp.data.positives import PositiveRule
from dist_vasp.data.role_columns import serving_columns
from dist_vasp.data.rows import Rows, indptr_of
from dist_vasp.parallel.comm import form_groups
from dist_vasp.parallel.partition import Layout
from dist_vasp.ranking import export as exports
from dist_vasp.ranking.accepted import history_lists, id_list, refuse_frame
from dist_vasp.ranking.evaluate import to_item_rows, top_items
from dist_vasp.ranking.explain import mapped_explainer
from dist_vasp.ranking.filters import counted
from dist_vasp.ranking.histories import (
    RowCounts,
    count_rows,
    find_items,
    histories_of_table,
    known_rows,
    liked_rows,
)
from dist_vasp.ranking.load import check_size, open_model, positives_of
from dist_vasp.ranking.mapped import MappedModel, map_model
from dist_vasp.ranking.recommend import list_table
from dist_vasp.ranking.topk import NO_ITEM, TopK

USERS_PER_PASS = 4096  # users that go through the blocks of W together (docs/experiments.md)
_ROWS_AT_ONCE = 4096  # rows of R that are compared at once

Id = int | str
# Sequence[Iterable[Id]] | scipy.sparse matrix | pa.Table, neither of which has types to check
HistoriesLike: TypeAlias = Any


@dataclass(frozen=True)
class Lists:
    """Top-K lists, one row for each history; unpacks as `ids, scores`.

    `ids` (U, K): int64, or str objects. `scores` (U, K): float32, p of the model, descending. A list that ends early (fewer than
    k unseen items, or no known item in the history) is filled up with id -1 (None for str) and score NaN. `users`: the users of
    an Arrow table in order of first appearance, the users without a known item at the end; None for other input.
    `read`: how many likes were used, how many further items masked, and what was left out. `notes`: lines on
    how a table was read and on ids of filters.
    """

    ids: np.ndarray
    scores: np.ndarray
    users: pa.Array | None
    read: RowCounts
    notes: tuple[str, ...]
    _rows: np.ndarray  # (U, K) item rows
    _items: ItemTable

    @property
    def n_unknown(self) -> int:
        """Interactions whose item the model does not know; they were ignored."""
        return self.read.unknown

    @property
    def rows(self) -> np.ndarray:
        """(U, K) int64 item rows of `ids`, -1 where a list has ended."""
        return self._rows

    def __iter__(self) -> Iterator[np.ndarray]:
        yield self.ids
        yield self.scores

    def to_table(self) -> pa.Table:
        """One row per recommendation as launch/recommend.py writes them: user (the row where there
        are no ids), rank, item, score."""
        users = pa.array(np.arange(len(self.ids))) if self.users is None else self.users
        table = list_table(users, self.scores, self._rows, self._items)
        if self._items.titles is not None:
            rows = self._rows[self._rows >= 0]
            table = table.append_column("title", self._items.titles.take(pa.array(rows)))
        return table


@dataclass(frozen=True)
class _Given:
    """Histories as they were passed: likes, everything seen, and what was read."""

    rows: Rows
    seen: Rows
    read: RowCounts
    users: pa.Array | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reason:
    """What one past item adds to the shallow path's logit."""

    item: Id
    weight: float
    title: str | None = None


@dataclass(frozen=True)
class Explanation:
    """Why a history leads to `item`.

    The shallow path's logit is the sum over the history of W[past item, item]: `reasons` are the largest of these, descending,
    `rest` is the sum of the others, and `logit` is all of it (model.nease_offset, 0 in most models, comes on top). p = p_flvae *
    p_nease: both paths must agree. A path that the
    model does not have is None (`reasons` empty); of the closed form p, p_flvae and p_nease are None and `logit` is the score.
    """

    item: Id
    title: str | None
    p: float | None
    p_flvae: float | None
    p_nease: float | None
    logit: float | None
    reasons: list[Reason]
    rest: float


class Recommender:
    """A trained model, read only. Make one with `Recommender.load`."""

    def __init__(
        self,
        opened: Checkpoint[ModelHeader],
        items: ItemTable,
        items_file: Path,
        model: MappedModel,
        rule: PositiveRule | None = None,
    ) -> None:
        self._opened, self._items_file, self.model, self.items, self.positives = (
            opened,
            items_file,
            model,
            items,
            rule,
        )
        self._alone = form_groups(0, Layout(1, 1, 1), torch.device("cpu"))
        self._stamps = self._read_stamps()

    @staticmethod
    def load(folder: str | Path, checkpoint: str | None = None, verify: bool = True) -> Recommender:
        """The model of a run directory (its best checkpoint, else its newest, else the one named)
        or of an exported folder.

        `verify` holds every file against its SHA-256 and looks for numbers that are none, which reads all of them; without it
        only what is asked for is read. ValueError where the folder holds no model or a file is damaged.
        """
        _answer_after_forks()
        opened = open_model(folder, checkpoint)
        if verify:
            verify_files(opened, form_groups(0, Layout(1, 1, 1), torch.device("cpu")))
        items_file = (
            Path(folder).absolute() / ITEMS_FILE
        )  # `export` finds it after a change of folder, too
        items = read_items_file(items_file, opened.header.n_items, opened.header.vocabulary_sha256)
        config = from_dict(opened.header.config)
        check_size(opened, config)
        model = map_model(opened, config)
        if verify:
            check_numbers(opened, model.tensors())
        return Recommender(opened, items, items_file, model, positives_of(opened))

    def export(
        self,
        folder: str | Path,
        trunk: Literal["torch_export"] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> str:
        """Write the model to a new folder that `load` and launch/recommend.py take; returns one
        line on what was written.

        `trunk` "torch_export" adds trunk.pt2, a program W1 x (B, H) -> d (B, H), z (B, L) for another runtime.
        `progress(bytes done, bytes in all)` is called on the way.
        """
        self._check_unchanged()
        if trunk not in (None, "torch_export"):
            raise ValueError(f"trunk is {trunk!r}, expected torch_export or None")
        if trunk and self.model.trunk is None:
            raise ValueError(
                f"a model of kind {self.model.config.kind} has no trunk to export; leave trunk out"
            )
        return exports.export(
            self._opened,
            self._items_file,
            folder,
            self.model.trunk if trunk else None,
            progress,
            self.positives,
        )

    def _read_stamps(self) -> dict[str, tuple[int, int]]:
        """Size and time of change of every file that is mapped."""
        found = {name: os.fstat(handle.fileno()) for name, handle in self._opened.handles.items()}
        return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}

    def _check_unchanged(self) -> None:
        """ValueError where somebody wrote into a mapped file: a replaced or removed one is kept,
        but not a changed one."""
        for name, stamp in self._read_stamps().items():
            if stamp != self._stamps[name]:
                raise ValueError(
                    f"{self._opened.path / name} was changed while the model was in use; load it again, and never write into the "
                    "files of a model: write a new folder"
                )

    # --- lists ---------------------------------------------------------------------------------------------------------

    def recommend(
        self,
        histories: HistoriesLike,
        k: int,
        mask_input: bool = True,
        filter_items: Iterable[Id] | None = None,
        restrict_to: Iterable[Id] | None = None,
        *,
        all_positive: bool = False,
        user_column: str | None = None,
        item_column: str | None = None,
        rating_column: str | None = None,
        time_column: str | None = None,
    ) -> Lists:
        """The k best items of every history, as launch/recommend.py ranks them: `ids, scores =
        r.recommend(...)`.

        histories: a list of lists of original ids, all of them likes; a sparse matrix (U, I) whose columns are item rows
        (non-zero: seen; ratings unless all of them are 1); or an Arrow table, whose columns are those the shards were made
        from, else user and item, or the ones that are named here. Ratings follow the rule the model was trained with
        (`positives`), unless `all_positive`. Everything seen, liked or not, is not listed unless `mask_input` is False;
        `filter_items` never are; with `restrict_to` only those are. Ids that the model does not know are ignored. ValueError
        for anything else, and where `restrict_to` has no known item.
        """
        _check_count("k", k)
        self._check_unchanged()
        asked = {
            "user": user_column,
            "item": item_column,
            "rating": rating_column,
            "time": time_column,
        }
        given = self._read(histories, asked, all_positive)
        rows = given.rows
        allowed, notes = self._allowed(filter_items, restrict_to)
        ids = np.full((rows.n_rows, k), NO_ITEM, np.int64)
        scores = np.full((rows.n_rows, k), np.nan, np.float32)
        known = np.flatnonzero(rows.lengths)
        for start in range(0, len(known), USERS_PER_PASS):
            block = known[start : start + USERS_PER_PASS]
            likes = rows.take(block)
            seen = likes if given.seen is rows else given.seen.take(block)
            found, ids[block] = top_items(
                lambda x: self.model.scores(x, allowed),
                likes,
                k,
                self.n_items,
                self._alone,
                mask_input,
                seen,
            )
            scores[block] = found if self.is_linear else np.exp(found)
        scores[ids == NO_ITEM] = np.nan
        return Lists(
            self._ids(ids), scores, given.users, given.read, (*given.notes, *notes), ids, self.items
        )

    def similar_items(
        self, item: Id, k: int, by: Literal["nease", "decoder"] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids, scores) of the k items nearest to `item`, itself excepted; fewer where the
        catalogue is smaller.

        `nease`: W[item, j], what having `item` adds to the logit of j. It is directed: a rare sequel may point at its famous
        first part and not the other way round; a list of "goes with" is wanted in just this direction. `decoder`: cosine of the
        rows of R, which is symmetric. The default is nease where the model has it. ValueError for an unknown item or path.
        """
        _check_count("k", k)
        self._check_unchanged()
        row = self._known_item(item)
        paths = {"nease": self._shallow, "decoder": self._deep}
        by = by or ("nease" if self._shallow else "decoder")
        if by not in paths or not paths[by]:
            there = " or ".join(name for name, has in paths.items() if has)
            raise ValueError(
                f"by is {by!r}, but a model of kind {self.model.config.kind} can compare items by {there}"
            )
        best = TopK(k)
        for first, scores_C in self._nease_row(row) if by == "nease" else self._cosines(row):
            if first <= row < first + len(scores_C):
                scores_C[row - first] = -torch.inf
            best.update(scores_C[None], first)
        scores, ids = (t[0].numpy() for t in best.result())
        found = ids != NO_ITEM
        return self._ids(ids[found]), scores[found]

    def explain(self, history: Iterable[Id], item: Id, n: int = 5) -> Explanation:
        """Which of the past items speak for `item`, and what either path says.

        ValueError for an unknown item or no known history.
        """
        _check_count("n", n)
        self._check_unchanged()
        row = self._known_item(item)
        refuse_frame(history, "history")
        rows = self._read([history]).rows
        if rows.n_rows == 0 or not len(rows.items):
            raise ValueError(
                "no item of the history is known to the model; there is nothing to explain"
            )
        x = to_item_rows(rows, 1, self.n_items, torch.device("cpu"))
        wanted = torch.zeros(self.n_items, dtype=torch.bool)
        wanted[row] = True
        score = next(s[0, row - lo] for lo, s in self.model.scores(x, wanted))
        pair = (torch.tensor([0]), torch.tensor([row]), score[None])
        found = mapped_explainer(self.model)(x, *pair, max(n, len(rows.items)))
        reasons, rest, logit = [], 0.0, None
        if (
            found.items_EN is not None
            and found.weights_EN is not None
            and found.shallow_E is not None
        ):
            pairs = [
                (i, w)
                for i, w in zip(
                    found.items_EN[0].tolist(), found.weights_EN[0].tolist(), strict=True
                )
                if i != NO_ITEM
            ]
            reasons = [Reason(self._id(i), w, self._title(i)) for i, w in pairs[:n]]
            rest, logit = sum(w for _, w in pairs[n:]), float(found.shallow_E[0])
        p_flvae, p_nease = (
            None if p is None else float(p.exp()[0])
            for p in (found.log_p_flvae_E, found.log_p_nease_E)
        )
        p = None if self.is_linear else float(score.exp())
        return Explanation(
            self._id(row), self._title(row), p, p_flvae, p_nease, logit, reasons, rest
        )

    # --- what there is ---------------------------------------------------------------------------------------------------

    @property
    def n_items(self) -> int:
        return self.model.n_items

    @property
    def vocabulary_sha256(self) -> str:
        """Identifies the catalogue: data of another one has another."""
        return self._opened.header.vocabulary_sha256

    @property
    def is_linear(self) -> bool:
        """Whether scores are no probabilities: the closed form."""
        return self.model.config.linear

    @property
    def _shallow(self) -> bool:
        return bool(self.model.outputs[0].W_IC)

    @property
    def _deep(self) -> bool:
        return bool(self.model.outputs[0].heads)

    def title(self, item: Id) -> str | None:
        """The title of an item, None where items.parquet has none.

        ValueError for an unknown item.
        """
        return self._title(self._known_item(item))

    def _title(self, row: int) -> str | None:
        return None if self.items.titles is None else self.items.titles[row].as_py()

    def _id(self, row: int) -> Id:
        return self.items.ids[row].as_py()

    def _ids(self, rows: np.ndarray) -> np.ndarray:
        """Original ids of item rows of any shape; -1 or None where the row is -1."""
        flat = rows.reshape(-1)
        if pa.types.is_integer(self.items.ids.type):
            ids = np.asarray(self.items.ids.cast(pa.int64()))[flat]
            ids[flat < 0] = -1
            return ids.reshape(rows.shape)
        found = self.items.ids.take(pa.array(flat, mask=flat < 0))
        return np.array([*found.to_pylist(), None], object)[:-1].reshape(rows.shape)

    # --- input -----------------------------------------------------------------------------------------------------------

    def _read(
        self,
        histories: HistoriesLike,
        asked: Mapping[str, str | None] | None = None,
        all_positive: bool = False,
    ) -> _Given:
        if isinstance(histories, pa.RecordBatch):
            histories = pa.Table.from_batches([histories])
        named = {role: name for role, name in (asked or {}).items() if name is not None}
        if isinstance(histories, pa.Table):
            return self._read_table(histories, named, all_positive)
        if named:
            role = next(iter(named))
            raise ValueError(
                f"{role}_column is {named[role]!r}, but histories are no table; leave it out"
            )
        if scipy.sparse.issparse(histories):
            return self._read_matrix(histories, all_positive)
        lists = history_lists(histories, self.n_items)
        item_rows = self._find([*chain.from_iterable(lists)], "the histories")
        owner = np.repeat(np.arange(len(lists)), [len(one) for one in lists])
        rows = known_rows(owner, item_rows, len(lists), self.n_items)
        return _Given(rows, rows, count_rows(item_rows, rows, rows))

    def _read_table(
        self, table: pa.Table, asked: Mapping[str, str | None], all_positive: bool
    ) -> _Given:
        columns = serving_columns(
            table.column_names, self.positives, asked, "the table", all_positive, dashes=""
        )
        found = histories_of_table(table, columns, self.items, self.positives, "the table")

        def with_skipped(rows: Rows) -> Rows:
            return Rows(
                indptr_of(np.append(rows.lengths, np.zeros(len(found.skipped), np.int64))),
                rows.items,
            )

        rows = with_skipped(found.rows)
        seen = rows if found.seen is found.rows else with_skipped(found.seen)
        return _Given(
            rows, seen, found.counts, pa.concat_arrays([found.users, found.skipped]), columns.notes
        )

    def _read_matrix(self, matrix: Any, all_positive: bool) -> _Given:
        """Non-zero entries are seen items.

        They are ratings where the rule reads ratings and not all of them are 1.
        """
        if matrix.ndim != 2 or matrix.shape[1] != self.n_items:
            raise ValueError(
                f"the matrix has shape {matrix.shape}, expected (users, {self.n_items}): columns are item rows"
            )
        if matrix.dtype.kind not in "biuf":
            raise ValueError(f"the matrix holds {matrix.dtype}, expected numbers; convert it first")
        x = matrix.tocsr()
        if not x.has_canonical_format:  # entries that are stored several times add up
            x = x.copy()
            x.sum_duplicates()
        x = x.tocoo()
        stored = x.data != 0
        owner, item_rows, values = (
            x.row[stored],
            x.col[stored],
            np.asarray(x.data[stored], np.float64),
        )
        if not np.isfinite(values).all():
            raise ValueError("the matrix holds values that are not finite; leave those entries out")
        rows = seen = known_rows(owner, item_rows, x.shape[0], self.n_items)
        if (
            self.positives is not None
            and not self.positives.is_implicit
            and not all_positive
            and (values != 1).any()
        ):
            rows = liked_rows(owner, item_rows, x.shape[0], self.n_items, self.positives, values)
        return _Given(rows, seen, count_rows(item_rows, rows, seen))

    def _find(self, ids: Sequence[Any], what: str) -> np.ndarray:
        """Item rows of ids, -1 where unknown; ValueError unless they are all whole numbers or all
        strings."""
        if len(ids) == 0:
            return np.empty(0, np.int32)
        try:
            array = pa.array(ids, from_pandas=False)
        except (pa.ArrowException, TypeError, OverflowError):
            array = pa.nulls(1)
        if pa.types.is_floating(array.type):
            array = of_column(
                array, range(1, len(array) + 1), what, ()
            )  # 17.0 is 17, 17.5 is no id
        if array.null_count or not (
            pa.types.is_integer(array.type) or pa.types.is_string(array.type)
        ):
            raise ValueError(
                f"{what} must hold original ids, all whole numbers or all strings; some are of another kind"
            )
        return find_items(array, self.items)

    def _known_item(self, item: Id) -> int:
        row = int(self._find([item], "item")[0])
        if row < 0:
            raise ValueError(
                f"item {item!r} is not one of the {self.n_items} items that the model was trained on"
            )
        return row

    def _allowed(
        self, filter_items: Iterable[Id] | None, restrict_to: Iterable[Id] | None
    ) -> tuple[torch.Tensor | None, list[str]]:
        """(I,) bool of the items that may be listed, None for all, and lines on the ids that were
        passed."""
        if filter_items is None and restrict_to is None:
            return None, []
        allowed, notes = np.ones(self.n_items, bool), []
        for name, given in (("restrict_to", restrict_to), ("filter_items", filter_items)):
            if given is None:
                continue
            rows = self._find(id_list(given, name), name)
            notes.append(counted(name, len(rows), int((rows < 0).sum())))
            if name == "restrict_to":
                allowed[:] = False
            allowed[rows[rows >= 0]] = name == "restrict_to"
        if not allowed.any():
            raise ValueError(
                "filter_items and restrict_to leave no item that the model knows; pass other ids"
            )
        return torch.from_numpy(allowed), notes

    # --- similarity ------------------------------------------------------------------------------------------------------

    def _nease_row(self, row: int) -> Iterator[tuple[int, torch.Tensor]]:
        self.model.expect(1)
        for output in self.model.outputs:
            for (lo, _), W_IC in zip(output.blocks, output.W_IC, strict=True):
                yield lo, W_IC[row].clone()

    def _cosines(self, row: int) -> Iterator[tuple[int, torch.Tensor]]:
        decoders = [(output.part, output.heads[0].weight_JK) for output in self.model.outputs]
        wanted = next(
            R_JH[row - part.start] for part, R_JH in decoders if part.start <= row < part.stop
        )
        for part, R_JH in decoders:
            for lo, hi in part.blocks(_ROWS_AT_ONCE):
                yield (
                    lo,
                    torch.cosine_similarity(
                        R_JH[lo - part.start : hi - part.start], wanted[None], dim=1
                    ),
                )


_prepared_for_forks = False


def _answer_after_forks() -> None:
    """Make children of this process compute with one thread: the threads of torch's pool do not
    live on in a fork.

    A web server that loads the model and then forks its workers would otherwise wait for them for
    ever.
    """
    global _prepared_for_forks
    if not _prepared_for_forks:
        os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
        _prepared_for_forks = True


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}, expected a whole number of at least 1")

"""Lists, similar items and explanations of a trained model in Python, without a launcher or a GPU.

    from dist_vasp import Recommender
    r = Recommender.load("runs/mine")
    ids, scores = r.recommend([[17, 23], [5]], k=10)

Original ids come in and go out: ints where the vocabulary is numeric, else strings.

Shapes: U users, I items, K list length.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from dist_vasp.data.positives import PositiveRule
from dist_vasp.model.sparse import ItemRows
from dist_vasp.model.trunk import Trunk
from dist_vasp.parallel.comm import form_groups
from dist_vasp.parallel.partition import Layout
from dist_vasp.ranking.accepted import refuse_frame
from dist_vasp.ranking.evaluate import to_item_rows, top_items
from dist_vasp.ranking.explain import explain_pairs
from dist_vasp.ranking.export import export
from dist_vasp.ranking.export_ensemble import export_ensemble
from dist_vasp.ranking.given import GivenReader, HistoriesLike
from dist_vasp.ranking.lists import Explanation, Id, Lists, Reason
from dist_vasp.ranking.scoring import Ensemble, Model
from dist_vasp.ranking.similar import similar_to
from dist_vasp.ranking.sources import Sources, open_sources
from dist_vasp.ranking.topk import NO_ITEM, TopK

USERS_PER_PASS = 4096  # users that go through the blocks of W together (docs/experiments.md)


class Recommender:
    """A trained model, read only. Make one with `Recommender.load`."""

    def __init__(self, sources: Sources) -> None:
        self.sources, self.model, self.items = sources, sources.model, sources.items
        self._reader = GivenReader(sources.items, sources.positives)
        self._alone = form_groups(0, Layout(1, 1, 1), torch.device("cpu"))

    @staticmethod
    def load(folder: str | Path, checkpoint: str | None = None, verify: bool = True) -> Recommender:
        """The model of a run directory, an exported folder or an ensemble.

        Of a run: its best checkpoint, else its newest, or the one that is named. `verify` checks
        every file against its SHA-256 and looks for numbers that are not finite, which reads all of
        them; without it only what is asked for is read. ValueError where the folder holds no model
        or a file is damaged.
        """
        _answer_after_forks()
        return Recommender(open_sources(folder, checkpoint, verify))

    def export(
        self,
        folder: str | Path,
        trunk: Literal["torch_export"] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> str:
        """Write the model to a new folder that `load` and launch/recommend.py take.

        Returns one line on what was written. `trunk` "torch_export" adds trunk.pt2, a program
        W1 x (B, H) -> the sources of the heads (B, K) for another runtime. `progress(bytes done,
        bytes in all)` is called meanwhile.
        """
        self.sources.check_unchanged()
        if trunk not in (None, "torch_export"):
            raise ValueError(f"trunk is {trunk!r}, expected torch_export or None")
        if isinstance(self.model, Ensemble):
            if trunk:
                raise ValueError("trunk is torch_export, which takes one model; leave trunk out")
            return export_ensemble(self.sources, folder, progress)
        if trunk and self.model.trunk is None:
            raise ValueError(
                f"a model of kind {self.sources.kind} has no trunk to export; leave trunk out"
            )
        (source,) = self.sources.members
        module = self.model.trunk if trunk else None
        assert module is None or isinstance(module, Trunk)
        return export(source.opened, source.items_file, folder, module, progress, self.positives)

    # --- lists -------------------------------------------------------------------------------

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
        """The k best items of every history, as launch/recommend.py ranks them.

        `ids, scores = r.recommend(...)`. histories: a list of lists of original ids, all of them
        likes; a sparse matrix (U, I) whose columns are item rows (non-zero: seen; ratings unless
        all of them are 1); or an Arrow table. The table's columns are those that the shards were
        made from, else user and item, or the ones that are named here. Ratings follow the rule that
        the model was trained with (`positives`), unless `all_positive`. What a user has seen, liked
        or not, is not listed unless `mask_input` is False. `filter_items` are never listed; with
        `restrict_to` only those are. Ids that the model does not know are ignored. ValueError for
        anything else, and where `restrict_to` has no known item.
        """
        _check_count("k", k)
        self.sources.check_unchanged()
        asked = {
            "user": user_column,
            "item": item_column,
            "rating": rating_column,
            "time": time_column,
        }
        given = self._reader.read(histories, asked, all_positive)
        rows = given.rows
        allowed, notes = self._reader.allowed(filter_items, restrict_to)
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
            scores[block] = np.exp(found) if self.model.is_probability else found
        scores[ids == NO_ITEM] = np.nan
        return Lists(
            self._ids(ids), scores, given.users, given.read, (*given.notes, *notes), ids, self.items
        )

    def similar_items(
        self, item: Id, k: int, by: str | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids, scores) of the k items nearest to `item`, itself excepted.

        by `nease`: W[item, j], what having `item` adds to the logit of j. It is directed: a rare
        sequel may point at its famous first part and not the other way round. A list of "goes with"
        is wanted in just this direction. Of an ensemble, the members' weighted sum. by `decoder` or
        `latent`: cosine of the rows of R or Q, which is symmetric. The default is nease where the
        model has it, else decoder. ValueError for an unknown item or path.
        """
        _check_count("k", k)
        self.sources.check_unchanged()
        row = self._known_item(item)
        best = TopK(k)
        for first, scores_C in similar_to(self.sources, row, by):
            if first <= row < first + len(scores_C):
                scores_C[row - first] = -torch.inf
            best.update(scores_C[None], first)
        scores, ids = (t[0].numpy() for t in best.result())
        listed = ids != NO_ITEM
        return self._ids(ids[listed]), scores[listed]

    def explain(self, history: Iterable[Id], item: Id, n: int = 5) -> Explanation:
        """Which of the past items speak for `item`, and what the paths say.

        ValueError for an unknown item or no known history.
        """
        _check_count("n", n)
        self.sources.check_unchanged()
        row = self._known_item(item)
        refuse_frame(history, "history")
        rows = self._reader.read([history]).rows
        if rows.n_rows == 0 or not len(rows.items):
            raise ValueError(
                "no item of the history is known to the model; there is nothing to explain"
            )
        x = to_item_rows(rows, 1, self.n_items, torch.device("cpu"))
        return self._explain(self.model, x, row, n)

    def _explain(self, model: Model, x: ItemRows, row: int, n: int) -> Explanation:
        wanted = torch.zeros(self.n_items, dtype=torch.bool)
        wanted[row] = True
        score = next(s[0, row - lo] for lo, s in model.scores(x, wanted))
        pair = (torch.tensor([0]), torch.tensor([row]), score[None])
        told = explain_pairs(model, x, *pair, max(n, len(x.items)))
        reasons, rest, logit = [], 0.0, None
        if told.items_EN is not None:
            assert told.weights_EN is not None
            assert told.shallow_E is not None
            pairs = zip(told.items_EN[0].tolist(), told.weights_EN[0].tolist(), strict=True)
            past = [(i, weight) for i, weight in pairs if i != NO_ITEM]
            reasons = [Reason(self._id(i), weight, self._title(i)) for i, weight in past[:n]]
            rest, logit = sum(weight for _, weight in past[n:]), float(told.shallow_E[0])
        factors = (told.log_p_flvae_E, told.log_p_nease_E)
        p_flvae, p_nease = (None if p is None else float(p.exp()[0]) for p in factors)
        members: tuple[Explanation, ...] = ()
        if isinstance(model, Ensemble):
            members = tuple(self._explain(member, x, row, n) for member in model.members)
        return Explanation(
            item=self._id(row),
            title=self._title(row),
            p=float(score.exp()) if model.is_probability else None,
            p_flvae=p_flvae,
            p_nease=p_nease,
            logit=logit,
            reasons=reasons,
            rest=rest,
            members=members,
        )

    # --- what there is -----------------------------------------------------------------------

    @property
    def n_items(self) -> int:
        return self.model.n_items

    @property
    def positives(self) -> PositiveRule | None:
        """What makes an interaction of a history a positive; None where it is not known."""
        return self.sources.positives

    @property
    def vocabulary_sha256(self) -> str:
        """Identifies the catalogue: data of another one has another."""
        return self.sources.members[0].opened.header.vocabulary_sha256

    @property
    def is_probability(self) -> bool:
        """Whether scores are probabilities."""
        return self.model.is_probability

    def title(self, item: Id) -> str | None:
        """Return the title of an item, None if it has none; ValueError for an unknown item."""
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
        taken = self.items.ids.take(pa.array(flat, mask=flat < 0))
        return np.array([*taken.to_pylist(), None], object)[:-1].reshape(rows.shape)

    def _known_item(self, item: Id) -> int:
        row = int(self._reader.find([item], "item")[0])
        if row < 0:
            raise ValueError(
                f"item {item!r} is not one of the {self.n_items} items that the model was trained "
                "on"
            )
        return row


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

"""Lists, similar items and explanations of a trained model in Python, without a launcher or a GPU.

    from dist_vasp import Recommender
    r = Recommender.load("runs/mine")
    ids, scores = r.recommend([[17, 23], [5]], k=10)

Original ids come in and go out: ints where the vocabulary is numeric, else strings.

Shapes: U users, I items, K list length.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dist_vasp.data.positives import PositiveRule
from dist_vasp.extras import about_missing
from dist_vasp.model.trunk import Trunk
from dist_vasp.ranking.accepted import refuse_frame
from dist_vasp.ranking.evaluate import to_item_rows
from dist_vasp.ranking.explanation import explanation
from dist_vasp.ranking.export import export
from dist_vasp.ranking.export_ensemble import export_ensemble
from dist_vasp.ranking.given import GivenReader, HistoriesLike
from dist_vasp.ranking.held_out_pairs import evaluate_pairs, evaluate_shards
from dist_vasp.ranking.lists import Explanation, Id, Lists, ids_of, title_of
from dist_vasp.ranking.make_lists import make_lists
from dist_vasp.ranking.scoring import Ensemble
from dist_vasp.ranking.similar import similar_to
from dist_vasp.ranking.sources import Sources, open_sources
from dist_vasp.ranking.topk import NO_ITEM, TopK
from dist_vasp.ranking.vectors import item_vectors, user_vectors

# Ids for all users, ids for each history, or ids by user.
FilterLike = Iterable[Id] | Sequence[Iterable[Id]] | Mapping[Id, Iterable[Id]]


class Recommender:
    """A trained model, read only. Make one with `Recommender.load` or `Recommender.fit`."""

    def __init__(self, sources: Sources) -> None:
        self.sources, self.model, self.items = sources, sources.model, sources.items
        self._reader = GivenReader(sources.items, sources.positives)

    def __repr__(self) -> str:
        folder = str(self.sources.folder)
        return f"Recommender({self.sources.kind}, {self.n_items:,} items, {folder!r})"

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

    @staticmethod
    def fit(shards: str | Path, config: Any, run_dir: str | Path) -> Recommender:
        """Train a model in this process, and load it.

        shards: a data folder of `python -m data_tools.shard`. config: the path of a YAML file, such
        as configs/demo.yaml, or its sections as a mapping: `{"model": {"kind": "ease"}}`. run_dir:
        the folder of the run, as launch/train.py writes it. If it holds an interrupted run with
        this configuration, training resumes there; a finished run is loaded. Ctrl-C saves, and
        raises KeyboardInterrupt. ValueError for what a user can fix, such as a library that is
        missing.
        """
        try:
            from dist_vasp.training.in_process import train_here
        except ImportError as missing:
            how = about_missing(missing) or f"{missing}; install it with pip"
            raise ValueError(f"training needs a library that cannot be imported: {how}") from None
        train_here(shards, config, run_dir)
        return Recommender.load(run_dir)

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
        filter_items: FilterLike | None = None,
        restrict_to: FilterLike | None = None,
        *,
        empty: Literal["popularity"] | None = None,
        all_positive: bool = False,
        user_column: str | None = None,
        item_column: str | None = None,
        rating_column: str | None = None,
        time_column: str | None = None,
    ) -> Lists:
        """The k best items of every history, as launch/recommend.py ranks them.

        `ids, scores = r.recommend(...)`. histories: a list of lists of original ids, all of them
        likes; a SciPy sparse matrix (U, I) whose columns are item rows (non-zero: seen; ratings
        unless all of them are 1); or a table with the Arrow C interface, such as a data frame of
        pandas or polars. The table's columns are those that the shards were made from, else user
        and item, or the ones that are named here. Ratings follow the rule that the model was
        trained with (`positives`), unless `all_positive`. What a user has seen, liked or not, is
        not listed unless `mask_input` is False. Ids that the model does not know are ignored.

        `filter_items` are never listed; with `restrict_to` only those are. Both are a list of ids
        for all users, a list of ids for each history, or, where the histories are a table, a
        mapping of each user to ids. Users without a known like get no list, or with `empty`
        "popularity" the most popular items.

        ValueError for anything else, and where `restrict_to` has no known item.
        """
        _check_count("k", k)
        if empty not in (None, "popularity"):
            raise ValueError(f"empty is {empty!r:.40}, expected popularity or None")
        self.sources.check_unchanged()
        asked = {
            "user": user_column,
            "item": item_column,
            "rating": rating_column,
            "time": time_column,
        }
        given = self._reader.read(histories, asked, all_positive)
        listable = self._reader.listable(given, filter_items, restrict_to)
        popular = (given.rows.lengths == 0) & (empty is not None)
        scores, rows = make_lists(self.model, self.items, given, listable, k, mask_input, popular)
        notes = (*given.notes, *listable.notes)
        ids = ids_of(self.items, rows)
        return Lists(ids, scores, given.users, given.read, notes, popular, rows, self.items)

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
        return ids_of(self.items, ids[listed]), scores[listed]

    def item_vectors(self) -> np.ndarray:
        """(I, D) float32: a vector of each item, for an index of approximate search.

        Its inner product with `user_vectors` is the sum of the logits of the dense heads. Ranked by
        it, multvae, recvae, autorec, puresvd, and flvae with the multinomial loss have the lists of
        the model. For a product of sigmoids (flvae, vasp) and models with an items x items path
        (wide_deep) it gives candidates. ValueError for nease, ease and ensembles, which have no
        vectors.
        """
        self.sources.check_unchanged()
        return item_vectors(self.sources)

    def user_vectors(self, histories: HistoriesLike, all_positive: bool = False) -> np.ndarray:
        """(U, D) float32: a vector of each history; see `item_vectors`.

        The users of a table are in the order of `Lists.users`.
        """
        self.sources.check_unchanged()
        given = self._reader.read(histories, None, all_positive)
        return user_vectors(self.sources, given.rows)

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
        return explanation(self.model, self.items, x, row, n)

    # --- how good it is ----------------------------------------------------------------------

    def evaluate(
        self,
        data: str | Path | HistoriesLike,
        held_out: HistoriesLike | None = None,
        *,
        metrics: str | Sequence[str] = "",
        split: Literal["test", "validation"] = "test",
        all_positive: bool = False,
    ) -> dict[str, Any]:
        """The metrics of lists for held-out users, each with its standard error.

        data: a data folder, whose users of `split` are ranked as launch/evaluate.py ranks them; or
        histories, with the items that these users chose later as `held_out`. Both are then of one
        kind, as for `recommend`: tables are matched by user, lists and matrices by position. A user
        without a known like is ranked by what the model scores for an empty history. metrics: names
        beyond the default ones, such as "ndcg@10,hr@10". The result has the keys of result.json;
        of pairs also `n_unknown`, the held-out rows of items that the model does not know.

        ValueError where the data are of another catalogue, no user can be scored, or a held-out
        item is in its user's history.
        """
        self.sources.check_unchanged()
        names = metrics if isinstance(metrics, str) else ",".join(metrics)
        if isinstance(data, str | os.PathLike):
            if held_out is not None:
                raise ValueError(
                    f"data is the folder {data}, which has held-out items of its own; leave "
                    "held_out out, or pass histories"
                )
            return evaluate_shards(self.sources, Path(data), split, names)
        if held_out is None:
            raise ValueError(
                "held_out is missing; pass the items that the users of the histories chose later, "
                "or a data folder as data"
            )
        given = self._reader.read(data, None, all_positive)
        target = self._reader.read(held_out, None, all_positive)
        return evaluate_pairs(self.sources, given, target, names)

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
    def model_sha256(self) -> str:
        """Identifies the weights: another model has another."""
        return self.sources.sha256

    @property
    def is_probability(self) -> bool:
        """Whether scores are probabilities."""
        return self.model.is_probability

    def title(self, item: Id) -> str | None:
        """Return the title of an item, None if it has none; ValueError for an unknown item."""
        return title_of(self.items, self._known_item(item))

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

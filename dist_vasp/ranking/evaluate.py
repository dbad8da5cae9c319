"""Compute top-k lists and their metrics over a partitioned catalogue.

Each rank scores its items block by block and keeps its k best, so no rank holds a full row of
scores. Only lists of length k are exchanged and merged. Each replica ranks a part of the users.

Shapes: U users of a block, G padded users (a multiple of the partitions), I items, C columns of a
block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dist_vasp.config.metric_names import DEFAULT_METRICS, Metric
from dist_vasp.data.held_out import EvalBlock, evaluation_blocks
from dist_vasp.data.items import ItemTable, load_items
from dist_vasp.data.manifest import Manifest
from dist_vasp.data.rows import Rows
from dist_vasp.model.partitioned import PartitionedModel
from dist_vasp.model.sparse import ItemRows
from dist_vasp.model.step import TrunkCall
from dist_vasp.parallel.agree import agreed
from dist_vasp.parallel.comm import Ranks, all_gather, all_reduce
from dist_vasp.ranking.metrics import RankingMetrics
from dist_vasp.ranking.rating_errors import RatingErrors, WatchedScorer
from dist_vasp.ranking.topk import TopK, merge_topk
from dist_vasp.ranking.user_metrics import UserMetrics, self_information_of

# From the rows of users to (first item, scores (G, C)) of each block of this rank's items, in item
# order. The caller may overwrite the scores.
Scorer = Callable[[ItemRows], Iterator[tuple[int, Tensor]]]

USERS_PER_BLOCK = 512
GPU_USERS_PER_BLOCK = 2048  # fewer would leave it waiting for the host
_SELECT_COLUMNS = 2048  # blocks are joined to this width before selection


def model_scorer(model: PartitionedModel, trunk: TrunkCall | None) -> Scorer:
    """Scores are log p, as in the paper's ranking; those of ease are x B."""
    return partial(model.scores, trunk)


def popularity_scorer(items: ItemTable, ranks: Ranks) -> Scorer:
    """Score every item by its popularity among training users."""
    part = ranks.partition_of_items(len(items.popularity))
    counts_J = torch.from_numpy(items.popularity[part.start : part.stop].astype(np.float64)).to(
        ranks.device
    )

    def score(x: ItemRows) -> Iterator[tuple[int, Tensor]]:
        first = part.start
        for counts_C in counts_J.split(_SELECT_COLUMNS):
            yield first, counts_C.repeat(x.n_rows, 1)
            first += len(counts_C)

    return score


def to_item_rows(rows: Rows, n_rows: int, n_items: int, device: torch.device) -> ItemRows:
    """Return the rows on the device, padded to `n_rows` with empty rows."""
    indptr = np.concatenate([rows.indptr, np.full(n_rows - rows.n_rows, rows.indptr[-1])])
    real = torch.arange(n_rows, device=device) < rows.n_rows
    values = None if rows.values is None else torch.tensor(rows.values, device=device)
    return ItemRows(
        torch.from_numpy(indptr).to(device),
        torch.from_numpy(rows.items.astype(np.int64)).to(device),
        n_items,
        real,
        values,
    )


@torch.no_grad()
def top_items(
    scorer: Scorer,
    histories: Rows,
    k: int,
    n_items: int,
    ranks: Ranks,
    mask_input: bool = True,
    seen: Rows | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (scores, item rows) of each user's k best unseen items, (U, k) each, on every rank.

    Lists are in descending order of score, ties by item row, and padded with -inf and -1. Every
    rank of the partition group passes the same histories. With `mask_input` False, seen items may
    be listed, too. `seen`: all items the users have seen, if these are more than the histories. The
    scorer may skip blocks, whose items are then not listed.
    """
    partitions = ranks.layout.partitions
    n_rows = -(-max(histories.n_rows, 1) // partitions) * partitions
    x = to_item_rows(histories, n_rows, n_items, ranks.device)
    masked = (
        x
        if seen is None or seen is histories
        else to_item_rows(seen, n_rows, n_items, ranks.device)
    )
    best = TopK(k)
    waiting: list[Tensor] = []
    width = first = 0
    for lo, scores in scorer(x):
        if mask_input:
            scores[masked.positions(lo, lo + scores.shape[1])] = -torch.inf
        if waiting and lo != first + width:
            best.update(torch.cat(waiting, dim=1), first)
            waiting, width = [], 0
        first = first if waiting else lo
        waiting.append(scores)
        width += scores.shape[1]
        if width >= _SELECT_COLUMNS:
            best.update(torch.cat(waiting, dim=1), first)
            waiting, width = [], 0
    if waiting:
        best.update(torch.cat(waiting, dim=1), first)
    scores_UK, ids_UK = best.result()
    lists = [all_gather(t[None], ranks.partition_group) for t in (scores_UK, ids_UK)]
    scores_UK, ids_UK = merge_topk(list(lists[0]), list(lists[1]), k)
    n = histories.n_rows
    return scores_UK[:n].cpu().numpy(), ids_UK[:n].cpu().numpy()


def evaluate(
    scorer: Scorer,
    folder: str | Path,
    split: str,
    ranks: Ranks,
    progress: Callable[[int], None] | None = None,
    interrupted: Callable[[], bool] = lambda: False,
    recall_denominator: str = "min",
    each_block: Callable[[EvalBlock, np.ndarray], None] | None = None,
    manifest: Manifest | None = None,
    metrics: Sequence[Metric] = DEFAULT_METRICS,
    ratings: bool = False,
) -> RankingMetrics | None:
    """Return `metrics` of `split`, the same on every rank; None if interrupted.

    `each_block(users, their lists (U, K))`, K the longest list of the metrics, and then
    `progress(users done)` are called after each block. `interrupted()` is called on all ranks
    together before each block; True ends the evaluation. `manifest`: one that the caller has
    already read, so that shards replaced since then are an error. With `ratings` histories carry
    their ratings, and the scores are compared with the held-out ones (RMSE).
    AgreedError where a shard or the item table is damaged, or has no ratings.
    """
    manifest = manifest or Manifest.load(folder)
    with agreed(ranks):
        of_users = user_metrics(metrics, recall_denominator, folder, manifest)
    found, done = RankingMetrics(manifest.n_items, of_users), 0
    k = list_length(metrics, manifest.n_items)
    replicas = ranks.layout.replicas
    together = USERS_PER_BLOCK if ranks.device.type == "cpu" else GPU_USERS_PER_BLOCK
    size = together * replicas
    blocks = evaluation_blocks(folder, split, size, manifest=manifest, ratings=ratings)
    errors = RatingErrors(ranks.device) if ratings else None
    while True:
        with agreed(ranks):
            block = next(blocks, None)
        if block is None:
            if errors:
                found.add_ratings(*all_reduce(errors.sums, ranks.world).tolist())
            return found
        if interrupted():
            return None
        ids = _lists(scorer, block, k, manifest.n_items, ranks, errors)
        found.update(ids, block.held_out)
        if each_block:
            each_block(block, ids)
        done += len(block.user_keys)
        if progress:
            progress(done)


def list_length(metrics: Sequence[Metric], n_items: int) -> int:
    """Return the length of the lists that `metrics` need of a catalogue of `n_items`."""
    return min(max((metric.k for metric in metrics), default=1), max(n_items, 1))


def user_metrics(
    metrics: Sequence[Metric],
    recall_denominator: str,
    folder: str | Path,
    manifest: Manifest,
    items: ItemTable | None = None,
) -> UserMetrics:
    """Return what computes the metrics of each user; ValueError where the item table, which novelty
    needs, is damaged.

    `items`: the table of the folder, if the caller has read it.
    """
    information = None
    if any(metric.name == "novelty" for metric in metrics):
        popularity = (items or load_items(folder, manifest)).popularity
        information = self_information_of(popularity, manifest.splits["train"].users)
    return UserMetrics(metrics, recall_denominator, information)


def _lists(
    scorer: Scorer,
    block: EvalBlock,
    k: int,
    n_items: int,
    ranks: Ranks,
    errors: RatingErrors | None,
) -> np.ndarray:
    """Return the lists of the block's users, (U, k) item rows; each replica ranks some users.

    `errors` takes the scores of held-out ratings.
    """
    n_users, replicas = block.fold_in.n_rows, ranks.layout.replicas
    per_replica = -(-n_users // replicas)
    start = min(ranks.layout.replica_of(ranks.rank) * per_replica, n_users)
    stop = min(start + per_replica, n_users)
    mine = block.fold_in.slice(start, stop)
    if errors:
        held_out = block.held_out.slice(start, stop)
        rated = to_item_rows(held_out, held_out.n_rows, n_items, ranks.device)
        scorer = WatchedScorer(scorer, rated, errors)
    _, ids = top_items(scorer, mine, k, n_items, ranks)
    if replicas == 1:
        return ids
    padded = torch.full((per_replica, k), -1, dtype=torch.int64, device=ranks.device)
    padded[: len(ids)] = torch.from_numpy(ids).to(ranks.device)
    return all_gather(padded, ranks.replica_group)[:n_users].cpu().numpy()

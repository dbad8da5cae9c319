"""Write top-N lists with original ids to a file, block by block, explained on request.

Users without a list are written to `<output stem>.skipped.csv`, with the reason.

Shapes: U users of a block, K list length, E recommendations of a block, N reasons for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dist_vasp.data.items import ItemTable
from dist_vasp.model.sparse import ItemRows
from dist_vasp.parallel.agree import agree
from dist_vasp.parallel.comm import Ranks
from dist_vasp.places import Inputs
from dist_vasp.ranking.evaluate import Scorer, to_item_rows, top_items
from dist_vasp.ranking.explain import Explainer, Reasons
from dist_vasp.ranking.histories import NO_ITEM_LEFT, Histories, RowCounts
from dist_vasp.ranking.history_file import HistoryFile
from dist_vasp.ranking.writers import ListFile, skipped_file
from dist_vasp.text import one_line

# W is read once per block; 512 users took four times as long on a large W (docs/experiments.md)
USERS_PER_BLOCK = 2048


def list_schema(
    user_type: pa.DataType, item_type: pa.DataType, n_reasons: int = 0, titles: bool = False
) -> pa.Schema:
    """Return the columns of lists; with `titles` those of the items and of the reasons, too."""
    fields = [
        ("user", user_type),
        ("rank", pa.int32()),
        ("item", item_type),
        ("score", pa.float32()),
    ]
    if titles:
        fields.append(("title", pa.string()))
    if n_reasons:
        fields += [("p_flvae", pa.float32()), ("p_nease", pa.float32())]
    for n in range(1, n_reasons + 1):
        fields.append((f"because_{n}", item_type))
        fields += [(f"title_{n}", pa.string())] if titles else []
        fields.append((f"weight_{n}", pa.float32()))
    return pa.schema(fields)


def recommend_to_file(
    scorer: Scorer,
    histories: HistoryFile,
    items: ItemTable,
    k: int,
    output: str | Path,
    ranks: Ranks,
    progress: Callable[[int], None] | None = None,
    show: int = 0,
    to_score: Callable[[np.ndarray], np.ndarray] = np.exp,
    n_reasons: int = 0,
    explainer: Explainer | None = None,
    allowed: np.ndarray | None = None,
    keep_seen: bool = False,
    overwrite: bool | None = None,
    inputs: Inputs = (),
    titles: bool = False,
) -> str:
    """Write each user's k best unseen items; return lines on what was written, read and left out.

    The file appears when complete. It replaces earlier lists, unless `overwrite` is False, but no
    other file and none of `inputs`. A user gets fewer than k rows where fewer unseen items exist.

    progress: called with the number of users done. show: users whose history and list the lines
    include. to_score: from the scorer's values to `score`. n_reasons: past items that explain each
    row. allowed: (I,) bool, the items that may be listed; None: all. keep_seen: seen items may be
    listed, too. titles: write the titles of items, too.
    """
    output = Path(output)
    scorer = scorer if allowed is None else restricted(scorer, allowed, ranks)
    schema = list_schema(histories.user_type, items.ids.type, n_reasons, titles)
    file, error = None, None
    try:
        if ranks.is_main:
            file = ListFile(output, schema, histories.user_type, overwrite, inputs)
    except ValueError as raised:
        error = raised
    agree(error, ranks)
    report, n_items = _Report(histories.left_out, show), len(items.keys)
    try:
        for block in histories.blocks(items, USERS_PER_BLOCK):
            scores, rows = top_items(
                scorer, block.rows, k, n_items, ranks, not keep_seen, block.seen
            )
            reasons = None
            if explainer is not None and n_reasons:
                reasons = explain_lists(explainer, block, scores, rows, n_reasons, n_items, ranks)
            skipped, why = _without_list(block, rows)
            scores = to_score(scores)
            if file is not None:
                table = list_table(block.users, scores, rows, items, reasons, titles)
                file.write(table, skipped, why)
            report.add(block, len(skipped), scores, rows, items)
            if progress:
                progress(report.n_users)
        agree(report.error(histories, items), ranks)
        if file is not None:
            file.finish()
    finally:
        if file is not None:
            file.discard()
    return report.text(output, 0 if file is None else file.n_rows, keep_seen)


class _Report:
    """Counts of users and rows, and the lists of the first `show` users as text."""

    def __init__(self, left_out: RowCounts, show: int) -> None:
        self.n_users = 0
        self._n_skipped = 0
        self._n_ended = 0  # users with likes who have seen all items that may be listed
        self._rows = left_out
        self._show = show
        self._examples: list[str] = []

    def add(
        self,
        block: Histories,
        n_skipped: int,
        scores: np.ndarray,
        rows: np.ndarray,
        items: ItemTable,
    ) -> None:
        for u in range(min(block.n_users, self._show - len(self._examples))):
            self._examples.append(_example(block, u, scores[u], rows[u], items))
        self._n_ended += n_skipped - len(block.skipped)
        self._n_skipped += n_skipped
        self._rows += block.counts
        self.n_users += block.n_users + len(block.skipped)

    def error(self, histories: HistoryFile, items: ItemTable) -> ValueError | None:
        """Return the error for the case that no user has a list, else None."""
        if not self.n_users or self._n_skipped < self.n_users:
            return None
        n_known = self._rows.rows - self._rows.missing - self._rows.unknown
        return histories.no_list(items, n_known, self._n_ended)

    def text(self, output: Path, n_rows: int, keep_seen: bool) -> str:
        others = ""
        if self._n_skipped:
            others = (
                f"; {self._n_skipped:,} users without a list are in {skipped_file(output)}, with "
                "the reason"
            )
        n_listed = self.n_users - self._n_skipped
        written = f"{output}: {n_rows:,} recommendations for {n_listed:,} users{others}"
        return "\n".join([*self._examples, written, self._rows.line(keep_seen)])


def _without_list(block: Histories, rows: np.ndarray) -> tuple[pa.Array, pa.Array]:
    """Return the users of a block who get no list, and why.

    They have no like, or have seen all items that may be listed. rows: (U, K).
    """
    ended = block.users.filter(pa.array(~(rows >= 0).any(axis=1)))
    reasons = pa.repeat(pa.scalar(NO_ITEM_LEFT, pa.string()), len(ended))
    return pa.concat_arrays([block.skipped, ended]), pa.concat_arrays([block.reasons, reasons])


def restricted(scorer: Scorer, allowed: np.ndarray, ranks: Ranks) -> Scorer:
    """Return a scorer that lists only the items marked in `allowed`, (I,) bool."""
    allowed_I = torch.from_numpy(allowed).to(ranks.device)

    def score(x: ItemRows) -> Iterator[tuple[int, Tensor]]:
        for lo, scores_GC in scorer(x):
            scores_GC[:, ~allowed_I[lo : lo + scores_GC.shape[1]]] = -torch.inf
            yield lo, scores_GC

    return score


def explain_lists(
    explainer: Explainer,
    block: Histories,
    scores: np.ndarray,
    rows: np.ndarray,
    n: int,
    n_items: int,
    ranks: Ranks,
) -> Reasons:
    """Return the reasons for every listed item of a block, in the order of `list_table`."""
    partitions = ranks.layout.partitions
    n_padded = -(-max(block.n_users, 1) // partitions) * partitions
    x = to_item_rows(block.rows, n_padded, n_items, ranks.device)
    user, rank = np.nonzero(rows >= 0)
    user_E, item_E, score_E = (
        torch.from_numpy(a).to(ranks.device) for a in (user, rows[user, rank], scores[user, rank])
    )
    return explainer(x, user_E, item_E, score_E, n)


def list_table(
    users: pa.Array,
    scores: np.ndarray,
    rows: np.ndarray,
    items: ItemTable,
    reasons: Reasons | None = None,
    titles: bool = False,
) -> pa.Table:
    """Return lists (U, K) of item rows, padded with -1, as one table row per recommendation.

    titles: add the titles of items, null for an item without one.
    """
    user, rank = np.nonzero(rows >= 0)
    columns = [
        users.take(pa.array(user)),
        pa.array(rank + 1, pa.int32()),
        items.ids.take(pa.array(rows[user, rank])),
        pa.array(scores[user, rank].astype(np.float32)),
    ]
    if titles:
        columns.append(_titles(items, rows[user, rank]))
    if reasons is None:
        schema = list_schema(users.type, items.ids.type, titles=titles)
        return pa.Table.from_arrays(columns, schema=schema)
    for log_p in (reasons.log_p_flvae_E, reasons.log_p_nease_E):
        columns.append(
            pa.nulls(len(user), pa.float32())
            if log_p is None
            else pa.array(np.exp(log_p.cpu().numpy()))
        )
    assert reasons.items_EN is not None and reasons.weights_EN is not None, (
        "a model without a shallow path has no reasons"
    )
    for items_E, weights_E in zip(
        reasons.items_EN.T.cpu().numpy(), reasons.weights_EN.T.cpu().numpy(), strict=True
    ):
        columns.append(items.ids.take(pa.array(items_E, mask=items_E < 0)))
        if titles:
            columns.append(_titles(items, items_E))
        columns.append(pa.array(weights_E, mask=items_E < 0))
    n_reasons = reasons.items_EN.shape[1]
    schema = list_schema(users.type, items.ids.type, n_reasons, titles)
    return pa.Table.from_arrays(columns, schema=schema)


def _titles(items: ItemTable, rows: np.ndarray) -> pa.Array:
    """Return the titles of item rows, null for -1 and where there is none."""
    if items.titles is None:
        return pa.nulls(len(rows), pa.string())
    return items.titles.take(pa.array(rows, mask=rows < 0))


def _example(
    block: Histories,
    user: int,
    scores: np.ndarray,
    rows: np.ndarray,
    items: ItemTable,
    most: int = 10,
) -> str:
    """Return a user's history (popular items first) and list as text, with titles if known."""
    names = items.titles if items.titles is not None else items.ids
    first, last = block.rows.indptr[user], block.rows.indptr[user + 1]
    seen = [one_line(str(names[int(i)])) for i in block.rows.items[first : min(last, first + most)]]
    more = f" and {last - first - most} more" if last - first > most else ""
    listed = [
        f"{one_line(str(names[int(i)]))} ({s:.3f})"
        for s, i in zip(scores, rows, strict=True)
        if i >= 0
    ]
    return (
        f"user {one_line(str(block.users[user]))}\n  history  {', '.join(seen)}{more}\n  list     "
        f"{', '.join(listed)}"
    )

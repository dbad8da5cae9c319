"""Top-N lists with original ids, block by block: histories in, user, rank, item, score out,
explained where asked for.

Users without a list are in `<output stem>.skipped.csv` with the reason, never dropped silently.

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
from dist_vasp.ranking.histories import NO_ITEM_LEFT, Histories
from dist_vasp.ranking.history_file import HistoryFile
from dist_vasp.ranking.writers import ListFile, skipped_file
from dist_vasp.text import one_line

# W passes once for a block: 512 took four times as long on a large one (docs/experiments.md)
USERS_PER_BLOCK = 2048


def list_schema(user_type: pa.DataType, item_type: pa.DataType, n_reasons: int = 0) -> pa.Schema:
    fields = [
        ("user", user_type),
        ("rank", pa.int32()),
        ("item", item_type),
        ("score", pa.float32()),
    ]
    if n_reasons:
        fields += [("p_flvae", pa.float32()), ("p_nease", pa.float32())]
    for n in range(1, n_reasons + 1):
        fields += [(f"because_{n}", item_type), (f"weight_{n}", pa.float32())]
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
) -> str:
    """Write each user's k best unseen items block by block; returns lines on what was written, read
    and left out.

    allowed: (I,) bool, the items that may be listed; None for all. With `keep_seen` seen items may
    be listed too. With `show` the histories and lists of that many first users stand before the
    lines. With `n_reasons` every row says which past items speak for it most. `score` is `to_score`
    of what the scorer ranks by: p of a log p; a linear model's scores as they are. Fewer than k
    rows where fewer unseen items exist. The file appears when complete. Earlier lists are replaced
    (with `overwrite` False they are not), any other file and `inputs` never are.
    """
    output, file, error = Path(output), None, None
    done = n_skipped = n_ended = 0  # users; n_ended: with likes, but no item is left to list
    read = histories.left_out
    if allowed is not None:
        scorer = restricted(scorer, allowed, ranks)
    examples: list[str] = []
    try:
        if ranks.is_main:
            schema = list_schema(histories.user_type, items.ids.type, n_reasons)
            file = ListFile(output, schema, histories.user_type, overwrite, inputs)
    except ValueError as raised:
        error = raised
    agree(error, ranks)
    try:
        for block in histories.blocks(items, USERS_PER_BLOCK):
            scores, rows = top_items(
                scorer, block.rows, k, len(items.keys), ranks, not keep_seen, block.seen
            )
            reasons = None
            if explainer is not None and n_reasons:
                reasons = explain_lists(
                    explainer, block, scores, rows, n_reasons, len(items.keys), ranks
                )
            skipped, why = _without_list(block, rows)
            if file is not None:
                file.write(
                    list_table(block.users, to_score(scores), rows, items, reasons), skipped, why
                )
            for u in range(min(block.n_users, show - len(examples))):
                examples.append(_example(block, u, to_score(scores[u]), rows[u], items))
            n_ended += len(skipped) - len(block.skipped)
            n_skipped, read = n_skipped + len(skipped), read + block.read
            done += block.n_users + len(block.skipped)
            if progress:
                progress(done)
        n_known = read.rows - read.missing - read.unknown
        agree(histories.no_list(items, n_known, n_ended) if n_skipped == done > 0 else None, ranks)
        if file is not None:
            file.finish()
    finally:
        if file is not None:
            file.discard()
    others = (
        f"; {n_skipped:,} users without a list are in {skipped_file(output)}, with the reason"
        if n_skipped
        else ""
    )
    examples.append("")
    n_rows = file.n_rows if file is not None else 0
    return "\n".join(examples) + (
        f"{output}: {n_rows:,} recommendations for {done - n_skipped:,} "
        f"users{others}\n{read.line(keep_seen)}"
    )


def _without_list(block: Histories, rows: np.ndarray) -> tuple[pa.Array, pa.Array]:
    """The users of a block who get no list, and why: no like, or no item that may be listed is
    unseen. rows: (U, K)."""
    ended = block.users.filter(pa.array(~(rows >= 0).any(axis=1)))
    reasons = pa.repeat(pa.scalar(NO_ITEM_LEFT, pa.string()), len(ended))
    return pa.concat_arrays([block.skipped, ended]), pa.concat_arrays([block.reasons, reasons])


def restricted(scorer: Scorer, allowed: np.ndarray, ranks: Ranks) -> Scorer:
    """The scorer that lists only the items of `allowed`, (I,) bool."""
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
    """Reasons for every listed item of a block, in the order of `list_table`."""
    partitions = ranks.layout.partitions
    x = to_item_rows(
        block.rows, -(-max(block.n_users, 1) // partitions) * partitions, n_items, ranks.device
    )
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
) -> pa.Table:
    """Lists (U, K) of item rows, -1 where there is none, as a table of one row per recommendation."""
    user, rank = np.nonzero(rows >= 0)
    columns = [
        users.take(pa.array(user)),
        pa.array(rank + 1, pa.int32()),
        items.ids.take(pa.array(rows[user, rank])),
        pa.array(scores[user, rank].astype(np.float32)),
    ]
    if reasons is None:
        return pa.Table.from_arrays(columns, schema=list_schema(users.type, items.ids.type))
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
        columns.append(pa.array(weights_E, mask=items_E < 0))
    n_reasons = reasons.items_EN.shape[1]
    return pa.Table.from_arrays(columns, schema=list_schema(users.type, items.ids.type, n_reasons))


def _example(
    block: Histories,
    user: int,
    scores: np.ndarray,
    rows: np.ndarray,
    items: ItemTable,
    most: int = 10,
) -> str:
    """A user's history (popular items first) and list, by title where there are titles."""
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

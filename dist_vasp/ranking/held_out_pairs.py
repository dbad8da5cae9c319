"""Evaluate a mapped model on one process: on a data folder, or on histories and held-out items.

Shapes: U users.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_vasp.config.command_line import from_dict
from dist_vasp.config.metric_names import Metric, computed_metrics, parse_metrics
from dist_vasp.config.schema import RunConfig
from dist_vasp.data.ids import find
from dist_vasp.data.manifest import Manifest
from dist_vasp.data.rows import Rows, concatenate_rows, indptr_of
from dist_vasp.ranking.evaluate import USERS_PER_BLOCK, evaluate, list_length, top_items
from dist_vasp.ranking.given import Given
from dist_vasp.ranking.load import check_vocabulary
from dist_vasp.ranking.make_lists import one_rank
from dist_vasp.ranking.metrics import RankingMetrics
from dist_vasp.ranking.sources import Sources
from dist_vasp.ranking.user_metrics import UserMetrics


def evaluate_shards(sources: Sources, folder: Path, split: str, names: str) -> dict[str, Any]:
    """Return the metrics on the users of `split` in a data folder, as launch/evaluate.py does.

    names: metrics beyond the default ones; "": those of the run's configuration.
    """
    run = _run_config(sources)
    metrics = _metrics(names) or run.asked_metrics
    manifest = Manifest.load(folder)
    check_vocabulary(sources.members[0].opened.header, folder, manifest)
    if split not in manifest.splits or not manifest.splits[split].users:
        raise ValueError(
            f"{folder} has no {split} users; choose another split, or prepare the data with some"
        )
    found = evaluate(
        sources.model.scores,
        folder,
        split,
        one_rank(),
        recall_denominator=run.recall_denominator,
        manifest=manifest,
        metrics=computed_metrics(metrics),
    )
    assert found is not None
    return found.result()


def evaluate_pairs(sources: Sources, given: Given, held_out: Given, names: str) -> dict[str, Any]:
    """Return the metrics on histories and the items held out of them, and `n_unknown`."""
    run = _run_config(sources)
    metrics = _metrics(names)
    novelty = next((metric for metric in metrics if metric.name == "novelty"), None)
    if novelty is not None:
        raise ValueError(
            f"{novelty} needs the number of training users; leave it out, or pass a data folder"
        )
    metrics = metrics or tuple(m for m in run.asked_metrics if m.name != "novelty")
    metrics = computed_metrics(metrics)
    n_items = sources.model.n_items
    users = _matched(given, held_out)
    users.check_disjoint(n_items)
    found = RankingMetrics(n_items, UserMetrics(metrics, run.recall_denominator))
    k = list_length(metrics, n_items)
    for start in range(0, users.rows.n_rows, USERS_PER_BLOCK):
        rows, seen, target = users.slice(start, min(start + USERS_PER_BLOCK, users.rows.n_rows))
        _, ids = top_items(sources.model.scores, rows, k, n_items, one_rank(), seen=seen)
        found.update(ids, target)
    result = found.result()
    if not result["n_users"]:
        raise ValueError(
            "no user has a held-out item that the model knows; are the ids those of its catalogue?"
        )
    return result | {"n_unknown": held_out.read.unknown}


def _run_config(sources: Sources) -> RunConfig:
    return from_dict(sources.members[0].opened.header.config).run


def _metrics(names: str) -> tuple[Metric, ...]:
    return parse_metrics(names, "metrics")


@dataclass(frozen=True)
class _Users:
    """U users: what they like, all that they have seen, and what was held out."""

    rows: Rows
    seen: Rows
    target: Rows

    def slice(self, start: int, stop: int) -> tuple[Rows, Rows, Rows]:
        return (
            self.rows.slice(start, stop),
            self.seen.slice(start, stop),
            self.target.slice(start, stop),
        )

    def check_disjoint(self, n_items: int) -> None:
        """Raise ValueError where a held-out item is in its user's history: it is never listed."""
        seen, target = (rows.row_of * n_items + rows.items for rows in (self.seen, self.target))
        n_both = int(np.isin(target, seen).sum())
        if n_both:
            raise ValueError(
                f"{n_both:,} held-out items are also in the history of their user, and are never "
                "listed; leave them out of one of the two"
            )


def _matched(given: Given, held_out: Given) -> _Users:
    """Match tables by user, and other histories by position."""
    if given.users is None and held_out.users is None:
        n_users, n_targets = given.rows.n_rows, held_out.rows.n_rows
        if n_users != n_targets:
            raise ValueError(
                f"there are {n_users:,} histories, and held-out items of {n_targets:,} users; pass "
                "the same number of both, in the same order"
            )
        return _Users(given.rows, given.seen, held_out.rows)
    if given.users is None or held_out.users is None:
        raise ValueError(
            "one of the histories and held_out is a table with users, the other is not; pass two "
            "tables, or neither"
        )
    target_of = find(given.users, held_out.users)
    strangers = np.flatnonzero(find(held_out.users, given.users) < 0)
    target_of = np.concatenate([target_of, strangers])
    history_of = np.concatenate([np.arange(len(given.users)), np.full(len(strangers), -1)])
    return _Users(
        _taken(given.rows, history_of),
        _taken(given.seen, history_of),
        _taken(held_out.rows, target_of),
    )


def _taken(rows: Rows, order: np.ndarray) -> Rows:
    """Return the rows numbered in `order`, an empty row for -1."""
    empty = Rows(indptr_of(np.zeros(1, np.int64)), np.empty(0, np.int32))
    return concatenate_rows([rows, empty]).take(np.where(order < 0, rows.n_rows, order))

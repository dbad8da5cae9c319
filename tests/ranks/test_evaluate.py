"""Evaluation on every layout against a full ranking of the dense oracle's scores in double
precision."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from dist_vasp.data.held_out import evaluation_blocks
from dist_vasp.data.items import ItemTable, load_items
from dist_vasp.data.manifest import Manifest
from dist_vasp.model import slices
from dist_vasp.model.build import make_trunk
from dist_vasp.parallel.comm import Ranks, form_groups
from dist_vasp.parallel.partition import Layout
from dist_vasp.ranking import evaluate as module
from dist_vasp.ranking.evaluate import evaluate, model_scorer, popularity_scorer, top_items
from tests.oracles.dense import dense_rows
from tests.oracles.rounding import bounded, bounded_scores, each_within, same_list, within
from tests.support.make_shards import write_folder
from tests.support.partitioned import csr, dense_of, make_model, random_rows
from tests.support.ranks import run_ranks

N_ITEMS = 131  # more than a list of 100, divisible by none of 2 and 3
MODELS = [("vasp", "focal"), ("nease", "focal"), ("flvae", "multinomial")]
SEEN_ALMOST_ALL, SEEN_NOTHING, SEEN_ALL = 5, 6, 7  # test users with special histories
K = 20


def alone() -> Ranks:
    return form_groups(0, Layout(1, 1, 1), torch.device("cpu"))


def _users(n: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """(fold-in, held-out) of `n` users; every ninth has no target."""
    rows = random_rows(n, N_ITEMS, seed)
    rng = np.random.default_rng(seed)
    pairs = []
    for u, row in enumerate(rows):
        mixed = rng.permutation(row).tolist()
        n_target = 0 if u % 9 == 0 else 1 + len(mixed) // 3
        pairs.append((sorted(mixed[n_target:]), sorted(mixed[:n_target])))
    return pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluate")
    test = _users(41, 1)
    test[SEEN_ALMOST_ALL] = (list(range(3, N_ITEMS)), [0, 2])
    test[SEEN_NOTHING] = ([], [4, 5, 6])
    test[SEEN_ALL] = (list(range(N_ITEMS)), [])
    train = [
        [i % 40, 40 + i % 17, 90 + i % 3] for i in range(60)
    ]  # many items of equal popularity, many of none
    write_folder(
        path, train, _users(7, 2), test, n_items=N_ITEMS, users_per_shard=9, users_per_block=4
    )
    return path


def histories(folder, split: str) -> tuple[list[list[int]], list[list[int]]]:
    fold_in, held_out = [], []
    for block in evaluation_blocks(folder, split, 8):
        for side, rows in ((fold_in, block.fold_in), (held_out, block.held_out)):
            side += [
                rows.items[a:b].tolist() for a, b in zip(rows.indptr, rows.indptr[1:], strict=False)
            ]
    return fold_in, held_out


# --- the oracle -----------------------------------------------------------------------------------


def full_ranking(scores: np.ndarray, seen: list[list[int]]) -> list[list[int]]:
    """Every user's unseen items, best first, ties to the lower row."""
    return [
        [int(i) for i in np.lexsort((np.arange(len(row)), -row)) if int(i) not in set(items)]
        for row, items in zip(scores, seen, strict=True)
    ]


def metrics_of(ranking: list[list[int]], held_out: list[list[int]]) -> dict[str, float]:
    found: dict[str, list[float]] = {
        "ndcg@100": [],
        "ndcg@20": [],
        "recall@20": [],
        "recall@50": [],
    }
    for listed, target in zip(ranking, held_out, strict=True):
        if not target:
            continue
        for k in (20, 50):
            found[f"recall@{k}"].append(len(set(listed[:k]) & set(target)) / min(k, len(target)))
        for k in (20, 100):
            gain = sum(
                1 / math.log2(rank + 2) for rank, item in enumerate(listed[:k]) if item in target
            )
            found[f"ndcg@{k}"].append(
                gain / sum(1 / math.log2(rank + 2) for rank in range(min(k, len(target))))
            )
    out: dict[str, float] = {}
    for name, values in found.items():
        out |= {
            name: float(np.mean(values)),
            f"{name}_se": float(np.std(values, ddof=1) / np.sqrt(len(values))),
        }
    out["coverage@100"] = len({item for listed in ranking for item in listed[:100]}) / N_ITEMS
    return out | {
        "n_users": len(found["ndcg@100"]),
        "n_users_unscored": sum(not target for target in held_out),
    }


def dense_scores(kind: str, loss: str, seen: list[list[int]]) -> np.ndarray:
    """log p (U, I) of the same weights in double precision."""
    model = make_model(kind, N_ITEMS, alone(), loss, dtype=torch.float32)
    with torch.no_grad():
        x = dense_rows(seen, N_ITEMS, torch.float64)
        return dense_of(model, make_trunk(model.config, 5)).log_p(x, loss).numpy()


# --- models on every layout -----------------------------------------------------------------------


class Evaluated(NamedTuple):
    """What a rank has computed for one model."""

    test: dict
    validation: dict
    per_user: dict
    lists: tuple  # scores and ids of K items
    long_lists: tuple  # of more items than there are
    progress: list[int]


def _evaluate(ranks, folder):
    """Evaluate every model, and popularity, on small blocks."""
    slices.BLOCK_COLUMNS = 7
    module.USERS_PER_BLOCK = 8
    module._SELECT_COLUMNS = 20
    seen, _ = histories(folder, "test")
    found = {}
    for kind, loss in MODELS:
        model = make_model(kind, N_ITEMS, ranks, loss, dtype=torch.float32)
        scorer = model_scorer(model, make_trunk(model.config, 5))
        done: list[int] = []
        test = evaluate(scorer, folder, "test", ranks, done.append)
        validation = evaluate(scorer, folder, "validation", ranks)
        lists = top_items(scorer, csr(seen), K, N_ITEMS, ranks)
        long_lists = top_items(scorer, csr(seen), N_ITEMS + 9, N_ITEMS, ranks)
        found[kind] = Evaluated(
            test.result(), validation.result(), test.per_user(), lists, long_lists, done
        )
    popularity = popularity_scorer(load_items(folder, Manifest.load(folder)), ranks)
    found["popularity"] = (
        evaluate(popularity, folder, "test", ranks).result(),
        top_items(popularity, csr(seen), K, N_ITEMS, ranks),
    )
    return found


@pytest.fixture(scope="module")
def by_layout(folder):
    """What `_evaluate` found: by (ranks, replicas), a list over the ranks."""
    found = {
        (n, r): run_ranks(_evaluate, n, folder, replicas=r) for n, r in ((2, 1), (3, 1), (4, 2))
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "BLOCK_COLUMNS", 7)
        patch.setattr(module, "USERS_PER_BLOCK", 8)
        patch.setattr(module, "_SELECT_COLUMNS", 20)
        found[1, 1] = [_evaluate(alone(), folder)]
    return found


@pytest.mark.parametrize(("kind", "loss"), MODELS)
def test_metrics_equal_a_full_ranking_on_every_layout(folder, by_layout, kind, loss):
    for split in ("test", "validation"):
        seen, held_out = histories(folder, split)
        expected = bounded(
            lambda seen=seen, held_out=held_out: metrics_of(
                full_ranking(np.asarray(dense_scores(kind, loss, seen)), seen), held_out
            )
        )
        assert expected.exact["n_users_unscored"] > 0
        for layout, by_rank in by_layout.items():
            for found in by_rank:
                metrics = getattr(found[kind], split)
                assert metrics.keys() == expected.exact.keys()
                for name, value in metrics.items():
                    # a metric moves only where rounding decides the order of two items; it is a
                    # float64
                    within(value, expected, name, f"{layout} {split}", at_least=1e-12)
    _, held_out = histories(folder, "test")
    for by_rank in by_layout.values():
        per_user, done = by_rank[0][kind].per_user, by_rank[0][kind].progress
        assert all(
            (np.isnan(values) == [not target for target in held_out]).all()
            for values in per_user.values()
        )
        assert done == sorted(done) and done[-1] == len(held_out)


@pytest.mark.parametrize(("kind", "loss"), MODELS)
def test_lists_equal_a_full_ranking_and_do_not_depend_on_partitions(folder, by_layout, kind, loss):
    seen, _ = histories(folder, "test")
    expected, bounds = bounded_scores(lambda: dense_scores(kind, loss, seen))
    ranking = full_ranking(expected, seen)
    for by_rank in by_layout.values():
        for found in by_rank:
            result = found[kind]
            for (scores, ids), k in ((result.lists, K), (result.long_lists, N_ITEMS + 9)):
                assert scores.shape == ids.shape == (len(seen), k)
                for u, listed in enumerate(ranking):
                    n = min(k, len(listed))
                    same_list(ids[u, :n], listed[:n], expected[u], bounds[u], f"user {u}")
                    each_within(
                        scores[u, :n], expected[u, ids[u, :n]], bounds[u, ids[u, :n]], f"user {u}"
                    )
                    assert (ids[u, n:] == -1).all() and (scores[u, n:] == -np.inf).all()
                    assert not set(ids[u, :n].tolist()) & set(seen[u])
    assert (
        len(ranking[SEEN_ALMOST_ALL]) == 3
        and ranking[SEEN_ALL] == []
        and len(ranking[SEEN_NOTHING]) == N_ITEMS
    )


def test_popularity_is_exact_with_ties_to_the_lower_row(folder, by_layout):
    items: ItemTable = load_items(folder, Manifest.load(folder))
    seen, held_out = histories(folder, "test")
    counts = np.tile(items.popularity.astype(np.float64), (len(seen), 1))
    assert len(np.unique(items.popularity)) < 10, "no ties"
    ranking = full_ranking(counts, seen)
    expected = metrics_of(ranking, held_out)
    for by_rank in by_layout.values():
        for found in by_rank:
            metrics, (scores, ids) = found["popularity"]
            for name, value in expected.items():
                assert metrics[name] == pytest.approx(value, rel=1e-12), name
            for u, listed in enumerate(ranking):
                n = min(K, len(listed))
                assert ids[u, :n].tolist() == listed[:n]
                assert scores[u, :n].tolist() == items.popularity[listed[:n]].tolist()


# --- corners --------------------------------------------------------------------------------------


def test_no_users_at_all(folder):
    scorer = popularity_scorer(load_items(folder, Manifest.load(folder)), alone())
    scores, ids = top_items(scorer, csr([]), 4, N_ITEMS, alone())
    assert scores.shape == ids.shape == (0, 4)


def test_ranking_leaves_the_scorer_alone(folder):
    """Seen items are masked in scores of the ranking's own, even where there is a single user."""
    scorer = popularity_scorer(load_items(folder, Manifest.load(folder)), alone())
    for seen in ([[0, 1, 2], []], [[90, 91]], [[]]):
        _, ids = top_items(scorer, csr(seen), 5, N_ITEMS, alone())
        assert not set(seen[0]) & set(ids[0].tolist())
    assert ids[0].tolist() == [90, 91, 92, 40, 41]


def test_a_model_that_has_diverged(folder):
    model = make_model("nease", N_ITEMS, alone(), dtype=torch.float32)
    model.slices()[0].tensor[4, 9] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        evaluate(model_scorer(model, None), folder, "test", alone())


def test_the_split_is_named(folder):
    scorer = popularity_scorer(load_items(folder, Manifest.load(folder)), alone())
    with pytest.raises(ValueError, match="split is 'train', expected validation or test"):
        evaluate(scorer, folder, "train", alone())

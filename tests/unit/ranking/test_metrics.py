"""Metrics against a plain loop over users, and against values worked out by hand."""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_vasp.config.metric_names import computed_metrics, parse_metrics
from dist_vasp.data.rows import Rows
from dist_vasp.ranking.metrics import RankingMetrics, summary
from dist_vasp.ranking.user_metrics import (
    UserMetrics,
    hits,
    ndcg_at_k,
    recall_at_k,
    self_information_of,
)
from tests.oracles import metrics as oracle

KEYS = [
    f"{name}{suffix}"
    for name in ("ndcg@100", "ndcg@20", "recall@20", "recall@50")
    for suffix in ("", "_se")
] + ["coverage@100"]


def csr(rows) -> Rows:
    indptr = np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64)
    return Rows(indptr, np.array([i for r in rows for i in sorted(r)], np.int32))


def naive_recall(listed, target, k, denominator="min") -> float:
    if not target:
        return math.nan
    return sum(i in target for i in listed[:k]) / (
        len(target) if denominator == "held_out" else min(k, len(target))
    )


def naive_ndcg(listed, target, k) -> float:
    if not target:
        return math.nan
    dcg = sum(1 / math.log2(rank + 2) for rank, i in enumerate(listed[:k]) if i in target)
    return dcg / sum(1 / math.log2(rank + 2) for rank in range(min(k, len(target))))


@st.composite
def cases(draw) -> tuple[int, np.ndarray, list[set[int]]]:
    """(n_items, topk_ids padded with -1, targets); some targets empty."""
    n_items, n_users, width = (
        draw(st.integers(1, 160)),
        draw(st.integers(0, 6)),
        draw(st.integers(0, 120)),
    )
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    ids = np.full((n_users, width), -1, np.int64)
    targets = []
    for row in ids:
        n = random.integers(0, min(width, n_items) + 1)
        row[:n] = random.permutation(n_items)[:n]
        targets.append(
            set(random.permutation(n_items)[: random.integers(0, min(n_items, 70) + 1)].tolist())
        )
        if random.random() < 0.3:
            targets[-1] = set()
    return n_items, ids, targets


@settings(deadline=None)
@given(cases(), st.sampled_from([1, 3, 20, 50, 100]))
def test_metrics_equal_the_plain_loop(case, k):
    _, ids, targets = case
    held_out = csr(targets)
    expected_hits = [
        [bool(i in t) for i in row] for row, t in zip(ids.tolist(), targets, strict=True)
    ]
    assert hits(ids, held_out).tolist() == expected_hits
    for metric, naive in ((recall_at_k, naive_recall), (ndcg_at_k, naive_ndcg)):
        expected = [naive(row, t, k) for row, t in zip(ids.tolist(), targets, strict=True)]
        np.testing.assert_allclose(
            metric(hits(ids, held_out), held_out, k), np.array(expected), rtol=1e-12
        )


@settings(deadline=None)
@given(cases(), st.integers(1, 4), st.sampled_from(["min", "held_out"]))
def test_result_over_blocks(case, users_per_block, denominator):
    n_items, ids, targets = case
    metrics = RankingMetrics(n_items, UserMetrics(recall_denominator=denominator))
    for start in range(0, len(ids), users_per_block):
        metrics.update(
            ids[start : start + users_per_block], csr(targets[start : start + users_per_block])
        )
    result = metrics.result()
    assert list(result) == [*KEYS, "n_users", "n_users_unscored"]
    scored = [(row, t) for row, t in zip(ids.tolist(), targets, strict=True) if t]
    assert (result["n_users"], result["n_users_unscored"]) == (len(scored), len(ids) - len(scored))
    values = metrics.per_user()
    assert [len(v) for v in values.values()] == [len(ids)] * 4
    if not scored:
        assert all(result[key] is None for key in KEYS)
        return
    recall = partial(naive_recall, denominator=denominator)
    for name, naive, k in (
        ("ndcg@100", naive_ndcg, 100),
        ("ndcg@20", naive_ndcg, 20),
        ("recall@20", recall, 20),
        ("recall@50", recall, 50),
    ):
        expected = np.array([naive(row, t, k) for row, t in scored])
        assert result[name] == pytest.approx(expected.mean(), rel=1e-12)
        if len(scored) < 2:
            assert result[f"{name}_se"] is None
        else:
            assert result[f"{name}_se"] == pytest.approx(
                expected.std(ddof=1) / math.sqrt(len(scored)), rel=1e-9, abs=1e-15
            )
        np.testing.assert_array_equal(np.isnan(values[name]), [not t for t in targets])
    listed = {i for row in ids.tolist() for i in row[:100] if i >= 0}
    assert result["coverage@100"] == pytest.approx(len(listed) / n_items)
    json.dumps(result, allow_nan=False)


def test_by_hand():
    ids = np.array([[7, 2, 9, -1], [1, 2, 3, 4]])
    held_out = csr([{2, 5}, {4}])
    hit = hits(ids, held_out)
    np.testing.assert_allclose(recall_at_k(hit, held_out, 4), [0.5, 1.0])
    np.testing.assert_allclose(recall_at_k(hit, held_out, 1), [0.0, 0.0])
    np.testing.assert_allclose(recall_at_k(hit, held_out, 1, "held_out"), [0.0, 0.0])
    ideal = 1 + 1 / math.log2(3)
    np.testing.assert_allclose(
        ndcg_at_k(hit, held_out, 4), [1 / math.log2(3) / ideal, 1 / math.log2(5)]
    )
    more = csr([{2, 7, 5, 6}, {1}])
    hit = hits(ids, more)
    np.testing.assert_allclose(recall_at_k(hit, more, 1, "held_out"), [0.25, 1.0])
    np.testing.assert_allclose(recall_at_k(hit, more, 1), [1.0, 1.0])


def test_padding_hits_nothing_at_the_border_of_two_rows():
    # -1 of the second user, as a flat position, is the last item of the first user's row
    assert not hits(np.array([[0], [-1]]), csr([{9}, {0}])).any()
    assert not hits(np.array([[8], [-1]]), csr([{9}, {9}])).any()


def test_a_perfect_list_scores_one_for_long_and_short_targets():
    ids = np.tile(np.arange(100), (2, 1))
    metrics = RankingMetrics(200)
    metrics.update(ids, csr([set(range(3)), set(range(150))]))
    result = metrics.result()
    assert [result[k] for k in ("ndcg@100", "recall@20", "recall@50")] == pytest.approx([1, 1, 1])
    assert result["coverage@100"] == 0.5


def test_only_the_first_hundred_count_for_coverage():
    metrics = RankingMetrics(400)
    metrics.update(np.arange(300)[None], csr([{250}]))
    assert metrics.result()["coverage@100"] == 0.25
    assert metrics.result()["ndcg@100"] == 0


# --- every metric by name -------------------------------------------------------------------------

OF_TARGET = {
    "ndcg": oracle.ndcg,
    "recall": oracle.recall,
    "precision": oracle.precision,
    "hr": oracle.hr,
    "mrr": oracle.mrr,
    "map": oracle.average_precision,
}
OF_LISTS = ("coverage", "gini", "diversity")


@settings(deadline=None)
@given(cases(), st.sampled_from([1, 2, 5, 30, 200]), st.integers(0, 2**31))
def test_every_metric_equals_its_definition(case, k, seed):
    """Empty targets, empty lists, and lists that are shorter than k and padded with -1."""
    n_items, ids, targets = case
    popularity = np.random.default_rng(seed).integers(0, 9, n_items)
    asked = parse_metrics(
        ",".join(f"{name}@{k}" for name in (*OF_TARGET, "novelty", *OF_LISTS)), ""
    )
    of_users = UserMetrics(asked, "min", self_information_of(popularity, 12))
    metrics = RankingMetrics(n_items, of_users)
    for start in range(0, len(ids), 2):
        metrics.update(ids[start : start + 2], csr(targets[start : start + 2]))
    lists = [[item for item in row if item >= 0] for row in ids.tolist()]
    expected = {
        f"{name}@{k}": [
            function(listed, target, k) for listed, target in zip(lists, targets, strict=True)
        ]
        for name, function in OF_TARGET.items()
    }
    bits = [oracle.novelty(listed, popularity.tolist(), 12, k) for listed in lists]
    expected[f"novelty@{k}"] = bits
    found = metrics.per_user()
    assert list(found) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], np.array(values, float), rtol=1e-12, atol=1e-14)
    result = metrics.result()
    if not any(targets):
        assert all(result[str(metric)] is None for metric in asked)
        return
    assert result[f"coverage@{k}"] == pytest.approx(oracle.coverage(lists, n_items, k))
    assert result[f"gini@{k}"] == pytest.approx(oracle.gini(lists, n_items, k), abs=1e-12)
    diversity = oracle.diversity(lists, k)
    assert result[f"diversity@{k}"] == (
        None if diversity is None else pytest.approx(diversity, abs=1e-12)
    )
    known = [value for value in bits if value is not None]
    assert result[f"novelty@{k}"] == (pytest.approx(np.mean(known)) if known else None)
    json.dumps(result, allow_nan=False)


def test_metrics_of_lists_by_hand():
    asked = parse_metrics("gini@2,diversity@2,coverage@2,novelty@2", "")
    of_users = UserMetrics(asked, "min", self_information_of(np.array([8, 4, 1, 0]), 8))
    same, other = RankingMetrics(4, of_users), RankingMetrics(4, of_users)
    same.update(np.array([[0, 1], [1, 0], [0, 1]]), csr([{0}, {0}, {0}]))
    other.update(np.array([[0, 1], [2, 3]]), csr([{0}, {0}]))
    one, two = same.result(), other.result()
    assert (one["diversity@2"], two["diversity@2"]) == (0, 1)
    # counts 0 0 3 3: (-3 0 - 1 0 + 1 3 + 3 3) / (3 6)
    assert (one["gini@2"], two["gini@2"]) == (pytest.approx(2 / 3), 0)
    assert (one["coverage@2"], two["coverage@2"]) == (0.5, 1)
    # bits 0, 1, 3 and 3, for an item without a user counts as having one
    assert (one["novelty@2"], two["novelty@2"]) == (pytest.approx(0.5), pytest.approx(1.75))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ndgc@10", "'ndgc@10' is not a metric; did you mean ndcg@10? expected NAME@K"),
        ("Recall@20", "did you mean recall@20?"),
        ("recal", "did you mean recall@10?"),
        ("recall@0", "did you mean recall@10?"),
        ("xyz@5", "'xyz@5' is not a metric; expected NAME@K"),
        ("ndcg@10,,hr@5", "'' is not a metric"),
        ("ndcg@10001", "asks for lists of more than 10000 items"),
    ],
)
def test_wrong_names(text, message):
    with pytest.raises(ValueError, match=r"^--metrics: ") as error:
        parse_metrics(text, "--metrics")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_names_are_taken_once_and_after_the_default_ones():
    asked = parse_metrics(" hr@5, ndcg@100 ,hr@5", "")
    assert [str(metric) for metric in asked] == ["hr@5", "ndcg@100"]
    assert [str(metric) for metric in computed_metrics(asked)] == [
        *("ndcg@100", "ndcg@20", "recall@20", "recall@50", "coverage@100", "hr@5")
    ]
    assert parse_metrics("", "") == ()


def test_summary_shows_what_was_asked_for():
    asked = parse_metrics("map@2,gini@2", "")
    metrics = RankingMetrics(4, UserMetrics(computed_metrics(asked)))
    metrics.update(np.array([[0, 1, 2, 3]] * 2), csr([{0}, {1}]))
    assert summary(metrics.result(), asked) == "MAP@2 0.7500 +- 0.2500, Gini@2 0.667 (2 users)"
    assert summary(metrics.result()).startswith("NDCG@100 0.8155 +- 0.1845, Recall@20 1.0000")

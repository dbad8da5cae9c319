"""Exact top-k with the lowest item row first among equal scores, against a plain sort."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_vasp.ranking.topk import TopK, local_topk, merge_topk

INF = math.inf


def naive(scores: torch.Tensor, k: int, item_offset: int = 0) -> list[list[tuple[float, int]]]:
    """Per user the k best (score, id), padded with (-inf, -1)."""
    out = []
    for row in scores.tolist():
        ranked = sorted((-s, j + item_offset) for j, s in enumerate(row) if s > -INF)[:k]
        out.append([(-s, j) for s, j in ranked] + [(-INF, -1)] * (k - len(ranked)))
    return out


def pairs(lists: tuple[torch.Tensor, torch.Tensor]) -> list[list[tuple[float, int]]]:
    scores, ids = lists
    assert ids.dtype == torch.int64
    return [
        list(zip(s, i, strict=True)) for s, i in zip(scores.tolist(), ids.tolist(), strict=True)
    ]


@st.composite
def tied_scores(draw) -> torch.Tensor:
    """Few distinct values, -inf and both zeros among them."""
    n_users, n_items, seed = (
        draw(st.integers(0, 5)),
        draw(st.integers(1, 40)),
        draw(st.integers(0, 2**31)),
    )
    values = draw(
        st.lists(st.sampled_from([-INF, -2.0, -0.0, 0.0, 0.5, 3.0, INF]), min_size=1, max_size=7)
    )
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(values), (n_users, n_items), generator=generator)
    return torch.tensor(values, dtype=draw(st.sampled_from([torch.float32, torch.float64])))[index]


@settings(deadline=None, max_examples=300)
@given(tied_scores(), st.integers(1, 45), st.integers(0, 7))
def test_local_topk_equals_a_plain_sort(scores, k, item_offset):
    before = scores.clone()
    found = local_topk(scores, k, item_offset)
    assert found[0].dtype == scores.dtype
    assert pairs(found) == naive(scores, min(k, scores.shape[1]), item_offset)
    assert torch.equal(scores, before)


@settings(deadline=None, max_examples=200)
@given(
    tied_scores(),
    st.integers(1, 45),
    st.lists(st.integers(0, 40), max_size=4),
    st.randoms(use_true_random=False),
)
def test_partitions_and_blocks_change_nothing(scores, k, cuts, random):
    n_items = scores.shape[1]
    bounds = sorted({0, n_items, *(c for c in cuts if c < n_items)})
    pieces = list(pairwise(bounds))
    expected = naive(scores, k)

    streaming = TopK(k)
    for start, stop in pieces:
        streaming.update(scores[:, start:stop], start)
    assert pairs(streaming.result()) == expected

    random.shuffle(pieces)
    parts = [local_topk(scores[:, start:stop], k, start) for start, stop in pieces]
    assert pairs(merge_topk([s for s, _ in parts], [i for _, i in parts], k)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_rows_with_and_without_ties(dtype):
    generator = torch.Generator().manual_seed(0)
    smooth = torch.randn(6, 3000, generator=generator, dtype=dtype)
    counts = torch.randint(0, 5, (6, 3000), generator=generator).to(
        dtype
    )  # as popularity: hundreds of ties at the border
    equal = torch.zeros(2, 3000, dtype=dtype)
    mixed = torch.cat([smooth, counts, equal, equal - INF])
    assert pairs(local_topk(mixed, 100)) == naive(mixed, 100)
    streaming = TopK(100)
    for start in range(0, 3000, 257):
        streaming.update(mixed[:, start : start + 257], start)
    assert pairs(streaming.result()) == naive(mixed, 100)


def test_blocks_with_a_gap_empty_and_narrow_ones():
    streaming = TopK(3)
    streaming.update(torch.empty(1, 0), 0)
    streaming.update(torch.tensor([[1.0]]), 4)
    streaming.update(torch.tensor([[-INF, 1.0]]), 10)
    assert pairs(streaming.result()) == [[(1.0, 4), (1.0, 11), (-INF, -1)]]


def test_fewer_items_than_k_is_shorter_locally_and_padded_by_the_merge():
    scores = torch.tensor([[1.0, -INF, 2.0]])
    assert pairs(local_topk(scores, 5, 10)) == [[(2.0, 12), (1.0, 10), (-INF, -1)]]
    assert pairs(merge_topk(*([part] for part in local_topk(scores, 5, 10)), 5)) == [
        [(2.0, 12), (1.0, 10)] + [(-INF, -1)] * 3
    ]


def test_no_columns_and_no_users():
    assert local_topk(torch.empty(3, 0), 4)[1].shape == (3, 0)
    assert local_topk(torch.empty(0, 9), 4)[1].shape == (0, 4)


def test_nan_is_an_error():
    scores = torch.zeros(3, 10)
    scores[1, 7] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        local_topk(scores, 2)


def test_on_an_accelerator():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(0, 9, (7, 500), generator=generator).float()
    assert pairs(local_topk(scores.cuda(), 50)) == naive(scores, 50)

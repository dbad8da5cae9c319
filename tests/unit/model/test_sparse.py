"""Rows of item ids against dense zeros and ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_vasp.kernels.interface import PLAIN
from dist_vasp.model.sparse import ItemRows, gather_rows
from tests.oracles.dense import dense_rows
from tests.support.partitioned import csr, random_rows, share
from tests.support.ranks import run_ranks

rows_of_items = st.lists(
    st.sets(st.integers(0, 12), max_size=13).map(sorted), min_size=1, max_size=8
)


def item_rows(rows: list[list[int]], n_items: int) -> ItemRows:
    sparse = csr(rows)
    real = torch.ones(len(rows), dtype=torch.bool)
    return ItemRows(
        torch.from_numpy(sparse.indptr), torch.from_numpy(sparse.items).long(), n_items, real
    )


@settings(deadline=None)
@given(rows_of_items, st.integers(0, 4), st.sampled_from([torch.float32, torch.float64]))
def test_sum_rows_is_a_dense_product(rows, width, dtype):
    table = torch.randn(13, width + 1, generator=torch.Generator().manual_seed(width), dtype=dtype)
    x = item_rows(rows, 13)
    found = PLAIN.sum_rows(table, x.items, x.indptr)
    assert found.dtype == dtype
    torch.testing.assert_close(found, dense_rows(rows, 13, dtype) @ table)


def test_sum_rows_of_nothing():
    table, nothing = torch.ones(3, 2), torch.zeros(0, dtype=torch.int64)
    assert torch.equal(
        PLAIN.sum_rows(table, nothing, torch.zeros(5, dtype=torch.int64)), torch.zeros(4, 2)
    )
    assert PLAIN.sum_rows(table, nothing, torch.zeros(1, dtype=torch.int64)).shape == (0, 2)
    assert PLAIN.sum_rows(torch.empty(0, 2), nothing, torch.zeros(3, dtype=torch.int64)).shape == (
        2,
        2,
    )


@settings(deadline=None, max_examples=200)
@given(rows_of_items, st.integers(0, 13), st.integers(0, 13))
def test_ranges_of_items_equal_dense_slices(rows, a, b):
    lo, hi = min(a, b), max(a, b)
    x, dense = item_rows(rows, 13), dense_rows(rows, 13, torch.float64)
    assert x.n_rows == len(rows)
    assert x.lengths.tolist() == [len(row) for row in rows]
    assert x.row_of.tolist() == [b for b, row in enumerate(rows) for _ in row]

    found = torch.zeros(len(rows), hi - lo, dtype=torch.float64)
    positions = x.positions(lo, hi)
    found[positions] += 1
    assert torch.equal(found, dense[:, lo:hi])
    assert len(positions[0]) == dense[:, lo:hi].sum()

    ids, indptr = x.restricted(lo, hi)
    assert [ids[s:e].tolist() for s, e in itertools.pairwise(indptr)] == [
        [item - lo for item in row if lo <= item < hi] for row in rows
    ]

    ids, indptr = x.rows_by_item(lo, hi)
    assert [ids[s:e].tolist() for s, e in itertools.pairwise(indptr)] == [
        [b for b, row in enumerate(rows) if item in row] for item in range(lo, hi)
    ]


@pytest.mark.parametrize("n_rows", [1, 4])
def test_no_interactions_at_all(n_rows):
    x = item_rows([[]] * n_rows, 6)
    assert x.lengths.tolist() == [0] * n_rows
    assert [len(t) for t in x.positions(1, 5)] == [0, 0]
    assert x.restricted(0, 6)[1].tolist() == [0] * (n_rows + 1)
    assert x.rows_by_item(0, 6)[1].tolist() == [0] * 7
    assert torch.equal(
        PLAIN.sum_rows(torch.ones(n_rows, 2), *x.rows_by_item(0, 6)), torch.zeros(6, 2)
    )


# --- gathered over ranks --------------------------------------------------------------------------

N_ITEMS = 19
CASES = {
    "uneven": (
        random_rows(11, N_ITEMS, 1, empty=(0, 4, 10)),
        random_rows(11, N_ITEMS, 2, empty=(0, 5)),
    ),
    "nothing": ([[]] * 5, [[]] * 5),
    "one row": ([[3, 4]], [[]]),
    "no rows": ([], []),
}


def _gather(ranks):
    found = {}
    for name, (x, y) in CASES.items():
        mine, padded = share(len(x), ranks)
        padded += 2  # more padding than any rank needs
        n = mine.stop - mine.start
        for sides in ([x, y], [y]):
            gathered = gather_rows(
                [csr(rows[mine]) for rows in sides],
                n,
                padded,
                N_ITEMS,
                ranks.partition_group,
                ranks.device,
            )
            found[name, len(sides)] = [
                (
                    g.indptr.numpy(),
                    g.items.numpy(),
                    g.real_rows.numpy(),
                    g.n_items,
                    str(g.indptr.dtype),
                    str(g.items.dtype),
                )
                for g in gathered
            ]
    return found


@pytest.mark.parametrize("world_size", [1, 3])
def test_gather_rows_equals_dense(world_size):
    for found in run_ranks(_gather, world_size):
        for name, (x, y) in CASES.items():
            for sides in ([x, y], [y]):
                assert len(found[name, len(sides)]) == len(sides)
                for rows, (indptr, items, real, n_items, *dtypes) in zip(
                    sides, found[name, len(sides)], strict=True
                ):
                    assert n_items == N_ITEMS
                    assert dtypes == ["torch.int64", "torch.int64"]
                    assert real.sum() == len(rows)
                    assert len(real) == len(indptr) - 1
                    listed = [items[a:b].tolist() for a, b in itertools.pairwise(indptr)]
                    # ranks hold consecutive rows, so the real rows are the rows in order; padding
                    # is empty
                    assert [
                        row for row, is_real in zip(listed, real, strict=True) if is_real
                    ] == rows
                    assert all(
                        row == [] for row, is_real in zip(listed, real, strict=True) if not is_real
                    )
                    np.testing.assert_array_equal(indptr[-1], len(items))

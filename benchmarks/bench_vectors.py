"""Recall of approximate search by item vectors against exact lists: python -m
benchmarks.bench_vectors --run RUN --shards SHARDS (needs `pip install usearch`)

For the test users of SHARDS: which share of the model's exact k best unseen items is among the
candidates that usearch finds by inner product. `exact` is the same search without an index, which
shows what the vectors themselves lose; `index` adds what the graph loses.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import scipy.sparse
from usearch.index import Index

from dist_vasp import Recommender
from dist_vasp.data.held_out import evaluation_blocks
from dist_vasp.data.rows import Rows


def recall(candidates: np.ndarray, exact: np.ndarray) -> float:
    """Return the share of `exact` (U, K), padded with -1, that is among `candidates` (U, C)."""
    found = [
        np.isin(row[row >= 0], some).sum() for row, some in zip(exact, candidates, strict=True)
    ]
    return sum(found) / int((exact >= 0).sum())


def matrix(rows: Rows, n_items: int) -> scipy.sparse.csr_matrix:
    ones = np.ones(len(rows.items), np.float32)
    return scipy.sparse.csr_matrix((ones, rows.items, rows.indptr), (rows.n_rows, n_items))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", required=True)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--candidates", default="20,100,200,500,1000")
    arguments = parser.parse_args()
    r = Recommender.load(arguments.run)
    rows = next(evaluation_blocks(arguments.shards, "test", 100_000)).fold_in
    histories = matrix(rows, r.n_items)
    exact = r.recommend(histories, arguments.k).rows
    items, users = r.item_vectors(), r.user_vectors(histories)
    begin = time.perf_counter()
    index = Index(ndim=items.shape[1], metric="ip", dtype="f32")
    index.add(np.arange(len(items)), items)
    built = time.perf_counter() - begin
    scores = users @ items.T
    longest = int(rows.lengths.max())
    print(f"{r!r}: {len(users)} users, {items.shape[1]} numbers a vector, index in {built:.1f} s")
    print(f"candidates  recall@{arguments.k} exact  index")
    for n in (int(text) for text in arguments.candidates.split(",")):
        # what the user has seen is found, too, and left out afterwards
        asked = min(n + longest, len(items))
        best = np.argsort(-scores, axis=1)[:, :asked]
        found = index.search(users, asked).keys
        unseen = [
            [row[~np.isin(row, rows.items[rows.indptr[u] : rows.indptr[u + 1]])][:n]
             for u, row in enumerate(some.astype(np.int64))]
            for some in (best, found)
        ]  # fmt: skip
        padded = [
            np.stack([np.pad(row, (0, n - len(row)), constant_values=-1) for row in some])
            for some in unseen
        ]
        of_exact, of_index = (recall(some, exact) for some in padded)
        print(f"{n:10}  {of_exact:15.4f}  {of_index:.4f}")


if __name__ == "__main__":
    main()

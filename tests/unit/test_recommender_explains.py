"""The Python interface: explanations and similar items, held against the dense oracle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_vasp import Recommender
from dist_vasp.config.schema import Config, ModelConfig
from dist_vasp.model.build import build_model
from dist_vasp.parallel.comm import form_groups
from dist_vasp.parallel.partition import Layout
from dist_vasp.ranking.scoring import TrainedModel
from tests.oracles.dense import dense_rows
from tests.oracles.rounding import SAFETY, UNIT, bounded, bounded_scores, each_within, gamma
from tests.support.recommender_runs import (
    HISTORY_ROWS,
    KINDS,
    N_ITEMS,
    NUMBERS,
    K,
    a_run,
    dense_lists,
    ids_of,
    unpadded,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("partitions", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_explanations_add_up(runs, kind, partitions):
    path, dense = a_run(runs, kind, partitions)
    r = Recommender.load(path)
    for row in HISTORY_ROWS:
        exact = bounded(lambda row=row: dense.factors(dense_rows([row], N_ITEMS, torch.float64)))
        for item in (0, 11, 24, 36):
            found = r.explain([NUMBERS[i] for i in row] + [4], NUMBERS[item], n=4)

            def close(value, name, item=item, exact=exact):
                each_within(
                    value, exact.exact[name][item], exact.each[name][item], f"{kind} {name}"
                )

            assert found.item == NUMBERS[item]
            close(found.p, "p")
            if kind == "flvae":
                assert (found.reasons, found.logit, found.p_nease, found.p_flvae) == (
                    [],
                    None,
                    None,
                    found.p,
                )
                continue
            W = dense.parameters["output.nease.weight"].detach()
            expected = sorted(
                ((float(W[i, item]), NUMBERS[i]) for i in row), key=lambda pair: (-pair[0], pair[1])
            )
            # a weight is a number of the file, so it comes back as it is
            assert [(reason.weight, reason.item) for reason in found.reasons] == expected[:4]
            close(sum(reason.weight for reason in found.reasons) + found.rest, "logit")
            close(found.logit, "logit")
            close(found.p_nease, "p_nease")
            if kind == "vasp":
                close(found.p_flvae, "p_flvae")
                close(found.p_flvae * found.p_nease, "p")
            else:
                assert found.p_flvae is None
                close(found.p_nease, "p")


def test_similar_items_on_planted_clusters(runs):
    """Items come in clusters of 4: those of one cluster speak for each other and have one direction
    in R."""
    path, _ = a_run(runs, "vasp", 2)
    r = Recommender.load(path)
    random = np.random.default_rng(0)
    cluster = np.arange(N_ITEMS) % 9
    directions = random.normal(size=(9, 6))

    def rows(lo: int, hi: int) -> np.ndarray:
        scale = random.uniform(0.5, 9, (hi - lo, 1))
        return (directions[cluster[lo:hi]] * scale).astype(np.float32)

    def columns(lo: int, hi: int) -> np.ndarray:
        same = cluster[:, None] == cluster[None, lo:hi]
        return same + 0.1 * random.random((N_ITEMS, hi - lo))

    decoder, (nease,) = r.model.model.heads[0], r.model.model.matrices
    decoder.weights = [
        replace(piece, tensor=torch.from_numpy(rows(piece.lo, piece.hi)))
        for piece in decoder.weights
    ]
    nease.blocks = [
        replace(piece, tensor=torch.from_numpy(columns(piece.lo, piece.hi)).float())
        for piece in nease.blocks
    ]
    for item in (0, 5, 20, 36):
        family = {NUMBERS[i] for i in np.flatnonzero(cluster == cluster[item]) if i != item}
        for by in ("nease", "decoder"):
            ids, scores = r.similar_items(NUMBERS[item], len(family), by=by)
            assert set(ids.tolist()) == family and (np.diff(scores) <= 0).all(), by
        cosines = r.similar_items(NUMBERS[item], len(family), by="decoder")[1]
        # three sums of 6 terms that do not cancel, two roots and a division, of rows rounded once
        each_within(
            cosines, np.ones(len(family)), SAFETY * (3 * gamma(6) + 5 * UNIT), "a cosine of 1"
        )
    ids, _ = r.similar_items(NUMBERS[0], 100)
    assert sorted(ids) == NUMBERS[1:], "at most the whole catalogue without the item"


@pytest.mark.parametrize("partitions", [1, 3])
def test_similar_items_are_rows_of_the_matrices(runs, partitions):
    path, dense = a_run(runs, "vasp", partitions)
    r = Recommender.load(path)
    W, R = (dense.parameters[f"output.{name}.weight"].detach() for name in ("nease", "decoder"))
    for item in (0, 14, 36):
        cosines = bounded(lambda item=item: {"cosine": cosine(R, R[item])})
        for by, values, bounds in (
            ("nease", W[item], torch.zeros(N_ITEMS)),  # numbers of the file
            ("decoder", cosines.exact["cosine"], cosines.each["cosine"]),
        ):
            order = [
                i for i in sorted(range(N_ITEMS), key=lambda i: (-float(values[i]), i)) if i != item
            ][:5]
            ids, scores = r.similar_items(NUMBERS[item], 5, by=by)
            assert ids.tolist() == [NUMBERS[i] for i in order]
            each_within(scores, values[order], bounds[order], f"similar by {by}")


def cosine(R: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """The cosine of every row of R with r, (I,)."""
    return (R @ r) / ((R * R).sum(1).sqrt() * (r * r).sum().sqrt())


def test_paths_that_a_model_does_not_have(runs):
    assert len(Recommender.load(a_run(runs, "flvae")[0]).similar_items(1000, 3)[0]) == 3
    for kind, by, there in (
        ("flvae", "nease", "decoder or latent"),
        ("nease", "decoder", "nease"),
        ("vasp", "cosine", "nease or decoder or latent"),
    ):
        r = Recommender.load(a_run(runs, kind)[0])
        with pytest.raises(
            ValueError,
            match=f"by is '{by}', but a model of kind {kind} can compare items by {there}",
        ):
            r.similar_items(1000, 3, by=by)


def test_the_closed_form_has_scores_and_no_probabilities(runs):
    """`ease` is one linear layer without a sigmoid: scores are sums of weights, negative ones
    too."""
    path, dense = a_run(runs, "nease", 1)
    nease = Recommender.load(path)
    one = nease.sources.members[0]
    ranks = form_groups(0, Layout(1, 1, 1), torch.device("cpu"))
    config = Config(model=ModelConfig(kind="ease"))
    ease = TrainedModel(build_model(config, one.model.model.storage, ranks))
    r = Recommender(replace(nease.sources, model=ease))
    x = dense_rows(HISTORY_ROWS, N_ITEMS, torch.float64)
    W = dense.parameters["output.nease.weight"].detach()
    scores, bounds = bounded_scores(lambda: x @ W)
    lists = r.recommend(ids_of(HISTORY_ROWS), K)
    assert unpadded(lists.ids) == ids_of(dense_lists(scores, HISTORY_ROWS, K))
    expected = dense_lists(scores, HISTORY_ROWS, K)
    for u, row in enumerate(expected):
        each_within(
            lists.scores[u, : len(row)], scores[u, row], bounds[u, row], f"score of user {u}"
        )
    found = r.explain(ids_of(HISTORY_ROWS)[3], NUMBERS[2])
    assert (found.p, found.p_flvae, found.p_nease) == (None, None, None)
    total = sum(reason.weight for reason in found.reasons) + found.rest
    each_within(total, scores[3, 2], bounds[3, 2], "the reasons of a score")

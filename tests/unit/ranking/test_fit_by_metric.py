"""Weights of an ensemble that are searched by a metric of validation users' lists."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_vasp.config.metric_names import parse_metrics
from dist_vasp.data.held_out import EvalBlock
from dist_vasp.ranking import fit_by_metric
from dist_vasp.ranking.ensemble import load_ranker
from dist_vasp.ranking.evaluate import evaluate
from dist_vasp.ranking.fit_by_metric import Candidates, search
from dist_vasp.ranking.topk import NO_ITEM
from dist_vasp.ranking.user_metrics import UserMetrics
from launch.ensemble import main as make_ensemble
from tests.support.make_shards import write_folder
from tests.support.partitioned import csr
from tests.unit.ranking.test_fit_weights import VALIDATION, write_members
from tests.unit.ranking.test_recommend import alone

N_USERS, N_ITEMS = 120, 30


def candidates(scores_MUI: torch.Tensor, held: list[list[int]]) -> Candidates:
    """All items are candidates of every user; two blocks."""
    blocks, ids, scores = [], [], []
    for lo, hi in [(0, 70), (70, N_USERS)]:
        none = csr([[] for _ in range(hi - lo)])
        blocks.append(EvalBlock(np.arange(lo, hi, dtype=np.uint64), none, csr(held[lo:hi])))
        ids.append(torch.arange(N_ITEMS).repeat(hi - lo, 1))
        scores.append(scores_MUI[:, lo:hi].float())
    return Candidates(blocks, ids, scores, N_USERS)


def drawn(seed: int) -> tuple[torch.Tensor, list[list[int]]]:
    """Three members: two that know a half of what users like, of different size, and noise."""
    rng = np.random.default_rng(seed)
    parts = rng.normal(size=(2, N_USERS, N_ITEMS))
    likes = parts.sum(axis=0) + 0.5 * rng.normal(size=(N_USERS, N_ITEMS))
    held = [np.sort(np.argsort(-row)[: 1 + u % 3]).tolist() for u, row in enumerate(likes)]
    held[5] = []  # a user without a target does not count
    noise = rng.normal(size=(1, N_USERS, N_ITEMS))
    return torch.from_numpy(np.concatenate([parts * [[[1]], [[100]]], noise])), held


@pytest.mark.parametrize("name", ["ndcg@10", "recall@3"])
def test_the_metric_is_that_of_the_lists_and_no_single_change_raises_it(name):
    scores, held = drawn(0)
    metrics = UserMetrics(parse_metrics(name, ""))
    found = search(candidates(scores, held), metrics)
    weights, value, single = found.weights, found.value, found.alone
    assert (found.n_users, found.all_users) == (N_USERS, N_USERS)

    def of(w) -> float:
        total = np.tensordot(w, scores.float().numpy(), 1)
        order = np.argsort(-total, axis=1, kind="stable")[:, : metrics.metrics[0].k]
        return float(np.nanmean(metrics.of_target(order, csr(held))[name]))

    assert value == pytest.approx(of(weights), abs=1e-9)
    assert single == pytest.approx([of(w) for w in np.eye(3)], abs=1e-9)
    assert value > max(single), "two halves are better than one"
    assert weights[0] / (100 * weights[1]) == pytest.approx(1, rel=0.8)
    for m in (0, 1):
        for factor in (0.5, 2.0):
            changed = np.array(weights)
            changed[m] *= factor
            assert of(changed) <= value


def test_a_member_that_adds_nothing_has_no_weight():
    scores, held = drawn(1)
    scores[0] = sum(scores[:2] / torch.tensor([1, 100]).reshape(2, 1, 1))
    scores[1] = -scores[0]  # the opposite of the best
    metrics = UserMetrics(parse_metrics("ndcg@10", ""))
    weights = search(candidates(scores[:2], held), metrics).weights
    assert weights[0] > 0 and weights[1] == 0


def test_the_size_of_a_members_scores_does_not_count():
    scores, held = drawn(2)
    metrics = UserMetrics(parse_metrics("ndcg@10", ""))
    found = search(candidates(scores, held), metrics)
    scores[1] *= 1024
    again = search(candidates(scores, held), metrics)
    assert again.value == found.value
    expected = np.array(found.weights) / [1, 1024, 1]
    np.testing.assert_allclose(again.weights, expected, rtol=1e-4)


def test_a_score_that_is_no_number_is_an_error():
    scores, held = drawn(3)
    scores[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="a score of member 2 is not a finite number"):
        search(candidates(scores, held), UserMetrics(parse_metrics("ndcg@10", "")))


def test_the_union_has_every_item_once():
    found = fit_by_metric._union(
        [torch.tensor([[4, 1], [7, NO_ITEM]]), torch.tensor([[1, 9], [7, 3]])]
    )
    assert found.tolist() == [[1, 4, 9], [3, 7, NO_ITEM]]


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path) -> list[str]:
    return write_members(tmp_path, "ease", "vasp", "puresvd")


@pytest.mark.parametrize("least", [200, 4])
def test_the_command_tells_the_metric_that_an_evaluation_finds(
    runs, tmp_path, capsys, monkeypatch, least
):
    """With 4 candidates of each member the lists of 2 items are those of all 20."""
    monkeypatch.setattr(fit_by_metric, "LEAST_CANDIDATES", least)
    shards, folder = str(tmp_path / "shards"), tmp_path / "all"
    fitting = ["--fit", "ndcg@2", "--shards", shards, "--device", "cpu"]
    make_ensemble(["--members", *runs, *fitting, "--output", str(folder)])
    out = capsys.readouterr().out
    assert "weights fitted on 40 of 40 validation users" in out
    kept = [m["run"] for m in json.loads((folder / "ensemble.json").read_text())["members"]]
    assert [run for run in runs if f"because its weight is 0: {run}" in out] == [
        run for run in runs if f"../{Path(run).name}" not in kept
    ]
    for run, name in [*((run, f"{run} alone") for run in runs), (folder, "together, with")]:
        scorer = load_ranker(run, None, alone()).model.scores
        found = evaluate(scorer, shards, "validation", alone(), metrics=parse_metrics("ndcg@2", ""))
        assert f"NDCG@2 {found.result()['ndcg@2']:.4f}: {name}" in out


def test_what_does_not_fit_memory_is_left_out_and_said(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fit_by_metric, "_ROOM", 30 * (20 * (4 * 3 + 8) + 8 * 20 * 3))
    fitting = ["--fit", "ndcg@2", "--shards", str(tmp_path / "shards"), "--device", "cpu"]
    make_ensemble(["--members", *runs, *fitting, "--output", str(tmp_path / "all")])
    assert "weights fitted on 30 of 40 validation users" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fit", "coverage@10"], "--fit is 'coverage@10', expected one metric of ndcg"),
        (["--fit", "ndcg@10,hr@10"], "--fit is 'ndcg@10,hr@10', expected one metric"),
        (["--fit", ""], "--fit is '', expected one metric"),
        (["--fit", "run2"], "--fit: 'run2' is not a metric"),
        (["--fit", "ndcg@2", "--weights", "1", "2", "3"], "--weights cannot be given"),
        (["--fit", "ndcg@2", "--shards", "none"], "none has no validation user with held-out"),
        (["--fit", "ndcg@2", "--shards", "other"], "other has a vocabulary of 21 items"),
    ],
)
def test_what_cannot_be_fitted_is_refused(runs, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    write_folder(Path("none"), [[0, 1, 2], [3, 4]], n_items=20)
    write_folder(Path("other"), [[0, 1, 2], [3, 4]], VALIDATION, n_items=21)
    with pytest.raises(ValueError, match=message):
        make_ensemble(["--members", *runs, *options, "--output", "both"])
    assert not Path("both").exists()

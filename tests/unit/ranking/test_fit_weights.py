"""Weights of an ensemble that are fitted on validation users."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_vasp.data.items import load_items
from dist_vasp.data.manifest import Manifest
from dist_vasp.ranking import fit_weights
from dist_vasp.ranking.ensemble import load_ranker
from dist_vasp.ranking.evaluate import to_item_rows
from dist_vasp.ranking.fit_weights import fit
from launch.ensemble import main as make_ensemble
from tests.support.make_shards import write_folder
from tests.support.partitioned import csr
from tests.support.runs import write_run
from tests.unit.ranking.test_recommend import alone


def drawn(n_users: int, n_items: int, true_w: list[float], seed: int = 0):
    """Scores of members (M, U, I), and one held-out item of each user, drawn from their pool among
    what the user has not seen."""
    rng = np.random.default_rng(seed)
    scores_MUI = rng.normal(size=(len(true_w), n_users, n_items)) * 3
    seen_UI = rng.random((n_users, n_items)) < 0.2
    seen_UI[:, 0] = False
    pool_UI = np.tensordot(true_w, scores_MUI, 1)
    pool_UI[seen_UI] = -np.inf
    p_UI = np.exp(pool_UI - pool_UI.max(axis=1, keepdims=True))
    p_UI /= p_UI.sum(axis=1, keepdims=True)
    held_UI = np.zeros((n_users, n_items), bool)
    for u, p_I in enumerate(p_UI):
        held_UI[u, rng.choice(n_items, p=p_I)] = True
    return torch.from_numpy(scores_MUI), torch.from_numpy(held_UI), torch.from_numpy(seen_UI)


def slope(weights, scores_MUI, held_UI, seen_UI) -> np.ndarray:
    """The derivative of the mean log loss for each weight, by its definition."""
    slopes = np.zeros(len(weights))
    for u in range(held_UI.shape[0]):
        free = ~seen_UI[u].numpy()
        s_MI = scores_MUI[:, u].double().numpy()[:, free]
        total = np.array(weights) @ s_MI
        p = np.exp(total - total.max())
        p /= p.sum()
        held = held_UI[u].numpy()[free]
        slopes += s_MI @ p - s_MI[:, held].mean(axis=1)
    return slopes / held_UI.shape[0]


def test_the_weights_that_made_the_data_are_found():
    """With 4,000 users a weight's standard error is about 1 / sqrt(4000 x the variance of a score
    under p): .01 here."""
    found = fit(*drawn(4000, 12, [0.5, 0.2]))
    np.testing.assert_allclose(found, [0.5, 0.2], atol=0.05)


def test_they_are_the_least_of_a_convex_problem(monkeypatch):
    """Where a weight is above 0 the slope is 0; where it is 0 the slope is not below 0."""
    scores, held, seen = drawn(60, 9, [0.4, 0.0, 0.3], seed=1)
    scores[1] -= 3 * held  # a member that is wrong about every user
    monkeypatch.setattr(fit_weights, "_BLOCK_BYTES", 8 * 3 * 9 * 7)  # blocks of 7 users
    found = np.array(fit(scores, held, seen))
    slopes = slope(found, scores, held, seen)
    assert found[1] == 0
    assert slopes[1] > 0
    np.testing.assert_allclose(slopes[[0, 2]], 0, atol=1e-4)  # weights have 6 digits


def test_the_size_of_a_members_scores_does_not_count():
    scores, held, seen = drawn(80, 9, [0.4, 0.3])
    found = fit(scores, held, seen)
    scores[1] *= 1024
    again = fit(scores, held, seen)
    np.testing.assert_allclose(again, [found[0], found[1] / 1024], rtol=1e-4)


def test_users_without_held_out_items_do_not_count():
    scores, held, seen = drawn(50, 9, [0.4, 0.3])
    found = fit(scores[:, :40], held[:40], seen[:40])
    held[40:] = False
    seen[45:] = True  # nothing is left to recommend to them
    np.testing.assert_allclose(fit(scores, held, seen), found, rtol=1e-4)


def test_what_cannot_be_fitted_is_an_error():
    scores, held, seen = drawn(5, 9, [0.4, 0.3])
    with pytest.raises(ValueError, match="no validation user has held-out items"):
        fit(scores, torch.zeros_like(held), seen)
    scores[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="a score of member 2 is not a finite number"):
        fit(scores, held, seen)


# --- the command ----------------------------------------------------------------------------------

VALIDATION = [([u % 7, 9 + u % 3], [u % 5 + 12]) for u in range(40)]


def write_members(folder: Path, *kinds: str) -> list[str]:
    """A run of each kind, on the shards in `shards`."""
    shards = folder / "shards"
    write_folder(shards, [[0, 1, 2], [3, 4]], VALIDATION, n_items=20)
    ids = load_items(shards, Manifest.load(shards)).ids.to_pylist()
    for place, kind in enumerate(kinds):
        write_run(folder / f"run{place}", ids, kind)
    return [str(folder / f"run{place}") for place in range(len(kinds))]


@pytest.fixture
def runs(tmp_path) -> list[str]:
    return write_members(tmp_path, "ease", "vasp")


def test_the_command_writes_the_fitted_weights(runs, tmp_path, capsys):
    folder = tmp_path / "both"
    fitting = ["--fit", "--shards", str(tmp_path / "shards"), "--device", "cpu"]
    make_ensemble(["--members", *runs, *fitting, "--output", str(folder)])
    assert "weights fitted on 40 of 40 validation users" in capsys.readouterr().out
    scores = torch.zeros(2, 40, 20)
    seen, held = torch.zeros(40, 20, dtype=torch.bool), torch.zeros(40, 20, dtype=torch.bool)
    for u, (history, target) in enumerate(VALIDATION):
        seen[u, history], held[u, target] = True, True
    x = to_item_rows(csr([history for history, _ in VALIDATION]), 40, 20, torch.device("cpu"))
    for m, run in enumerate(runs):
        for lo, part in load_ranker(run, None, alone()).model.scores(x):
            scores[m, :, lo : lo + part.shape[1]] = part
    expected = {f"../run{m}": w for m, w in enumerate(fit(scores, held, seen)) if w}
    members = json.loads((folder / "ensemble.json").read_text())["members"]
    assert {m["run"]: m["weight"] for m in members} == pytest.approx(expected, rel=1e-4)


def test_what_does_not_fit_memory_is_left_out_and_said(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fit_weights, "_LEAST_USERS", 10)
    monkeypatch.setattr(fit_weights, "_ROOM", 4 * 2 * 20 * 30)
    fitting = ["--fit", "--shards", str(tmp_path / "shards"), "--device", "cpu"]
    make_ensemble(["--members", *runs, *fitting, "--output", str(tmp_path / "both")])
    assert "weights fitted on 30 of 40 validation users" in capsys.readouterr().out
    monkeypatch.setattr(fit_weights, "_ROOM", 4 * 2 * 20 * 9)
    with pytest.raises(ValueError, match=r"40 validation users, and the scores of 9 fit memory"):
        make_ensemble(["--members", *runs, *fitting, "--output", str(tmp_path / "both")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fit", "--weights", "1", "2"], "--fit finds the weights, so --weights cannot be given"),
        (["--shards", "shards"], "--shards is the data of --fit; pass --fit"),
        (["--fit"], "does not say which data it was trained on; pass --shards DIR"),
        (["--fit", "--shards", "none"], "none has 0 validation users"),
        (["--fit", "--shards", "other"], "other has a vocabulary of 21 items"),
    ],
)
def test_what_cannot_be_fitted_is_refused(runs, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    write_folder(Path("none"), [[0, 1, 2], [3, 4]], n_items=20)
    write_folder(Path("other"), [[0, 1, 2], [3, 4]], VALIDATION, n_items=21)
    with pytest.raises(ValueError, match=message):
        make_ensemble(["--members", *runs, *options, "--output", "both"])
    assert not Path("both").exists()

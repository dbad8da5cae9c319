"""The arithmetic of a comparison against plain numpy, and its sentences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dist_vasp.compare.statistics import (
    Cost,
    Scores,
    against_reference,
    estimate,
    paired,
    seed_noise,
    verdict,
)

# --- arithmetic -----------------------------------------------------------------------------------


def scores(name: str, values, **more) -> Scores:
    """(seeds, users) of NDCG@100, the same for recall unless given."""
    columns = {"ndcg@100": values, "recall@20": values, "recall@50": values} | more
    columns = {column: np.atleast_2d(np.asarray(v, float)) for column, v in columns.items()}
    n_seeds, n_users = columns["ndcg@100"].shape
    return Scores(name, tuple(range(n_seeds)), np.arange(n_users, dtype=np.uint64), columns)


def test_paired_standard_error_against_numpy():
    rng = np.random.default_rng(0)
    hard = rng.random(200) / 2
    a, b = hard + rng.random((3, 200)) / 3, hard + rng.random((2, 200)) / 4
    unscored = rng.choice(200, 20, replace=False)
    a[:, unscored] = b[:, unscored] = np.nan
    d = paired(scores("a", a), scores("b", b), "ndcg@100")
    kept = np.setdiff1d(np.arange(200), unscored)
    differences = [
        sum(a[s, u] for s in range(3)) / 3 - sum(b[s, u] for s in range(2)) / 2 for u in kept
    ]
    mean = sum(differences) / 180
    assert d.n == 180
    assert d.mean == pytest.approx(mean, rel=1e-12)
    assert d.se == pytest.approx(
        math.sqrt(sum((x - mean) ** 2 for x in differences) / 179 / 180), rel=1e-12
    )
    assert d.ratio == pytest.approx(d.mean / d.se)
    single = [scores(n, v).estimate("ndcg@100").se for n, v in (("a", a), ("b", b))]
    assert d.se < math.hypot(*single), "pairing must gain where users are hard for both"


def test_spread_over_seeds():
    a = scores("a", [[0.1, 0.3], [0.2, 0.6], [0.0, 0.3]])  # metrics .2, .4, .15
    assert a.by_seed("ndcg@100") == pytest.approx([0.2, 0.4, 0.15])
    assert a.estimate("ndcg@100").mean == pytest.approx(0.25)
    assert a.seed_sd("ndcg@100") == pytest.approx(np.std([0.2, 0.4, 0.15], ddof=1))
    b = scores("b", [[0.1, 0.1], [0.3, 0.3]])
    assert seed_noise(a, b, "ndcg@100") == pytest.approx(math.sqrt(0.0175 / 3 + 0.02 / 2))
    one = scores("c", [0.1, 0.2])
    assert math.isnan(one.seed_sd("ndcg@100")) and math.isnan(seed_noise(one, one, "ndcg@100"))


def test_estimate_of_few():
    assert estimate(np.array([np.nan])).n == 0 and math.isnan(estimate(np.array([])).mean)
    one = estimate(np.array([0.5, np.nan]))
    assert one.mean == 0.5 and math.isnan(one.se) and not one.differs
    assert not estimate(np.zeros(5)).differs
    assert estimate(np.full(5, 0.1)).differs, "the same difference for every user"


def test_different_users_are_not_paired(tmp_path):
    a, b = scores("a", [0.1, 0.2]), scores("b", [0.1, 0.2])
    with pytest.raises(ValueError, match="a and b were evaluated on different users"):
        paired(a, Scores("b", b.seeds, b.keys + np.uint64(1), b.values), "ndcg@100")


# --- sentences ------------------------------------------------------------------------------------

USERS = np.linspace(0.2, 0.6, 101)  # mean .4
NOISE = np.tile([0.01, -0.01], 51)[:101]
COSTS = {"ours": Cost(20.0, 3e9), "ease": Cost(4.0, 1.5e9), "popularity": Cost()}


def test_verdict_when_the_reference_wins():
    models = [
        scores("popularity", USERS - 0.2 + NOISE),
        scores("ours", USERS),
        scores("ease", USERS - 0.1 + NOISE),
    ]
    assert verdict(models, "ours", COSTS) == (
        "**ours wins**: it is ahead of ease, the best of the others, by 0.0999 "
        "+- 0.0010 in NDCG@100 (0.4000 against 0.3001), "
        "99.9 standard errors of the paired difference. Recall@20 favours ours "
        "(+0.0999 +- 0.0010), Recall@50 favours ours "
        "(+0.0999 +- 0.0010). ours costs 5.00 times the training time (20.0 s "
        "against 4.0 s) and 2.00 times the memory (3.00 GB "
        "against 1.50 GB)."
    )
    assert against_reference(models, "ours") == (
        "Against the reference ours, by NDCG@100 at two standard errors: worse: popularity, ease."
    )


def test_verdict_when_the_reference_loses():
    models = [
        scores("ours", USERS, **{"recall@20": USERS + 0.3, "recall@50": USERS + 0.05 + 5 * NOISE}),
        scores("ease", USERS + 0.05 + NOISE),
        scores("other", USERS + 0.01 + NOISE),
    ]
    text = verdict(models, "ours", COSTS)
    assert text.startswith(
        "**ease wins**: it is ahead of the reference ours by 0.0501 +- 0.0010 in "
        "NDCG@100 (0.4501 against 0.4000), "
    )
    assert (
        "Recall@20 favours ours (-0.2499 +- 0.0010), Recall@50 shows no "
        "difference (-0.0004 +- 0.0040)." in text
    )
    assert text.endswith(
        "0.20 times the training time (4.0 s against 20.0 s) and 0.50 times the "
        "memory (1.50 GB against 3.00 GB)."
    )
    assert against_reference(models, "ours").endswith("better: ease, other.")


def test_verdict_of_a_tie():
    models = [
        scores("ours", USERS),
        scores("ease", USERS + 0.001 + NOISE),
        scores("popularity", USERS - 0.2),
    ]
    text = verdict(models, "ours", COSTS)
    assert text.startswith(
        "**No winner**: ease is ahead of the reference ours by 0.0011 +- 0.0010 "
        "in NDCG@100 (0.4011 against 0.4000), "
        "1.1 standard errors of the paired difference, which does not exceed "
        "two. Recall@20 shows no difference"
    )
    assert "wins" not in text
    assert against_reference(models, "ours").endswith("no different: ease; worse: popularity.")


def test_verdict_against_what_is_not_trained():
    ours, popularity = scores("ours", USERS), scores("popularity", USERS - 0.2 + NOISE)
    assert verdict([ours, popularity], "popularity", COSTS).endswith(
        "ours costs 20.0 s of training, where popularity needs none."
    )
    better = scores("popularity", USERS + 0.2 + NOISE)
    assert verdict([ours, better], "ours", COSTS).endswith(
        "popularity costs no training, where ours takes 20.0 s."
    )
    assert verdict([ours], "ours", COSTS) == "There is nothing to compare: ours alone has results."


def test_verdict_says_when_the_seeds_could_turn_it():
    unstable = scores(
        "ours", np.stack([USERS + 0.12, USERS - 0.08 + 2 * NOISE])
    )  # mean 0.02 ahead, seeds 0.2 apart
    stable = scores("ease", np.stack([USERS, USERS]))
    text = verdict([unstable, stable], "ours", COSTS)
    assert text.startswith("**ours wins**")
    assert (
        "But the choice of seeds moves that difference by 0.0999 (one standard "
        "error): more seeds could turn it." in text
    )
    steady = scores("ours", np.stack([USERS + 0.02, USERS + 0.02 + 2 * NOISE]))
    assert "choice of seeds" not in verdict([steady, stable], "ours", COSTS)

"""Ensembles: the weighted sum of the members' scores against the dense oracle, on any number of
ranks, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dist_vasp.parallel.comm import Ranks
from dist_vasp.ranking.ensemble import load_ranker
from dist_vasp.ranking.evaluate import top_items
from dist_vasp.ranking.load import ENSEMBLE
from dist_vasp.recommender import Recommender
from launch.ensemble import main as make_ensemble
from launch.evaluate import main as evaluate_main
from launch.recommend import main as recommend_main
from tests.oracles.dense import dense_rows
from tests.oracles.rounding import bounded_scores, each_within, same_list
from tests.support.partitioned import csr
from tests.support.ranks import run_ranks
from tests.support.runs import write_run
from tests.unit.ranking.test_recommend import alone

IDS = list(range(100, 123))
HISTORIES = [[0, 3, 9], [1], [4, 5, 6, 7, 22], [20, 2]]
# kind, loss, columns of a block, partitions it was written by, weight
MEMBERS = (
    ("vasp", "focal", 5, 2, 0.75),
    ("flvae", "multinomial", 4, 1, 0.4),
    ("ease", "focal", 7, 3, 2.5),
)


def log_p(oracle, kind: str, loss: str, x: torch.Tensor) -> torch.Tensor:
    """What a member ranks by, (rows, I), in double precision."""
    if kind == "ease":
        return x @ oracle.parameters["output.nease.weight"]
    return oracle.log_p(x, loss)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, tuple[np.ndarray, np.ndarray]]:
    """An ensemble of three runs, and its scores of HISTORIES by the oracle with their bounds."""
    base = tmp_path_factory.mktemp("ensemble")
    x = dense_rows(HISTORIES, len(IDS), torch.float64)
    oracles = []
    for place, (kind, loss, columns, partitions, _) in enumerate(MEMBERS):
        oracles.append(
            write_run(
                base / f"run{place}",
                IDS,
                kind,
                partitions,
                columns=columns,
                loss=loss,
                sharper=2.0 + place,
            )
        )
    runs, weights = (
        [str(base / f"run{place}") for place in range(3)],
        [str(member[-1]) for member in MEMBERS],
    )
    make_ensemble(["--members", *runs, "--weights", *weights, "--output", str(base / "all")])

    def scores() -> torch.Tensor:
        members = zip(oracles, MEMBERS, strict=True)
        return sum(
            weight * log_p(oracle, kind, loss, x).detach()
            for oracle, (kind, loss, _, _, weight) in members
        )

    return base, bounded_scores(scores)


def lists(ranks: Ranks, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    ranker = load_ranker(folder, None, ranks)
    assert not ranker.model.is_probability
    return top_items(ranker.model.scores, csr(HISTORIES), 8, len(IDS), ranks)


def check_lists(
    found: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]
) -> None:
    scores, items = found
    exact, bounds = (torch.from_numpy(part) for part in expected)
    unseen = exact.clone()
    for u, history in enumerate(HISTORIES):
        unseen[u, history] = -torch.inf
    best = torch.topk(unseen, 8, dim=1)
    for u, listed in enumerate(items):
        same_list(listed, best.indices[u], exact[u].numpy(), bounds[u].numpy(), f"user {u}")
    ids = torch.from_numpy(items).long()
    each_within(scores, exact.gather(1, ids), bounds.gather(1, ids), "scores of the ensemble")


def test_scores_are_the_weighted_sum(made):
    base, expected = made
    check_lists(lists(alone(), base / "all"), expected)


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_list_as_one(made, ranks):
    base, expected = made
    for found in run_ranks(lists, ranks, base / "all"):
        check_lists(found, expected)


def test_one_member_ranks_as_it_does_alone(made, tmp_path):
    base, _ = made
    make_ensemble(["--members", str(base / "run0"), "--output", str(tmp_path / "one")])
    single, ensemble = (
        load_ranker(folder, None, alone()) for folder in (base / "run0", tmp_path / "one")
    )
    assert single.model.is_probability
    found = [
        top_items(ranker.model.scores, csr(HISTORIES), 8, len(IDS), alone())
        for ranker in (single, ensemble)
    ]
    np.testing.assert_array_equal(found[0][1], found[1][1])
    np.testing.assert_array_equal(found[0][0], found[1][0])


def test_members_may_move_with_it_and_it_may_be_written_again(made, tmp_path):
    base, expected = made
    shutil.copytree(base, tmp_path / "elsewhere")
    check_lists(lists(alone(), tmp_path / "elsewhere" / "all"), expected)
    runs = [str(tmp_path / "elsewhere" / f"run{place}") for place in range(2)]
    make_ensemble(["--members", *runs, "--output", str(tmp_path / "elsewhere" / "all")])
    header = json.loads((tmp_path / "elsewhere" / "all" / ENSEMBLE).read_text())
    assert [(member["run"], member["weight"]) for member in header["members"]] == [
        ("../run0", 1.0),
        ("../run1", 1.0),
    ]


def test_recommend_takes_it(made, tmp_path, capsys):
    base, expected = made
    (tmp_path / "h.csv").write_text(
        "user,item\n" + "".join(f"{u},{IDS[i]}\n" for u, row in enumerate(HISTORIES) for i in row)
    )
    arguments = [
        "--run",
        str(base / "all"),
        "--histories",
        str(tmp_path / "h.csv"),
        "--output",
        str(tmp_path / "o.csv"),
        "--k",
        "8",
    ]
    recommend_main([*arguments, "--device", "cpu"])
    assert "32 recommendations for 4 users" in capsys.readouterr().out
    rows = [line.split(",") for line in (tmp_path / "o.csv").read_text().splitlines()[1:]]
    items = np.array([IDS.index(int(row[2])) for row in rows]).reshape(4, 8)
    scores = np.array([float(row[3]) for row in rows]).reshape(4, 8)
    check_lists((scores, items), expected)


def test_it_is_exported_loaded_and_explained_like_one_model(made, tmp_path, capsys):
    base, expected = made
    ours = Recommender.load(base / "all")
    capsys.readouterr()
    assert "3 members" in ours.export(tmp_path / "carried")
    shutil.move(tmp_path / "carried", tmp_path / "elsewhere")
    for r in (ours, Recommender.load(tmp_path / "elsewhere")):
        lists = r.recommend([[IDS[i] for i in row] for row in HISTORIES], 8)
        check_lists((lists.scores, lists.rows), expected)
    history = [IDS[i] for i in HISTORIES[0]]
    told, single = ours.explain(history, IDS[20], 3), ours.explain(history, IDS[20], 100)
    assert told.p is None and len(told.members) == len(ours.model.members)
    with_matrix = [
        (w, m) for w, m in zip(ours.model.weights, told.members, strict=True) if m.logit is not None
    ]
    assert told.logit == pytest.approx(sum(w * m.logit for w, m in with_matrix), rel=1e-5)
    assert sum(reason.weight for reason in told.reasons) + told.rest == pytest.approx(
        told.logit, rel=1e-5
    )
    assert {reason.item for reason in single.reasons} == set(history)
    ids, scores = ours.similar_items(IDS[0], 5)
    assert len(ids) == 5 and (np.diff(scores) <= 0).all()


def test_reasons_in_a_file_are_those_of_the_recommender(made, tmp_path):
    base, _ = made
    rows = "".join(f"{u},{IDS[i]}\n" for u, row in enumerate(HISTORIES) for i in row)
    (tmp_path / "h.csv").write_text("user,item\n" + rows)
    arguments = ["--run", str(base / "all"), "--histories", str(tmp_path / "h.csv"), "--k", "2"]
    output = tmp_path / "o.parquet"
    recommend_main([*arguments, "--output", str(output), "--device", "cpu", "--explain", "2"])
    table, r = pq.read_table(output), Recommender.load(base / "all")
    for row in table.to_pylist():
        history = [IDS[i] for i in HISTORIES[row["user"]]]
        reasons = r.explain(history, row["item"], 2).reasons
        items = [item for item in (row["because_1"], row["because_2"]) if item is not None]
        assert items == [reason.item for reason in reasons]
        assert row["weight_1"] == pytest.approx(reasons[0].weight, rel=1e-5)
        assert row["p_flvae"] is None and row["p_nease"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run0", "nowhere"], r"nowhere is not a folder; pass the run\.dir"),
        (
            ["run0", "run1", "--weights", "1"],
            r"1 weights were given for 2 members; give one for each",
        ),
        (
            ["run0", "run1", "--weights", "1", "0"],
            r"weights are \[1\.0, 0\.0\], expected finite numbers above 0",
        ),
        (
            ["run0", "run1", "--weights", "1", "nan"],
            r"weights are \[1\.0, nan\], expected finite numbers above 0",
        ),
        (
            ["run0", "all"],
            "all is an ensemble, expected a single model; pass the folder of one of its members",
        ),
        (
            ["run0", "other"],
            r"other has a vocabulary with hash .*run0 one with .* must be trained "
            r"on the same shards",
        ),
        (
            ["run0", "--output", "run1"],
            r"--output .*run1 holds something else than an ensemble; choose another folder",
        ),
        (
            ["run0", "--output", "a_file"],
            r"--output .*a_file holds something else than an ensemble",
        ),
        (
            ["run0", "--output", "a_file/below"],
            r"--output .*below.* cannot be written \(Not a directory\)",
        ),
    ],
)
def test_what_cannot_be_an_ensemble(made, tmp_path, monkeypatch, arguments, message):
    shutil.copytree(made[0], tmp_path, dirs_exist_ok=True)
    write_run(tmp_path / "other", IDS[::-1])
    (tmp_path / "a_file").write_text("")
    monkeypatch.chdir(tmp_path)
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        make_ensemble(
            ["--members", *arguments, *([] if "--output" in arguments else ["--output", "new"])]
        )
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda header: header["members"].clear(), "is damaged .*write the ensemble again"),
        (lambda header: header["members"][0].update(weight="2"), "is damaged"),
        (
            lambda header: header["members"][0].update(weight=2),
            r"is damaged .*header_sha256 is not that of its content",
        ),
        (
            lambda header: header.update(format_version=2),
            "has format_version 2, this version reads 1",
        ),
    ],
)
def test_a_damaged_file_is_named(made, tmp_path, damage, message):
    header = json.loads((made[0] / "all" / ENSEMBLE).read_text())
    damage(header)
    (tmp_path / ENSEMBLE).write_text(json.dumps(header))
    with pytest.raises(ValueError, match=rf"{ENSEMBLE} {message}"):
        load_ranker(tmp_path, None, alone())


def test_a_member_that_was_trained_anew_on_other_items_is_refused(made, tmp_path):
    shutil.copytree(made[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "run1")
    write_run(tmp_path / "run1", IDS[::-1], "flvae")
    with pytest.raises(
        ValueError, match=r"run1 has a vocabulary with hash .*ensemble\.json one with"
    ):
        load_ranker(tmp_path / "all", None, alone())


def test_an_ensemble_has_no_checkpoint(made):
    folder = made[0] / "all"
    with pytest.raises(
        ValueError,
        match=r"all is an ensemble and has no checkpoint best-00000001; leave --checkpoint out",
    ):
        load_ranker(folder, "best-00000001", alone())


def test_evaluate_asks_for_shards(made):
    with pytest.raises(
        ValueError,
        match=r"run0/checkpoints/\S+ does not say which data it was trained on; pass --shards DIR",
    ):
        evaluate_main(["--run", str(made[0] / "all"), "--device", "cpu"])

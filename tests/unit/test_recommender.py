"""The Python interface: lists, similar items, explanations and exports, held against the dense
oracle and the command."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_vasp import Recommender
from dist_vasp.checkpoint.json_header import header_sha256
from dist_vasp.config.schema import Config, ModelConfig
from dist_vasp.model.build import build_model, make_trunk
from dist_vasp.parallel.comm import form_groups
from dist_vasp.parallel.partition import Layout
from dist_vasp.ranking import make_lists as module
from dist_vasp.ranking.export import write_program
from dist_vasp.ranking.scoring import TrainedModel
from dist_vasp.tensor_file import map_tensors, write_safetensors
from tests.oracles.dense import dense_rows
from tests.oracles.rounding import SAFETY, UNIT, bounded, bounded_scores, each_within, gamma
from tests.support.invoke import run_script
from tests.support.paths import ROOT
from tests.support.runs import sha256_of_files, write_run

N_ITEMS = 37
NUMBERS = [1000 + 3 * i for i in range(N_ITEMS)]
NAMES = [f"i{i}" for i in range(N_ITEMS)]
TITLES = [f"Title {i}" for i in range(N_ITEMS)]
KINDS = ["vasp", "flvae", "nease"]
RANDOM = np.random.default_rng(3)
HISTORY_ROWS = [
    sorted(RANDOM.choice(N_ITEMS, size=n, replace=False).tolist()) for n in (1, 2, 5, 9, 3, 30, 36)
]
K = 6


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


def a_run(
    runs: Path,
    kind: str,
    partitions: int = 2,
    ids: list = NUMBERS,
    titles: list[str] | None = None,
    **more,
):
    """(run directory, its dense oracle)"""
    path = runs / f"{kind}-{partitions}-{ids[0]}-{bool(titles)}-{'-'.join(map(str, more.values()))}"
    shutil.rmtree(path, ignore_errors=True)
    return path, write_run(path, ids, kind, partitions, titles, **more)


def ids_of(rows: list[list[int]], ids: list = NUMBERS) -> list[list]:
    return [[ids[i] for i in row] for row in rows]


def dense_p(dense, rows: list[list[int]], loss: str = "focal") -> np.ndarray:
    with torch.no_grad():
        paths, _ = dense.forward(dense_rows(rows, N_ITEMS, torch.float64))
        if loss == "multinomial":
            return torch.softmax(sum(paths), dim=1).numpy()
        return torch.stack([torch.sigmoid(path) for path in paths]).prod(dim=0).numpy()


def dense_lists(
    p: np.ndarray,
    rows: list[list[int]],
    k: int,
    allowed: np.ndarray | None = None,
    mask: bool = True,
) -> list[list[int]]:
    """Item rows of the k best, ties to the lower row."""
    lists = []
    for u, row in enumerate(rows):
        banned = set(row) if mask else set()
        candidates = [
            i for i in range(N_ITEMS) if i not in banned and (allowed is None or allowed[i])
        ]
        lists.append(sorted(candidates, key=lambda i: (-p[u, i], i))[:k])
    return lists


def unpadded(ids: np.ndarray, missing: object = -1) -> list[list]:
    return [[i for i in row if i != missing] for row in ids.tolist()]


# --- lists ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("partitions", [1, 3])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("vasp", {}),
        ("vasp", {"latent_head": False}),
        ("flvae", {}),
        ("flvae", {"loss": "multinomial"}),
        ("nease", {}),
    ],
)
def test_lists_are_the_oracles(runs, kind, options, partitions, monkeypatch):
    monkeypatch.setattr(module, "USERS_PER_PASS", 3)  # several passes, the last one short
    path, dense = a_run(runs, kind, partitions, **options)
    ids, scores = Recommender.load(path).recommend(ids_of(HISTORY_ROWS), K)
    p, bounds = bounded_scores(lambda: dense_p(dense, HISTORY_ROWS, options.get("loss", "focal")))
    expected = dense_lists(p, HISTORY_ROWS, K)
    assert (
        ids.shape == scores.shape == (len(HISTORY_ROWS), K)
        and ids.dtype == np.int64
        and scores.dtype == np.float32
    )
    assert unpadded(ids) == ids_of(expected)
    for u, row in enumerate(expected):
        each_within(scores[u, : len(row)], p[u, row], bounds[u, row], f"p of user {u}")
        assert np.isnan(scores[u, len(row) :]).all() and (ids[u, len(row) :] == -1).all()
    assert len(expected[-1]) == 1, "one of the lists must end early, or padding is not tested"


@pytest.mark.parametrize("ids", [NUMBERS, NAMES])
def test_mask_filter_and_restrict(runs, ids):
    path, dense = a_run(runs, "vasp", ids=ids)
    r, p, missing = (
        Recommender.load(path),
        dense_p(dense, HISTORY_ROWS),
        None if ids is NAMES else -1,
    )
    stranger = "nobody" if ids is NAMES else 5

    def lists(**options) -> list[list]:
        return unpadded(r.recommend(ids_of(HISTORY_ROWS, ids), K, **options).ids, missing)

    assert lists(mask_input=False) == ids_of(dense_lists(p, HISTORY_ROWS, K, mask=False), ids)
    assert lists(mask_input=False) != lists()
    everything = np.ones(N_ITEMS, bool)
    filtered = everything.copy()
    filtered[[0, 7, 20]] = False
    assert lists(filter_items=[ids[0], ids[7], ids[20], stranger]) == ids_of(
        dense_lists(p, HISTORY_ROWS, K, filtered), ids
    )
    # with gaps of whole blocks (5 columns each) between the candidates
    some = ~everything
    some[[1, 2, 17, 36]] = True
    restricted = lists(restrict_to=[ids[i] for i in (36, 2, 1, 17)] + [stranger])
    assert restricted == ids_of(dense_lists(p, HISTORY_ROWS, K, some), ids)
    some[2] = False
    both = lists(
        restrict_to=(ids[i] for i in (36, 2, 1, 17)), filter_items={ids[2]}, mask_input=False
    )
    assert both == ids_of(dense_lists(p, HISTORY_ROWS, K, some, mask=False), ids)


@pytest.mark.parametrize("ids", [NUMBERS, NAMES])
def test_lists_matrices_and_tables_agree(runs, ids):
    path, oracle = a_run(runs, "vasp", ids=ids)
    r = Recommender.load(path)
    given = [*ids_of(HISTORY_ROWS, ids), []]
    given[1] = [
        *given[1],
        *given[1],
        "nothing of this kind" if ids is NAMES else 1,
    ]  # repeated, and unknown
    lists = r.recommend(given, K)
    assert lists.users is None and lists.n_unknown == 1
    assert lists.ids.dtype == (object if ids is NAMES else np.int64)
    assert (
        unpadded(lists.ids, None if ids is NAMES else -1)[-1] == []
        and np.isnan(lists.scores[-1]).all()
    )

    dense = dense_rows([*HISTORY_ROWS, []], N_ITEMS, torch.float64).numpy()
    for matrix in (scipy.sparse.csr_matrix(dense), scipy.sparse.coo_array(dense * 2.5)):
        found_ids, found_scores = r.recommend(matrix, K)
        assert np.array_equal(found_ids, lists.ids)
        np.testing.assert_array_equal(found_scores, lists.scores)
    x = scipy.sparse.coo_matrix(dense)
    explicit_zero = scipy.sparse.csr_matrix(
        (np.append(x.data, 0), (np.append(x.row, 7), np.append(x.col, 3))), shape=x.shape
    )
    assert explicit_zero.nnz == x.nnz + 1
    assert np.array_equal(r.recommend(explicit_zero, K).ids, lists.ids)

    order = [4, 0, 6, 1, 2, 5, 3]  # users as they first appear, their rows scattered
    rows = [(f"u{u}", item) for u in order for item in given[u][:1]]
    rows += [("stranger", "x9" if ids is NAMES else 2)]
    rows += [(f"u{u}", item) for u in reversed(order) for item in given[u][1:]]
    table = pa.table({"item": [i for _, i in rows], "user": [u for u, _ in rows]})
    of_table = r.recommend(table, K)
    assert of_table.users.to_pylist() == [f"u{u}" for u in order] + ["stranger"]
    assert np.array_equal(of_table.ids[:-1], lists.ids[order]) and of_table.n_unknown == 2
    p, bounds = bounded_scores(lambda: dense_p(oracle, HISTORY_ROWS))
    for u, row in enumerate(
        dense_lists(p, HISTORY_ROWS, K)
    ):  # a row's place in a product may round
        found = of_table.scores[order.index(u), : len(row)]
        each_within(found, p[u, row], bounds[u, row], f"p of user {u} in a table")
    assert np.isnan(of_table.scores[-1]).all()
    listed = of_table.to_table()
    assert (
        listed.column_names == ["user", "rank", "item", "score"]
        and "stranger" not in listed["user"].to_pylist()
    )
    first = listed.slice(0, 1).to_pylist()[0]
    assert first == {"user": "u4", "rank": 1, "item": lists.ids[4, 0], "score": lists.scores[4, 0]}


def test_titles(runs):
    path, _ = a_run(runs, "vasp", ids=NAMES, titles=TITLES)
    r = Recommender.load(path)
    assert r.title("i7") == "Title 7"
    table = r.recommend([["i1", "i2"]], 3).to_table()
    assert table["title"].to_pylist() == [f"Title {item[1:]}" for item in table["item"].to_pylist()]
    found = r.explain(["i1", "i2"], "i3")
    assert found.title == "Title 3" and {reason.title for reason in found.reasons} == {
        "Title 1",
        "Title 2",
    }
    plain = Recommender.load(a_run(runs, "vasp")[0])
    assert plain.title(1003) is None and plain.explain([1000], 1003).title is None


def command(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run_script(script, *arguments, "--device", "cpu")


@pytest.mark.parametrize("ids", [NUMBERS, NAMES])
def test_the_command_writes_the_same_lists(runs, tmp_path, ids):
    """From the run, and from its export; bitwise where the blocks are the same."""
    path, _ = a_run(runs, "vasp", 1, ids)
    rows = [(10 + u, item) for u, row in enumerate(ids_of(HISTORY_ROWS, ids)) for item in row]
    table = pa.table({"user": [u for u, _ in rows], "item": [i for _, i in rows]})
    pq.write_table(table, tmp_path / "h.parquet")
    assert command("export", "--run", path, "--output", tmp_path / "model").returncode == 0
    expected = Recommender.load(path).recommend(table, K).to_table()
    for run in (path, tmp_path / "model"):
        output = tmp_path / f"{run.name}.parquet"
        done = command(
            "recommend",
            "--run",
            run,
            "--histories",
            tmp_path / "h.parquet",
            "--k",
            K,
            "--output",
            output,
        )
        assert done.returncode == 0, done.stderr
        assert pq.read_table(output).equals(expected)


# --- explanations and similar items ---------------------------------------------------------------


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


# --- exports --------------------------------------------------------------------------------------


@pytest.mark.parametrize("partitions", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_an_export_answers_bitwise_as_its_run(runs, tmp_path, kind, partitions):
    path, _ = a_run(runs, kind, partitions, titles=TITLES)
    r = Recommender.load(path)
    assert "37 items" in r.export(tmp_path / "model")
    moved = (tmp_path / "model").rename(tmp_path / "moved")
    other = Recommender.load(moved)
    ours, theirs = r.recommend(ids_of(HISTORY_ROWS), K), other.recommend(ids_of(HISTORY_ROWS), K)
    assert (
        ours.ids.tobytes() == theirs.ids.tobytes()
        and ours.scores.tobytes() == theirs.scores.tobytes()
    )
    assert r.explain([1000], 1003) == other.explain([1000], 1003)
    other.export(tmp_path / "again")
    assert sha256_of_files(tmp_path / "again") == sha256_of_files(moved), (
        "an export of an export is the same"
    )
    assert str(tmp_path) not in (moved / "export.json").read_text()
    expected = {
        "export.json",
        "items.parquet",
        "MODEL_CARD.md",
        *(f"items-{p:05d}-of-{partitions:05d}.safetensors" for p in range(partitions)),
    }
    assert {p.name for p in moved.iterdir()} == expected | (
        {"trunk.safetensors"} if kind != "nease" else set()
    )
    assert not list(tmp_path.glob(".*"))


def test_moments_stay_behind(runs, tmp_path):
    """A step checkpoint holds them; its export does not."""
    from safetensors import safe_open

    path, _ = a_run(runs, "vasp", 2)
    best = path / "checkpoints" / "best-00000001"
    step = Path(shutil.copytree(best, path / "checkpoints" / "step-00000001"))
    header = json.loads((step / "checkpoint.json").read_text())
    for name in header["files"]:
        tensors = map_tensors(best / name)
        moments = {}
        for key, tensor in tensors.items():
            stem, bracket, rest = key.partition("[")
            moments |= {
                f"{stem}.{m}{bracket}{rest}": torch.ones_like(tensor)
                for m in ("exp_avg", "exp_avg_sq")
            }
        (step / name).unlink()
        header["files"][name] = write_safetensors(step / name, tensors | moments)
    header["header_sha256"] = header_sha256(header)
    (step / "checkpoint.json").write_text(json.dumps(header))
    Recommender.load(path, "step-00000001").export(tmp_path / "from-step")
    Recommender.load(path).export(tmp_path / "from-best")
    from_step, from_best = (
        sha256_of_files(tmp_path / "from-step"),
        sha256_of_files(tmp_path / "from-best"),
    )
    assert from_step.pop("export.json") != from_best.pop("export.json"), (
        "they tell where they come from"
    )
    assert from_step.pop("MODEL_CARD.md") != from_best.pop("MODEL_CARD.md")
    assert from_step == from_best
    for file in (tmp_path / "from-step").glob("*.safetensors"):
        with safe_open(file, framework="numpy") as handle:
            assert not any("exp_avg" in key for key in handle.keys())  # noqa: SIM118


def test_the_trunk_as_a_program(runs, tmp_path):
    path, _ = a_run(runs, "vasp")
    r = Recommender.load(path)
    r.export(tmp_path / "model", trunk="torch_export")
    program = torch.export.load(tmp_path / "model" / "trunk.pt2").module()
    for n_rows in (1, 5):
        pre = torch.randn(n_rows, 6)
        with torch.no_grad():
            for found, expected in zip(program(pre), r.model.trunk(pre, None)[0], strict=True):
                torch.testing.assert_close(found, expected)
    loaded = Recommender.load(tmp_path / "model")
    assert np.array_equal(
        loaded.recommend(ids_of(HISTORY_ROWS), K).ids, r.recommend(ids_of(HISTORY_ROWS), K).ids
    )
    loaded.export(tmp_path / "again")
    assert not (tmp_path / "again" / "trunk.pt2").exists()
    with open(tmp_path / "model" / "trunk.pt2", "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"trunk\.pt2 has SHA-256"):
        Recommender.load(tmp_path / "model")
    nease = Recommender.load(a_run(runs, "nease")[0])
    with pytest.raises(ValueError, match="a model of kind nease has no trunk to export"):
        nease.export(tmp_path / "none", trunk="torch_export")
    with pytest.raises(ValueError, match="trunk is 'onnx', expected torch_export or None"):
        r.export(tmp_path / "none", trunk="onnx")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", ["multvae", "autorec", "puresvd"])
def test_other_trunks_as_programs(tmp_path, kind):
    trunk = make_trunk(ModelConfig(kind=kind, hidden=6, latent=3), 1)
    assert write_program(trunk, tmp_path / "trunk.pt2")  # it compares both


def test_an_export_holds_the_items_of_its_weights(runs, tmp_path, monkeypatch):
    path, _ = a_run(runs, "vasp")
    monkeypatch.chdir(path.parent)
    r = Recommender.load(path.name)
    monkeypatch.chdir(tmp_path)
    r.export("model")
    assert Recommender.load("model").items.ids.equals(r.items.ids)
    other, _ = a_run(runs, "vasp", ids=NAMES)
    shutil.copy(other / "items.parquet", path)
    with pytest.raises(
        ValueError, match=rf"{path}/items\.parquet lists .* it comes from another preparation"
    ):
        r.export("swapped")
    (path / "items.parquet").unlink()
    with pytest.raises(
        ValueError,
        match=r"items\.parquet cannot be read \(No such file or directory\).*load the model again",
    ):
        r.export("gone")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "arguments", [(None,), (7,), (b"export",), (["run"],), ("run", 7), ("x" * 5000,)]
)
def test_what_is_no_folder_is_a_value_error(arguments):
    with pytest.raises(ValueError, match=r"expected the path of a folder|is not a folder"):
        Recommender.load(*arguments)


def test_export_refuses(runs, tmp_path, monkeypatch):
    path, _ = a_run(runs, "vasp")
    r = Recommender.load(path)
    (tmp_path / "there").mkdir()
    with pytest.raises(
        ValueError, match=r"there exists; name another folder, or remove it yourself"
    ):
        r.export(tmp_path / "there")
    with pytest.raises(ValueError, match=r"the folder .*no does not exist; create it first"):
        r.export(tmp_path / "no" / "model")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(ValueError, match=r"has 0\.00 GB free but the export needs"):
        r.export(tmp_path / "model")
    monkeypatch.undo()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dist_vasp.ranking.export.write_safetensors", full)
    with pytest.raises(
        ValueError, match=r"model cannot be written \(No space left on device\); free some space"
    ):
        r.export(tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["there"], "nothing is left behind"


def test_damage_is_found(runs, tmp_path):
    path, _ = a_run(runs, "vasp", 2)
    Recommender.load(path).export(tmp_path / "model")
    for name in sorted(p.name for p in (tmp_path / "model").iterdir()):
        copy = Path(shutil.copytree(tmp_path / "model", tmp_path / "copy"))
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        message = (
            "is damaged|is not that"
            if name == "export.json"
            else rf"{name} has SHA-256 .*export\.json says .*export the run again"
        )
        with pytest.raises(ValueError, match=message):
            Recommender.load(copy)
        (copy / name).unlink()
        with pytest.raises(ValueError, match=r"cannot be read|holds no checkpoint"):
            Recommender.load(copy)
        shutil.rmtree(copy)
    header = json.loads((tmp_path / "model" / "export.json").read_text())
    (tmp_path / "model" / "export.json").write_text(json.dumps(header | {"format_version": 9}))
    with pytest.raises(
        ValueError, match="format_version 9, this version reads 1; use the version that wrote it"
    ):
        Recommender.load(tmp_path / "model")


def test_mapping_believes_no_header(runs, tmp_path):
    """With checksums off, or right: shapes, ranges and types are held against what the config
    says."""
    path, _ = a_run(runs, "vasp", 2)
    best = path / "checkpoints" / "best-00000001"
    items, trunk = best / "items-00001-of-00002.safetensors", best / "trunk.safetensors"

    def changed(file: Path, old: bytes, new: bytes, message: str) -> None:
        before = file.read_bytes()
        assert old in before and len(old) == len(new)
        file.write_bytes(before.replace(old, new))
        with pytest.raises(ValueError, match=message):
            Recommender.load(path, verify=False)
        file.write_bytes(before)

    changed(
        items,
        b"output.nease.weight[18:23]",
        b"output.nease.weight[18:22]",
        "does not hold output.nease.weight for all items 18 to 36 once",
    )
    changed(
        items,
        b"input.weight[18:37]",
        b"input.weight[18:36]",
        r"has no input\.weight\[18:37\] of shape \(19, 6\)",
    )
    changed(
        items,
        b"output.nease.weight[18:23]",
        b"output.nease.weight?18:23]",
        r"holds a tensor 'output\.nease\.weight\?18:23\]'",
    )
    changed(items, b"F32", b"I32", "is of dtype I32")
    changed(
        trunk,
        b"encoder.layers.0.weight",
        b"encoder.layers.9.weight",
        r"has no encoder\.layers\.0\.weight of shape \(6, 6\)",
    )
    before = trunk.read_bytes()
    trunk.write_bytes(before[:-5])
    with pytest.raises(ValueError, match=r"trunk\.safetensors cannot be read as safetensors"):
        Recommender.load(path, verify=False)
    trunk.write_bytes(before)
    assert Recommender.load(path, verify=False).n_items == N_ITEMS


# --- mistakes -------------------------------------------------------------------------------------


def test_mistakes_are_readable(runs, tmp_path):
    path, _ = a_run(runs, "vasp")
    r = Recommender.load(path)
    named = Recommender.load(a_run(runs, "vasp", ids=NAMES)[0])
    table = pa.table({"user": [1], "thing": [1000]})
    for call, message in (
        (lambda: r.recommend([[1000]], 0), r"k is 0, expected a whole number of at least 1"),
        (lambda: r.recommend([[1000]], 2.5), r"k is 2\.5, expected a whole number"),
        (lambda: r.similar_items(1000, -1), r"k is -1, expected"),
        (lambda: r.explain([1000], 1003, n=0), r"n is 0, expected"),
        (
            lambda: r.recommend([1000, 1003], 3),
            r"history 0 is 1000, expected a list of ids; pass \[history\] for one user",
        ),
        (
            lambda: named.recommend(["i1", "i2"], 3),
            r"history 0 is 'i1', expected a list of ids; pass \[history\]",
        ),
        (
            lambda: r.recommend("i1", 3),
            r"histories are of type str, expected one of: lists of ids, a S",
        ),
        (lambda: r.recommend(7, 3), r"histories are of type int, expected one of"),
        (
            lambda: r.recommend([[1000, "x"]], 3),
            r"the histories must hold original ids, all whole numbers or all strings",
        ),
        (
            lambda: r.recommend([[1.5]], 3),
            r"the histories, row 1: the id 1\.5 is not a whole number from 0 to 2\^53-1",
        ),
        (lambda: r.recommend([[1000, None]], 3), r"the histories must hold original ids"),
        (
            lambda: r.recommend(scipy.sparse.csr_matrix((2, 5)), 3),
            r"has shape \(2, 5\), expected \(users, 37\)",
        ),
        (
            lambda: r.recommend(table, 3),
            r"the table has no column 'item'; its columns are user, thing; pass item_column=",
        ),
        (
            lambda: r.recommend([[1000]], 3, restrict_to=[4, 5]),
            r"leave no item that the model knows; pass other ids",
        ),
        (
            lambda: r.explain([1000], 4),
            r"item 4 is not one of the 37 items that the model was trained on",
        ),
        (lambda: named.explain(["i1"], "film"), r"item 'film' is not one of the 37 items"),
        (lambda: r.similar_items(4, 3), r"item 4 is not one of the 37 items"),
        (
            lambda: r.explain([4, 5], 1000),
            r"no item of the history is known to the model; there is nothing to explain",
        ),
        (lambda: r.explain([], 1000), r"no item of the history is known"),
        (lambda: Recommender.load(tmp_path / "no"), r"no is not a folder; pass the run\.dir"),
        (lambda: Recommender.load(tmp_path), r"holds no checkpoint; name the run.dir"),
        (lambda: Recommender.load(path, "step-9"), r"step-9 is not a checkpoint; .* holds best"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    ids, scores = r.recommend([], 3)
    assert ids.shape == scores.shape == (0, 3)


def test_commands_exit_with_2(runs, tmp_path):
    path, _ = a_run(runs, "flvae")
    (tmp_path / "h.csv").write_text("user,item\n1,1000\n")
    recommend = [
        "recommend",
        "--run",
        path,
        "--histories",
        tmp_path / "h.csv",
        "--output",
        tmp_path / "o.csv",
    ]
    for arguments, message in (
        (
            ["export", "--run", tmp_path / "no", "--output", tmp_path / "model"],
            "no is not a folder",
        ),
        (["export", "--run", path, "--output", tmp_path], "exists; name another folder"),
        ([*recommend, "--explain", "2"], "--explain needs an items x items matrix"),
        ([*recommend, "--explain", "-1"], "--explain is -1, expected 0 to 1,000 past items"),
    ):
        with pytest.raises(ValueError, match=message):
            importlib.import_module(f"launch.{arguments[0]}").main(
                [*map(str, arguments[1:]), "--device", "cpu"]
            )
    done = command("export", "--run", tmp_path / "no", "--output", tmp_path / "model")
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: ")
        and len(done.stderr.splitlines()) == 1
    ), done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["h.csv"]


# --- memory ---------------------------------------------------------------------------------------


class Copies(TorchDispatchMode):
    """Bytes of the largest tensor, and of all, that operations give back outside the mapped
    files."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.total = 0, 0
        pages = [
            m
            for m in psutil.Process().memory_maps(grouped=False)
            if m.path.endswith(".safetensors")
        ]
        self.mapped = [tuple(int(a, 16) for a in m.addr.split("-")) for m in pages]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                address, n_bytes = (
                    tensor.untyped_storage().data_ptr(),
                    tensor.untyped_storage().nbytes(),
                )
                if n_bytes and not any(lo <= address < hi for lo, hi in self.mapped):
                    self.largest, self.total = max(self.largest, n_bytes), self.total + n_bytes
        return out


def test_no_copy_of_the_matrix_is_ever_made(runs):
    n_items, columns = 1500, 100
    matrix, block = 4 * n_items**2, 4 * n_items * columns
    path = runs / "wide"
    write_run(path, list(range(n_items)), "vasp", 2, columns=columns)
    r = Recommender.load(path)
    histories = [[u, 3 * u + 1, 700 + u] for u in range(20)]
    work = {
        "recommend": lambda: r.recommend(histories, 10),
        "restrict": lambda: r.recommend(histories, 10, restrict_to=range(5, 900, 7)),
        "explain": lambda: r.explain(histories[3], 1400),
        "nease": lambda: r.similar_items(5, 10),
        "decoder": lambda: r.similar_items(5, 10, by="decoder"),
    }
    for what, call in work.items():
        with Copies() as copies:
            call()
        assert 0 < copies.largest < block / 2, (what, copies.largest)
        assert copies.total < matrix / 2, (
            what,
            copies.total,
        )  # nor in pieces, one block after the other
    (path,) = r.model.model.matrices
    with Copies() as copies:
        torch.cat([b.tensor for b in path.blocks if b.hi <= n_items // 2], dim=1)
    assert copies.largest == matrix / 2, "a copy would have been seen"


@pytest.mark.slow
def test_private_memory_does_not_grow_with_the_matrix(runs, tmp_path):
    """In a process of its own: 64 MB of W, of which private memory takes no part; a copied load is
    seen."""
    path, n_items = runs / "private", 4000
    write_run(path, list(range(n_items)), "nease", 1, columns=256, sharper=1.0)
    script = f"""
import torch
from dataclasses import replace
from pathlib import Path
torch.set_num_threads(1)
from dist_vasp import Recommender
def private():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(l for l in lines if l.startswith("RssAnon")).split()[1]) / 1024
other = Recommender.load({str(runs / "small")!r}); other.recommend([[1]], 3)
before = private()
r = Recommender.load({str(path)!r})
r.recommend([[u, u + 50] for u in range(300)], 10)
print(private() - before)
copy = [w.clone() for w in r.model.model.matrices[0].columns()]
print(private() - before)
"""
    write_run(runs / "small", list(range(20)), "nease", 1)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    mapped, copied = map(float, done.stdout.split())
    assert mapped < 24 < 60 < copied, (mapped, copied)


def test_a_file_larger_than_memory_is_mapped(tmp_path):
    """A sparse file of twice the machine's memory; torch's own mapping of it is refused by the
    kernel."""
    n = psutil.virtual_memory().total // 2  # fp32 numbers
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [n // 8, 8], "data_offsets": [0, n // 8 * 32]}}
    ).encode()
    header += b" " * (-len(header) % 8)
    with open(tmp_path / "large.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + n // 8 * 32)
        file.seek(-4, 2)
        file.write(np.float32(3).tobytes())
    w = map_tensors(tmp_path / "large.safetensors")["w"]
    assert w.shape == (n // 8, 8) and w[-1, -1] == 3 and w[0, 0] == 0


def test_the_script_in_the_readme(tmp_path):
    """At most 14 lines, on a run with the demo's ids."""
    script = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    assert len(script.splitlines()) <= 14
    write_run(tmp_path / "demo" / "run", list(range(1, 801)), columns=256)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    r = Recommender.load(tmp_path / "demo" / "model")
    expected = r.recommend([[17, 256, 391]], 5).ids[0].tolist()
    lines = done.stdout.splitlines()
    assert [int(line.split(":")[0]) for line in lines] == expected
    for line in lines:
        p, deep, shallow = map(
            float, re.search(r"p (\S+) = deep (\S+) x shallow (\S+), because of", line).groups()
        )
        assert p == pytest.approx(deep * shallow, abs=2e-3)

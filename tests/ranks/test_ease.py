"""Closed-form EASE against numpy's inverse in double precision, on 1, 2 and 3 ranks, and as a run
from the command line."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.csv as pa_csv
import pytest
import scipy.sparse
import torch

from dist_vasp.commands import train as command
from dist_vasp.config.schema import Config, DataConfig, ModelConfig, RunConfig
from dist_vasp.data.manifest import Manifest
from dist_vasp.data.rows import concatenate_rows
from dist_vasp.model import ease
from dist_vasp.model.build import measure_size, new_model
from dist_vasp.model.ease import SymmetricColumns, add_gram, add_to_diagonal, invert, to_weights
from dist_vasp.parallel.agree import AgreedError
from dist_vasp.parallel.comm import Ranks
from dist_vasp.plan.closed_form import EASE_COLUMNS
from dist_vasp.plan.estimate import make_plan
from dist_vasp.plan.rates import Rates
from dist_vasp.plan.terms import Sizes
from dist_vasp.ranking.evaluate import to_item_rows
from dist_vasp.ranking.load import load_model
from dist_vasp.training.closed_form import ease as fit_ease
from dist_vasp.training.closed_form import settings
from dist_vasp.training.stop import StopRequest
from tests.oracles.rounding import bounded_scores, each_within, stored
from tests.ranks.test_evaluate import full_ranking, metrics_of
from tests.ranks.test_memory import Allocations
from tests.support.invoke import fails, succeeds
from tests.support.jobs import environment, free_port
from tests.support.make_shards import write_folder
from tests.support.partitioned import csr, random_rows
from tests.support.paths import ROOT
from tests.support.ranks import run_ranks
from tests.unit.ranking.test_recommend import alone

LAMBDA = 3.0


def oracle(x: np.ndarray, value: float) -> np.ndarray:
    """B by the formula of the paper."""
    P = np.linalg.inv(x.T @ x + value * np.eye(x.shape[1]))
    B = np.eye(len(P)) - P @ np.diag(1 / np.diag(P))
    np.fill_diagonal(B, 0)
    return B


def dense(rows: list[list[int]], n_items: int) -> np.ndarray:
    x = np.zeros((len(rows), n_items))
    for u, row in enumerate(rows):
        x[u, row] = 1
    return x


def columns_of(ranks: Ranks, n_items: int, width: int, dtype: torch.dtype) -> SymmetricColumns:
    blocks = ranks.partition_of_items(n_items).blocks(width)
    return SymmetricColumns(
        [torch.zeros((n_items, hi - lo), dtype=dtype) for lo, hi in blocks], n_items, ranks, width
    )


def gram(A: SymmetricColumns, rows: list[list[int]]) -> None:
    """In three parts, the last without a user."""
    for part in (rows[:70], rows[70:], []):
        add_gram(A, to_item_rows(csr(part), len(part), A.n_items, torch.device("cpu")))


# --- the matrix -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_blocks", range(1, 10))
def test_of_two_mirrored_blocks_one_is_kept_and_all_columns_keep_as_many(n_blocks):
    A = columns_of(alone(), 3 * n_blocks - 1, 3, torch.float64)
    kept = np.zeros((A.n_items, n_blocks), int)
    for c in range(n_blocks):
        for first, last in A.kept_rows(c):
            kept[first:last, c] += 1
    by_block = np.stack([kept[lo] for lo, _ in A.blocks])
    assert (by_block + by_block.T == 1 + np.eye(n_blocks)).all()
    assert (np.repeat(by_block, [hi - lo for lo, hi in A.blocks], axis=0) == kept).all(), (
        "a block is kept whole"
    )
    assert np.ptp(by_block.sum(axis=0)) <= 1


def _gram(ranks: Ranks) -> list[np.ndarray]:
    return [_filled_gram(ranks, *case) for case in GRAMS]


def _filled_gram(ranks: Ranks, n_items: int, width: int, dtype: torch.dtype) -> np.ndarray:
    A = columns_of(ranks, n_items, width, dtype)
    gram(A, random_rows(150, n_items, 1, empty=(0, 149)))
    A.fill()
    return torch.cat(A.columns, dim=1).numpy()


GRAMS = [(37, 8, torch.float64), (37, 8, torch.float32), (300, 300, torch.float32)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gram_matrix_is_that_of_scipy(world_size):
    by_rank = run_ranks(_gram, world_size)
    for case, (n_items, _, _) in enumerate(GRAMS):
        x = scipy.sparse.csr_matrix(dense(random_rows(150, n_items, 1, empty=(0, 149)), n_items))
        found = np.concatenate([grams[case] for grams in by_rank], axis=1)
        np.testing.assert_array_equal(found, (x.T @ x).toarray())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_dense_products_of_users_give_the_same_gram_matrix(monkeypatch, dtype):
    """As on a GPU; users are taken in several groups."""
    n_items, rows = 37, random_rows(150, 37, 1, empty=(0, 149))
    monkeypatch.setattr(ease, "DENSE_BYTES", 40 * n_items * dtype.itemsize)
    x = to_item_rows(csr(rows), len(rows), n_items, torch.device("cpu"))
    for weight_U in (None, (1 + x.lengths.to(dtype)) ** -0.5):
        sums, products = (columns_of(alone(), n_items, 8, dtype) for _ in range(2))
        add_gram(sums, x, weight_U)
        ease.add_dense_gram(products, x, weight_U)
        for column, wanted in zip(products.columns, sums.columns, strict=True):
            if weight_U is None:
                assert torch.equal(column, wanted)
            else:  # 150 summands, in another order
                assert torch.allclose(column, wanted, rtol=150 * torch.finfo(dtype).eps, atol=0)


def _weighted(ranks: Ranks) -> np.ndarray:
    rows = random_rows(150, 37, 1, empty=(0, 149))
    A = columns_of(ranks, 37, 8, torch.float64)
    for part in (rows[:70], rows[70:]):
        x = to_item_rows(csr(part), len(part), 37, torch.device("cpu"))
        add_gram(A, x, (1 + x.lengths.double()) ** -0.5)
    A.fill()
    return torch.cat(A.columns, dim=1).numpy()


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_weighted_gram_matrix_is_that_of_numpy(world_size):
    x = dense(random_rows(150, 37, 1, empty=(0, 149)), 37)
    weights = (1 + x.sum(axis=1)) ** -0.5
    found = np.concatenate(run_ranks(_weighted, world_size), axis=1)
    np.testing.assert_allclose(found, x.T @ (weights[:, None] * x), rtol=1e-12, atol=1e-12)


# blocks that do and do not divide the items, an even and an odd number of them, one block, one item
# a block
WEIGHTS = [(37, 8), (40, 10), (45, 5), (7, 16), (9, 1)]


def _weights(ranks: Ranks) -> list[np.ndarray]:
    return [_weights_of(ranks, *case) for case in WEIGHTS]


def _weights_of(ranks: Ranks, n_items: int, width: int) -> np.ndarray:
    A = columns_of(ranks, n_items, width, torch.float64)
    gram(A, random_rows(150, n_items, 1))
    add_to_diagonal(A, LAMBDA)
    ticks: list[int] = []
    invert(A, ticks.append)
    assert ticks == list(range(1, len(A.blocks) + 1))
    to_weights(A)
    return torch.cat(A.columns, dim=1).numpy()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_weights_are_those_of_numpys_inverse(world_size):
    by_rank = run_ranks(_weights, world_size)
    for case, (n_items, _) in enumerate(WEIGHTS):
        B = np.concatenate([weights[case] for weights in by_rank], axis=1)
        np.testing.assert_allclose(
            B, oracle(dense(random_rows(150, n_items, 1), n_items), LAMBDA), rtol=0, atol=1e-10
        )
        assert (np.diag(B) == 0).all()


def test_in_float32_as_exact_as_lapacks_cholesky():
    """An ill-conditioned Gram matrix (condition 1e6, more items than users)."""
    rows = random_rows(150, 400, 2)
    x = dense(rows, 400)
    exact = np.linalg.inv(x.T @ x + 1e-2 * np.eye(400))
    A = columns_of(alone(), 400, 64, torch.float32)
    gram(A, rows)
    add_to_diagonal(A, 1e-2)
    A.fill()
    G = torch.cat(A.columns, dim=1)
    assert np.linalg.cond(G.double().numpy()) > 1e5
    lapack = torch.cholesky_inverse(torch.linalg.cholesky(G)).double().numpy()
    invert(A)
    errors = [
        np.linalg.norm(found - exact)
        for found in (-torch.cat(A.columns, dim=1).double().numpy(), lapack)
    ]
    assert errors[0] <= 2 * errors[1]


def _singular(ranks: Ranks) -> str:
    A = columns_of(ranks, 40, 6, torch.float64)
    gram(A, random_rows(20, 40, 1))  # fewer users than items and no lambda
    with pytest.raises(AgreedError) as caught:
        invert(A)
    return str(caught.value)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_pivot_that_is_not_positive_is_an_error_on_every_rank(world_size):
    for text in run_ranks(_singular, world_size):
        assert "not positive at item row" in text and "raise model.ease_lambda" in text


def test_a_diagonal_that_is_not_positive_is_an_error():
    A = columns_of(alone(), 4, 2, torch.float32)
    for column in A.columns:
        column.fill_(torch.nan)
    with pytest.raises(
        AgreedError,
        match=r"diagonal that is not positive within the item rows 0 to 1.*raise "
        r"model\.ease_lambda",
    ):
        to_weights(A)


# --- a run ----------------------------------------------------------------------------------------

N_ITEMS = 60


def tastes(n_users: int, seed: int) -> list[np.ndarray]:
    """Users with two of ten tastes, and a third of their items from anywhere: too small a lambda
    learns the noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n_users):
        liked = np.concatenate(
            [np.arange(6) + 6 * taste for taste in rng.choice(10, 2, replace=False)]
        )
        rows.append(
            np.unique(
                np.concatenate(
                    [rng.choice(liked, 8, replace=False), rng.choice(N_ITEMS, 4, replace=False)]
                )
            )
        )
    return rows


def held_out(n_users: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    pairs = []
    for row in tastes(n_users, seed):
        out = np.isin(row, rng.choice(row, 3, replace=False))
        pairs.append((row[~out], row[out]))
    return pairs


def write_shards(path: Path) -> Path:
    """The data folder of these users' tastes."""
    write_folder(path, tastes(400, 0), held_out(150, 1), held_out(60, 2), n_items=N_ITEMS)
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("ease") / "shards")


def arguments(shards: Path, run_dir: Path, *more: str) -> list[str]:
    data = ["--data.shards", str(shards), "--run.dir", str(run_dir), "--device", "cpu"]
    return ["--model.kind", "ease", "--model.ease_dtype", "fp64", *data, *more]


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Path:
    """A search in a process of its own."""
    path = tmp_path_factory.mktemp("ease") / "run"
    out = succeeds("train", *arguments(shards, path))
    assert "lambda 5120: validation NDCG@100 0." in out and re.search(
        r"inverse: 1/1 blocks, [\d.,]+ blocks/s, 0:00:00 left", out
    )
    return path


def train_matrix() -> np.ndarray:
    return dense([row.tolist() for row in tastes(400, 0)], N_ITEMS)


def figures(B: np.ndarray, pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    seen = [fold_in.tolist() for fold_in, _ in pairs]
    found = metrics_of(
        full_ranking(dense(seen, N_ITEMS) @ B, seen), [out.tolist() for _, out in pairs]
    )
    return {name: value for name, value in found.items() if "@" in name and "coverage" not in name}


def lines_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_the_search_finds_the_lambda_that_is_best_on_validation(run):
    lines, result = lines_of(run), json.loads((run / "result.json").read_text())
    assert [line["ease_lambda"] for line in lines] == list(settings.GRID[: len(lines)])
    x, pairs = train_matrix(), held_out(150, 1)
    for line in lines:
        expected = figures(oracle(x, line["ease_lambda"]), pairs)
        # the run scores with its weights in float32, which may swap two items that are as good as
        # tied
        assert line["ndcg@100"] == pytest.approx(expected["ndcg@100"], abs=1e-4)
    every = {value: figures(oracle(x, value), pairs)["ndcg@100"] for value in settings.GRID}
    planted = max(every, key=every.__getitem__)
    assert result["ease_lambda"] == planted
    assert settings.GRID[0] > planted > settings.GRID[-1], (
        "the optimum of this test lies within the grid"
    )
    assert len(lines) == settings.GRID.index(planted) + 1 + settings.PATIENCE, (
        "the search ends behind it"
    )


def test_files_and_result_of_a_run(run):
    result = json.loads((run / "result.json").read_text())
    names = [
        "validation",
        "test",
        "seconds_training",
        "epochs",
        "world_size",
        "checkpoint",
        "checkpoint_sha256",
    ]
    names.append("ease_lambda")
    assert list(result) == names
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"best", result["checkpoint"]}
    assert (run / "checkpoints" / "best").resolve().name == result["checkpoint"]
    B = load_model(run, None, alone()).model.model.matrices[0].columns()
    expected = oracle(train_matrix(), result["ease_lambda"])
    stored(torch.cat(B, dim=1), expected, "B")
    found = figures(expected, held_out(60, 2))
    assert {k: result["test"][k] for k in found} == pytest.approx(found, abs=1e-4)


def test_evaluate_and_recommend(run, tmp_path, call):
    from launch.evaluate import main as evaluate
    from launch.recommend import main as recommend

    result = json.loads((run / "result.json").read_text())
    call(evaluate, "--run", run, "--json", tmp_path / "e.json", "--device", "cpu")
    assert json.loads((tmp_path / "e.json").read_text())["test"] == result["test"]
    call(evaluate, "--run", run, "--json", tmp_path / "h.json", "--recall_denominator", "held_out")
    assert (
        json.loads((tmp_path / "h.json").read_text())["test"]["ndcg@20"]
        == result["test"]["ndcg@20"]
    )

    seen = [3, 4, 40]
    (tmp_path / "h.csv").write_text("user,item\n" + "".join(f"ann,{1000 + i}\n" for i in seen))
    call(
        recommend,
        "--run",
        run,
        "--histories",
        tmp_path / "h.csv",
        "--k",
        57,
        "--output",
        tmp_path / "l.csv",
        "--device",
        "cpu",
    )
    table = pa_csv.read_csv(tmp_path / "l.csv").to_pydict()
    B = oracle(train_matrix(), result["ease_lambda"])
    x = torch.from_numpy(dense([seen], N_ITEMS))
    scores, bounds = bounded_scores(lambda: x @ torch.from_numpy(B).mul(1.0))  # B is rounded once
    items = [item - 1000 for item in table["item"]]
    assert sorted(items + seen) == list(range(N_ITEMS))
    each_within(table["score"], scores[0, items], bounds[0, items], "x B")


@pytest.mark.slow
def test_two_ranks_and_a_given_lambda_under_deepspeed(shards, run, tmp_path):
    """The same figures as one rank, and a checkpoint of two partitions that one rank reads."""
    value = json.loads((run / "result.json").read_text())["ease_lambda"]
    succeeds(
        "train", *arguments(shards, tmp_path / "two", "--model.ease_lambda", str(value)), ranks=2
    )
    one, two = (json.loads((path / "result.json").read_text()) for path in (run, tmp_path / "two"))
    assert (two["world_size"], two["ease_lambda"], two["checkpoint"]) == (2, value, "step-00000001")
    for split in ("validation", "test"):
        assert two[split] == pytest.approx(one[split], abs=1e-4)
    loaded = load_model(tmp_path / "two", None, alone())
    assert len(loaded.checkpoint.header.files) == 2
    expected = oracle(train_matrix(), value)
    stored(torch.cat(loaded.model.model.matrices[0].columns(), dim=1), expected, "B of two ranks")


def test_a_run_that_is_done_only_says_so_again(run, shards, tmp_path, call, capsys):
    from launch.train import main

    done = shutil.copytree(run, tmp_path / "done", symlinks=True)
    call(main, *arguments(shards, done))
    assert "already holds lambda" in capsys.readouterr().out
    assert json.loads((done / "result.json").read_text()) == json.loads(
        (run / "result.json").read_text()
    )
    assert lines_of(done) == lines_of(run)
    with pytest.raises(
        ValueError,
        match=r"model\.ease_lambda was 0\.0 and is now 7\.0; set it back, or start a new run\.dir",
    ):
        call(main, *arguments(shards, done, "--model.ease_lambda", "7"))
    call(
        main, *arguments(shards, done, "--run.recall_denominator", "held_out")
    )  # only changes how the same lists are counted


def test_a_search_that_was_cut_off_goes_on_behind_the_best(run, shards, tmp_path, call, capsys):
    """Stopped within a later lambda; the same command then gives the same result."""
    from launch.train import main

    class StopAfter(StopRequest):
        asked = 0

        @property
        def requested(self) -> bool:
            type(self).asked += 1
            return type(self).asked > 30

        @requested.setter
        def requested(self, value: bool) -> None: ...

    path = tmp_path / "cut"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "StopRequest", StopAfter)
        assert call(main, *arguments(shards, path)) == 0
    assert "stopped on request" in capsys.readouterr().out
    assert not (path / "result.json").exists()
    assert (path / "checkpoints" / "best").is_dir()
    saved, tried = (path / "checkpoints" / "best").resolve().name, lines_of(path)
    call(main, *arguments(shards, path))
    value = settings.GRID[len(tried) - 1]
    assert len(tried) >= int(saved.removeprefix("step-"))
    assert f"(resumed after lambda {value:g})" in capsys.readouterr().out
    assert lines_of(path)[: len(tried)] == tried, "none is tried again"
    before, after = (json.loads((folder / "result.json").read_text()) for folder in (run, path))
    assert {k: after[k] for k in ("test", "validation", "checkpoint")} == {
        k: before[k] for k in ("test", "validation", "checkpoint")
    }
    assert [line["ndcg@100"] for line in lines_of(path)] == [
        line["ndcg@100"] for line in lines_of(run)
    ]


def test_sigterm_ends_a_run_with_status_0(tmp_path):
    """Between two lambdas or in the middle of one: nothing half-written stays, and the lock is
    gone."""
    write_folder(tmp_path / "shards", random_rows(60, 1500, 0), [([0], [1])] * 3, n_items=1500)
    command = [
        sys.executable,
        str(ROOT / "launch" / "train.py"),
        *arguments(tmp_path / "shards", tmp_path / "run"),
    ]
    process = subprocess.Popen(
        command,
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(2)]
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, [*lines, out]
    assert "stopped on request" in out
    assert not (tmp_path / "run" / "result.json").exists()
    assert not list((tmp_path / "run" / "checkpoints").glob(".*.tmp"))


def test_dry_run_says_memory_and_time_and_writes_nothing(run, shards, tmp_path, call, capsys):
    from launch.train import main

    call(main, *arguments(shards, tmp_path / "new"), "--dry_run")
    out = capsys.readouterr().out
    assert (
        "memory of a rank, 1 partitions: 0." in out
        and "time for each of at most 10 settings" in out
    )
    assert "would start anew" in out and not (tmp_path / "new").exists()
    call(main, *arguments(shards, run), "--dry_run")
    assert "would resume from step-" in capsys.readouterr().out


def test_what_cannot_work_is_refused(shards, tmp_path, call):
    from launch.benchmark import main as benchmark
    from launch.train import main

    run_dir = tmp_path / "run"
    with pytest.raises(ValueError, match=r"--init_from is x, but model\.kind ease"):
        call(main, *arguments(shards, run_dir), "--init_from", "x")
    with pytest.raises(
        ValueError, match=r"model\.kind is 'ease', expected a model that is trained in steps"
    ):
        call(benchmark, *arguments(shards, run_dir))
    with pytest.raises(ValueError, match=r"model\.ease_lambda is -1\.0, expected 0 or more"):
        call(main, *arguments(shards, run_dir, "--model.ease_lambda=-1"))
    for name, pairs in (("none", []), ("empty", [([1], [])])):
        write_folder(tmp_path / name, tastes(20, 0), pairs, n_items=N_ITEMS)
        with pytest.raises(
            ValueError,
            match=r"model\.ease_lambda is 0, so it is to be chosen on validation.*set "
            r"model\.ease_lambda",
        ):
            call(main, *arguments(tmp_path / name, run_dir))
    write_folder(tmp_path / "few", tastes(20, 0), n_items=N_ITEMS)
    line = fails(
        "train",
        *arguments(
            tmp_path / "few",
            tmp_path / "x",
            "--model.ease_lambda",
            "1e-30",
            "--model.ease_dtype",
            "fp32",
        ),
    )
    assert "raise model.ease_lambda or set model.ease_dtype to fp64" in line


# --- memory ---------------------------------------------------------------------------------------

I, WIDTH, USERS = 211, 32, 46


def _fit(ranks: Ranks, folder: Path, dtype: str) -> tuple[np.ndarray, dict]:
    ease.SWEEP_COLUMNS = ease._GATHER_COLUMNS = WIDTH
    config = Config(
        model=ModelConfig(kind="ease", ease_dtype=dtype, ease_lambda=LAMBDA),
        data=DataConfig(shards=str(folder)),
        run=RunConfig(),
    )
    blocks = replace(config.parallel, block_columns=WIDTH)
    model = new_model(replace(config, parallel=blocks), I, ranks)
    columns = model.matrices[0].columns()
    with Allocations() as mode:
        fit_ease.fit(columns, WIDTH, config, Manifest.load(folder), ranks)
    return torch.cat(columns, dim=1).numpy(), mode.seen


@pytest.mark.parametrize(("world_size", "replicas"), [(2, 1), (3, 1), (4, 2)])
def test_no_rank_ever_holds_a_whole_matrix(tmp_path, world_size, replicas):
    """Nor users x items: besides its own columns a rank makes nothing larger than a block of
    them."""
    rows = random_rows(USERS, I, 0)
    write_folder(tmp_path, rows, n_items=I)
    found = run_ranks(_fit, world_size, tmp_path, "fp64", replicas=replicas)
    partitions = world_size // replicas
    for replica in range(replicas):
        B = np.concatenate(
            [B for B, _ in found[replica * partitions : (replica + 1) * partitions]], axis=1
        )
        stored(B, oracle(dense(rows, I), LAMBDA), "B of a replica")
    for _, seen in found:
        assert ((I, WIDTH), 8 * I * WIDTH) in seen
        for (shape, n_bytes), operation in seen.items():
            assert int(np.prod(shape)) <= I * WIDTH, f"{operation} gives {shape}, {n_bytes} bytes"


def test_users_are_taken_together_and_each_once(tmp_path, monkeypatch):
    rows = random_rows(100, 30, 0, empty=(5,))
    write_folder(tmp_path, rows, n_items=30, users_per_shard=7)
    manifest = Manifest.load(tmp_path)
    one = [block.rows for block in fit_ease.training_blocks(tmp_path, manifest)]
    monkeypatch.setattr(fit_ease, "_MOST_USERS", 21)
    parts = [block.rows for block in fit_ease.training_blocks(tmp_path, manifest)]
    assert len(one) < len(parts) and max(p.n_rows for p in parts) == 21
    for together in (one, parts):
        joined, expected = concatenate_rows(together), csr(rows)
        assert (
            joined.indptr.tolist() == expected.indptr.tolist()
            and joined.items.tolist() == expected.items.tolist()
        )


def test_plan_knows_the_block_and_counts_the_matrix():
    assert EASE_COLUMNS == {"cpu": ease.SWEEP_COLUMNS, "cuda": ease.GPU_SWEEP_COLUMNS}
    config = Config(model=ModelConfig(kind="ease"))
    one, four = (make_plan(config, Sizes(40_981, 27.0, 29_858), p, 1, Rates()) for p in (1, 4))
    assert one.memory["item weights"] == 4 * 40_981**2
    assert one.memory_total < 10e9
    assert four.memory["item weights"] == pytest.approx(one.memory["item weights"] / 4, rel=1e-3)
    double = make_plan(
        replace(config, model=ModelConfig(kind="ease", ease_dtype="fp64")),
        Sizes(40_981, 27.0),
        1,
        1,
        Rates(),
    )
    assert double.memory["item weights"] == 2 * one.memory["item weights"]
    size = measure_size(config, 100, 4)
    assert size.items == 100 * 25 and size.trunk == 0


# --- real data ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.data
def test_movielens_1m_gives_the_known_figures(data_dir, tmp_path):
    """configs/ease-ml-1m.yaml on 2 ranks: lambda 600, float64."""
    from data_tools.shard import main as shard

    sizes = ["--val_users", "500", "--test_users", "1000"]
    assert (
        shard([str(data_dir / "ml-1m" / "ratings.csv.gz"), str(tmp_path / "shards"), *sizes]) == 0
    )
    deepspeed = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_accelerators",
        "2",
        "--master_port",
        str(free_port()),
    ]
    command = [*deepspeed, "launch/train.py", "--config", "configs/ease-ml-1m.yaml"]
    command += ["--data.shards", str(tmp_path / "shards"), "--run.dir", str(tmp_path / "run")]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    test = json.loads((tmp_path / "run" / "result.json").read_text())["test"]
    assert [round(test[name], 4) for name in ("ndcg@100", "recall@20", "recall@50")] == [
        0.4222,
        0.3631,
        0.4806,
    ]

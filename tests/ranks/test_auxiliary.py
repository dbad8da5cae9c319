"""Auxiliary interactions count their value in X of the closed form, on 1, 2 and 3 ranks."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_vasp.config.schema import Config, DataConfig, ModelConfig
from dist_vasp.data.block import concatenate
from dist_vasp.data.manifest import Manifest
from dist_vasp.model import ease
from dist_vasp.model.ease import SymmetricColumns, add_dense_gram, add_gram
from dist_vasp.parallel.comm import Ranks
from dist_vasp.ranking.evaluate import to_item_rows
from dist_vasp.training.closed_form.auxiliary import Auxiliary, Overlap
from dist_vasp.training.closed_form.ease import fit, training_blocks
from tests.oracles.rounding import stored
from tests.support.invoke import fails, run_script, succeeds
from tests.support.make_shards import write_folder
from tests.support.ranks import run_ranks
from tests.unit.ranking.test_recommend import alone

I, USERS, WIDTH, VALUE = 14, 40, 4, 0.375
KEYS = ModelConfig(
    kind="ease",
    ease_lambda=3.0,
    ease_dropout=0.3,
    ease_user_exponent=-0.5,
    ease_lambda_exponent=0.3,
    ease_auxiliary=VALUE,
    ease_dtype="fp64",
)


def rows_of_more() -> list[np.ndarray]:
    """The rows of the second folder, by user; some pairs are in both."""
    more = rows_by_user(I + 2, 2)
    for user, main in enumerate(rows_by_user(I, 1)):
        more[user] = np.unique(np.concatenate([more[user], I - 1 - main[:1]]))
    return more


def rows_by_user(n_items: int, seed: int, shares: float = 0.3) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [np.flatnonzero(generator.random(n_items) < shares) for _ in range(USERS)]


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Shards of USERS training users, and others with more of them: the first 30 users as training
    users there, the others held out; the items in another order, the last two unknown here."""
    main = rows_by_user(I, 1)
    main[3] = np.array([], int)
    write_folder(tmp_path / "main", main, [([0, 1], [2])], [([3], [4])], n_items=I)
    more = rows_of_more()
    held_out = [(row[: len(row) // 2], row[len(row) // 2 :]) for row in more[30:]]
    ids = [*(1000 + np.arange(I))[::-1], 5000, 5001]
    write_folder(tmp_path / "more", more[:30], held_out[:5], held_out[5:], item_ids=ids)
    return tmp_path / "main", tmp_path / "more"


def expected_x() -> tuple[np.ndarray, np.ndarray]:
    """X with the auxiliary values, and without: dense, (USERS, I)."""
    main, more = rows_by_user(I, 1), rows_of_more()
    main[3] = np.array([], int)
    x = np.zeros((USERS, I))
    for user in range(USERS):
        here = [I - 1 - item for item in more[user] if item < I]
        x[user, here] = VALUE
    own = np.zeros((USERS, I))
    for user in range(USERS):
        own[user, main[user]] = 1
    return np.where(own > 0, 1, x), own


def oracle() -> np.ndarray:
    """B in dense numpy: lengths and popularity are those of the main data."""
    x, own = expected_x()
    lengths, popularity = own.sum(axis=1), own.sum(axis=0)
    weights = (np.maximum(lengths, 1) / lengths.mean()) ** -0.5
    G = x.T @ (weights[:, None] * x)
    relative = np.maximum(popularity, 1) / popularity.mean()
    ridge = 3.0 * relative**0.3 + np.diag(G) * 0.3 / 0.7
    P = np.linalg.inv(G + np.diag(ridge))
    B = np.eye(I) - P / np.diag(P)
    np.fill_diagonal(B, 0)
    return B


def config_of(folders: tuple[Path, Path]) -> Config:
    main, more = map(str, folders)
    return Config(model=KEYS, data=DataConfig(shards=main, auxiliary=more))


def _fitted(ranks: Ranks, folders: tuple[Path, Path]) -> np.ndarray:
    config, manifest = config_of(folders), Manifest.load(folders[0])
    blocks = ranks.partition_of_items(I).blocks(WIDTH)
    columns = [torch.zeros(I, hi - lo) for lo, hi in blocks]
    auxiliary = Auxiliary(Overlap(config, manifest))
    fit(columns, WIDTH, config, manifest, ranks, auxiliary=auxiliary)
    return torch.cat(columns, dim=1).numpy()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_equals_the_formula(folders, world_size):
    found = run_ranks(_fitted, world_size, folders)
    stored(np.concatenate(found, axis=1), oracle(), "B with auxiliary interactions")


def test_rows_are_joined(folders):
    config, manifest = config_of(folders), Manifest.load(folders[0])
    auxiliary = Auxiliary(Overlap(config, manifest))
    x, _ = expected_x()
    block = concatenate(training_blocks(folders[0], manifest))
    rows = auxiliary.joined(block, VALUE)
    found = np.zeros_like(x)
    found[rows.row_of, rows.items] = rows.values
    np.testing.assert_array_equal(found[np.argsort(block.user_keys)], x)
    of_items = sum(int((row < I).sum()) for row in rows_of_more())
    assert auxiliary.told() == (
        f"data.auxiliary: {of_items} pairs in {folders[1]} are of training users (40 of 40) and "
        "items of data.shards; those that data.shards does not hold count model.ease_auxiliary each"
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_gram_matrix_of_values(folders, monkeypatch, dtype, weighted):
    """By sums over users as on a CPU, and by dense products as on a GPU; all numbers are exact."""
    monkeypatch.setattr(ease, "_GATHER_COLUMNS", 3)
    monkeypatch.setattr(ease, "DENSE_BYTES", 7 * I * dtype.itemsize)
    manifest = Manifest.load(folders[0])
    auxiliary = Auxiliary(Overlap(config_of(folders), manifest))
    block = concatenate(training_blocks(folders[0], manifest))
    rows = auxiliary.joined(block, VALUE)
    x = to_item_rows(rows, rows.n_rows, I, torch.device("cpu"))
    dense = np.zeros((rows.n_rows, I))
    dense[rows.row_of, rows.items] = rows.values
    weight = np.where(np.arange(rows.n_rows) % 2, 0.5, 2.0) if weighted else np.ones(rows.n_rows)
    weight_U = torch.tensor(weight, dtype=dtype) if weighted else None
    for add in (add_gram, add_dense_gram):
        blocks = alone().partition_of_items(I).blocks(WIDTH)
        columns = [torch.zeros(I, hi - lo, dtype=dtype) for lo, hi in blocks]
        G = SymmetricColumns(columns, I, alone(), WIDTH)
        add(G, x, weight_U)
        G.fill()
        found = torch.cat(G.columns, dim=1).numpy()
        np.testing.assert_array_equal(found, dense.T @ (weight[:, None] * dense))


def _command(folders: tuple[Path, Path], run: Path, *more: str) -> list[object]:
    words = ["train", "--data.shards", folders[0], "--data.auxiliary", folders[1], "--run.dir", run]
    words += ["--model.kind", "ease", "--model.ease_lambda", "3", "--device", "cpu"]
    return [*words, "--model.ease_auxiliary", "0.375", *more]


def test_a_run_says_what_counts_and_is_not_resumed_with_other_data(folders, tmp_path):
    run = tmp_path / "run"
    out = succeeds(*_command(folders, run), ranks=2)
    assert out.count("of training users (40 of 40)") == 1
    assert "ease_auxiliary: 0.375" in (run / "config.yaml").read_text()
    succeeds("export", "--run", run, "--output", tmp_path / "export")
    card = (tmp_path / "export" / "MODEL_CARD.md").read_text()
    assert "from a second data folder: each counts 0.375 of a positive." in card
    write_folder(folders[1], rows_by_user(I, 5), n_items=I)
    said = fails(*_command(folders, run))
    assert "hash of data.auxiliary was" in said


def test_a_damaged_folder_is_found_before_anything_is_written(folders, tmp_path):
    shard = folders[1] / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[1500] ^= 1
    shard.write_bytes(data)
    for more in ([], ["--dry_run"]):
        assert str(shard) in fails(*_command(folders, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()
    assert "run.dir and data.auxiliary are both" in fails(*_command(folders, folders[1]))


def test_doctor_checks_the_folder(folders, tmp_path):
    command = ["doctor", *_command(folders, tmp_path / "run")[1:], "--checksums"]
    assert "40 of 40 training users are in" in run_script(*command).stdout
    (folders[1] / "train-000000.tar").unlink()
    done = run_script(*command)
    said = done.stdout + done.stderr
    assert done.returncode and re.search(r"auxiliary.*train-000000.tar has no bytes", said), said


def test_a_comparison_notices_other_auxiliary_data(folders, tmp_path):
    model = "{name: ease, config: CONFIG, overrides: {data.auxiliary: FOLDER}}"
    text = f"shards: {folders[0]}\nreference: ease\nmodels:\n  - {model}\n"
    text = text.replace("FOLDER", str(folders[1])).replace("CONFIG", str(tmp_path / "ease.yaml"))
    (tmp_path / "compare.yaml").write_text(text)
    (tmp_path / "ease.yaml").write_text(
        "model: {kind: ease, ease_lambda: 3, ease_auxiliary: 0.375}\ndevice: cpu\n"
        "data: {auxiliary: none}\n"
    )
    command = ["compare", "--config", tmp_path / "compare.yaml", "--output", tmp_path / "out"]
    succeeds(*command)
    assert "1 done, 0 to do" in succeeds(*command, "--dry_run")
    write_folder(folders[1], rows_by_user(I, 5), n_items=I)
    assert "0 done, 1 to do" in succeeds(*command, "--dry_run")
    done = run_script(*command)
    assert done.returncode and "hash of data.auxiliary was" in done.stdout + done.stderr


def test_folders_that_do_not_fit(folders, tmp_path):
    main, more = folders
    config = config_of(folders)

    def refused(message: str, folder: Path, shards: Path = main) -> None:
        data = DataConfig(shards=str(shards), auxiliary=str(folder))
        with pytest.raises(ValueError, match=message):
            Overlap(replace(config, data=data), Manifest.load(shards))

    refused("^data.auxiliary: .* holds no manifest.json", tmp_path / "nothing")
    refused("has the same interactions as data.shards .*; name a folder with more", main)
    other_items = tmp_path / "items"
    write_folder(other_items, rows_by_user(I, 1), item_ids=90_000 + np.arange(I))
    refused("no item of .*, such as 1000, is in .*, which has ids such as 90000", other_items)
    empty = tmp_path / "empty"
    write_folder(empty, [], n_items=I)
    refused("no training user of .*, such as 1, is in .*, which has none; shard", empty)
    both = tmp_path / "both"  # as protocol given writes: users of training and of the test
    shutil.copytree(main, both)
    shutil.copy(both / "users-train.parquet", both / "users-test.parquet")
    text = json.loads((both / "manifest.json").read_text())
    text["files"]["users-test.parquet"] = text["files"]["users-train.parquet"]
    (both / "manifest.json").write_text(json.dumps(text))
    refused("are test users, too, .* expected shards of --protocol liang or hashed", more, both)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model.neighbours", "3"],
            "data.auxiliary is .*, expected none with model.neighbours 3",
        ),
        (
            ["--model.kind", "puresvd"],
            "data.auxiliary is .*, expected none with model.kind puresvd",
        ),
        (
            ["--model.kind", "vasp", "--data.auxiliary", ""],
            "model.ease_auxiliary is 0.375, expected 0 with model.kind vasp",
        ),
        (["--model.ease_auxiliary", "0"], "ease_auxiliary is 0.0, expected more than 0 with"),
        (["--model.ease_auxiliary", "2"], "ease_auxiliary is 2.0, expected 0 to 1"),
        (["--data.auxiliary", ""], "data.auxiliary is '', expected a data folder with"),
    ],
)
def test_options_that_do_not_fit(folders, tmp_path, options, message):
    said = fails(*_command(folders, tmp_path / "run", *options))
    assert re.search(message, said), said
    assert not (tmp_path / "run").exists()

"""MovieLens 1M from the command line, as a newcomer would run it: baseline figures, the stream's
invariant, the trained model."""

from __future__ import annotations

import csv
import gzip
import hashlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_tools.shard import main as shard
from dist_vasp import Recommender
from dist_vasp.data.held_out import evaluation_blocks
from dist_vasp.data.stream import StreamOptions, TrainStream
from launch.evaluate import main as evaluate
from launch.recommend import main as recommend
from launch.train import main as train
from tests.support.jobs import free_port
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def folders(data_dir, tmp_path_factory) -> list[Path]:
    """The same preparation in two shard sizes."""
    out = tmp_path_factory.mktemp("ml-1m")
    arguments = [
        str(data_dir / "ml-1m" / "ratings.csv.gz"),
        "--val_users",
        "500",
        "--test_users",
        "1000",
    ]
    for name, size in (("small", []), ("large", ["--users_per_shard", "500"])):
        assert shard([arguments[0], str(out / name), *arguments[1:], *size]) == 0
    return [out / "small", out / "large"]


@pytest.mark.data
@pytest.mark.slow
def test_popularity_baseline(folders, tmp_path):
    evaluate(
        [
            "--baseline",
            "popularity",
            "--shards",
            str(folders[0]),
            "--json",
            str(tmp_path / "e.json"),
            "--device",
            "cpu",
        ]
    )
    found = json.loads((tmp_path / "e.json").read_text())["test"]
    assert [round(found[name], 4) for name in ("ndcg@100", "recall@20", "recall@50")] == [
        0.2172,
        0.1687,
        0.2447,
    ]
    assert (found["n_users"], found["n_users_unscored"]) == (1000, 0)


def _triples(folder: Path, ranks: int, workers: int, epoch: int) -> list[bytes]:
    """One digest per (user, A, B) of an epoch, over all ranks, sorted."""
    found = []
    for rank in range(ranks):
        stream = TrainStream(folder, StreamOptions(256, 48, seed=7), rank, ranks)
        first = epoch * stream.steps_per_epoch
        for batch in stream.batches(first, first + stream.steps_per_epoch, workers):
            for b in range(0, len(batch.user_keys), 2):
                digest = hashlib.sha256(batch.user_keys[b].tobytes())
                for rows in (batch.inputs, batch.targets):
                    digest.update(
                        b"|"
                        + rows.items[rows.indptr[b] : rows.indptr[b + 1]].astype(np.int32).tobytes()
                    )
                found.append(digest.digest())
    return sorted(found)


@pytest.mark.data
@pytest.mark.slow
def test_users_and_halves_do_not_depend_on_how_they_are_read(folders):
    """Invariant 3: 1, 2 and 4 ranks, 0 and 2 workers, two shard sizes; epochs 0 and 1."""
    epochs = []
    for epoch in (0, 1):
        reference = _triples(folders[0], 1, 0, epoch)
        assert len(reference) == len(set(reference)) == 4534
        for folder, ranks, workers in (
            (folders[0], 2, 0),
            (folders[0], 4, 2),
            (folders[0], 1, 2),
            (folders[1], 1, 0),
            (folders[1], 2, 2),
        ):
            assert _triples(folder, ranks, workers, epoch) == reference, (
                folder.name,
                ranks,
                workers,
                epoch,
            )
        epochs.append(set(reference))
    assert len(epochs[0] & epochs[1]) < 100  # only users of very few items may be split alike


@pytest.mark.data
@pytest.mark.slow
def test_metrics_equal_trec_eval(folders, tmp_path):
    """Every metric of every test user, for the lists of EASE, as trec_eval computes it."""
    trec = pytest.importorskip("pytrec_eval")
    folder, run, per_user = folders[0], tmp_path / "run", tmp_path / "users.parquet"
    names = {"ndcg": "ndcg_cut", "recall": "recall", "precision": "P", "hr": "success"}
    names |= {"map": "map_cut"}
    asked = [f"{name}@{k}" for name in (*names, "mrr") for k in (5, 10, 20, 100)]
    config = ["--config", str(ROOT / "configs" / "ease-ml-1m.yaml"), "--device", "cpu"]
    train([*config, "--data.shards", str(folder), "--run.dir", str(run)])
    output = ["--per_user", str(per_user), "--recall_denominator", "held_out", "--device", "cpu"]
    evaluate(["--run", str(run), "--metrics", ",".join(asked), *output])
    table = pq.read_table(per_user)

    recommender = Recommender.load(run)
    ids = recommender.items.ids
    qrels: dict[str, dict[str, int]] = {}
    lists: dict[str, list[str]] = {}
    for block in evaluation_blocks(folder, "test", 500):
        n = len(block.user_keys)
        seen = [ids.take(block.fold_in.slice(u, u + 1).items).to_pylist() for u in range(n)]
        for u, listed in enumerate(recommender.recommend(seen, 100).ids.tolist()):
            user = str(block.user_keys[u])
            held_out = ids.take(block.held_out.slice(u, u + 1).items).to_pylist()
            qrels[user] = {str(item): 1 for item in held_out}
            lists[user] = [str(item) for item in listed if item != -1]
    assert len(qrels) == len(table) == 1000

    def ranked(length: int) -> dict[str, dict[str, float]]:
        return {
            user: {item: float(-rank) for rank, item in enumerate(listed[:length])}
            for user, listed in lists.items()
        }

    measures = {f"{measure}.5,10,20,100" for measure in names.values()}
    expected = trec.RelevanceEvaluator(qrels, measures).evaluate(ranked(100))
    users = [str(key) for key in table["key"].to_pylist()]
    for name, k in itertools.product((*names, "mrr"), (5, 10, 20, 100)):
        if name == "mrr":  # trec_eval has no cut
            cut = trec.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(ranked(k))
            wanted = [cut[user]["recip_rank"] for user in users]
        else:
            wanted = [expected[user][f"{names[name]}_{k}"] for user in users]
        found = table[f"{name}@{k}"].to_numpy()
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6, err_msg=f"{name}@{k}")
        assert 0 < np.mean(wanted) < 1


@pytest.mark.slow
@pytest.mark.data
def test_vasp_reaches_the_authors_figure(folders, tmp_path):
    """configs/ml-1m.yaml on 2 ranks under deepspeed: test NDCG@100 of at least .405."""
    deepspeed = Path(sys.executable).parent / "deepspeed"
    command = [
        str(deepspeed),
        "--num_accelerators",
        "2",
        "--master_port",
        str(free_port()),
        "launch/train.py",
    ]
    command += [
        "--config",
        "configs/ml-1m.yaml",
        "--data.shards",
        str(folders[0]),
        "--run.dir",
        str(tmp_path / "run"),
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["test"]["ndcg@100"] >= 0.405
    assert result["epochs"] == 40
    print(json.dumps(result["test"]), f"{result['seconds_training']:.0f} s of training")


@pytest.mark.slow
@pytest.mark.data
def test_lists_from_the_file_that_was_sharded(folders, data_dir, tmp_path):
    """The README's sequence: likes are the ratings of at least 4, and what was rated at all is
    never listed."""
    source = data_dir / "ml-1m" / "ratings.csv.gz"
    config = [
        "--config",
        str(ROOT / "configs" / "ease-ml-1m.yaml"),
        "--model.ease_lambda",
        "10",
        "--device",
        "cpu",
    ]
    train([*config, "--data.shards", str(folders[0]), "--run.dir", str(tmp_path / "run")])
    output = ["--k", "20", "--output", str(tmp_path / "lists.parquet")]
    recommend(
        ["--run", str(tmp_path / "run"), "--histories", str(source), *output, "--device", "cpu"]
    )
    lists: dict[int, list[int]] = {}
    table = pq.read_table(tmp_path / "lists.parquet")
    for user, item in zip(table["user"].to_pylist(), table["item"].to_pylist(), strict=True):
        lists.setdefault(user, []).append(item)

    recommender = Recommender.load(tmp_path / "run")
    known = set(recommender.items.ids.to_pylist())
    liked: dict[int, list[int]] = {}
    seen: dict[int, set[int]] = {}
    with gzip.open(source, "rt") as rows:
        for row in csv.DictReader(rows):
            user, item = int(row["user"]), int(row["item"])
            seen.setdefault(user, set()).add(item)
            if float(row["rating"]) >= 4 and item in known:
                liked.setdefault(user, []).append(item)
    assert set(lists) == set(liked)
    users = sorted(liked)[::5]
    for start in range(0, len(users), 400):
        block = users[start : start + 400]
        ranked = recommender.recommend(
            [liked[user] for user in block], len(known), mask_input=False
        ).ids
        for user, items in zip(block, ranked.tolist(), strict=True):
            assert lists[user] == [item for item in items if item not in seen[user]][:20], user

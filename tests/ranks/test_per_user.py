"""Per-user files on every layout against a plain loop, and what they average to."""

from __future__ import annotations

import contextlib
import json
import math
from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_vasp.config.metric_names import computed_metrics, parse_metrics
from dist_vasp.data.held_out import evaluation_blocks
from dist_vasp.data.items import load_items
from dist_vasp.data.manifest import Manifest
from dist_vasp.model.build import make_trunk
from dist_vasp.parallel.comm import Ranks, form_groups
from dist_vasp.parallel.partition import Layout
from dist_vasp.ranking import evaluate as module
from dist_vasp.ranking.evaluate import (
    evaluate,
    model_scorer,
    popularity_scorer,
    top_items,
    user_metrics,
)
from dist_vasp.ranking.per_user import THIRDS, PerUserFile, keep_items, popularity_thirds
from tests.oracles import metrics as oracle
from tests.support.make_shards import write_folder
from tests.support.partitioned import csr, make_model, random_rows
from tests.support.ranks import run_ranks

N_ITEMS = 131
METRICS = {"ndcg@100": 100, "recall@20": 20, "recall@50": 50}
ASKED = parse_metrics(
    "ndcg@7,recall@120,precision@9,hr@3,mrr@8,map@11,novelty@9,coverage@4,gini@9,diversity@9",
    "",
)
COMPUTED = computed_metrics(ASKED)


def alone() -> Ranks:
    return form_groups(0, Layout(1, 1, 1), torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("per_user")
    rng = np.random.default_rng(0)
    test = []
    for u, row in enumerate(random_rows(41, N_ITEMS, 1)):
        mixed = rng.permutation(row).tolist()
        n_target = 0 if u % 9 == 0 else 1 + len(mixed) // 3
        test.append((sorted(mixed[n_target:]), sorted(mixed[:n_target])))
    train = [
        sorted({int(N_ITEMS * rng.random() ** 3) for _ in range(12)}) for _ in range(60)
    ]  # a few items hold most
    write_folder(path, train, (), test, n_items=N_ITEMS, users_per_shard=9, users_per_block=4)
    return path


# --- thirds ---------------------------------------------------------------------------------------


def test_thirds_by_hand():
    # 30 interactions; before the items stand 0, 8, 14, 19, 23, ...: an item that crosses 10 or 20
    # belongs to the third it begins in
    assert popularity_thirds(np.array([8, 6, 5, 4, 3, 2, 1, 1, 0])).tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
        2,
        2,
        2,
    ]
    # in any order of rows; ties to the lower row
    assert popularity_thirds(np.array([1, 1, 1])).tolist() == [0, 1, 2]
    assert popularity_thirds(np.array([0, 1, 4, 1])).tolist() == [2, 2, 0, 2]
    assert popularity_thirds(np.array([], np.int64)).tolist() == []


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=60).filter(any))
def test_thirds_follow_their_definition(counts):
    popularity, total = np.array(counts), sum(counts)
    thirds = popularity_thirds(popularity)
    order = sorted(range(len(counts)), key=lambda i: (-counts[i], i))
    before = 0
    for i in order:
        assert thirds[i] == (0 if before * 3 < total else 1 if before * 3 < 2 * total else 2)
        before += counts[i]
    assert thirds[order[0]] == 0 and (np.diff(thirds[order]) >= 0).all()


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 19), unique=True), max_size=8), st.integers(0, 2**20 - 1))
def test_keep_items(rows, mask):
    keep = np.array([bool(mask >> i & 1) for i in range(20)])
    kept = keep_items(csr([sorted(row) for row in rows]), keep)
    assert [
        kept.items[a:b].tolist() for a, b in zip(kept.indptr, kept.indptr[1:], strict=False)
    ] == [[i for i in sorted(row) if keep[i]] for row in rows]


# --- files on every layout ------------------------------------------------------------------------


def _write(ranks: Ranks, folder, path) -> dict:
    """The per-user files of a model and of popularity; what the evaluation says of each."""
    module.USERS_PER_BLOCK = 8
    manifest = Manifest.load(folder)
    items = load_items(folder, manifest)
    model = make_model("vasp", N_ITEMS, ranks, dtype=torch.float32)
    found = {}
    for name, scorer in (
        ("vasp", model_scorer(model, make_trunk(model.config, 5))),
        ("popularity", popularity_scorer(items, ranks)),
    ):
        file = path / f"{name}-{ranks.world_size}-{ranks.layout.replicas}.parquet"
        if ranks.is_main:
            of_users = user_metrics(COMPUTED, "min", folder, manifest)
            with PerUserFile(file, folder, "test", manifest, items, of_users) as per_user:
                metrics = evaluate(
                    scorer, folder, "test", ranks, each_block=per_user.write, metrics=COMPUTED
                )
        else:
            metrics = evaluate(scorer, folder, "test", ranks, metrics=COMPUTED)
        found[name] = metrics.result()
    return found


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    """The folder of the files, and by (ranks, replicas) what the evaluation said."""
    path = tmp_path_factory.mktemp("files")
    results = {
        (n, r): run_ranks(_write, n, folder, path, replicas=r)[0] for n, r in ((2, 1), (4, 2))
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "USERS_PER_BLOCK", 8)
        results[1, 1] = _write(alone(), folder, path)
    return path, results


@pytest.mark.parametrize("name", ["vasp", "popularity"])
def test_files_are_equal_on_every_layout_and_average_to_the_metrics(written, name):
    path, results = written
    expected = pq.read_table(path / f"{name}-1-1.parquet")
    for (n, r), result in results.items():
        table = pq.read_table(path / f"{name}-{n}-{r}.parquet")
        assert table.equals(expected), (n, r)
        assert result[name] == results[1, 1][name]
        for metric in METRICS:
            scored = table.column(metric).drop_null().to_numpy()
            assert result[name][metric] == pytest.approx(scored.mean(), rel=1e-12)
            assert result[name][f"{metric}_se"] == pytest.approx(
                scored.std(ddof=1) / math.sqrt(len(scored)), rel=1e-12
            )
            assert (result[name]["n_users"], result[name]["n_users_unscored"]) == (
                len(scored),
                len(table) - len(scored),
            )
    assert not list(path.glob(".*"))


def test_metrics_asked_for_against_their_definitions(folder, written):
    """Popularity's lists are known; its file and its result hold every metric by name."""
    path, results = written
    table = pq.read_table(path / "popularity-1-1.parquet")
    popularity = load_items(folder, Manifest.load(folder)).popularity
    by_popularity = np.argsort(-popularity, kind="stable").tolist()
    block = next(evaluation_blocks(folder, "test", 41))
    lists, targets = [], []
    for u in range(41):
        seen = set(block.fold_in.slice(u, u + 1).items.tolist())
        lists.append([item for item in by_popularity if item not in seen][:120])
        targets.append(set(block.held_out.slice(u, u + 1).items.tolist()))
    functions = {
        "ndcg@7": partial(oracle.ndcg, k=7),
        "recall@120": partial(oracle.recall, k=120),
        "precision@9": partial(oracle.precision, k=9),
        "hr@3": partial(oracle.hr, k=3),
        "mrr@8": partial(oracle.mrr, k=8),
        "map@11": partial(oracle.average_precision, k=11),
    }
    result = results[4, 2]["popularity"]
    for name, function in functions.items():
        expected = [function(one, target) for one, target in zip(lists, targets, strict=True)]
        values = np.array(table[name].to_pylist(), float)  # None becomes NaN
        np.testing.assert_allclose(values, np.array(expected, float), rtol=1e-12, err_msg=name)
        known = [value for value in expected if value is not None]
        assert result[name] == pytest.approx(np.mean(known), rel=1e-12), name
        assert f"{name}_tail" in table.column_names
    bits = [oracle.novelty(listed, popularity.tolist(), 60, 9) for listed in lists]
    assert table["novelty@9"].to_pylist() == pytest.approx(bits, rel=1e-12)
    assert "novelty@9_tail" not in table.column_names
    assert result["coverage@4"] == pytest.approx(oracle.coverage(lists, N_ITEMS, 4), rel=1e-12)
    assert result["gini@9"] == pytest.approx(oracle.gini(lists, N_ITEMS, 9), rel=1e-12)
    assert result["diversity@9"] == pytest.approx(oracle.diversity(lists, 9), rel=1e-12)


def test_file_against_a_plain_loop(folder, written):
    """Popularity's lists are known, so every number of the file is."""
    table = pq.read_table(written[0] / "popularity-1-1.parquet").to_pylist()
    popularity = load_items(folder, Manifest.load(folder)).popularity
    thirds = popularity_thirds(popularity)
    blocks = list(evaluation_blocks(folder, "test", 1))
    assert len(table) == len(blocks) == 41
    scored = dict.fromkeys(("", *THIRDS), 0)
    for line, block in zip(table, blocks, strict=True):
        assert line["key"] == line["id"] == int(block.user_keys[0])
        seen, held_out = set(block.fold_in.items.tolist()), set(block.held_out.items.tolist())
        listed = [i for i in np.argsort(-popularity, kind="stable").tolist() if i not in seen]
        for name in ("", *THIRDS):
            target = held_out if not name else {i for i in held_out if THIRDS[thirds[i]] == name}
            suffix = f"_{name}" if name else ""
            assert line[f"n_held_out{suffix}"] == len(target)
            scored[name] += bool(target)
            for metric, k in METRICS.items():
                value = line[f"{metric}{suffix}"]
                if not target:
                    assert value is None
                elif metric.startswith("recall"):
                    assert value == pytest.approx(
                        len(set(listed[:k]) & target) / min(k, len(target))
                    )
                else:
                    gain = sum(
                        1 / math.log2(rank + 2) for rank, i in enumerate(listed[:k]) if i in target
                    )
                    assert value == pytest.approx(
                        gain / sum(1 / math.log2(rank + 2) for rank in range(min(k, len(target))))
                    )
    assert all(scored.values()), "a third without any user would not test anything"


def test_a_failure_leaves_no_file(folder, tmp_path):
    manifest = Manifest.load(folder)
    items = load_items(folder, manifest)
    block = next(evaluation_blocks(folder, "test", 5))
    _, ids = top_items(popularity_scorer(items, alone()), block.fold_in, 100, N_ITEMS, alone())
    with (
        contextlib.suppress(KeyboardInterrupt),
        PerUserFile(tmp_path / "a.parquet", folder, "test", manifest, items) as per_user,
    ):
        per_user.write(block, ids)
        assert list(tmp_path.glob(".*"))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with (
        pytest.raises(ValueError, match="hold users that the file of user ids does not"),
        PerUserFile(tmp_path / "a.parquet", folder, "test", manifest, items) as per_user,
    ):
        per_user.write(
            type(block)(block.user_keys + np.uint64(1000), block.fold_in, block.held_out), ids
        )
    assert not list(tmp_path.iterdir())


def test_other_users_are_refused(folder, tmp_path):
    write_folder(tmp_path / "other", [[0, 1]], (), [([0], [1])] * 3, n_items=N_ITEMS)
    manifest = Manifest.load(folder)
    with pytest.raises(
        ValueError, match=r"users-test\.parquet is not the file that manifest\.json lists"
    ):
        PerUserFile(
            tmp_path / "a.parquet",
            tmp_path / "other",
            "test",
            manifest,
            load_items(folder, manifest),
        )


def test_from_the_command_line(folder, tmp_path, capsys):
    from launch.evaluate import main

    threads = torch.get_num_threads()
    arguments = ["--baseline", "popularity", "--shards", str(folder), "--device", "cpu"]
    main(
        [*arguments, "--json", str(tmp_path / "m.json"), "--per_user", str(tmp_path / "p.parquet")]
    )
    torch.set_num_threads(threads)
    scored = pq.read_table(tmp_path / "p.parquet").column("recall@20").drop_null().to_numpy()
    assert json.loads((tmp_path / "m.json").read_text())["test"]["recall@20"] == pytest.approx(
        scored.mean()
    )
    for file, message in (
        (tmp_path / "no" / "p.parquet", "no does not exist"),
        (tmp_path / "p.csv", r"does not end in \.parquet"),
    ):
        with pytest.raises(ValueError, match=message):
            main([*arguments, "--per_user", str(file)])

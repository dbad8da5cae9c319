"""The Python interface: lists and mistakes, held against the dense oracle and the command, and the
memory of mapped weights."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
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
from dist_vasp.ranking import make_lists as module
from dist_vasp.tensor_file import map_tensors
from tests.oracles.dense import dense_rows
from tests.oracles.rounding import bounded_scores, each_within
from tests.support.paths import PYTHONPATH, ROOT
from tests.support.recommender_runs import (
    HISTORY_ROWS,
    N_ITEMS,
    NAMES,
    NUMBERS,
    TITLES,
    K,
    a_run,
    command,
    dense_lists,
    dense_p,
    ids_of,
    unpadded,
)
from tests.support.runs import write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


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
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
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
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
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

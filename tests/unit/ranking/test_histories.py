"""Histories that stream: blocks of whole users in any order of rows, memory of a block, formats of
the output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import torch

from dist_vasp.data.tables import csv_blocks, parquet_file
from dist_vasp.parallel.comm import Ranks
from dist_vasp.ranking import history_file as module
from dist_vasp.ranking import recommend as recommend_module
from dist_vasp.ranking import writers
from dist_vasp.ranking.explain import model_explainer
from dist_vasp.ranking.history_file import open_histories
from dist_vasp.ranking.load import load_model
from dist_vasp.ranking.recommend import recommend_to_file
from dist_vasp.recommender import Recommender
from tests.oracles.dense import DenseVASP, dense_rows
from tests.oracles.rounding import Bounded, bounded, each_within
from tests.support.paths import PYTHONPATH
from tests.support.ranks import run_ranks
from tests.support.runs import write_run
from tests.unit.ranking.test_recommend import NUMBERED, alone, item_table, lists_of

N_ITEMS = 23
IDS = list(range(100, 100 + N_ITEMS))


def drawn(n_users: int, seed: int = 0, text: bool = False) -> list[tuple]:
    """(user, item) rows, users together and ascending."""
    random = np.random.default_rng(seed)
    rows = []
    for user in range(10, 10 + n_users):
        items = random.choice(13, size=random.integers(1, 9), replace=True) + 1000
        rows += [(f"u{user}" if text else user, int(item)) for item in items]
    return rows


def write(path: Path, rows: list[tuple]) -> Path:
    table = pa.table({"user": [u for u, _ in rows], "item": [i for _, i in rows]})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=64)
    else:
        pa_csv.write_csv(table, path)
    return path


def scattered(rows: list[tuple], how: str) -> list[tuple]:
    random = np.random.default_rng(1)
    if how == "ascending":
        return rows
    users = list(dict.fromkeys(u for u, _ in rows))
    if how == "together":
        return [row for u in random.permutation(len(users)) for row in rows if row[0] == users[u]]
    if how == "last row elsewhere":
        return [*rows[1:], rows[0]]
    return [rows[i] for i in random.permutation(len(rows))]


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(module, "ROWS_PER_BATCH", 17)
    monkeypatch.setattr(parquet_file, "ROWS_PER_BATCH", 17)
    monkeypatch.setattr(csv_blocks, "BLOCK_BYTES", 128)


@pytest.mark.parametrize("how", ["ascending", "together", "last row elsewhere", "shuffled"])
@pytest.mark.parametrize("name", ["h.parquet", "h.csv"])
@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("per_block", [1, 4, 1000])
def test_blocks_of_whole_users_in_order_of_appearance(
    tmp_path, small_batches, how, name, text, per_block
):
    rows = scattered(drawn(40, text=text), how)
    expected: dict = {}
    for user, item in rows:
        expected.setdefault(user, set()).add(item - 1000)
    path = write(tmp_path / name, rows)
    found: dict = {}
    with open_histories(path, tmp_path) as file:
        assert file.n_users == 40 and (file.user_type == pa.string()) == text
        assert bool(list(tmp_path.glob(".h*grouping*"))) == (how != "ascending")
        assert file._is_scattered == (how in ("last row elsewhere", "shuffled")), (
            "what lies together is not sorted"
        )
        for block in file.blocks(NUMBERED, per_block):
            lists = lists_of(block)
            assert not set(lists) & set(found), "no user is in two blocks"
            assert block.n_users <= per_block
            found |= lists
    assert found == {user: sorted(items) for user, items in expected.items()}
    assert list(found) == list(expected)
    assert [p.name for p in tmp_path.iterdir()] == [name], "scratch files are gone"


def test_numbers_are_not_ascending_as_text(tmp_path, small_batches):
    """9, 10: ascending only as numbers; a1, b1, a2: as neither.

    One late text makes all of them text.
    """
    rows = [(u, 1000) for u in (8, 9, 10, 11, 100)]
    with open_histories(write(tmp_path / "h.csv", rows), tmp_path) as file:
        assert not list(tmp_path.glob(".*")) and file.user_type == pa.int64()
    with open_histories(
        write(tmp_path / "g.csv", [(str(u), i) for u, i in rows] * 9 + [("x", 1001), ("9", 1002)]),
        tmp_path,
    ) as file:
        assert file.user_type == pa.string()
        lists = lists_of(next(file.blocks(NUMBERED, 100)))
    assert list(lists) == ["8", "9", "10", "11", "100", "x"] and lists["9"] == [0, 2]


def test_skipped_and_unknown_are_told_by_block(tmp_path, small_batches):
    rows = [row for u in range(30) for row in ((u, 1000 + u % 13), (u, 5))] + [(99, 5)]
    with open_histories(write(tmp_path / "h.parquet", rows), tmp_path) as file:
        blocks = list(file.blocks(NUMBERED, 7))
    assert sum(b.n_unknown for b in blocks) == 31
    assert [u for b in blocks for u in b.skipped.to_pylist()] == [99]
    assert [b.n_users for b in blocks] == [7, 7, 7, 7, 2]


def test_a_full_scratch_disk_is_readable(tmp_path, monkeypatch):
    path = write(tmp_path / "h.parquet", [(2, 1000), (1, 1000), (2, 1001)])
    with (
        pytest.raises(
            ValueError,
            match=r"h\.parquet cannot be grouped by user under .*no .*name another --output",
        ),
        open_histories(path, tmp_path / "no"),
    ):
        pass
    monkeypatch.setattr(module, "_SORT_MEMORY", "1KB")
    with (
        pytest.raises(ValueError, match=r"h\.parquet cannot be grouped by user beside the output"),
        open_histories(path, tmp_path) as file,
    ):
        list(file.blocks(NUMBERED, 10))
    assert [p.name for p in tmp_path.iterdir()] == ["h.parquet"]


# --- what comes out -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_and_oracle(tmp_path_factory) -> tuple[Path, DenseVASP]:
    path = tmp_path_factory.mktemp("runs") / "run"
    return path, write_run(path, IDS, "vasp", 2)


@pytest.fixture(scope="module")
def run(run_and_oracle) -> Path:
    return run_and_oracle[0]


@pytest.fixture(scope="module")
def history_file(tmp_path_factory) -> Path:
    random = np.random.default_rng(2)
    rows = [
        (u, int(i))
        for u in range(12)
        for i in random.choice(IDS, size=1 + 2 * u % 9, replace=False)
    ]
    return write(tmp_path_factory.mktemp("histories") / "h.parquet", [*rows, (50, 1), (51, 2)])


def _explained(ranks: Ranks, run: Path, histories: Path, output: Path, n: int) -> str:
    recommend_module.USERS_PER_BLOCK = 5
    loaded = load_model(run, None, ranks)
    scorer, explainer = loaded.model.scores, model_explainer(loaded.model)
    with open_histories(histories, output.parent) as file:
        return recommend_to_file(
            scorer, file, loaded.items, 4, output, ranks, n_reasons=n, explainer=explainer
        )


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(recommend_module, "USERS_PER_BLOCK", 5)


FACTORS = {
    "score": "p",
    "p_flvae": "p_flvae",
    "p_nease": "p_nease",
}  # columns of a file, and what they are


def explained(oracle: DenseVASP, history_file: Path) -> dict[int, Bounded]:
    """By user, the exact factors of every item's score and their bounds."""
    rows: dict[int, list[int]] = {}
    for row in pq.read_table(history_file).to_pylist():
        rows.setdefault(row["user"], []).extend(
            [IDS.index(row["item"])] if row["item"] in IDS else []
        )

    def factors_of(row: list[int]) -> Bounded:
        x = dense_rows([row], len(IDS), torch.float64)
        return bounded(lambda: oracle.factors(x))

    return {user: factors_of(row) for user, row in rows.items() if row}


def test_explained_rows(run_and_oracle, history_file, tmp_path, small_blocks):
    """Every row tells what `Recommender.explain` tells."""
    run, oracle = run_and_oracle
    _explained(alone(), run, history_file, tmp_path / "o.parquet", 3)
    r = Recommender.load(run)
    histories: dict = {}
    for row in pq.read_table(history_file).to_pylist():
        histories.setdefault(row["user"], []).append(row["item"])
    table = pq.read_table(tmp_path / "o.parquet").to_pylist()
    assert len(table) == 12 * 4
    some_are_short = False
    bounds = explained(oracle, history_file)
    for row in table:
        found = r.explain(histories[row["user"]], row["item"], n=3)
        exact = bounds[row["user"]]
        item = IDS.index(row["item"])
        for name, p in FACTORS.items():
            pair = [row[name], getattr(found, p)]
            each_within(
                pair, exact.exact[p][item], exact.each[p][item], f"user {row['user']} {name}"
            )
        because = [(row[f"because_{n}"], row[f"weight_{n}"]) for n in (1, 2, 3)]
        some_are_short |= because[-1] == (None, None)
        assert [pair for pair in because if pair[0] is not None] == [
            (reason.item, reason.weight) for reason in found.reasons
        ]
    assert some_are_short


def test_formats_agree(run, history_file, tmp_path, small_blocks, monkeypatch):
    monkeypatch.setattr(writers, "_ROWS_PER_GROUP", 30)
    for n in (0, 2):
        for suffix in ("csv", "parquet", "jsonl"):
            _explained(alone(), run, history_file, tmp_path / f"o{n}.{suffix}", n)
        table = pq.read_table(tmp_path / f"o{n}.parquet")
        assert pq.ParquetFile(tmp_path / f"o{n}.parquet").num_row_groups == 2
        as_csv = pa_csv.read_csv(tmp_path / f"o{n}.csv").cast(table.schema)
        assert as_csv.equals(table)
        lines = [json.loads(line) for line in (tmp_path / f"o{n}.jsonl").read_text().splitlines()]
        expected = []
        for row in table.to_pylist():
            flat = {k: v for k, v in row.items() if not k.startswith(("because", "weight"))}
            pairs = [(row[f"because_{i}"], row[f"weight_{i}"]) for i in range(1, n + 1)]
            because = [{"item": i, "weight": w} for i, w in pairs if i is not None]
            expected.append(flat | ({"because": because} if n else {}))
        assert [list(line) for line in lines] == [list(row) for row in expected]
        for line, row in zip(lines, expected, strict=True):
            assert np.float32(line["score"]) == np.float32(row["score"])
            assert json.loads(json.dumps(line), parse_float=np.float32) == json.loads(
                json.dumps(row), parse_float=np.float32
            )
        assert (tmp_path / f"o{n}.skipped.csv").read_text().splitlines()[1:] == [
            '50,"no item of the history is in the vocabulary"',
            '51,"no item of the history is in the vocabulary"',
        ]


def test_text_survives_json_lines(tmp_path):
    items = item_table(['ü, "quoted"', "b", "c"])
    pq.write_table(pa.table({"user": ["two\nlines"], "item": ["b"]}), tmp_path / "h.parquet")

    def scorer(x):
        yield 0, torch.tensor([[-0.5, -1.0, -2.0]]).repeat(x.n_rows, 1)

    with open_histories(tmp_path / "h.parquet", tmp_path) as file:
        recommend_to_file(scorer, file, items, 1, tmp_path / "o.jsonl", alone())
    line = json.loads((tmp_path / "o.jsonl").read_text())
    assert line == {
        "user": "two\nlines",
        "rank": 1,
        "item": 'ü, "quoted"',
        "score": pytest.approx(np.exp(-0.5)),
    }


def test_ranks_explain_as_one(run_and_oracle, run, history_file, tmp_path, small_blocks):
    _explained(alone(), run, history_file, tmp_path / "one.parquet", 3)
    run_ranks(_explained, 3, run, history_file, tmp_path / "three.parquet", 3)
    one, three = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("one", "three"))
    exact = explained(run_and_oracle[1], history_file)
    for name in one.column_names:
        p = FACTORS.get(name)
        if p is None:  # ids, and weights, which are numbers of the file
            assert one[name].equals(three[name]), name
            continue
        for user, id, a, b in zip(
            one["user"].to_pylist(),
            one["item"].to_pylist(),
            one[name].to_pylist(),
            three[name].to_pylist(),
            strict=True,
        ):
            found, item = exact[user], IDS.index(id)
            each_within([a, b], found.exact[p][item], found.each[p][item], f"user {user} {name}")


def test_nothing_is_half_written_when_the_disk_is_full(
    run, history_file, tmp_path, small_blocks, monkeypatch
):
    class Full:
        def __init__(self, file: BinaryIO, schema: pa.Schema) -> None:
            file.write(b"half")

        def write_table(self, table: pa.Table) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None: ...

    monkeypatch.setitem(writers._WRITERS, ".csv", Full)
    with pytest.raises(
        ValueError,
        match=r"o\.csv cannot be written \(.*No space left.*\); free some space or choose another",
    ):
        _explained(alone(), run, history_file, tmp_path / "o.csv", 0)
    assert not list(tmp_path.iterdir())


SCRIPT = """
import sys
from pathlib import Path
import numpy as np, pyarrow as pa, pyarrow.parquet as pq, torch
from dist_vasp.ranking.history_file import open_histories
from dist_vasp.ranking.recommend import recommend_to_file
from dist_vasp.ranking import writers
from tests.unit.ranking.test_recommend import NUMBERED, alone
# the buffers of the output have their size early
folder, writers._ROWS_PER_GROUP = Path(sys.argv[1]), 1 << 14
torch.set_num_threads(1)
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4 / 1024
seen, at = [], []
def scorer(x):
    yield 0, -torch.arange(13.0).repeat(x.n_rows, 1)
def note(done):
    at.append(done)
    seen.append(resident())
with open_histories(folder / "h.parquet", folder) as file:
    recommend_to_file(scorer, file, NUMBERED, 8, folder / "o.parquet", alone(), note)
print(max(s for a, s in zip(at, seen) if a <= file.n_users / 5), max(seen))
"""


@pytest.mark.slow
def test_memory_is_that_of_a_block(tmp_path):
    """300,000 users of 20 interactions, together but not ascending: no more is resident at the end
    than after a fifth of them. To hold them all would take 72 MB at least, more than the twentieth
    that is allowed."""
    n_users, per_user = 300_000, 20
    users = np.random.default_rng(0).permutation(n_users)
    with pq.ParquetWriter(
        tmp_path / "h.parquet", pa.schema([("user", pa.int64()), ("item", pa.int64())])
    ) as writer:
        for start in range(0, n_users, 50_000):
            block = np.repeat(users[start : start + 50_000], per_user)
            writer.write_table(pa.table({"user": block, "item": 1000 + np.arange(len(block)) % 6}))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    early, late = map(float, done.stdout.split())
    assert late < early * 1.05, (early, late)
    assert (
        pq.read_metadata(tmp_path / "o.parquet").num_rows == n_users * 7
    )  # of 13 items 6 are seen

"""What the engines share, and `--engine spark` without Spark (tests/support/pretend_spark.py)."""

from __future__ import annotations

import re
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from data_tools import shard, verify
from data_tools.interactions import FolderStore, UserBlock
from data_tools.shards import Shard, count_shard, write_shard
from data_tools.spark import engine
from dist_vasp.data.block import Block
from dist_vasp.data.rows import Rows
from tests.support import pretend_spark


def rows(seed: int = 0, n: int = 900, kind: str = "int") -> pa.Table:
    """Random rows with repeated pairs and equal times."""
    random = np.random.default_rng(seed)
    users, items = random.integers(0, 60, n) ** 2, (random.random(n) ** 2 * 40).astype(int) + 7
    columns = {
        "user": users.astype(str) if kind != "int" else users,
        "item": [f"i{i}" for i in items] if kind == "text" else items,
        "rating": random.integers(1, 6, n) * 1.0,
        "timestamp": random.integers(0, 300, n),
        "split": random.choice(["train", "train", "train", "test"], n),
    }
    return pa.table(columns)


def write_parts(folder, table: pa.Table, kind: str, n_files: int = 4):
    folder.mkdir()
    for number in range(n_files):
        part = table.slice(number * len(table) // n_files, len(table) // n_files)
        if kind == "parquet":
            pq.write_table(part, folder / f"part-{number}.parquet")
        else:
            pa_csv.write_csv(part, folder / f"part-{number}.csv")
    return folder


def contents(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def run(*words) -> int:
    return shard.main([str(word) for word in words])


PROTOCOLS = {
    "hashed": ["--protocol", "hashed", "--min_items", 2],
    "hashed last": ["--protocol", "hashed", "--repeats", "last", "--time_column", "timestamp"],
    "hashed max": ["--protocol", "hashed", "--repeats", "max"],
    "hashed core": ["--protocol", "hashed", "--min_users", 4, "--min_items", 3, "--core"],
    "time": ["--protocol", "time", "--split_quantile", 0.8, "--min_rating", 2],
    "last": ["--protocol", "last", "--min_users", 3],
    "given": ["--protocol", "given", "--rating_column", "rating", "--keep_ratings"],
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_spark_writes_the_same_bytes(tmp_path, monkeypatch, capsys, name):
    """Every task is attempted twice, which changes nothing."""
    kind = "parquet" if name == "hashed core" else "csv"
    source = write_parts(tmp_path / "in", rows(kind="text" if "max" in name else "int"), kind)
    monkeypatch.setattr(engine, "session", partial(pretend_spark.session, times=2))
    words = [source, "--seed", 5, "--users_per_shard", 13, *PROTOCOLS[name]]
    assert run(*words, tmp_path / "local") == 0
    local = capsys.readouterr().out
    assert run(*words, tmp_path / "spark", "--engine", "spark") == 0
    spark = capsys.readouterr().out
    assert contents(tmp_path / "local") == contents(tmp_path / "spark")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "local", "spark"]
    assert verify.main([str(tmp_path / "spark")]) == 0
    told = [
        line.replace("/spark", "/local")
        for line in spark.splitlines()
        if not line.startswith("spark:")
    ]
    timed = [line for line in local.splitlines() if "rows in" not in line]
    assert [line for line in told if "rows in" not in line] == timed


def test_one_text_among_numbers_makes_all_ids_text(tmp_path, monkeypatch, capsys):
    """The files before it hold only numbers, so the tasks start again."""
    table = rows()
    source = write_parts(tmp_path / "in", table, "csv")
    (source / "part-9.csv").write_text("user,item,rating,timestamp,split\n007,8,5,1,train\n")
    monkeypatch.setattr(engine, "session", pretend_spark.session)
    monkeypatch.chdir(tmp_path)  # tasks run elsewhere
    words = [source.name, "--protocol", "hashed", "--min_items", 1]
    assert run(*words, "local") == 0
    capsys.readouterr()
    assert run(*words, "spark", "--engine", "spark") == 0
    assert "some ids of the column user are text; again" in capsys.readouterr().out
    assert contents(tmp_path / "local") == contents(tmp_path / "spark")


def test_a_dry_run_counts_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    source = write_parts(tmp_path / "in", rows(), "csv")
    monkeypatch.setattr(engine, "session", pretend_spark.session)
    words = [source, tmp_path / "new" / "out", "--protocol", "hashed", "--dry_run"]
    assert run(*words) == 0
    local = capsys.readouterr().out
    assert run(*words, "--engine", "spark") == 0
    spark = capsys.readouterr().out
    assert "spark: counting" in spark and "would hold" in spark
    assert [line for line in spark.splitlines() if not line.startswith("spark:")][:4] == (
        local.splitlines()[:4]
    )
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("part-1.csv", "user,item,rating\n1,2,5\n1,3,five\n"),
        ("part-1.csv", "user,item\n1,2\n"),
        ("part-0.csv", "user,item,rating\n1,,5\n"),
        ("part-0.csv", "user,item,rating\n1,2,1\n"),
        ("part-0.csv", "user,item,rating\n"),
        ("part-2.csv", "user;item;rating\n1;2;5\n"),
    ],
)
def test_bad_input_gives_the_same_message(tmp_path, monkeypatch, capsys, name, text):
    (tmp_path / "in").mkdir()
    if not name.startswith("part-0"):
        (tmp_path / "in" / "part-0.csv").write_text("user,item,rating\n4,4,5\n")
    (tmp_path / "in" / name).write_text(text)
    monkeypatch.setattr(engine, "session", pretend_spark.session)
    words = [tmp_path / "in", tmp_path / "out", "--protocol", "hashed"]
    assert run(*words) == 2
    local = capsys.readouterr().err
    assert run(*words, "--engine", "spark") == 2
    assert capsys.readouterr().err == local
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_folder_that_tasks_do_not_see(tmp_path, monkeypatch, capsys):
    source = write_parts(tmp_path / "in", rows(), "csv")
    monkeypatch.setattr(engine, "session", pretend_spark.session)
    monkeypatch.setattr(engine, "sees", lambda *_: False)
    assert run(source, tmp_path / "out", "--protocol", "hashed", "--engine", "spark") == 2
    assert "OUT_DIR is not on a file system that the driver and all exec" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_failure_of_spark_is_one_line(tmp_path, monkeypatch, capsys):
    lost = """Job aborted due to stage failure. Traceback follows:
    Traceback (most recent call last):
      File "tasks.py", line 3, in rows
    KeyError: 'a bug'

        at org.apache.spark.api.python.BasePythonRunner
    """

    def fail(*_):
        raise type("PythonException", (Exception,), {"__module__": "pyspark.errors"})(lost)

    source = write_parts(tmp_path / "in", rows(), "csv")
    monkeypatch.setattr(engine, "session", pretend_spark.session)
    monkeypatch.setattr(pretend_spark.Frame, "repartition", fail)
    assert run(source, tmp_path / "out", "--protocol", "hashed", "--engine", "spark") == 1
    told = capsys.readouterr().err
    assert re.fullmatch(
        r"error: Spark failed while reading 4 files.* \(KeyError: 'a bug'\)\n", told
    )
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


# --- the core -------------------------------------------------------------------------------------


def _as_it_is(block: UserBlock, keys: np.ndarray) -> Block:
    """A BlockMaker in which the numbers of items are the item rows."""
    return Block(keys, Rows(block.rows.indptr, block.rows.items.astype(np.int32)))


def test_a_shard_depends_on_its_rows_alone(tmp_path):
    """Where the users lie in the store makes no difference."""
    sizes, items = np.array([3, 0, 2]), np.array([1, 4, 6, 0, 2], np.uint32)
    near, far = tmp_path / "near", tmp_path / "far"
    for folder in (near, far):
        folder.mkdir()
    items.tofile(near / "items")
    np.concatenate([[9, 9], items[3:], [9], items[:3]]).astype(np.uint32).tofile(far / "items")
    keys = np.array([7, 8, 9], np.uint64)
    one = Shard("train", 4, keys, np.array([0, 3, 3]), sizes)
    other = Shard("train", 4, keys, np.array([5, 4, 2]), sizes)
    entries = [
        write_shard(folder / "tar", part, FolderStore(folder), _as_it_is)
        for folder, part in ((near, one), (far, other))
    ]
    assert entries[0] == entries[1]
    assert (near / "tar").read_bytes() == (far / "tar").read_bytes()
    counted = count_shard(one, FolderStore(near), _as_it_is)
    assert (counted.name, counted.users, counted.interactions) == ("train-000004.tar", 3, 5)


def test_a_store_reads_what_lies_between_or_each_user(tmp_path, monkeypatch):
    values = np.arange(1000, dtype=np.uint32)
    values.tofile(tmp_path / "items")
    starts, sizes = np.array([3, 10, 500]), np.array([4, 0, 20])
    expected = [*range(3, 7), *range(500, 520)]
    for limit in (1 << 20, 16):
        monkeypatch.setattr("data_tools.interactions._BYTES_PER_READ", limit)
        found = FolderStore(tmp_path).read("items", starts, sizes)
        np.testing.assert_array_equal(found, expected)
        backwards = FolderStore(tmp_path).read("items", starts[::-1], sizes[::-1])
        np.testing.assert_array_equal(backwards, [*range(500, 520), *range(3, 7)])


# --- what is missing ------------------------------------------------------------------------------


def test_without_pyspark_or_java(tmp_path, monkeypatch, capsys):
    source = write_parts(tmp_path / "in", rows(), "csv")
    words = [source, tmp_path / "out", "--protocol", "hashed", "--engine", "spark"]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyspark.sql", None)
        assert run(*words) == 2
    assert "needs pyspark, which is not installed here; run pip" in capsys.readouterr().err
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.delenv("PYSPARK_GATEWAY_PORT", raising=False)
    monkeypatch.setitem(sys.modules, "pyspark.sql", SimpleNamespace(SparkSession=_NoSession))
    assert run(*words) == 2
    assert f"and JAVA_HOME={tmp_path} has no bin/java; install" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


class _NoSession:
    @staticmethod
    def getActiveSession():  # noqa: N802
        return None


def test_netflix_is_for_the_local_engine(tmp_path, capsys):
    (tmp_path / "mv_0000001.txt").write_text("1:\n7,5,2005-09-06\n")
    words = [tmp_path / "mv_0000001.txt", tmp_path / "out", "--protocol", "hashed"]
    assert run(*words, "--engine", "spark") == 2
    assert "but the format of the input is netflix; pass" in capsys.readouterr().err

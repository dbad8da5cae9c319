"""`--engine spark` on Spark itself: one session on two cores, and a cluster of two executors.

Skipped where pyspark or Java is missing. tests/unit/data_tools/test_shards.py needs neither.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import shard, verify
from tests.support.paths import PYTHONPATH, ROOT
from tests.unit.data_tools.test_shards import contents, rows, write_parts

HAS_JAVA = bool(os.environ.get("JAVA_HOME") or shutil.which("java"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_JAVA, reason="Spark needs Java, and there is none here"),
]


@pytest.fixture(scope="module")
def session():
    """A session that the commands below find and leave running."""
    pytest.importorskip(
        "pyspark", reason="pyspark is not installed here: pip install -e '.[spark]'"
    )
    from data_tools.spark.session import session

    with session("local[2]") as spark:
        yield spark


def run(*words) -> int:
    return shard.main([str(word) for word in words])


def same_on_both(folder, *words) -> None:
    for engine in ("local", "spark"):
        assert run(*words, folder / engine, "--engine", engine) == 0
    assert contents(folder / "local") == contents(folder / "spark")
    assert verify.main([str(folder / "spark")]) == 0


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_same_bytes(tmp_path, session, kind):
    source = write_parts(tmp_path / "in", rows(kind="text" if kind == "csv" else "int"), kind)
    same_on_both(tmp_path, source, "--protocol", "hashed", "--min_items", 2)


def test_tables_by_name(tmp_path, session, capsys):
    source = write_parts(tmp_path / "events", rows(), "parquet")
    session.read.parquet(str(source)).createOrReplaceTempView("events")
    words = ["--protocol", "hashed", "--min_items", 2]
    assert run(source, tmp_path / "local", *words) == 0
    words += ["--engine", "spark", "--format", "table"]
    assert run("events", tmp_path / "spark", *words) == 0
    assert contents(tmp_path / "local") == contents(tmp_path / "spark")
    assert run("no.where", tmp_path / "new", *words) == 2
    assert "--format table: Spark has no table no.where (" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["events", "local", "spark"]


@pytest.mark.data
def test_same_bytes_of_real_data(tmp_path, session, data_dir):
    source = data_dir / "ml-1m" / "ratings.csv.gz"
    same_on_both(tmp_path, source, "--protocol", "hashed")


def test_a_long_user_and_an_item_of_every_user(tmp_path, session):
    """A million rows of one user, and one item in every second row of the others."""
    random = np.random.default_rng(0)
    users = np.concatenate([np.full(1_000_000, 7), np.repeat(np.arange(10, 5010), 8)])
    items = random.integers(1, 200_000, len(users))
    items[1_000_000::2] = 0
    source = tmp_path / "skewed.parquet"
    pq.write_table(pa.table({"user": users, "item": items}), source)
    same_on_both(tmp_path, source, "--protocol", "hashed", "--min_items", 3)


def messages_of_the_page() -> list[str]:
    """The wrong commands of docs/errors.md that are not about an engine."""
    text = (ROOT / "docs" / "errors.md").read_text()
    lines = re.findall(r"^\| `python -m data_tools\.shard (.*?)` \|", text, re.MULTILINE)
    of_one_engine = ("--engine", "--master", "--format table")
    return [line for line in lines if not any(word in line for word in of_one_engine)]


def test_bad_input_is_told_as_by_the_local_engine(prepared, session, monkeypatch, capsys):
    monkeypatch.chdir(prepared)
    before = sorted(prepared.rglob("*"))
    wrong = []
    for line in messages_of_the_page():
        words = shlex.split(line)
        words += [] if "--protocol" in words else ["--protocol", "hashed"]
        told = []
        for engine in ("local", "spark"):
            try:
                status = run(*words, "--engine", engine)
            except SystemExit as end:
                status = end.code
            told.append((status, capsys.readouterr().err))
            if status == 0:  # wrong in liang alone
                shutil.rmtree(words[1])
        if told[0] != told[1]:
            wrong.append(f"{line}\n  {told[0]}\n  {told[1]}")
    assert not wrong, "\n".join(wrong)
    assert sorted(prepared.rglob("*")) == before


def test_an_executor_that_is_killed_changes_nothing(tmp_path):
    pytest.importorskip(
        "pyspark", reason="pyspark is not installed here: pip install -e '.[spark]'"
    )
    source = write_parts(tmp_path / "in", rows(n=40_000), "parquet", n_files=8)
    words = [source, "--protocol", "hashed", "--users_per_shard", 2]
    assert run(*words, tmp_path / "local") == 0
    command = [sys.executable, "-m", "data_tools.shard", *words, tmp_path / "spark"]
    command += ["--engine", "spark", "--master", "local-cluster[2,1,1024]"]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    with subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        watchdog = threading.Timer(1500, process.kill)
        watchdog.start()
        killed = 0
        for line in process.stdout:
            if line.startswith(("spark: reading", "spark: writing")) and killed < 2:
                killed += kill_an_executor(process.pid)
        watchdog.cancel()
    assert killed == 2
    assert process.returncode == 0
    assert contents(tmp_path / "local") == contents(tmp_path / "spark")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "local", "spark"]


def kill_an_executor(parent: int) -> int:
    """Kill one, once it has had time to begin its tasks; return how many."""
    time.sleep(3)
    for process in psutil.Process(parent).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            if "CoarseGrainedExecutorBackend" in " ".join(process.cmdline()):
                process.send_signal(signal.SIGKILL)
                return 1
    return 0

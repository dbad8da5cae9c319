"""The ranks of run_ranks: nothing of one call is left for the next, and a failure is told and
ended."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from dist_vasp.parallel.comm import Ranks
from tests.support.ranks import run_ranks


def _state(ranks: Ranks) -> tuple[str | None, str, int, str, bool]:
    found = (
        os.environ.get("OF_A_TEST"),
        os.getcwd(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
    )
    loaded = "deepspeed" in sys.modules
    os.environ["OF_A_TEST"] = "left by a rank"
    os.chdir("/")
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    return *found[:3], str(found[3]), loaded


def test_each_call_starts_from_this_process(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for value in ("first", "second"):
        monkeypatch.setenv("OF_A_TEST", value)
        assert run_ranks(_state, 2) == [(value, str(tmp_path), 1, "torch.float32", True)] * 2


def _misbehave(ranks: Ranks, how: str, folder: Path) -> None:
    (folder / str(ranks.rank)).write_text(str(os.getpid()))
    if ranks.rank == 1 and how == "raise":
        raise KeyError("of rank 1")
    if ranks.rank == 1 and how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(100)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", r"rank 1 failed:\n(.|\n)*KeyError: 'of rank 1'"),
        ("die", "rank 1 died with status -9"),
        ("hang", r"ranks \[0, 1\] did not finish within 2 s"),
    ],
)
def test_a_failure_is_told_and_all_ranks_end(tmp_path, how, message):
    with pytest.raises(pytest.fail.Exception, match=message):
        run_ranks(_misbehave, 2, how, tmp_path, timeout=2 if how == "hang" else 60)
    assert not any(psutil.pid_exists(int(path.read_text())) for path in tmp_path.iterdir())

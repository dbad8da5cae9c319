"""One folder for all ranks, wherever they run."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_vasp.parallel.comm import AgreedError, Ranks
from dist_vasp.training import run_dir
from tests.ranks import run_ranks


def _check(ranks: Ranks, *folders: Path) -> str:
    run_dir._SHARED_WITHIN_S = 0.3
    try:
        run_dir.check_shared(folders[ranks.rank], ranks)
    except AgreedError as error:
        return str(error)
    return "shared"


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    return [tmp_path / "a", tmp_path / "b"]


def test_ranks_that_share_a_folder(folders):
    assert run_ranks(_check, 2, folders[0], folders[0]) == ["shared", "shared"]
    assert not list(folders[0].iterdir())


def test_a_rank_that_sees_another_folder(folders):
    said = run_ranks(_check, 2, *folders)
    assert said[0] == said[1]
    assert f"run.dir {folders[1]} on " in said[0] and "is not the folder that rank 0 sees" in said[0]
    assert "(rank 1)" in said[0]
    assert not list(folders[0].iterdir()) and not list(folders[1].iterdir())


def test_a_folder_that_rank_0_cannot_write(folders):
    said = run_ranks(_check, 2, folders[0] / "absent", folders[1])
    assert said[0] == said[1] and "cannot be written" in said[0]

"""The folder of checkpoints: which one is read, resumed from, and removed."""

from __future__ import annotations

import shutil

import pytest

from dist_vasp.checkpoint import folder as folders
from dist_vasp.checkpoint.header import BestCheckpoint
from dist_vasp.checkpoint.read import open_checkpoint
from tests.support.checkpoints import alone, save


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step in (9, 100, 20, 3):
        save(tmp_path / f"step-{step:08d}", alone(), step)
    save(tmp_path / "best-00000003", alone(), 3)
    folders.point_best_at(tmp_path / "best-00000003")
    (tmp_path / "step-99999999").mkdir()  # no checkpoint: it has no header
    folders.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best",
        "best-00000003",
        "step-00000020",
        "step-00000100",
        "step-99999999",
    ]
    newest = folders.newest(tmp_path)
    assert newest is not None and open_checkpoint(newest).step == 100
    folders.prune(tmp_path, 5)
    assert folders.newest(tmp_path) == newest


def test_best_is_switched_in_one_step(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path / f"best-{step:08d}", alone(), step)
    folders.point_best_at(tmp_path / "best-00000001")
    assert open_checkpoint(folders.find(tmp_path)).step == 1
    save(tmp_path / "best-00000002", alone(), 2)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folders.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            folders.point_best_at(tmp_path / "best-00000002")
    assert open_checkpoint(folders.find(tmp_path)).step == 1  # still the one before, and whole
    folders.point_best_at(tmp_path / "best-00000002")
    assert (tmp_path / "best").is_symlink()
    assert open_checkpoint(tmp_path / "best").step == 2
    folders.settle(tmp_path, tmp_path / "best-00000002")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "best-00000002"]


def test_find(tmp_path):
    with pytest.raises(ValueError, match=r"holds no checkpoint; name the run\.dir"):
        folders.find(tmp_path / "nothing")
    assert folders.newest(tmp_path / "nothing") is None
    for name in ("step-00000001", "step-00000002", "best-00000001"):
        save(tmp_path / name, alone(), int(name[-1]))
    assert folders.find(tmp_path).name == "step-00000002"  # never evaluated: the newest
    folders.point_best_at(tmp_path / "best-00000001")
    assert folders.find(tmp_path).resolve().name == "best-00000001"
    assert folders.find(tmp_path, "step-00000001").name == "step-00000001"
    with pytest.raises(
        ValueError,
        match=r"step-00000009 is not a checkpoint; .* holds best, best-00000001, "
        r"step-00000001, step-00000002",
    ):
        folders.find(tmp_path, "step-00000009")


def test_copies_under_other_names_are_neither_read_nor_removed(tmp_path):
    for step in (1, 2):
        save(tmp_path / f"step-{step:08d}", alone(), step)
    for name in ("step-00000002.bak", "step-zzz", "step-1", "best-copy"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    save(tmp_path / "step-100000000", alone(), 100_000_000)  # a ninth digit
    assert folders.newest(tmp_path) == tmp_path / "step-100000000"
    assert folders.newest_step(tmp_path) == 100_000_000
    folders.prune(tmp_path, 1)
    folders.settle(tmp_path, None)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best-copy",
        "step-00000002.bak",
        "step-1",
        "step-100000000",
        "step-zzz",
    ]


def test_a_checkpoint_under_the_name_of_another_step(tmp_path):
    save(tmp_path / "step-00000001", alone(), 1)
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000009")
    with pytest.raises(
        ValueError,
        match=r"step-00000009 holds the checkpoint of step 1, not of step 9; rename it back$",
    ):
        folders.open_found(tmp_path)


def test_the_best_one_is_found_without_its_link(tmp_path):
    for step in (2, 3):
        save(
            tmp_path / f"best-{step:08d}", alone(), step, best={"ndcg@100": 0.5}, attempt=f"{step}"
        )
    named = BestCheckpoint(2, "2")
    save(tmp_path / "step-00000005", alone(), 5, best={"ndcg@100": 0.5}, best_checkpoint=named)
    assert folders.find(tmp_path) == tmp_path / "best-00000002"
    (tmp_path / "best").symlink_to("best-00000009")  # dangling
    assert folders.find(tmp_path) == tmp_path / "best-00000002"


@pytest.mark.parametrize(
    "name", ["..", ".", "", "/", "../other/best-00000001", "{other}/best-00000001"]
)
def test_a_name_never_leads_to_another_run(tmp_path, name):
    folder, other = tmp_path / "run", tmp_path / "other"
    for run in (folder, other):
        save(run / "best-00000001", alone(), 1)
    with pytest.raises(
        ValueError, match=r"is not a checkpoint; .* holds best-00000001; name one of them$"
    ):
        folders.find(folder, name.format(other=other))


@pytest.mark.parametrize("target", ["../other/best-00000001", "{other}/best-00000001"])
def test_a_link_never_leads_to_another_run(tmp_path, target):
    folder, other = tmp_path / "run", tmp_path / "other"
    for run in (folder, other):
        save(run / "best-00000001", alone(), 1)
    (folder / "best").symlink_to(target.format(other=other))
    for name in (None, "best"):
        with pytest.raises(
            ValueError,
            match=r"run/best is a link to .*other/best-00000001, which is not a "
            r"checkpoint of this run",
        ):
            folders.find(folder, name)
    folders.point_best_at(folder / "best-00000001")
    (folder / "best").unlink()
    (folder / "best").symlink_to(folder / "best-00000001")  # by its whole path
    assert folders.find(folder) == folder / "best-00000001"

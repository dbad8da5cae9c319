"""What a run resumes from decides which checkpoints count; what is beyond it, or of another
attempt, goes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dist_vasp.checkpoint import folder as folders
from dist_vasp.checkpoint.header import BestCheckpoint, Header
from dist_vasp.checkpoint.json_header import header_sha256
from dist_vasp.checkpoint.read import open_checkpoint
from dist_vasp.parallel.comm import form_groups
from dist_vasp.parallel.partition import Layout
from dist_vasp.training.state import RunState, Saver, _state_of
from tests.unit.training.test_state import names, saver

METRICS = {"ndcg@100": 0.5}


def best(save: Saver, step: int, attempt: str, found: float = 0.5) -> RunState:
    """Save a best checkpoint of this step; the state that names it."""
    state = RunState(step, attempt=attempt).with_best({"ndcg@100": found})
    save.save_best(state)
    save.finish()
    return state


def step(save: Saver, at: int, state: RunState) -> None:
    save.save(
        RunState(at, best=state.best, attempt=state.attempt, best_checkpoint=state.best_checkpoint)
    )
    save.finish()


def resumed(folder: Path) -> RunState | None:
    """What a training would do at its start: the state it resumes from, and the folder settled."""
    path = folders.newest(folder)
    if path is None:
        folders.settle(folder, None)
        return None
    ranks = form_groups(0, Layout(1, 1, 1), saver(folder).trainer.ranks.device)
    state = _state_of(open_checkpoint(path), folder, ranks)
    wanted = (
        folders.best_path(folder, state.best_checkpoint.step) if state.best_checkpoint else None
    )
    folders.settle(folder, wanted if wanted is None or wanted.exists() else folder / "best")
    return state


def test_a_best_checkpoint_beyond_the_resumed_step_goes(tmp_path):
    save = saver(tmp_path)
    first = best(save, 4, "a")
    step(save, 5, first)
    best(save, 8, "a", 0.6)  # killed before the next step checkpoint
    assert names(tmp_path) == ["best", "best-00000004", "best-00000008", "step-00000005"]
    assert folders.find(tmp_path).name == "best-00000008"
    state = resumed(tmp_path)
    assert (
        state is not None
        and state.best == METRICS
        and state.best_checkpoint == BestCheckpoint(4, "a")
    )
    assert names(tmp_path) == ["best", "best-00000004", "step-00000005"]
    assert folders.find(tmp_path).name == "best-00000004"


def test_a_best_checkpoint_without_a_step_to_resume_from_goes(tmp_path):
    best(saver(tmp_path), 4, "a")
    assert resumed(tmp_path) is None
    assert names(tmp_path) == []


def test_another_attempt_of_the_same_step_is_not_taken_for_this_one(tmp_path):
    save = saver(tmp_path)
    step(save, 5, best(save, 4, "a"))
    shutil.rmtree(tmp_path / "best-00000004")
    best(save, 4, "b")  # equal metrics, other weights
    state = resumed(tmp_path)
    assert (
        state is not None
        and state.best is None
        and state.lost_best
        and state.best_checkpoint is None
    )
    assert names(tmp_path) == ["step-00000005"]


def test_best_checkpoints_that_kept_steps_name_are_kept(tmp_path):
    save = saver(tmp_path, keep=2)
    states = [best(save, at, "a", at / 100) for at in (2,)]
    step(save, 3, states[-1])
    states.append(best(save, 5, "a", 0.6))
    step(save, 6, states[-1])
    states.append(best(save, 8, "a", 0.7))
    assert names(tmp_path) == [
        "best",
        *(f"best-{at:08d}" for at in (2, 5, 8)),
        "step-00000003",
        "step-00000006",
    ]
    step(save, 9, states[-1])
    assert names(tmp_path) == [
        "best",
        *(f"best-{at:08d}" for at in (5, 8)),
        "step-00000006",
        "step-00000009",
    ]


@pytest.mark.parametrize("diverged", [5, 8])
def test_void_weights_are_neither_kept_nor_pointed_at(tmp_path, diverged):
    """The loss after step 8 is no number: with its checkpoints still being written (8), or whole
    already."""
    save = saver(tmp_path, keep=2)
    good = best(save, 4, "a")
    step(save, 5, good)
    void = RunState(8, attempt="a").with_best({"ndcg@100": 0.9})
    save.save_best(void)
    save.save(RunState(8, best=void.best, attempt="a", best_checkpoint=void.best_checkpoint))
    if diverged == 5:
        save.finish()
    save.keep_what_is_good(8)
    assert names(tmp_path) == ["best", "best-00000004", "step-00000005"]
    assert folders.find(tmp_path).name == "best-00000004"


def test_void_weights_of_the_first_checkpoint_leave_nothing(tmp_path):
    save = saver(tmp_path)
    step(save, 8, best(save, 8, "a"))
    save.keep_what_is_good(8)
    assert names(tmp_path) == []


@pytest.mark.parametrize("link", ["best-00000004", "gone", None])
def test_the_link_is_repaired_whatever_a_kill_left(tmp_path, link):
    save = saver(tmp_path)
    step(save, 5, best(save, 4, "a"))
    (tmp_path / "best").unlink()
    if link:
        (tmp_path / "best").symlink_to(link)
    (tmp_path / ".best.0123456789abcdef.tmp").symlink_to("best-00000004")
    (tmp_path / ".step-00000006.0123456789abcdef.tmp").mkdir()
    (tmp_path / "step-00000009").mkdir()  # its header went first
    resumed(tmp_path)
    assert names(tmp_path) == ["best", "best-00000004", "step-00000005"]
    assert folders.find(tmp_path).name == "best-00000004"


@pytest.mark.parametrize("alone", [False, True])
def test_a_copy_that_followed_the_link(tmp_path, alone):
    save = saver(tmp_path / "run")
    step(save, 5, best(save, 4, "a"))
    copy = Path(shutil.copytree(tmp_path / "run", tmp_path / "copy"))  # `best` is a folder now
    assert not (copy / "best").is_symlink()
    if alone:
        shutil.rmtree(copy / "best-00000004")
    opened = folders.open_found(copy)
    assert (opened.step, opened.name) == (4, "best-00000004")
    state = resumed(copy)
    assert state is not None and state.best_checkpoint == BestCheckpoint(4, "a")
    assert names(copy) == ["best", "best-00000004", "step-00000005"]
    best(saver(copy), 6, "c", 0.8)
    assert (copy / "best").is_symlink() and folders.open_found(copy).step == 6


def forget_attempts(path: Path) -> None:
    """As an earlier version wrote it."""
    header = json.loads((path / Header.FILE).read_text())
    for key in ("attempt", "best_checkpoint", "data_sha256", "shards_from_run"):
        header.pop(key, None)
    header["header_sha256"] = header_sha256(header)
    (path / Header.FILE).write_text(json.dumps(header))


def test_a_run_of_an_earlier_version_resumes_with_its_best(tmp_path):
    save = saver(tmp_path)
    step(save, 5, best(save, 4, "a"))
    for name in ("best-00000004", "step-00000005"):
        forget_attempts(tmp_path / name)
    state = resumed(tmp_path)
    assert (
        state is not None
        and state.best == METRICS
        and state.best_checkpoint == BestCheckpoint(4, "")
    )
    assert names(tmp_path) == ["best", "best-00000004", "step-00000005"]
    later = RunState(7, attempt="b").with_best({"ndcg@100": 0.7})
    save.save_best(later)
    save.finish()
    assert "best-00000004" in names(tmp_path), "the step of the earlier version may need it"


def test_nothing_outside_is_removed_through_a_link(tmp_path):
    outside = saver(tmp_path / "other")
    step(outside, 3, best(outside, 3, "c"))
    save = saver(tmp_path / "run", keep=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step-00000003").symlink_to(tmp_path / "other" / "step-00000003")
    (tmp_path / "run" / "best-00000003").symlink_to(tmp_path / "other" / "best-00000003")
    step(save, 5, best(save, 4, "a"))
    folders.settle(tmp_path / "run", tmp_path / "run" / "best-00000004")
    assert names(tmp_path / "run") == ["best", "best-00000004", "step-00000005"]
    for name in ("step-00000003", "best-00000003"):
        open_checkpoint(tmp_path / "other" / name)

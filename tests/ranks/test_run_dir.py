"""One folder for all ranks, wherever they run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_vasp.parallel.agree import AgreedError
from dist_vasp.parallel.comm import Ranks
from dist_vasp.training import run_dir
from tests.support.ranks import run_ranks


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


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "result.json",
        "checkpoints",
        "tensorboard",
    ],
)
def test_nothing_is_written_through_a_link(tmp_path, name):
    folder, victim = tmp_path / "run", tmp_path / "victim"
    (folder / "checkpoints").mkdir(parents=True)
    victim.mkdir() if "." not in name else victim.write_text("mine")
    if name == "checkpoints":
        (folder / name).rmdir()
    (folder / name).symlink_to(victim)
    with pytest.raises(
        ValueError, match=f"{name} is a link to .*victim, and nothing is written through a link"
    ):
        run_dir.RunDir(folder)
    assert not (folder / ".lock").exists()
    assert victim.is_dir() or victim.read_text() == "mine"


def test_a_lock_that_is_a_link_is_not_written(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to("../victim")
    with pytest.raises(ValueError, match="cannot be written"):
        run_dir.RunDir(tmp_path / "run")
    assert (tmp_path / "victim").read_text() == "mine"


def test_one_training_at_a_time(tmp_path):
    first = run_dir.RunDir(tmp_path / "run")
    with pytest.raises(
        ValueError,
        match=r"run is in use by process \d+ on .*; wait for it to end or choose another run\.dir",
    ):
        run_dir.RunDir(tmp_path / "run")
    first._lock.close()
    (tmp_path / "run" / f".config.yaml.{'0' * 16}.tmp").touch()
    run_dir.RunDir(tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "result.json",
        "items.parquet",
        "manifest.json",
        "export.json",
        "ensemble.json",
    ],
)
def test_a_folder_of_somebody_else(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=r"run\.dir .* a run needs a folder of its own"):
        run_dir.RunDir(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_ranks_that_share_a_folder(folders):
    assert run_ranks(_check, 2, folders[0], folders[0]) == ["shared", "shared"]
    assert not list(folders[0].iterdir())


def test_a_rank_that_sees_another_folder(folders):
    said = run_ranks(_check, 2, *folders)
    assert said[0] == said[1]
    assert (
        f"run.dir {folders[1]} on " in said[0] and "is not the folder that rank 0 sees" in said[0]
    )
    assert "(rank 1)" in said[0]
    assert not list(folders[0].iterdir()) and not list(folders[1].iterdir())


def test_a_folder_that_rank_0_cannot_write(folders):
    said = run_ranks(_check, 2, folders[0] / "absent", folders[1])
    assert said[0] == said[1] and "cannot be written" in said[0]


# --- metrics.jsonl --------------------------------------------------------------------------------

STEPS = [b'{"step": %d, "loss": 0.5}' % step for step in range(1, 6)]


def cut(tmp_path: Path, data: bytes, step: int) -> tuple[int, list[bytes], bytes]:
    """(damaged lines, lines kept, what was put aside)."""
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "metrics.damaged.jsonl"
    path.write_bytes(data)
    n = run_dir.cut_after(path, step)
    return n, path.read_bytes().splitlines(), aside.read_bytes() if aside.exists() else b""


@pytest.mark.parametrize(
    "damaged",
    [
        b"not json",
        b'{"loss": 1}',
        b'{"step": "3"}',
        b'{"step": true}',
        b'{"step": -1}',
        b"[1]",
        b"\x00" * 300,
        b"\xff\xfe{",
        b'{"step": 2, "lo',
        b"",
        b'{"step": ' + b"[" * 5000 + b"}",
        b'{"step": ' + b"9" * 5000 + b"}",
    ],
)
@pytest.mark.parametrize("place", [0, 2, 5])
def test_a_damaged_line_is_kept_aside_and_nothing_after_it_is_lost(tmp_path, damaged, place):
    lines = [*STEPS[:place], damaged, *STEPS[place:]]
    assert cut(tmp_path, b"\n".join(lines) + b"\n", 4) == (1, STEPS[:4], damaged + b"\n")


def test_a_whole_line_behind_a_torn_one_is_kept(tmp_path):
    torn = STEPS[2][:9]
    assert cut(tmp_path, b"\n".join([*STEPS[:2], torn + STEPS[3], STEPS[4]]), 9) == (
        1,
        [*STEPS[:2], *STEPS[3:]],
        torn + b"\n",
    )
    zeros = bytes(5000)
    n, kept, aside = cut(tmp_path, STEPS[0] + b"\n" + zeros + STEPS[1] + b"\n", 9)
    assert (n, kept, aside) == (1, STEPS[:2], torn + b"\n" + zeros + b"\n"), "what was aside stays"


def test_lines_of_an_undone_future_go(tmp_path):
    assert cut(tmp_path, b"\n".join([*STEPS, STEPS[1]]) + b"\n", 2) == (
        0,
        [*STEPS[:2], STEPS[1]],
        b"",
    )


def test_an_endless_line_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir, "_LONGEST_LINE", 100)
    n, kept, aside = cut(tmp_path, b"x" * 950 + b"\n" + STEPS[0] + b"\n", 9)
    assert n == 10 and kept == [STEPS[0]] and aside.count(b"x") == 950


def test_result_of_an_earlier_end(tmp_path):
    """It stays only if it speaks of the checkpoint that would be reported now."""
    run = run_dir.RunDir(tmp_path / "run")
    path = run.folder / "result.json"
    for text, unless, stays in (
        ('{"checkpoint_sha256": "a"}', "a", True),
        ('{"checkpoint_sha256": "a"}', "b", False),
        ('{"checkpoint_sha256": "a"}', "", False),
        ("{}", "a", False),
        ("damaged", "a", False),
    ):
        path.write_text(text)
        run.drop_result(unless)
        assert path.exists() == stays, (text, unless)


def test_an_evaluation_that_is_made_again_is_told_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 1, "loss": 1.0},
        {"step": 1, "split": "validation"},
        {"step": 2, "loss": 1.0},
        {"step": 2, "split": "validation"},
    ]
    for due, kept in ((False, lines), (True, lines[:3])):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert run_dir.cut_after(path, 2, due) == 0
        assert [json.loads(line) for line in path.read_text().splitlines()] == kept

"""A run that was moved finds its data where it lay from the run, or says how it was named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from dist_vasp.checkpoint.header import Header, Position
from dist_vasp.checkpoint.read import Checkpoint
from dist_vasp.config.schema import Config, DataConfig
from dist_vasp.data.manifest import Manifest
from dist_vasp.ranking.load import shards_of
from tests.support.make_shards import write_folder


def loaded(run: Path, shards: str, **header: str):
    """A model of a run whose configuration names these shards."""
    written = Header(
        position=Position(0, 1, 1),
        config={},
        must_match={},
        vocabulary_sha256="v",
        shards_sha256="s",
        n_items=3,
        optimizer={"step": 1.0, "mu_product": 1.0},
        **header,
    )
    checkpoint = Checkpoint(run / "checkpoints" / "best-00000001", written)
    config = replace(Config(), data=DataConfig(shards=shards))
    return SimpleNamespace(checkpoint=checkpoint, config=config)


@pytest.fixture
def moved(tmp_path, monkeypatch):
    """project/shards and project/run, seen from a folder elsewhere."""
    (tmp_path / "project").mkdir()
    write_folder(tmp_path / "project" / "shards", [[0, 1], [1, 2]], [([0], [1])], [([1], [2])])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "project" / "run"


def test_data_that_moved_with_the_run_is_found_and_said(moved):
    shards = moved.parent / "shards"
    hashed = {"data_sha256": Manifest.load(shards).data_sha256, "shards_from_run": "../shards"}
    folder, remark = shards_of(loaded(moved, "project/shards", **hashed))
    assert (Path(folder), f"{shards} is, and is used" in remark) == (shards, True)
    other = {**hashed, "data_sha256": "of other data"}
    with pytest.raises(
        ValueError,
        match=r"project/shards, a path relative to the folder where training was "
        r"started: .*--shards DIR",
    ):
        shards_of(loaded(moved, "project/shards", **other))


def test_data_that_is_where_it_was(moved, monkeypatch):
    monkeypatch.chdir(moved.parent.parent)
    digest = Manifest.load("project/shards").data_sha256
    assert shards_of(loaded(moved, "project/shards", data_sha256=digest)) == ("project/shards", "")
    assert shards_of(loaded(moved, "project/shards")) == (
        "project/shards",
        "",
    )  # of an earlier version
    with pytest.raises(
        ValueError, match=r"was prepared again; pass --shards project/shards to use it"
    ):
        shards_of(loaded(moved, "project/shards", data_sha256="of other data"))


def test_data_that_is_gone(moved):
    with pytest.raises(
        ValueError,
        match=r"was trained on the shards in /nowhere: it holds no manifest\.json here; "
        r"pass --shards",
    ):
        shards_of(loaded(moved, "/nowhere"))
    with pytest.raises(
        ValueError, match=r"does not say which data it was trained on; pass --shards DIR"
    ):
        shards_of(loaded(moved, ""))

"""Checkpoints: any layout writes, any layout reads, whole or not at all."""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
import re
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dist_vasp.checkpoint import folder as folders
from dist_vasp.checkpoint import write
from dist_vasp.checkpoint.header import items_file
from dist_vasp.checkpoint.read import open_checkpoint
from dist_vasp.checkpoint.weights import load_weights
from dist_vasp.model.slices import ItemSlice
from dist_vasp.parallel.agree import AgreedError
from dist_vasp.tensor_file import write_safetensors
from tests.support.checkpoints import (
    HEADER,
    MOMENTS,
    N_ITEMS,
    TRUNK_SHAPES,
    alone,
    flip,
    make_pieces,
    read,
    save,
    trunk_tensors,
)
from tests.support.partitioned import assemble, export
from tests.support.ranks import run_ranks


@pytest.fixture
def saved(tmp_path) -> Path:
    return save(tmp_path / "checkpoints" / "step-00000007", alone())


# --- any layout -----------------------------------------------------------------------------------


def _save_and_read(ranks, mine, others, damaged):
    """Save `mine`, then read it and `others` with another width of block; and what reading
    `damaged` says."""
    torch.set_grad_enabled(False)
    save(mine, ranks)
    found = {}
    for path in (mine, *others):
        found[path] = export(read(path, ranks, 3 + ranks.world_size))
        trunk = load_weights(open_checkpoint(path), [], TRUNK_SHAPES)
        assert (
            all(torch.equal(trunk.pop(name), tensor) for name, tensor in trunk_tensors().items())
            and not trunk
        )
    if damaged is None:
        return found, None
    with pytest.raises(AgreedError) as error:
        read(damaged, ranks)
    return found, str(error.value)


def test_every_layout_reads_what_every_layout_wrote(tmp_path):
    one, two, three, two_by_two = paths = [
        tmp_path / name / "step-00000007" for name in ("1", "2", "3", "2x2")
    ]
    save(one, alone())
    results = {"2x2": run_ranks(_save_and_read, 4, two_by_two, [one], None, replicas=2)}
    damaged = tmp_path / "damaged"
    shutil.copytree(two_by_two, damaged)
    victim = damaged / items_file(1, 2)
    flip(victim, victim.stat().st_size - 1)
    results["3"] = run_ranks(_save_and_read, 3, three, [one, two_by_two], damaged)
    results["2"] = run_ranks(_save_and_read, 2, two, [one, two_by_two, three], damaged)
    results["1"] = [({path: export(read(path, alone(), 4)) for path in paths}, None)]

    expected = assemble(export(make_pieces(alone(), True, 23)))
    for layout, by_rank in results.items():
        for path in by_rank[0][0]:
            whole = assemble(
                [piece for found, _ in by_rank[: int(layout[0])] for piece in found[path]]
            )
            assert whole.keys() == expected.keys()
            for key, matrix in expected.items():
                assert torch.equal(whole[key], matrix), f"{path} on {layout}: {key}"
        messages = {message for _, message in by_rank}
        assert len(messages) == 1, "every rank raises the same"
        if layout in "23":
            assert str(victim) in (message := messages.pop()) and "SHA-256" in message
    for path, partitions in zip(paths, (1, 2, 3, 2), strict=True):
        listed = {
            "checkpoint.json",
            "trunk.safetensors",
            *(items_file(p, partitions) for p in range(partitions)),
        }
        assert {p.name for p in path.iterdir()} == listed
        header = json.loads((path / "checkpoint.json").read_text())
        assert set(header["files"]) == listed - {"checkpoint.json"}
        pieces = make_pieces(alone(), True, 5)
        assert header["item_axis"] == {piece.name: piece.item_dim for piece in pieces}
        assert header["format_version"] == 2
        assert {k: header[k] for k in ("position", "n_items", "optimizer")} == {
            "position": {"epoch": 1, "step_in_epoch": 2, "step": 7},
            "n_items": N_ITEMS,
            "optimizer": {"step": 7.0, "mu_product": 0.1},
        }
        assert all(p.stat().st_mode & 0o044 == 0o044 for p in path.iterdir()), (
            "others must be able to read"
        )
        assert [p.name for p in path.parent.iterdir()] == ["step-00000007"]


def test_a_model_without_moments_reads_from_a_checkpoint_with_them(saved):
    wanted = [piece for piece in make_pieces(alone(), False, 4) if not piece.name.endswith(MOMENTS)]
    load_weights(open_checkpoint(saved), wanted, {})
    expected = assemble(export(make_pieces(alone(), True, 5)))
    for name, matrix in assemble(export(wanted)).items():
        assert torch.equal(matrix, expected[name])


def test_nothing_is_pickled(saved, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something was unpickled")

    for module, name in (
        (torch, "load"),
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
    ):
        monkeypatch.setattr(module, name, refuse)
    read(saved, alone())
    load_weights(open_checkpoint(saved), [], TRUNK_SHAPES)
    for file in saved.iterdir():
        data = file.read_bytes()
        header = (
            data if file.suffix == ".json" else data[8 : 8 + int.from_bytes(data[:8], "little")]
        )
        assert json.loads(header)


# --- whole or not at all --------------------------------------------------------------------------


def test_a_disk_that_is_too_small(saved, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1 << 20))
    with pytest.raises(
        AgreedError, match=r"GB free but the checkpoint needs .*earlier checkpoints are good"
    ):
        save(saved.with_name("step-00000008"), alone(), 8)
    assert [p.name for p in saved.parent.iterdir()] == ["step-00000007"]
    read(saved, alone())


@pytest.mark.parametrize("failing", ["write_safetensors", "sync"])
def test_a_write_that_fails(saved, monkeypatch, failing):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, failing, full)
    with pytest.raises(
        AgreedError,
        match=r"step-00000008 could not be written .*No space left.*earlier checkpoints are good",
    ):
        save(saved.with_name("step-00000008"), alone(), 8)
    assert [p.name for p in saved.parent.iterdir()] == ["step-00000007"]
    read(saved, alone())


@pytest.mark.parametrize("failing", ["write_safetensors", "sync"])
def test_an_interrupted_write_is_ignored_and_swept(saved, monkeypatch, failing):
    folder, calls, original = saved.parent, itertools.count(), getattr(write, failing)

    def killed(*arguments):
        if next(calls) == 0:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(write, failing, killed)
        with pytest.raises(KeyboardInterrupt):
            save(folder / "step-00000008", alone(), 8)
    (temporary,) = folder.glob(".*.tmp")
    assert re.fullmatch(r"\.step-00000008\.[0-9a-f]{16}\.tmp", temporary.name)
    assert folders.newest(folder) == saved
    assert folders.find(folder) == saved
    with pytest.raises(ValueError, match=r"holds step-00000007; name one of them$"):
        folders.find(folder, "step-00000008")
    assert folders.newest(folder) == saved
    (folder / ".best.tmp").symlink_to("step-00000007")
    folders.settle(folder, None)
    assert [p.name for p in folder.iterdir()] == ["step-00000007"]
    save(folder / "step-00000008", alone(), 8)
    read(folders.newest(folder), alone())


def start_in_background(path: Path) -> tuple[write.Save, list[ItemSlice]]:
    pieces = make_pieces(alone(), True, 5)
    pending = write.Save(path, HEADER, pieces, trunk_tensors(), alone())
    assert pending.write_in_background()
    return pending, pieces


def test_what_is_written_in_the_background_is_what_was_handed_over(tmp_path):
    path = tmp_path / "step-00000007"
    pending, pieces = start_in_background(path)
    for piece in pieces:
        piece.tensor.zero_()  # training goes on
    pending.commit()
    assert pending.written and not pending.in_foreground
    expected = assemble(export(make_pieces(alone(), True, 5)))
    for name, matrix in assemble(export(read(path, alone()))).items():
        assert torch.equal(matrix, expected[name])


def test_a_checkpoint_does_not_exist_before_it_is_committed(saved):
    pending, _ = start_in_background(saved.with_name("step-00000008"))
    assert folders.newest(saved.parent) == saved
    pending.commit()
    assert folders.newest(saved.parent) == saved.with_name("step-00000008")


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError(28, "No space left on device"), AgreedError), (RuntimeError("a bug"), RuntimeError)],
)
def test_a_background_write_that_fails_is_no_checkpoint(saved, monkeypatch, error, raised):
    def fail(*_):
        raise error

    monkeypatch.setattr(write, "write_safetensors", fail)
    pending, _ = start_in_background(saved.with_name("step-00000008"))
    with pytest.raises(raised):
        pending.commit()
    assert folders.newest(saved.parent) == saved


def test_little_memory_writes_in_the_foreground(tmp_path, monkeypatch):
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(write.psutil, "virtual_memory", lambda: memory(100))
    pending = write.Save(
        tmp_path / "step-00000007", HEADER, make_pieces(alone(), True, 5), trunk_tensors(), alone()
    )
    assert not pending.write_in_background()
    assert pending.in_foreground
    pending.write()
    pending.commit()
    read(tmp_path / "step-00000007", alone())


def test_the_writer_of_safetensors_is_read_by_the_library(tmp_path):
    tensors = {
        "whole": torch.randn(3, 4),
        "a view[0:2]": torch.randn(4, 6).T[::2],
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.0),
        "\N{SNOWMAN}": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    digest = write_safetensors(tmp_path / "x.safetensors", tensors)
    assert digest == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)
    assert write_safetensors(tmp_path / "nothing.safetensors", {})
    assert load_file(tmp_path / "nothing.safetensors") == {}


def test_saving_again_replaces(saved):
    save(saved, alone())
    read(saved, alone())
    assert [p.name for p in saved.parent.iterdir()] == ["step-00000007"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "checkpoints").write_text("a file is in the way")
    with pytest.raises(AgreedError, match="could not be written"):
        save(tmp_path / "checkpoints" / "step-00000001", alone())

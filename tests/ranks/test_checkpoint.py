"""Checkpoints: any layout writes, any layout reads, whole or not at all, and damage is named."""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
import re
import shutil
from collections import namedtuple
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_vasp.checkpoint import folder as folders
from dist_vasp.checkpoint import write
from dist_vasp.checkpoint.header import TRUNK, BestCheckpoint, Header, Position, items_file
from dist_vasp.checkpoint.json_header import header_sha256
from dist_vasp.checkpoint.read import GoneError, open_checkpoint, verify
from dist_vasp.checkpoint.weights import load_weights
from dist_vasp.config.schema import (
    Config,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    Stage,
)
from dist_vasp.data.stream import Batch
from dist_vasp.model import slices
from dist_vasp.model.registry import kind_of
from dist_vasp.model.slices import ItemSlice
from dist_vasp.parallel.agree import AgreedError
from dist_vasp.parallel.comm import Ranks, form_groups
from dist_vasp.parallel.partition import Layout
from dist_vasp.tensor_file import write_safetensors
from tests.support.partitioned import SMALL, assemble, csr, export, make_model, random_rows, share
from tests.support.ranks import run_ranks

N_ITEMS = 23
MOMENTS = ("exp_avg", "exp_avg_sq")
HEADER = Header(
    position=Position(1, 2, 7),
    config=asdict(Config()),
    must_match={},
    vocabulary_sha256="v",
    shards_sha256="s",
    n_items=N_ITEMS,
    optimizer={"step": 7.0, "mu_product": 0.1},
)


def alone() -> Ranks:
    return form_groups(0, Layout(1, 1, 1), torch.device("cpu"))


def make_pieces(ranks: Ranks, fill: bool, block_columns: int) -> list[ItemSlice]:
    """Every item matrix and two moments of it; filled by global item, so that every layout holds
    the same."""
    slices.BLOCK_COLUMNS, default = block_columns, slices.BLOCK_COLUMNS
    try:
        weights = make_model("vasp", N_ITEMS, ranks, dtype=torch.float32).slices()
    finally:
        slices.BLOCK_COLUMNS = default
    pieces = weights + [
        replace(p, name=f"{p.name}.{m}", tensor=torch.zeros_like(p.tensor))
        for p in weights
        for m in MOMENTS
    ]
    for piece in pieces:
        by_item = piece.tensor.movedim(piece.item_dim, 0)
        for item in range(piece.lo, piece.hi):
            values = np.random.default_rng(
                [len(piece.name), sum(piece.name.encode()), item]
            ).uniform(size=by_item.shape[1:])  # no negative second moment
            by_item[item - piece.lo] = (
                torch.from_numpy(np.asarray(values)) if fill else float("nan")
            )
    return pieces


TRUNK_SHAPES = {"a.weight": (3, 5), "a.weight.exp_avg": (3, 5), "b.bias": (3, 5)}


def trunk_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(3, 5, generator=generator) for name in TRUNK_SHAPES}


def save(path: Path, ranks: Ranks, step: int = 7, block_columns: int = 5, **more) -> Path:
    header = replace(HEADER, position=Position(1, 2, step), **more)
    write.save(
        path,
        header,
        make_pieces(ranks, True, block_columns),
        trunk_tensors() if ranks.is_main else {},
        ranks,
    )
    return path


@pytest.fixture
def saved(tmp_path) -> Path:
    return save(tmp_path / "checkpoints" / "step-00000007", alone())


def read(path: Path, ranks: Ranks, block_columns: int = 5) -> list[ItemSlice]:
    opened = open_checkpoint(path)
    verify(opened, ranks)
    pieces = make_pieces(ranks, False, block_columns)
    load_weights(opened, pieces, {})
    return pieces


def rewrite_header(path: Path, **changes) -> None:
    """Change the header and make its own digest right again."""
    header = {**json.loads((path / Header.FILE).read_text()), **changes}
    header["header_sha256"] = header_sha256(header)
    (path / Header.FILE).write_text(json.dumps(header))


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


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


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["trunk.safetensors", "items-00000-of-00001.safetensors"])
@pytest.mark.parametrize("where", [0, 0.5, -1])
def test_a_flipped_byte_is_found(saved, name, where):
    file = saved / name
    flip(file, where if where < 1 and isinstance(where, int) else int(file.stat().st_size * where))
    with pytest.raises(
        AgreedError,
        match=rf"{name} has SHA-256 .*checkpoint\.json says .*damaged; remove this checkpoint",
    ):
        read(saved, alone())


@pytest.mark.parametrize("name", ["trunk.safetensors", "items-00000-of-00001.safetensors"])
def test_a_file_cut_short_or_gone_is_found(saved, name):
    file = saved / name
    data = file.read_bytes()
    for length in (len(data) - 1, len(data) // 2, 3, 0):
        file.write_bytes(data[:length])
        with pytest.raises(AgreedError, match=f"{name} has SHA-256"):
            read(saved, alone())
        opened = open_checkpoint(saved)
        wanted = ([], TRUNK_SHAPES) if name == TRUNK else (make_pieces(alone(), False, 5), {})
        with pytest.raises(
            ValueError, match=f"{name} cannot be read as safetensors"
        ):  # even if nobody verified
            load_weights(opened, *wanted)
    file.unlink()
    with pytest.raises(GoneError, match=rf"{name} cannot be read \(No such file"):
        read(saved, alone())


def test_every_flipped_byte_of_the_header_is_found(saved):
    file = saved / Header.FILE
    whole = file.read_bytes()
    blank = {
        i for i, byte in enumerate(whole) if byte in b" \n"
    }  # white space may change into white space
    for position in set(range(0, len(whole), 7)) - blank:
        flip(file, position)
        with pytest.raises(ValueError, match=r"checkpoint\.json (is damaged|has format_version)"):
            open_checkpoint(saved)
        file.write_bytes(whole)
    open_checkpoint(saved)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '"text"', "\xff", '{"format_version": 1}', "{}"]
)
def test_a_header_that_is_none(saved, text):
    (saved / Header.FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"checkpoint\.json is damaged .*use another checkpoint"):
        open_checkpoint(saved)


@pytest.mark.parametrize(
    "key",
    ["position", "config", "vocabulary_sha256", "shards_sha256", "n_items", "optimizer", "files"],
)
def test_a_header_without_a_key(saved, key):
    header = json.loads((saved / Header.FILE).read_text())
    del header[key]
    (saved / Header.FILE).write_text(json.dumps(header))
    with pytest.raises(ValueError, match=f"damaged .*{key}"):
        open_checkpoint(saved)


def test_another_format_version(saved):
    (saved / Header.FILE).write_text('{"format_version": 99, "everything": "else is new"}')
    with pytest.raises(ValueError, match="format_version 99, this version reads 1 and 2"):
        open_checkpoint(saved)


def test_positions_are_whole_numbers(saved):
    rewrite_header(saved, position={"epoch": 1, "step_in_epoch": 0, "step": "7"})
    with pytest.raises(ValueError, match="position does not hold three whole numbers"):
        open_checkpoint(saved)


def rewrite_items(saved: Path, change) -> None:
    """Rewrite the items file and everything that vouches for it."""
    file = saved / items_file(0, 1)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    files = json.loads((saved / Header.FILE).read_text())["files"]
    rewrite_header(saved, files={**files, file.name: hashlib.sha256(file.read_bytes()).hexdigest()})


def test_a_missing_range_is_named(saved):
    rewrite_items(saved, lambda tensors: tensors.pop("output.nease.weight[5:10]"))
    with pytest.raises(
        ValueError, match=r"does not hold output\.nease\.weight for all items 4 to 7"
    ):
        read(saved, alone(), block_columns=4)


def test_a_missing_matrix_is_named(saved):
    rewrite_items(saved, lambda tensors: tensors.pop("input.weight.exp_avg[0:23]"))
    with pytest.raises(
        ValueError, match=r"does not hold input\.weight\.exp_avg for all items 0 to 22"
    ):
        read(saved, alone())


def test_another_shape_is_named(saved):
    def narrower(tensors):
        tensors["input.weight[0:23]"] = tensors["input.weight[0:23]"][:, :-1].contiguous()

    rewrite_items(saved, narrower)
    with pytest.raises(
        ValueError, match=r"input\.weight\[0:23\] has shape \[23, 5\], expected \[23, 6\]"
    ):
        read(saved, alone())


def test_a_strange_name_is_refused(saved):
    rewrite_items(saved, lambda tensors: tensors.update(stranger=torch.zeros(2)))
    with pytest.raises(ValueError, match=r"holds a tensor 'stranger', expected names like"):
        read(saved, alone())


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


# --- which one ------------------------------------------------------------------------------------


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


# --- the trainer ----------------------------------------------------------------------------------

N_ROWS = 12
CASES = [
    ("vasp", "nadam", 0, 1),
    ("vasp", "nadam", 1, 2),
    ("vasp", "adamw", 2, 1),
    ("vasp", "nadam", 3, 1),
    ("nease", "adam", 1, 1),
    ("multvae", "adam", 1, 1),
]


def _batch(step: int, ranks: Ranks) -> Batch:
    x, y = (
        random_rows(N_ROWS, N_ITEMS, 10 + step, empty=(3,)),
        random_rows(N_ROWS, N_ITEMS, 20 + step, empty=(5,)),
    )
    mine, padded = share(N_ROWS, ranks)
    n = mine.stop - mine.start
    lanes = tuple((lane, 1) for lane in range(mine.start, mine.stop))
    return Batch(
        0,
        step,
        csr(x[mine]),
        csr(y[mine]),
        np.arange(n, dtype=np.uint64),
        lanes,
        n,
        N_ROWS,
        N_ROWS,
        padded,
    )


def _state(trainer) -> dict[str, np.ndarray]:
    items = {f"{p.name}[{p.lo}:{p.hi}]": p.tensor.numpy().copy() for p in trainer.item_pieces(True)}
    return items | {name: t.numpy().copy() for name, t in trainer.trunk_tensors(True).items()}


def _train_save_go_on(ranks, folder):
    """For each case, the state after five steps in one go, and after three, a checkpoint, and two
    of a fresh trainer."""
    from dist_vasp.training.engine import Trainer

    found = []
    for kind, name, stage, accumulation in CASES:
        config = Config(
            model=ModelConfig(kind=kind, **SMALL),
            loss=LossConfig(kind=kind_of(kind).losses[0], kl_weight=0.5, kl_anneal_steps=8),
            optimizer=OptimizerConfig(
                name=name, schedule=[Stage(10, 0.01)], accumulation=accumulation
            ),
            parallel=ParallelConfig(zero_stage=stage),
            run=RunConfig(seed=5),
            device="cpu",
        )
        whole = Trainer(config, N_ITEMS, ranks)
        for step in range(3):
            whole.step(_batch(step, ranks))
        path = folder / f"{kind}-{stage}" / "step-00000003"
        header = replace(HEADER, optimizer=whole.optimizer_scalars())
        write.save(path, header, whole.item_pieces(True), whole.trunk_tensors(True), ranks)
        reports = [whole.step(_batch(step, ranks)) for step in (3, 4)]

        resumed = Trainer(config, N_ITEMS, ranks)  # its start is overwritten
        opened = open_checkpoint(path)
        verify(opened, ranks)
        shapes = resumed.trunk.shapes(moments=True) if resumed.trunk else {}
        tensors = load_weights(opened, resumed.item_pieces(True), shapes)
        if resumed.trunk:
            resumed.trunk.load(tensors)
        resumed.load_scalars(opened.header.optimizer, 0)
        assert opened.header.optimizer["step"] == 3
        reports_resumed = [resumed.step(_batch(step, ranks)) for step in (3, 4)]
        found.append(((_state(whole), reports), (_state(resumed), reports_resumed)))
    return found


def test_a_resumed_trainer_goes_on_bitwise(tmp_path):
    for by_rank in run_ranks(_train_save_go_on, 2, tmp_path):
        for case, ((whole, reports), (resumed, reports_resumed)) in zip(
            CASES, by_rank, strict=True
        ):
            assert reports == reports_resumed, case
            for step, report in zip((3, 4), reports, strict=True):  # of 8 in which it rises to .5
                assert report.loss == report.focal + step / 16 * report.kl, case
            assert whole.keys() == resumed.keys()
            for name, expected in whole.items():
                assert np.array_equal(expected, resumed[name]), f"{case} {name}"


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

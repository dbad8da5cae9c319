"""Damage of a checkpoint is found and named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_vasp.checkpoint.header import TRUNK, Header, items_file
from dist_vasp.checkpoint.read import GoneError, open_checkpoint
from dist_vasp.checkpoint.weights import load_weights
from dist_vasp.parallel.agree import AgreedError
from tests.support.checkpoints import (
    TRUNK_SHAPES,
    alone,
    flip,
    make_pieces,
    read,
    rewrite_header,
    save,
)


@pytest.fixture
def saved(tmp_path) -> Path:
    return save(tmp_path / "checkpoints" / "step-00000007", alone())


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

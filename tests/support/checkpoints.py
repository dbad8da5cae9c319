"""Small checkpoints for tests: what they hold is a function of the item alone."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from dist_vasp.checkpoint import write
from dist_vasp.checkpoint.header import Header, Position
from dist_vasp.checkpoint.json_header import header_sha256
from dist_vasp.checkpoint.read import open_checkpoint, verify
from dist_vasp.checkpoint.weights import load_weights
from dist_vasp.config.schema import Config
from dist_vasp.model import slices
from dist_vasp.model.slices import ItemSlice
from dist_vasp.parallel.comm import Ranks, form_groups
from dist_vasp.parallel.partition import Layout
from tests.support.partitioned import make_model

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

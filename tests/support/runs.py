"""Run directories with random weights, written without training: what a load, a recommendation or
an export reads."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dist_vasp.checkpoint import folder as folders
from dist_vasp.checkpoint.header import TRUNK, Header, Position, items_file
from dist_vasp.checkpoint.json_header import write_header
from dist_vasp.config.schema import Config, LossConfig, ModelConfig, ParallelConfig
from dist_vasp.data.hashing import keys_of_ids, vocabulary_sha256
from dist_vasp.data.manifest import ITEMS_FILE
from dist_vasp.data.positives import PositiveRule
from dist_vasp.model.build import make_trunk, new_model
from dist_vasp.model.slices import ItemSlice
from dist_vasp.parallel.comm import Group, Ranks
from dist_vasp.parallel.partition import Layout
from dist_vasp.tensor_file import write_safetensors
from tests.oracles.dense import DenseVASP
from tests.support.partitioned import SMALL, assemble, export, randomise


def write_items(folder: Path, ids: list, titles: list[str] | None = None) -> str:
    """items.parquet of these ids; returns the vocabulary's hash."""
    array = pa.array(ids)
    keys = keys_of_ids(array)
    columns = {
        "item": np.arange(len(ids)),
        "id": array,
        "key": keys,
        "popularity": np.arange(len(ids))[::-1].copy(),
    }
    pq.write_table(pa.table(columns | ({"title": titles} if titles else {})), folder / ITEMS_FILE)
    return vocabulary_sha256(keys)


def write_checkpoint(
    folder: Path,
    config: Config,
    n_items: int,
    vocabulary: str,
    trunk: dict[str, torch.Tensor],
    parts: list[list[ItemSlice]],
    rule: PositiveRule | None = None,
) -> Path:
    """A best checkpoint of these tensors, one items file for each of `parts`."""
    path = folder / "checkpoints" / "best-00000001"
    path.mkdir(parents=True)
    files = {TRUNK: trunk} if trunk else {}
    for p, pieces in enumerate(parts):
        files[items_file(p, len(parts))] = {f"{s.name}[{s.lo}:{s.hi}]": s.tensor for s in pieces}
    header = Header(
        position=Position(0, 1, 1),
        config=asdict(config),
        must_match={},
        vocabulary_sha256=vocabulary,
        shards_sha256="",
        n_items=n_items,
        positives=rule,
        optimizer={"step": 1, "mu_product": 1.0},
        item_axis={piece.name: piece.item_dim for pieces in parts for piece in pieces},
        files={name: write_safetensors(path / name, found) for name, found in files.items()},
    )
    write_header(path, header)
    folders.point_best_at(path)
    return path


def write_run(
    folder: Path,
    ids: list,
    kind: str = "vasp",
    partitions: int = 1,
    titles: list[str] | None = None,
    columns: int = 5,
    latent_head: bool = True,
    loss: str = "focal",
    sharper: float = 4.0,
    rule: PositiveRule | None = None,
    precision: str = "auto",
) -> DenseVASP:
    """A run of a tiny model whose weights, `sharper` than Glorot's, differ from item to item;
    returns the dense oracle of it."""
    folder.mkdir(parents=True, exist_ok=True)
    n_items = len(ids)
    config = Config(
        model=ModelConfig(kind=kind, latent_head=latent_head, **SMALL),
        loss=LossConfig(kind=loss),
        parallel=ParallelConfig(block_columns=columns, precision=precision),
    )
    parts = []
    for p in range(partitions):
        ranks = Ranks(
            p,
            Layout(partitions, partitions, 1),
            torch.device("cpu"),
            Group(1, 0),
            Group(1, 0),
            Group(1, 0),
        )
        model = new_model(config, n_items, ranks)
        model.initialise(7)
        randomise(model.slices(), 7)
        for piece in model.slices():
            piece.tensor.mul_(sharper)
        parts.append(model.slices())
    trunk = make_trunk(config.model, 0)
    named = {name: t.detach() for name, t in trunk.named_parameters()} if trunk is not None else {}
    write_checkpoint(folder, config, n_items, write_items(folder, ids, titles), named, parts, rule)
    whole = assemble([piece for part in parts for piece in export(part)]) | {
        f"trunk.{name}": t for name, t in named.items()
    }
    doubled = {name: t.double() for name, t in whole.items()}
    return DenseVASP(kind, doubled, SMALL["encoder_layers"], SMALL["decoder_layers"], latent_head)


def sha256_of_files(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}

"""Catalogue growth: a new run that starts from another run's weights, items matched by original id.

Rows and columns of known items are kept, in whatever order the new vocabulary has them; new items
keep their fresh initialisation. Moments and position start anew. Each rank reads one stored piece
at a time and keeps its own items of it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from dist_vasp import checkpoint as checkpoints
from dist_vasp import checkpoint_folder as folders
from dist_vasp.config import ModelConfig, from_dict
from dist_vasp.data.items import load_items, read_items_file
from dist_vasp.data.manifest import ITEMS_FILE, Manifest
from dist_vasp.model.item_layers import ItemSlice
from dist_vasp.parallel.agree import agreed
from dist_vasp.training.engine import Trainer
from dist_vasp.training.optimizer import MOMENTS

_SIZES = ("kind", "hidden", "latent", "encoder_layers", "decoder_layers", "latent_head")


def open_source(run: str, ours: ModelConfig) -> checkpoints.Checkpoint:
    """The best (else newest) checkpoint of `run`; ValueError where there is none, or one of another
    model."""
    if not Path(run).is_dir():
        raise ValueError(f"--init_from {run} is not a folder; name the run.dir of a training run")
    opened = folders.open_found(Path(run) / "checkpoints")
    theirs = from_dict(opened.header["config"]).model
    different = [
        f"model.{k} is {getattr(ours, k)!r}, there {getattr(theirs, k)!r}"
        for k in _SIZES
        if getattr(ours, k) != getattr(theirs, k)
    ]
    if different:
        raise ValueError(
            f"--init_from {run}: {'; '.join(different)}; a run can only start from one of the same model"
        )
    return opened


def initialise_from(trainer: Trainer, run: str, shards: str) -> None:
    """Copy the best (else newest) weights of `run` into `trainer`; AgreedError where the models
    differ in shape or files are bad."""
    ranks = trainer.ranks
    opened = folders.open_together(lambda: open_source(run, trainer.config.model), ranks)
    assert opened is not None
    with agreed(ranks):
        old_items = read_items_file(
            Path(run) / ITEMS_FILE, opened.header["n_items"], opened.header["vocabulary_sha256"]
        )
        new_items = load_items(shards, Manifest.load(shards))
    checkpoints.verify(opened, ranks)
    with agreed(ranks):
        found = pc.index_in(
            new_items.ids.cast(pa.string()), value_set=old_items.ids.cast(pa.string())
        )
        old_of_new = np.asarray(pc.fill_null(found, -1)).astype(np.int64)
        if (old_of_new < 0).all():
            raise ValueError(
                f"--init_from {run}: none of the {len(old_of_new)} items of {shards} is known there; are the ids of one kind?"
            )
        pieces = trainer.model.slices()
        for name, item_dim, lo, hi, stored in checkpoints.stored_pieces(
            opened, {piece.name for piece in pieces}
        ):
            for piece in pieces:
                if piece.name == name:
                    expected = list(piece.tensor.shape)
                    if name == "output.nease.weight":
                        expected[0] = opened.header["n_items"]
                    expected[item_dim] = hi - lo
                    if list(stored.shape) != expected:
                        raise ValueError(
                            f"{opened.path}: {name}[{lo}:{hi}] has shape {list(stored.shape)}, expected {expected}"
                        )
                    _copy_known(piece, item_dim, lo, hi, stored, old_of_new)
        tensors = checkpoints.read_trunk(opened) if trainer.trunk else {}
        checkpoints.check_numbers(
            opened, [*((piece.name, piece.tensor) for piece in pieces), *tensors.items()]
        )
    if trainer.trunk:
        fresh = trainer.trunk.tensors(moments=True)
        lacking = [name for name in fresh if name not in tensors and not name.endswith(MOMENTS)]
        if lacking:
            raise ValueError(
                f"{opened.path / checkpoints.TRUNK} has no {lacking[0]}; {opened.remedy}"
            )
        trainer.trunk.load({name: tensors.get(name, fresh[name]) for name in fresh})


def _copy_known(
    piece: ItemSlice, item_dim: int, lo: int, hi: int, stored: torch.Tensor, old_of_new: np.ndarray
) -> None:
    """Fill those items of `piece` whose old row lies in [lo, hi), the items that `stored` covers."""
    mine = old_of_new[piece.lo : piece.hi]
    here = np.flatnonzero((mine >= lo) & (mine < hi))
    if not len(here):
        return
    source = stored.movedim(item_dim, 0)[torch.from_numpy(mine[here] - lo)]
    target = piece.tensor.movedim(item_dim, 0)
    if piece.name == "output.nease.weight":  # the other axis holds items too
        known = np.flatnonzero(old_of_new >= 0)
        rows = target[torch.from_numpy(here)]
        rows[:, torch.from_numpy(known)] = source[:, torch.from_numpy(old_of_new[known])].to(rows)
        source = rows
    target[torch.from_numpy(here)] = source.to(target)

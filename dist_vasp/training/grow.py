"""Start a new run from another run's weights, where the catalogue has changed (`--init_from`).

Items are matched by original id. Rows and columns of known items are copied, in whatever order the
new vocabulary has them. With `model.neighbours` the inputs of an item are chosen from the new
data, and the weights of those that it had before are copied. New items keep their random
initialisation. Moments and position start anew. Each rank reads one stored tensor at a time and
keeps its own items of it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dist_vasp.checkpoint import folder as folders
from dist_vasp.checkpoint.header import Header
from dist_vasp.checkpoint.read import Checkpoint, open_checkpoint, verify
from dist_vasp.checkpoint.weights import load_weights
from dist_vasp.config.command_line import from_dict
from dist_vasp.config.schema import ModelConfig
from dist_vasp.data.items import load_items, read_items_file
from dist_vasp.data.manifest import ITEMS_FILE, Manifest
from dist_vasp.model.registry import kind_of
from dist_vasp.parallel.agree import agreed
from dist_vasp.training.step.engine import Trainer


def open_source(run: str, ours: ModelConfig) -> Checkpoint[Header]:
    """Open the best (else newest) checkpoint of `run`; ValueError where there is none, or one of
    another model."""
    if not Path(run).is_dir():
        raise ValueError(f"--init_from {run} is not a folder; name the run.dir of a training run")
    opened = folders.open_found(Path(run) / "checkpoints")
    theirs = from_dict(opened.header.config).model
    different = [
        f"model.{k} is {getattr(ours, k)!r}, there {getattr(theirs, k)!r}"
        for k in ("kind", "neighbours", *kind_of(ours.kind).size_keys)
        if getattr(ours, k) != getattr(theirs, k)
    ]
    if different:
        raise ValueError(
            f"--init_from {run}: {'; '.join(different)}; "
            "a run can only start from one of the same model"
        )
    return opened


def initialise_from(trainer: Trainer, run: str, shards: str) -> None:
    """Copy the best (else newest) weights of `run` into `trainer`; AgreedError where the models
    differ in shape or files are bad."""
    ranks = trainer.ranks
    opened = folders.open_together(
        lambda: open_source(run, trainer.config.model), open_checkpoint, ranks
    )
    assert opened is not None
    with agreed(ranks):
        old_items = read_items_file(
            Path(run) / ITEMS_FILE, opened.header.n_items, opened.header.vocabulary_sha256
        )
        new_items = load_items(shards, Manifest.load(shards))
    verify(opened, ranks)
    with agreed(ranks):
        found = pc.index_in(
            new_items.ids.cast(pa.string()), value_set=old_items.ids.cast(pa.string())
        )
        old_of_new = np.asarray(pc.fill_null(found, -1)).astype(np.int64)
        if (old_of_new < 0).all():
            raise ValueError(
                f"--init_from {run}: none of the {len(old_of_new)} items of {shards} is known "
                "there; are the ids of one kind?"
            )
        shapes = trainer.trunk.shapes(moments=False) if trainer.trunk else {}
        tensors = load_weights(opened, trainer.model.slices(), shapes, old_of_new)
    if trainer.trunk:
        trainer.trunk.load(trainer.trunk.tensors(moments=True) | tensors)
    opened.close()

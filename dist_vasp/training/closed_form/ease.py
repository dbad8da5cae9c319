"""The closed form from the shards, into columns that exist: as a run of its own
(training/closed_form/fit.py), or as NEASE's start.

model/closed_form.py has the equations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from dist_vasp.checkpoint import folder as folders
from dist_vasp.checkpoint.header import Header
from dist_vasp.checkpoint.read import open_checkpoint, verify
from dist_vasp.checkpoint.weights import load_weights
from dist_vasp.config.command_line import from_dict
from dist_vasp.config.schema import Config
from dist_vasp.data.block import Block, concatenate
from dist_vasp.data.manifest import Manifest
from dist_vasp.data.shard import read_shard
from dist_vasp.model.closed_form import solve
from dist_vasp.model.ease import Gpu, SymmetricColumns, add_gram, sweep_columns
from dist_vasp.model.kinds.nease import CLOSED_FORM
from dist_vasp.model.neighbours import NeighbourMatrix
from dist_vasp.model.paths import ItemMatrix
from dist_vasp.model.registry import kind_of
from dist_vasp.model.slices import ItemSlice, block_width
from dist_vasp.parallel.agree import agreed
from dist_vasp.parallel.comm import Ranks
from dist_vasp.plan.closed_form import EASE_INTERACTIONS_PER_ITEM
from dist_vasp.plan.estimate import has_items_x_items
from dist_vasp.progress import Progress
from dist_vasp.ranking.evaluate import to_item_rows
from dist_vasp.training.closed_form.auxiliary import Auxiliary
from dist_vasp.training.closed_form.support import SupportFit
from dist_vasp.training.step.engine import Trainer
from dist_vasp.training.stop import Interrupted, tick_of

_MOST_USERS = 1 << 16  # whose rows are dense for a block of columns: 64 MB
_MORE_USERS = 8  # times as many, where each group of users moves the matrix to a GPU and back


def fit(
    columns: list[Tensor],
    width: int,
    config: Config,
    manifest: Manifest,
    ranks: Ranks,
    show: bool = False,
    interrupted: Interrupted = lambda: False,
    auxiliary: Auxiliary | None = None,
    gpu: Gpu | None = None,
) -> None:
    """Write the B of the keys `model.ease_*` into `columns`, this rank's blocks (I, C) of `width`
    items. auxiliary: the interactions that count `model.ease_auxiliary`. gpu: what computes where
    `columns` are on the host.

    In float64 the list's tensors are made anew, block by block, and again in float32.
    """
    keys = config.model
    _convert(columns, {"fp32": torch.float32, "fp64": torch.float64}[keys.ease_dtype])
    for column in columns:
        column.zero_()
    matrix = SymmetricColumns(columns, manifest.n_items, ranks, width, gpu)
    reading = Progress("Gram matrix, training", manifest.splits["train"].users, "user", show=show)
    tick = tick_of(reading, interrupted)
    popularity_I = add_training_users(matrix, config, manifest, tick, auxiliary)
    reading.close()
    title = f"lambda {keys.ease_lambda:g}, inverse"
    inverting = Progress(title, len(matrix.blocks), "block", show=show)
    solve(matrix, popularity_I, keys, tick_of(inverting, interrupted))
    inverting.close()
    _convert(columns, torch.float32)


def add_training_users(
    G: SymmetricColumns,
    config: Config,
    manifest: Manifest,
    read: Callable[[int], None] = lambda users: None,
    auxiliary: Auxiliary | None = None,
) -> Tensor:
    """G += the Gram matrix of the training users, each weighted by `model.ease_user_exponent`;
    return how many of them have each item, (I,) float64. Auxiliary interactions count in G alone.

    `read(users so far)` is called before each group of users, and at the end.
    """
    dtype, device = G.columns[0].dtype, G.device
    exponent, train = config.model.ease_user_exponent, manifest.splits["train"]
    value = config.model.ease_auxiliary
    popularity_I = torch.zeros(manifest.n_items, dtype=torch.float64, device=device)
    done = 0
    more = _MORE_USERS if G.gpu else 1
    for block in training_blocks(config.data.shards, manifest, more):
        read(done)
        x = to_item_rows(block.rows, block.n_users, manifest.n_items, device)
        popularity_I.index_add_(0, x.items, torch.ones_like(x.items, dtype=torch.float64))
        weight_U = (
            (x.lengths.clamp(min=1).to(dtype) * (train.users / train.interactions)) ** exponent
            if exponent
            else None
        )
        if auxiliary is not None and value:
            rows = auxiliary.joined(block, value)
            x = to_item_rows(rows, rows.n_rows, manifest.n_items, device)
        add_gram(G, x, weight_U)
        done += block.n_users
    read(done)
    return popularity_I.to(G.ranks.device)


def _convert(columns: list[Tensor], dtype: torch.dtype) -> None:
    """Change the precision of the tensors, one after the other: the two share the memory."""
    for column in columns:
        column.data = column.data.to(dtype)


def training_blocks(folder: str | Path, manifest: Manifest, more: int = 1) -> Iterator[Block]:
    """All training users, some shards at a time, or `more` times as many. ValueError where a shard
    is damaged."""
    # the sums over them outweigh the pass over the matrix
    enough = EASE_INTERACTIONS_PER_ITEM * manifest.n_items * more
    waiting: list[Block] = []
    for entry in manifest.splits["train"].shards:
        waiting.append(read_shard(folder, "train", entry, manifest.n_items))
        if (
            sum(len(block.rows.items) for block in waiting) >= enough
            or sum(block.n_users for block in waiting) >= _MOST_USERS * more
        ):
            yield concatenate(waiting)
            waiting = []
    if waiting:
        yield concatenate(waiting)


# --- NEASE's start --------------------------------------------------------------------------------


def start_from_ease(
    trainer: Trainer, manifest: Manifest, on_support: SupportFit | None = None
) -> None:
    """W = model.nease_scale * B, from what model.init_from_ease names; the copy that
    optimizer.nease_decay draws to is the same.

    on_support: what has chosen the inputs of a W that keeps some only, unless a named run has.

    AgreedError where the named run is of another kind, of other items or of another number of
    inputs, or a file of it is damaged.
    """
    config, ranks = trainer.config, trainer.ranks
    (matrix,) = trainer.model.matrices
    if config.model.init_from_ease != CLOSED_FORM:
        _read_closed_form(trainer, manifest)
    elif isinstance(matrix, NeighbourMatrix):
        assert on_support is not None
        on_support.solve(matrix, config.model)
    else:
        assert isinstance(matrix, ItemMatrix)
        if ranks.device.type == "cpu":
            width = block_width(config.parallel.block_columns, ranks.device)
            columns = matrix.columns()
            fit(columns, width, config, manifest, ranks, ranks.is_main)
        else:
            _fit_beside(matrix.slices(), config, manifest, ranks)
    for piece in matrix.slices():
        piece.tensor.mul_(config.model.nease_scale)
    for start, piece in zip(matrix.start_slices(), matrix.slices(), strict=False):
        start.tensor.copy_(piece.tensor)


def _fit_beside(pieces: list[ItemSlice], config: Config, manifest: Manifest, ranks: Ranks) -> None:
    """Compute B in blocks of their own and copy it: those of a GPU's model are wide and padded."""
    width = sweep_columns(ranks.device)
    blocks = ranks.partition_of_items(manifest.n_items).blocks(width)
    columns = [torch.zeros((manifest.n_items, hi - lo), device=ranks.device) for lo, hi in blocks]
    fit(columns, width, config, manifest, ranks, ranks.is_main)
    for (lo, hi), column in zip(blocks, columns, strict=True):
        for piece in pieces:
            first, last = max(lo, piece.lo), min(hi, piece.hi)
            if first < last:
                part = column[:, first - lo : last - lo]
                piece.tensor[:, first - piece.lo : last - piece.lo] = part


def _read_closed_form(trainer: Trainer, manifest: Manifest) -> None:
    """Each rank reads its own columns from whichever files hold them."""
    run, ranks = trainer.config.model.init_from_ease, trainer.ranks
    opened = folders.open_together(
        lambda: folders.open_found(Path(run) / "checkpoints"), open_checkpoint, ranks
    )
    assert opened is not None
    with agreed(ranks):
        _check_closed_form(opened.header, trainer.config, manifest)
    verify(opened, ranks)
    with agreed(ranks):
        (matrix,) = trainer.model.matrices
        pieces = [*matrix.slices(), *matrix.constants()]
        load_weights(opened, pieces, {})
    opened.close()


def check_named_closed_form(config: Config, manifest: Manifest) -> None:
    """Raise ValueError where `model.init_from_ease` names a run that W cannot start from."""
    run = config.model.init_from_ease
    if run in ("", CLOSED_FORM):
        return
    opened = folders.open_found(Path(run) / "checkpoints")
    opened.close()
    _check_closed_form(opened.header, config, manifest)


def _check_closed_form(header: Header, config: Config, manifest: Manifest) -> None:
    """Raise ValueError unless the run has the matrix that this one starts from."""
    run, theirs = config.model.init_from_ease, from_dict(header.config)
    kind, inputs = theirs.model.kind, theirs.model.neighbours
    if not kind_of(kind).closed_form or not has_items_x_items(theirs):
        raise ValueError(
            f"model.init_from_ease: {run} is a run of model.kind {kind}, expected ease; "
            "--init_from starts from others"
        )
    if inputs != config.model.neighbours:
        raise ValueError(
            f"model.init_from_ease: {run} has model.neighbours {inputs}, expected "
            f"{config.model.neighbours} as this run; change one of the two"
        )
    if header.vocabulary_sha256 != manifest.vocabulary_sha256:
        raise ValueError(
            f"model.init_from_ease: {run} was computed on {header.n_items} items (hash "
            f"{header.vocabulary_sha256[:12]}...), data.shards lists "
            f"{manifest.n_items} (hash "
            f"{manifest.vocabulary_sha256[:12]}...); compute ease on these shards, or set "
            f"{CLOSED_FORM}"
        )

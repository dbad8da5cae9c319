"""A trained model that computes from its files as they lie on the disk: item matrices are mapped,
never read whole or copied.

A safetensors file is a header and raw numbers, so a stored tensor is a view of the file's pages,
which the operating system brings in when they are touched and drops when memory is short: a
catalogue larger than memory still answers. Each items file is one partition; the sides of the model
(model/item_layers.py) are built over its tensors, one pair for each file, and what crosses ranks in
training is here a sum over the files.

What is touched: a history of n items reads n rows of every block of W, C numbers each. A few users
need a few pages of every block, and the kernel is told not to read around them; some hundreds need
nearly all. So blocks of W are the outer loop and many users go through each together
(ranking/recommender.py): W passes once for all of them, in the order in which it lies in the file.

Shapes: U users, I items, C columns of a block, H hidden, L latent.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dist_vasp.checkpoint.header import TRUNK, ModelHeader, items_file
from dist_vasp.checkpoint.read import Checkpoint, parse_piece, readable
from dist_vasp.config import Config, LossConfig, ModelConfig
from dist_vasp.model.item_layers import BLOCK_COLUMNS, NEASE_WEIGHT, Head, InputSide, OutputSide
from dist_vasp.model.losses import MultinomialLoss, make_loss, sum_log_sigmoid
from dist_vasp.model.sparse import ItemRows
from dist_vasp.model.trunk import Trunk
from dist_vasp.model.vasp import make_trunk
from dist_vasp.parallel.comm import Group
from dist_vasp.parallel.partition import ItemPartition
from dist_vasp.tensor_file import TensorFile

_NOWHERE = torch.device("meta")  # sides are built without memory, then given the mapped tensors


_SCATTERED = 16  # fewer rows of W than one in so many: single pages are read


class MappedFile:
    """A mapped safetensors file: its tensors, and where W lies in it."""

    def __init__(self, file: TensorFile) -> None:
        self.tensors, self._pages = file.map()
        of_W = [stored for name, stored in file.stored.items() if name.startswith(NEASE_WEIGHT)]
        start = min((stored.start for stored in of_W), default=0) // mmap.PAGESIZE * mmap.PAGESIZE
        self._W = (start, max((stored.end for stored in of_W), default=0) - start)
        self._scattered = False

    def expect(self, scattered: bool) -> None:
        """Tell the kernel whether single rows of W are wanted or most of it: whether to read ahead."""
        if scattered != self._scattered and self._W[1] > 0:
            self._pages.madvise(mmap.MADV_RANDOM if scattered else mmap.MADV_NORMAL, *self._W)
            self._scattered = scattered


@dataclass(frozen=True)
class Part:
    """One partition of the catalogue: the sides that are built over one items file.

    NEASE has no input side.
    """

    input: InputSide | None
    output: OutputSide
    file: MappedFile | None = None


class MappedModel:
    """The model of `model.kind` over mapped item matrices.

    Scores are log p; of the closed form (`ease`), W x itself.
    """

    def __init__(
        self,
        model: ModelConfig,
        loss: LossConfig,
        n_items: int,
        parts: list[Part],
        trunk: Trunk | None,
    ) -> None:
        self.config, self.n_items, self.parts, self.trunk = model, n_items, parts, trunk
        self.loss = make_loss(loss.kind, loss.alpha, loss.gamma)
        self.outputs = [part.output for part in parts]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight, for checks."""
        if self.trunk is not None:
            yield from self.trunk.named_parameters()
        for part in self.parts:
            pieces = (part.input.slices() if part.input else []) + part.output.slices()
            yield from ((piece.name, piece.tensor) for piece in pieces)

    @torch.no_grad()
    def sources(self, x: ItemRows) -> list[Tensor]:
        """What feeds the deep paths: [d (U, H), z (U, L)] or [d]; empty where there is no deep
        path."""
        if self.trunk is None:
            return []
        pre_UH: Tensor | None = None
        for part in self.parts:
            assert part.input is not None
            share = part.input.forward(x)
            pre_UH = share if pre_UH is None else pre_UH + share
        assert pre_UH is not None
        d_UH, z_UL, _ = self.trunk(pre_UH, None)
        return [d_UH, z_UL] if self.config.latent_head else [d_UH]

    @torch.no_grad()
    def scores(self, x: ItemRows, allowed_I: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """(first item, scores (U, C)) of every block, in item order; with `allowed_I` (bool) -inf
        elsewhere, and a block without an allowed item is left out and not computed."""
        self.expect(len(torch.unique(x.items)))
        sources, stats = self.sources(x), None
        if isinstance(self.loss, MultinomialLoss):
            stats = self.loss.combine(
                torch.stack([o.row_stats(self.loss, sources, x, None) for o in self.outputs])
            )
        for output in self.outputs:
            for block, (lo, hi) in enumerate(output.blocks):
                if allowed_I is not None and not allowed_I[lo:hi].any():
                    continue
                paths = output.logits(block, sources, x)
                if stats is not None:
                    scores_UC = sum(paths[1:], paths[0]) - stats[:, :1]
                else:
                    scores_UC = paths[0] if self.config.linear else sum_log_sigmoid(paths)
                if allowed_I is not None:
                    scores_UC[:, ~allowed_I[lo:hi]] = -torch.inf
                yield lo, scores_UC

    def expect(self, n_rows: int) -> None:
        """Before reading `n_rows` rows of W."""
        scattered = n_rows * _SCATTERED < self.n_items
        for part in self.parts:
            if part.file is not None:
                part.file.expect(scattered)


def map_model(opened: Checkpoint[ModelHeader], config: Config) -> MappedModel:
    """The model of a checkpoint or export over its mapped files; ValueError where a tensor is
    missing or of another shape."""
    shallow, deep = config.model.shallow, config.model.deep
    n_items = opened.header.n_items
    trunk = _map_trunk(opened, config) if deep else None
    files = opened.header.items_files()
    parts = []
    for index, name in enumerate(files):
        part = ItemPartition(n_items, len(files), index)
        mapped = MappedFile(opened.tensors(name))
        if name != items_file(index, len(files)):
            raise ValueError(
                f"{opened.path} holds {', '.join(files)}, expected one file for each partition; {opened.remedy}"
            )
        with readable(opened.path / name, opened.remedy):
            parts.append(_make_part(opened.path / name, part, config.model, mapped, deep, shallow))
    if not parts:
        raise ValueError(f"{opened.path} lists no items file; {opened.remedy}")
    return MappedModel(config.model, config.loss, n_items, parts, trunk)


def _make_part(
    file: Path,
    part: ItemPartition,
    model: ModelConfig,
    mapped: MappedFile,
    deep: bool,
    shallow: bool,
) -> Part:
    tensors = mapped.tensors

    def take(name: str, lo: int, hi: int, *shape: int) -> Tensor:
        tensor = tensors.get(f"{name}[{lo}:{hi}]")
        if tensor is None or tuple(tensor.shape) != shape:
            raise ValueError(f"{file} has no {name}[{lo}:{hi}] of shape {shape}")
        return tensor

    place, alone, J = (_NOWHERE, torch.float32), Group(1, 0), part.size
    whole = (part.start, part.stop)
    input_side = None
    if deep:
        input_side = InputSide(part, alone, model.hidden, *place)
        input_side.weight_JH = take("input.weight", *whole, J, model.hidden)
    paths = (deep, model.latent_head, shallow)
    output = OutputSide(
        part, alone, model.hidden, model.latent, *paths, 0, *place, model.nease, model.nease_offset
    )
    output.heads = [
        Head(
            h.name,
            take(f"{h.name}.weight", *whole, *h.weight_JK.shape),
            take(f"{h.name}.bias", *whole, J),
        )
        for h in output.heads
    ]
    output.blocks = _stored_blocks(file, part, tensors) if shallow else part.blocks(BLOCK_COLUMNS)
    output.W_IC = (
        [take("output.nease.weight", lo, hi, part.n_items, hi - lo) for lo, hi in output.blocks]
        if shallow
        else []
    )
    return Part(input_side, output, mapped)


def _stored_blocks(
    file: Path, part: ItemPartition, tensors: dict[str, Tensor]
) -> list[tuple[int, int]]:
    """The blocks of columns in which the file holds W, in order; ValueError unless they make up the
    partition."""
    blocks = sorted(
        (lo, hi) for name, lo, hi in map(parse_piece, tensors) if name == "output.nease.weight"
    )
    ends = [part.start] + [hi for _, hi in blocks]
    if (
        [lo for lo, _ in blocks] != ends[:-1]
        or ends[-1] != part.stop
        or any(lo >= hi for lo, hi in blocks)
    ):
        raise ValueError(
            f"{file} does not hold output.nease.weight for all items {part.start} to {part.stop - 1} once"
        )
    return blocks


def _map_trunk(opened: Checkpoint[ModelHeader], config: Config) -> Trunk:
    trunk = make_trunk(config.model, config.run.seed)
    assert trunk is not None
    if TRUNK not in opened.header.files:
        raise ValueError(f"{opened.path} lists no {TRUNK}; {opened.remedy}")
    tensors, _ = opened.tensors(TRUNK).map()
    for name, p in trunk.named_parameters():
        if name not in tensors or tensors[name].shape != p.shape:
            raise ValueError(
                f"{opened.path / TRUNK} has no {name} of shape {tuple(p.shape)}; {opened.remedy}"
            )
        p.data = tensors[name]
    return trunk.eval().requires_grad_(False)

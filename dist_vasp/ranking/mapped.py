"""A trained model that computes from its files as they lie on the disk.

Item matrices are mapped, never read whole or copied. A safetensors file is a header and raw
numbers, so a stored tensor is a view of the file's pages. The operating system reads a page when it
is touched and drops it when memory is short, so a catalogue larger than memory still answers. The
model is the class that trains (model/partitioned.py), over another storage.

What is touched: a history of n items reads n rows of every block of an items x items matrix, C
numbers each. A few users need a few pages of every block, and the kernel is told not to read around
them; some hundreds need nearly all. So blocks are the outer loop and many users go through each
together (recommender.py).

Shapes: I items, J items of a file, C columns of a block.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from dist_vasp.checkpoint.header import TRUNK, ModelHeader, items_file
from dist_vasp.checkpoint.read import Checkpoint, parse_piece, readable
from dist_vasp.config.schema import Config
from dist_vasp.kernels.interface import EXACT
from dist_vasp.model.build import build_model, make_trunk
from dist_vasp.model.slices import BLOCK_COLUMNS, ItemSlice, Range
from dist_vasp.model.trunk import Trunk
from dist_vasp.parallel.comm import form_groups
from dist_vasp.parallel.partition import ItemPartition, Layout
from dist_vasp.ranking.scoring import TrainedModel
from dist_vasp.tensor_file import check_dtype

_SCATTERED = 16  # fewer rows of a matrix than one in so many: single pages are read


class ItemsFile:
    """A mapped items file of one partition: its tensors, and where its columns lie."""

    def __init__(self, opened: Checkpoint[ModelHeader], name: str, part: ItemPartition) -> None:
        file = opened.tensors(name)
        self.path, self.part = opened.path / name, part
        self.tensors, self._pages = file.map()
        pieces = {key: parse_piece(key, self.path) for key in file.stored}
        columns = {key: piece for key, piece in pieces.items() if _has_columns(opened, piece[0])}
        self.column_ranges = {
            matrix: sorted((lo, hi) for name, lo, hi in columns.values() if name == matrix)
            for matrix in {name for name, _, _ in columns.values()}
        }
        stored = [file.stored[key] for key in columns]
        start = min((s.start for s in stored), default=0) // mmap.PAGESIZE * mmap.PAGESIZE
        self._columns = (start, max((s.end for s in stored), default=0) - start)
        self._scattered = False

    def blocks(self) -> list[Range]:
        """The ranges of items that the file's columns are stored in, else even ones."""
        for name, ranges in self.column_ranges.items():
            self._check_whole(name, ranges)
            return ranges
        return self.part.blocks(BLOCK_COLUMNS)

    def _check_whole(self, name: str, ranges: list[Range]) -> None:
        """Raise ValueError unless the ranges make up the partition, each item once."""
        ends = [self.part.start] + [hi for _, hi in ranges]
        whole = [lo for lo, _ in ranges] == ends[:-1] and ends[-1] == self.part.stop
        if not whole or any(lo >= hi for lo, hi in ranges):
            last = self.part.stop - 1
            raise ValueError(
                f"{self.path} does not hold {name} for all items {self.part.start} to {last} once"
            )

    def take(
        self,
        name: str,
        lo: int,
        hi: int,
        shape: tuple[int, ...],
        item_dim: int,
        dtype: torch.dtype | None = None,
    ) -> ItemSlice:
        tensor = self.tensors.get(f"{name}[{lo}:{hi}]")
        if tensor is None or tuple(tensor.shape) != shape:
            raise ValueError(f"{self.path} has no {name}[{lo}:{hi}] of shape {shape}")
        check_dtype(f"{self.path}: {name}[{lo}:{hi}]", tensor.dtype, dtype or torch.float32)
        return ItemSlice(name, lo, hi, item_dim, tensor)

    def columns(self, name: str, n_items: int) -> list[ItemSlice]:
        """The blocks of an items x items matrix; ValueError unless they make up the partition."""
        ranges = self.column_ranges.get(name, [])
        self._check_whole(name, ranges)
        return [self.take(name, lo, hi, (n_items, hi - lo), 1) for lo, hi in ranges]

    def expect(self, scattered: bool) -> None:
        """Tell the kernel whether single rows or most of the columns are read next."""
        if scattered != self._scattered and self._columns[1] > 0:
            self._pages.madvise(mmap.MADV_RANDOM if scattered else mmap.MADV_NORMAL, *self._columns)
            self._scattered = scattered


def _has_columns(opened: Checkpoint[ModelHeader], name: str) -> bool:
    """Whether the items of a stored tensor are its columns; moments may be unlisted."""
    axes = opened.header.item_axis
    return (opened.header.axis_of(name) if axes is None else axes.get(name, 0)) == 1


class MappedStorage:
    """The item matrices of a checkpoint or export, one range of items for each file."""

    def __init__(self, opened: Checkpoint[ModelHeader]) -> None:
        self.opened = opened
        self.arithmetic = EXACT
        self.n_items: int = opened.header.n_items
        names = opened.header.items_files()
        if not names:
            raise ValueError(f"{opened.path} lists no items file; {opened.remedy}")
        self.files = []
        for index, name in enumerate(names):
            if name != items_file(index, len(names)):
                raise ValueError(
                    f"{opened.path} holds {', '.join(names)}, expected one file for each "
                    f"partition; {opened.remedy}"
                )
            part = ItemPartition(self.n_items, len(names), index)
            self.files.append(ItemsFile(opened, name, part))
        self.blocks = [block for file in self.files for block in self._blocks_of(file)]

    def _blocks_of(self, file: ItemsFile) -> list[Range]:
        with readable(file.path, self.opened.remedy):
            return file.blocks()

    def rows(
        self, name: str, width: int | None = None, dtype: torch.dtype | None = None
    ) -> list[ItemSlice]:
        pieces = []
        for file in self.files:
            J = file.part.size
            shape = (J,) if width is None else (J, width)
            with readable(file.path, self.opened.remedy):
                pieces.append(file.take(name, file.part.start, file.part.stop, shape, 0, dtype))
        return pieces

    def columns(self, name: str) -> list[ItemSlice]:
        pieces = []
        for file in self.files:
            with readable(file.path, self.opened.remedy):
                pieces += file.columns(name, self.n_items)
        return pieces

    def before_reading(self, items: Tensor) -> None:
        scattered = len(torch.unique(items)) * _SCATTERED < self.n_items
        for file in self.files:
            file.expect(scattered)


def map_model(opened: Checkpoint[ModelHeader], config: Config) -> TrainedModel:
    """The model of a checkpoint or export over its mapped files.

    ValueError where a tensor is missing or of another shape.
    """
    alone = form_groups(0, Layout(1, 1, 1), torch.device("cpu"))
    trunk = _map_trunk(opened, config)
    return TrainedModel(build_model(config, MappedStorage(opened), alone), trunk)


def _map_trunk(opened: Checkpoint[ModelHeader], config: Config) -> Trunk | None:
    trunk = make_trunk(config.model)
    if trunk is None:
        return None
    if TRUNK not in opened.header.files:
        raise ValueError(f"{opened.path} lists no {TRUNK}; {opened.remedy}")
    tensors, _ = opened.tensors(TRUNK).map()
    file = opened.path / TRUNK
    with readable(file, opened.remedy):
        for name, p in trunk.named_parameters():
            if name not in tensors or tensors[name].shape != p.shape:
                raise ValueError(f"{file} has no {name} of shape {tuple(p.shape)}")
            check_dtype(f"{file}: {name}", tensors[name].dtype, torch.float32)
            p.data = tensors[name]
    return trunk.eval().requires_grad_(False)

"""Models out of a configuration: to train, to read from files, or to count without memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from dist_vasp.kernels.interface import EXACT, Arithmetic
from dist_vasp.model.kind import Kind
from dist_vasp.model.losses import make_loss
from dist_vasp.model.neighbours import NeighbourMatrix
from dist_vasp.model.partitioned import PartitionedModel
from dist_vasp.model.paths import DenseHead, ItemMatrix
from dist_vasp.model.registry import kind_of
from dist_vasp.model.slices import GPU_ALIGN, NewStorage, Storage
from dist_vasp.model.trunk import Trunk
from dist_vasp.parallel.comm import Ranks
from dist_vasp.parallel.partition import ItemPartition

if TYPE_CHECKING:
    from dist_vasp.config.schema import Config, ModelConfig


def build_model(config: Config, storage: Storage, ranks: Ranks) -> PartitionedModel:
    """The model of `model.kind` over `storage`, with the weights that lie there."""
    of, kernels = config.loss, storage.arithmetic.kernels
    loss = make_loss(of.kind, of.alpha, of.gamma, kernels)
    parts = kind_of(config.model.kind).parts(config, storage)
    return PartitionedModel(parts, loss, ranks)


def new_model(
    config: Config,
    n_items: int,
    ranks: Ranks,
    arithmetic: Arithmetic = EXACT,
) -> PartitionedModel:
    """This rank's part of a model with zero weights; `initialise` fills them."""
    part = ranks.partition_of_items(n_items)
    width = block_items(config, ranks.device)
    return build_model(config, NewStorage(part, ranks.device, arithmetic, width), ranks)


def block_items(config: Config, device: torch.device) -> int:
    """The items of a block: `parallel.block_columns`, 0 for the default of the device.

    On a GPU a step takes as many as a sixteenth of its memory holds the logits and gradients of: a
    function of the card, so that a run that resumes computes the same.
    """
    if device.type != "cuda" or kind_of(config.model.kind).closed_form:
        return config.parallel.block_columns
    return gpu_width(config, torch.cuda.get_device_properties(device).total_memory)


def gpu_width(config: Config, memory: int) -> int:
    """The items of a block on a GPU with so many bytes of memory."""
    rows = 2 * -(-config.data.batch_size // config.optimizer.accumulation)  # two halves a user
    fit = memory // 16 // (rows * _BYTES_PER_LOGIT)
    return max(GPU_ALIGN, fit // GPU_ALIGN * GPU_ALIGN)


def make_trunk(
    model: ModelConfig, seed: int | None = None, arithmetic: Arithmetic = EXACT
) -> Trunk | None:
    """The trunk of `model`, None where the kind has none; with `seed` with its initial weights."""
    trunk = kind_of(model.kind).trunk(model, arithmetic)
    if trunk is not None and seed is not None:
        trunk.initialise(seed)
    return trunk


_BYTES_PER_LOGIT = 32  # logits and gradients of three paths in fp32, targets, and the loss
_TOO_LARGE = 1 << 61  # numbers of a model whose bytes torch cannot count


@dataclass(frozen=True)
class ModelSize:
    """What a model holds, counted from the model itself on the meta device.

    items, frozen: numbers in the item matrices of the items that one rank owns, and those of them
    without a gradient. trunk: parameters of the trunk. old_items, old_trunk: the same of the
    earlier encoder that training keeps. activations: numbers that the trunk's backward keeps for a
    row. hidden: width of the trunk's input, 0 without one. widths: of the
    sources that paths read. matrices, matrices_in_loss, paths_in_loss: how many there are.
    supports: items x items paths that keep some inputs only, which are no matrices.
    row_statistics: numbers per row that the loss sums over the partitions. largest: numbers of the
    largest item matrix.
    """

    items: int
    frozen: int
    trunk: int
    activations: int
    hidden: int
    widths: tuple[int, ...]
    matrices: int
    supports: int
    matrices_in_loss: int
    paths_in_loss: int
    row_statistics: int
    largest: int
    old_items: int = 0
    old_trunk: int = 0

    @property
    def trained(self) -> int:
        """Numbers of item matrices with a gradient."""
        return self.items - self.frozen

    @property
    def parameters(self) -> int:
        """Of item matrices and trunk together."""
        return self.items + self.trunk


def measure_size(config: Config, n_items: int, partitions: int = 1) -> ModelSize:
    """The size of the model of `config`, for the rank of `partitions` that owns the most items."""
    meta, model = torch.device("meta"), config.model
    kind = kind_of(model.kind)
    part = ItemPartition(n_items, partitions, partitions - 1)
    n_trunk, activations = _trunk_size(kind, model)
    try:
        parts = kind.parts(config, NewStorage(part, meta, width=part.size))
    except RuntimeError:  # torch counts bytes in 63 bits
        return ModelSize(_TOO_LARGE, 0, n_trunk, activations, 0, (), 0, 0, 0, 0, 0, _TOO_LARGE)
    loss = make_loss(config.loss.kind)
    widths = {path.source: path.width for path in parts.paths if isinstance(path, DenseHead)}
    matrices = [path for path in parts.paths if isinstance(path, ItemMatrix)]
    frozen = [p.tensor for path in parts.paths if not path.training.trained for p in path.slices()]
    constants = [p.tensor for path in parts.paths for p in path.constants()]
    inputs = parts.input.slices() if parts.input else []
    pieces = inputs + [piece for path in parts.paths for piece in path.slices()]
    with meta:
        earlier = kind.earlier(config, parts.storage)
    n_constant = sum(tensor.numel() for tensor in constants)
    return ModelSize(
        items=sum(piece.tensor.numel() for piece in pieces) + n_constant,
        frozen=0 if kind.closed_form else sum(t.numel() for t in frozen) + n_constant,
        trunk=n_trunk,
        activations=activations,
        hidden=parts.input.hidden if parts.input else 0,
        widths=tuple(widths.values()),
        matrices=len(matrices),
        supports=sum(isinstance(path, NeighbourMatrix) for path in parts.paths),
        matrices_in_loss=sum(path.training.in_loss for path in matrices),
        paths_in_loss=sum(path.training.in_loss for path in parts.paths),
        row_statistics=loss.row_statistics,
        largest=max(piece.tensor.numel() for piece in pieces),
        old_items=sum(piece.tensor.numel() for piece in earlier.slices()) if earlier else 0,
        old_trunk=sum(p.numel() for p in earlier.trunk.parameters()) if earlier else 0,
    )


@lru_cache(maxsize=16)
def _trunk_size(kind: Kind, model: ModelConfig) -> tuple[int, int]:
    """Parameters of the trunk, and numbers that its backward keeps for a row."""
    try:
        with torch.device("meta"):
            trunk = kind.trunk(model, EXACT)
    except RuntimeError:  # torch counts bytes in 63 bits
        return _TOO_LARGE, _TOO_LARGE
    if trunk is None:
        return 0, 0
    return sum(p.numel() for p in trunk.parameters()), trunk.activations

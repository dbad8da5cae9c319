"""The item matrices of a model as their optimizer takes them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dist_vasp.config.schema import OptimizerConfig
from dist_vasp.model.partitioned import PartitionedModel
from dist_vasp.model.slices import ItemSlice
from dist_vasp.training.step.adam_step import Beside


def item_groups(model: PartitionedModel, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameter groups: one for each trained path, one for the input side."""
    lean = config.item_state == "lean"

    def group(slices: list[ItemSlice], rate: float) -> dict[str, Any]:
        item_dim = slices[0].item_dim if lean else None
        whole = [piece.whole for piece in slices]
        return {"params": whole, "lean_dim": item_dim, "rate": rate, "l2": config.l2}

    groups = [group(model.input.slices(), 1.0)] if model.input else []
    trained = [path for path in model.paths if path.training.trained]
    return groups + [group(path.slices(), path.training.rate) for path in trained]


def copies_and_starts(model: PartitionedModel) -> dict[Tensor, Beside]:
    """The copies of the item matrices, and where they are drawn to, by parameter."""
    beside = {piece.whole: Beside(piece.copy) for piece in model.slices()}
    for path in model.paths:
        for piece, start in zip(path.slices(), path.start_slices(), strict=False):
            beside[piece.whole] = Beside(piece.copy, start.whole, path.training.decay)
    return beside

"""Which items are near to an item, by one of a model's paths.

    nease      W[item, j]: what having `item` adds to the logit of j; it is directed
    decoder    cosine of the rows of R, which is symmetric; `latent` the same of Q

Of an ensemble, the weighted sum of the members' items x items matrices.

Shapes: C columns of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dist_vasp.model.paths import Path
from dist_vasp.ranking.scoring import Ensemble, Model, common_blocks
from dist_vasp.ranking.sources import Sources


def similar_to(sources: Sources, item: int, by: str | None) -> Iterator[tuple[int, Tensor]]:
    """(first item, scores (C,)) of all items; ValueError where `by` names no path.

    `by` None: the first items x items path, else the first dense head.
    """
    paths = _paths(sources.model)
    by = by or next(iter(paths), "decoder")
    if by not in paths:
        raise ValueError(
            f"by is {by!r}, but a model of kind {sources.kind} can compare items by "
            f"{' or '.join(paths) or 'no path'}"
        )
    for source in sources.members:
        source.model.model.storage.before_reading(torch.tensor([item]))
    named, weights = zip(*paths[by], strict=True)
    streams = [((lo, s[None]) for lo, s in path.similar(item)) for path in named]
    for first, blocks in common_blocks(streams):
        total_C = blocks[0][0] if weights[0] == 1 else blocks[0][0] * weights[0]
        for scores_C, weight in zip(blocks[1:], weights[1:], strict=True):
            total_C = total_C + scores_C[0] * weight
        yield first, total_C


def _paths(model: Model) -> dict[str, list[tuple[Path, float]]]:
    """The paths that can compare items and their weights, by name."""
    if isinstance(model, Ensemble):
        pairs = zip(model.members, model.weights, strict=True)
        matrices: list[tuple[Path, float]] = [
            (matrix, weight) for member, weight in pairs for matrix in member.model.matrices
        ]
        return {"nease": matrices} if matrices else {}
    parts = model.model
    return {path.name: [(path, 1.0)] for path in [*parts.matrices, *parts.heads]}

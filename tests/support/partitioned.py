"""Helpers that put a partitioned model beside the dense oracle."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from dist_vasp.config.schema import Config, LossConfig, ModelConfig
from dist_vasp.data.rows import Rows
from dist_vasp.kernels.interface import Arithmetic
from dist_vasp.model.build import new_model
from dist_vasp.model.partitioned import PartitionedModel
from dist_vasp.model.slices import ItemSlice
from dist_vasp.model.sparse import ItemRows, gather_rows
from dist_vasp.parallel.comm import Ranks
from tests.oracles.dense import DenseVASP


class ConfiguredModel(PartitionedModel):
    """A model that remembers its configuration, for the oracle."""

    config: ModelConfig


class PlainTrunk:
    """A trunk in training without an engine; None stays None."""

    scale = 1.0

    def __init__(self, trunk: torch.nn.Module) -> None:
        self.trunk = trunk

    def __call__(self, pre_BH, noise_BL):
        return self.trunk(pre_BH, noise_BL)

    def backward(self, scalar: torch.Tensor) -> None:
        scalar.backward()


def plain(trunk: torch.nn.Module | None) -> PlainTrunk | None:
    return None if trunk is None else PlainTrunk(trunk)


SMALL = {"hidden": 6, "latent": 3, "encoder_layers": 3, "decoder_layers": 2}


def random_rows(
    n_rows: int, n_items: int, seed: int, empty: tuple[int, ...] = ()
) -> list[list[int]]:
    """Rows of 1 to n_items / 3 items; the rows in `empty` hold none."""
    rng = np.random.default_rng(seed)
    rows = [
        sorted(rng.choice(n_items, size=rng.integers(1, n_items // 3 + 1), replace=False).tolist())
        for _ in range(n_rows)
    ]
    return [[] if b in empty else row for b, row in enumerate(rows)]


def csr(rows: list[list[int]]) -> Rows:
    indptr = np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64)
    return Rows(indptr, np.array([i for r in rows for i in r], dtype=np.int32))


def share(n_rows: int, ranks: Ranks) -> tuple[slice, int]:
    """This rank's consecutive rows of `n_rows`, uneven on purpose, and the largest number that any
    rank has."""
    bounds = [
        0,
        *sorted(
            int(n_rows * ((r + 1) / ranks.world_size) ** 1.3) for r in range(ranks.world_size - 1)
        ),
        n_rows,
    ]
    return slice(bounds[ranks.rank], bounds[ranks.rank + 1]), int(np.diff(bounds).max())


def gathered(
    x: list[list[int]], y: list[list[int]], n_items: int, ranks: Ranks
) -> tuple[ItemRows, ItemRows, slice, int]:
    mine, padded = share(len(x), ranks)
    x_G, y_G = gather_rows(
        [csr(x[mine]), csr(y[mine])],
        mine.stop - mine.start,
        padded,
        n_items,
        ranks.partition_group,
        ranks.device,
    )
    return x_G, y_G, mine, padded


def dense_of(
    model: PartitionedModel, trunk: torch.nn.Module | None, config: ModelConfig | None = None
) -> DenseVASP:
    """The double precision oracle with the weights of a model of one partition."""
    parameters = {name: p.double() for name, p in assemble(export(model.slices())).items()}
    if trunk is not None:
        parameters |= {f"trunk.{name}": p.double() for name, p in trunk.named_parameters()}
    config = config or model.config
    return DenseVASP(
        config.kind,
        parameters,
        config.encoder_layers,
        config.decoder_layers,
        config.latent_head,
        config.nease_offset,
    )


def pad_noise(noise: np.ndarray, mine: slice, padded: int, dtype: torch.dtype) -> torch.Tensor:
    out = torch.zeros((padded, noise.shape[1]), dtype=dtype)
    out[: mine.stop - mine.start] = torch.from_numpy(noise[mine]).to(dtype)
    return out


def randomise(slices: list[ItemSlice], seed: int) -> None:
    """Biases start at zero; random ones make the comparison sharper. The same on every layout."""
    for piece in slices:
        if piece.name.endswith("bias"):
            for j in range(piece.lo, piece.hi):
                piece.tensor[j - piece.lo] = np.random.default_rng(
                    [seed, len(piece.name), j]
                ).normal()


def export(
    slices: list[ItemSlice], what: str = "tensor"
) -> list[tuple[str, int, int, int, np.ndarray]]:
    """Pieces that travel between processes: (name, lo, hi, item_dim, values or gradient)."""
    return [
        (
            s.name,
            s.lo,
            s.hi,
            s.item_dim,
            (s.tensor if what == "tensor" else s.tensor.grad).numpy().copy(),
        )
        for s in slices
    ]


def assemble(pieces: list[tuple[str, int, int, int, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Whole matrices out of the pieces of all partitions."""
    whole = {}
    for name in dict.fromkeys(p[0] for p in pieces):
        parts = sorted((p for p in pieces if p[0] == name), key=lambda p: p[1])
        assert all(a[2] == b[1] for a, b in itertools.pairwise(parts)), f"{name} has gaps"
        whole[name] = torch.from_numpy(np.concatenate([p[4] for p in parts], axis=parts[0][3]))
    return whole


def make_model(
    kind: str,
    n_items: int,
    ranks: Ranks,
    loss: str = "focal",
    latent_head: bool = True,
    dtype=torch.float64,
    seed: int = 5,
) -> ConfiguredModel:
    config = ModelConfig(kind=kind, latent_head=latent_head, **SMALL)
    whole = Config(model=config, loss=LossConfig(kind=loss))
    model = new_model(whole, n_items, ranks, Arithmetic(dtype))
    model.__class__ = ConfiguredModel
    model.config = config
    model.initialise(seed)
    randomise(model.slices(), seed)
    return model

"""A GPU that is smaller than the exact items x items matrix: the matrix lies in the host's memory,
and the GPU computes its Gram matrix and its inverse from copies of panels of it.

Several GPUs partition the matrix instead (model/ease.py). The model that comes out is evaluated on
the host.
"""

from __future__ import annotations

from dataclasses import replace

import psutil
import torch

from dist_vasp.config.schema import Config
from dist_vasp.data.manifest import Manifest
from dist_vasp.model.ease import Gpu
from dist_vasp.model.registry import kind_of
from dist_vasp.parallel.comm import Ranks
from dist_vasp.plan.closed_form import closed_form_plan
from dist_vasp.plan.estimate import has_items_x_items
from dist_vasp.plan.terms import Device, Sizes

_HOST_PARTS = 1.1  # of a matrix: it, and panels
_GPU_PARTS = 1.05


def is_exact(config: Config) -> bool:
    """Whether a closed form has all of an items x items matrix."""
    closed_form = kind_of(config.model.kind).closed_form
    return bool(closed_form) and has_items_x_items(config) and not config.model.neighbours


def place(config: Config, manifest: Manifest, ranks: Ranks) -> tuple[Ranks, Gpu | None]:
    """The ranks on the device that holds the model; and the GPU that computes it, where the host
    holds an exact matrix for lack of memory there.

    ValueError where the host cannot hold it either.
    """
    device, n_items = ranks.device, manifest.n_items
    if device.type != "cuda" or ranks.world_size > 1 or not is_exact(config):
        return ranks, None
    train = manifest.splits["train"]
    sizes = Sizes(n_items, train.interactions / max(train.users, 1), train.users)
    memory = closed_form_plan(config, sizes, 1, 1, None, Device("cuda")).memory
    there, _ = torch.cuda.mem_get_info(device)
    # Weighted users are a second copy; cuBLAS and the allocator keep some memory.
    of_matrix = sum(size for part, size in memory.items() if part != "process")
    if _GPU_PARTS * (of_matrix + memory["dense users"]) <= there:
        return ranks, None
    needed, here = _HOST_PARTS * memory["item weights"], psutil.virtual_memory().available
    if needed > here:
        raise ValueError(
            f"the matrix of {n_items:,} items takes {memory['item weights'] / 1e9:,.1f} GB, but "
            f"{there / 1e9:,.1f} GB are free on the GPU and {here / 1e9:,.1f} GB on this machine; "
            "start a rank on each of several GPUs, or set model.neighbours"
        )
    return replace(ranks, device=torch.device("cpu")), Gpu(device, there)

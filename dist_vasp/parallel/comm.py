"""Process groups and collectives. Only this file and start.py use torch.distributed.

Two kinds of group cross each other (DESIGN.md, section 3):

    partition group   the P ranks of one replica, each of which owns a range of items
    replica group     the ranks of all replicas that own the same item range

Collectives never write into their input and always return the reduced buffer; over one rank each is
the identity.

Shapes: B rows of this rank, G = P * B rows of the partition group.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dist_vasp.parallel.clock import Clock
from dist_vasp.parallel.partition import ItemPartition, Layout

_MESSAGE_BYTES = 1024

# torch 2.13 has renamed them.
_all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Group:
    """Some ranks that exchange tensors, and what this rank has spent on it, by collective."""

    size: int
    rank: int  # this rank's place in the group
    handle: dist.ProcessGroup | None = None
    bytes_moved: dict[str, int] = field(default_factory=dict)  # sent by this rank
    # seconds that the host waited; on a GPU a collective only enters a queue
    seconds: dict[str, float] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)

    def count(self, collective: str, n_bytes: int, since: float) -> None:
        self.bytes_moved[collective] = self.bytes_moved.get(collective, 0) + n_bytes
        self.seconds[collective] = self.seconds.get(collective, 0.0) + time.perf_counter() - since


@dataclass(frozen=True)
class Ranks:
    """This rank and its groups: the world, its partition group and its replica group."""

    rank: int
    layout: Layout
    device: torch.device
    world: Group
    partition_group: Group
    replica_group: Group

    @property
    def world_size(self) -> int:
        return self.layout.world_size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def clock(self) -> Clock:
        """Return what measures the parts of a step."""
        return self.world.clock

    def timed_by(self, clock: Clock) -> Ranks:
        """Return the same ranks and groups, measured by `clock`."""
        return replace(
            self,
            world=replace(self.world, clock=clock),
            partition_group=replace(self.partition_group, clock=clock),
            replica_group=replace(self.replica_group, clock=clock),
        )

    def bytes_moved(self) -> dict[str, int]:
        """Return the bytes that this rank has sent so far in all its groups, by collective.

        The trunk engine's own collectives count only where something counts them (zero.py).
        """
        moved: dict[str, int] = {}
        for group in (self.world, self.partition_group, self.replica_group):
            for name, n_bytes in group.bytes_moved.items():
                moved[name] = moved.get(name, 0) + n_bytes
        return moved

    def partition_of_items(self, n_items: int) -> ItemPartition:
        return ItemPartition(n_items, self.layout.partitions, self.layout.partition_of(self.rank))


def form_groups(rank: int, layout: Layout, device: torch.device) -> Ranks:
    """Return the groups of `layout`; the process group must be initialised.

    Every rank creates every group, in the same order.
    """
    P, R = layout.partitions, layout.replicas
    world = Group(layout.world_size, rank, None)
    if R == 1:
        partition_group, replica_group = Group(P, rank, None), Group(1, 0)
    else:
        across = [
            dist.new_group([p + r * P for r in range(R)]) if P > 1 else None for p in range(P)
        ]
        within = (
            [dist.new_group([r * P + p for p in range(P)]) for r in range(R)]
            if P > 1
            else [None] * R
        )
        partition_group = Group(P, layout.partition_of(rank), within[layout.replica_of(rank)])
        replica_group = Group(R, layout.replica_of(rank), across[layout.partition_of(rank)])
    return Ranks(rank, layout, device, world, partition_group, replica_group)


# --- collectives ----------------------------------------------------------------------------------


def all_gather(local: Tensor, group: Group) -> Tensor:
    """Return the tensors (B, ...) of all ranks as (size * B, ...), in the order of the ranks."""
    return local if group.size == 1 else Gathering(local, group).wait()


class Gathering:
    """An `all_gather` that runs while this rank does other work, until `wait`."""

    def __init__(self, local: Tensor, group: Group) -> None:
        self._local = local.contiguous()
        self._group = group
        self._work = None
        self._gathered = local
        if group.size > 1:
            self._gathered = local.new_empty((group.size * local.shape[0], *local.shape[1:]))
            self._work = _all_gather_into(
                self._gathered, self._local, group=group.handle, async_op=True
            )

    def wait(self) -> Tensor:
        """Return the tensors of all ranks, (size * B, ...), in the order of the ranks."""
        if self._work is not None:
            since = time.perf_counter()
            with self._group.clock("communication"):
                self._work.wait()
            self._work = None
            n_bytes = self._local.numel() * self._local.element_size()
            self._group.count("all_gather", (self._group.size - 1) * n_bytes, since)
        return self._gathered


def reduce_scatter(partial: Tensor, group: Group) -> Tensor:
    """Return this rank's B rows of the sum of all ranks' tensors (size * B, ...)."""
    if group.size == 1:
        return partial
    since = time.perf_counter()
    with group.clock("communication"):
        partial = partial.contiguous()
        reduced = partial.new_empty((partial.shape[0] // group.size, *partial.shape[1:]))
        _reduce_scatter_into(reduced, partial, group=group.handle)
    group.count(
        "reduce_scatter", (group.size - 1) * reduced.numel() * reduced.element_size(), since
    )
    return reduced


def all_reduce(local: Tensor, group: Group, op: str = "sum") -> Tensor:
    """Return the sum (or `max`) over the ranks; the input is unchanged."""
    if group.size == 1:
        return local
    since = time.perf_counter()
    with group.clock("communication"):
        reduced = local.clone()
        dist.all_reduce(
            reduced, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op], group=group.handle
        )
    group.count(
        "all_reduce",
        2 * (group.size - 1) * local.numel() * local.element_size() // group.size,
        since,
    )
    return reduced


def barrier(group: Group) -> None:
    if group.size > 1:
        dist.barrier(group=group.handle)


def all_gather_bytes(
    message: bytes, group: Group, device: torch.device, capacity: int = _MESSAGE_BYTES
) -> list[bytes]:
    """Return the messages of all ranks, each cut off at `capacity` bytes; nothing is pickled."""
    message = message[:capacity]
    sizes = all_gather(torch.tensor([len(message)], device=device), group).tolist()
    padded = torch.zeros(max(1, *sizes), dtype=torch.uint8)
    padded[: len(message)] = torch.tensor(list(message), dtype=torch.uint8)
    rows = all_gather(padded[None].to(device), group).cpu().numpy()
    return [bytes(row[:n]) for row, n in zip(rows, sizes, strict=True)]


def all_gather_keys(keys: np.ndarray, ranks: Ranks) -> list[int]:
    """Return the uint64 keys of all ranks, in the order of the ranks."""
    sizes = all_gather(torch.tensor([len(keys)], device=ranks.device), ranks.world).tolist()
    padded = torch.zeros(max(sizes), dtype=torch.int64)
    padded[: len(keys)] = torch.from_numpy(keys.view(np.int64))
    rows = all_gather(padded[None].to(ranks.device), ranks.world).cpu().numpy().view(np.uint64)
    return [int(key) for row, n in zip(rows, sizes, strict=True) for key in row[:n]]

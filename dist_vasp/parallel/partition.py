"""Which items belong to which rank.

The I items are divided into P contiguous ranges, whose sizes differ by at most one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ItemPartition:
    """The items [start, stop) that partition `index` of `n_partitions` owns; J = `size`."""

    n_items: int
    n_partitions: int
    index: int

    def __post_init__(self) -> None:
        if self.n_partitions < 1 or not 0 <= self.index < self.n_partitions:
            raise ValueError(f"partition {self.index} of {self.n_partitions} does not exist")
        if self.n_items < self.n_partitions:
            raise ValueError(
                f"{self.n_items} items cannot be cut into parallel.partitions = "
                f"{self.n_partitions} ranges; use fewer "
                "partitions (and more parallel.replicas)"
            )

    @property
    def start(self) -> int:
        return self.index * self.n_items // self.n_partitions

    @property
    def stop(self) -> int:
        return (self.index + 1) * self.n_items // self.n_partitions

    @property
    def size(self) -> int:
        return self.stop - self.start

    def blocks(self, width: int) -> list[tuple[int, int]]:
        """Return ranges [lo, hi) of items that cover this partition, each at most `width` wide."""
        return [(lo, min(lo + width, self.stop)) for lo in range(self.start, self.stop, width)]


@dataclass(frozen=True)
class Layout:
    """World size = replicas x partitions; rank = replica * P + partition."""

    world_size: int
    partitions: int
    replicas: int

    @staticmethod
    def of(world_size: int, partitions: int, replicas: int) -> Layout:
        """Return the layout; `partitions` 0 means world size / replicas.

        ValueError unless partitions x replicas is the world size.
        """
        if replicas < 1 or world_size % replicas:
            raise ValueError(
                f"parallel.replicas is {replicas}, which does not divide the {world_size} ranks; "
                "choose a divisor"
            )
        resolved = partitions or world_size // replicas
        if resolved * replicas != world_size:
            raise ValueError(
                f"parallel.partitions {partitions} x parallel.replicas {replicas} is "
                f"{partitions * replicas} but {world_size} ranks were started; set "
                f"parallel.partitions to {world_size // replicas}, or to 0 for as many as fit"
            )
        return Layout(world_size, resolved, replicas)

    def partition_of(self, rank: int) -> int:
        return rank % self.partitions

    def replica_of(self, rank: int) -> int:
        return rank // self.partitions

"""What a plan is made of, and what it says.

Shapes: B rows of a rank, G = P * B rows of a partition group, N rows of a step, I items, J items of
a rank, E items of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_vasp.plan.rates import Rates

FLOAT = 4
PROCESS_BASE = {
    "cpu": 0.47e9,
    "cuda": 1.2e9,
}  # interpreter, torch, deepspeed and gloo, with next to no model (docs/experiments.md)


@dataclass(frozen=True)
class Device:
    """What a rank computes on: cpu or cuda, and, of a GPU, its memory in bytes.

    The memory decides the width of a block (model/build.py).
    """

    type: str = "cpu"
    memory: int = 80_000_000_000


CPU = Device()


@dataclass(frozen=True)
class Sizes:
    """What the data contribute."""

    n_items: int
    items_per_user: float
    n_users: int = 0  # 0: not known


@dataclass(frozen=True)
class Plan:
    """The estimate for one rank.

    Dictionaries map a kind to bytes, floating-point operations or seconds. `seconds` is empty where
    the rates of the device are not known.
    """

    partitions: int
    replicas: int
    memory: dict[str, float]
    traffic: dict[str, float]
    arithmetic: dict[str, float]
    seconds: dict[str, float]

    @property
    def memory_total(self) -> float:
        return sum(self.memory.values())

    @property
    def traffic_total(self) -> float:
        return sum(self.traffic.values())

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())


def communication(traffic: dict[str, float], rates: Rates) -> dict[str, float]:
    """The seconds on the wire, nothing where the rate is not known."""
    if rates.network is None:
        return {}
    return {"communication": sum(traffic.values()) / rates.network}

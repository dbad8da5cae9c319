"""Memory, traffic and time of one rank before a cluster is rented: arithmetic on the configuration,
nothing is built.

The terms follow the step of DESIGN.md, section 3. Memory is what a process holds at its peak;
traffic is what one rank puts on the wire in a step (ring algorithms); time is a sum without
overlap, so a little more than a step takes.

Shapes: B rows of a rank, G = P * B rows of a partition group, N rows of a step, I items, J items of
a rank, E items of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dist_vasp.config.schema import Config
from dist_vasp.model.build import measure_size
from dist_vasp.model.registry import kind_of
from dist_vasp.model.sinks import GRADIENT_ROWS
from dist_vasp.model.slices import BLOCK_COLUMNS, GPU_BLOCK_COLUMNS

FLOAT = 4
PROCESS_BASE = {
    "cpu": 0.47e9,
    "cuda": 1.2e9,
}  # interpreter, torch, deepspeed and gloo, with next to no model (docs/experiments.md)
# a loader process beside what it shares with its rank: estimated, 50 decoded shards of 2 MB and
# what it writes to
LOADER_BASE = 0.15e9
# an interaction of a row: int64 as it came, sorted by item and its row, of x and of y; int32 on its
# way
IDS_BYTES = 80
# by ZeRO stage, how often the trunk passes each link of a ring: DeepSpeed all-reduces gradients (2)
# and gathers parameters (1); stage 3 scatters gradients (1) and gathers what is not small twice (2)
ZERO_MESSAGES = {0: 2, 1: 3, 2: 3, 3: 3}
ZERO_BUCKET = 500e6  # elements; the flat buckets of training/zero.py, which stay between steps
SAMPLED_STEPS = 4096
EASE_COLUMNS = 512
EASE_INTERACTIONS_PER_ITEM = 8


@dataclass(frozen=True)
class Rates:
    """What a device does in a second; `benchmark.py --floor` measures them."""

    flops: float = 80e9  # fp32 matrix products
    copy: float = 15e9  # bytes read and written
    gather: float = 20e9  # bytes of weight rows summed
    network: float = 1e9  # bytes on the wire


@dataclass(frozen=True)
class Sizes:
    """What the data contribute."""

    n_items: int
    items_per_user: float
    n_users: int = 0  # 0: not known


@dataclass(frozen=True)
class Plan:
    """The estimate for one rank.

    Dictionaries map a kind to bytes, floating-point operations or seconds.
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


def make_plan(
    config: Config, sizes: Sizes, partitions: int, replicas: int, rates: Rates, device: str = "cpu"
) -> Plan:
    """The estimate for one rank of a `replicas` x `partitions` world."""
    if kind_of(config.model.kind).closed_form:
        return _ease_plan(config, sizes, partitions, replicas, rates, device)
    step = _Step(config, sizes, partitions, replicas, device)
    traffic, arithmetic = step.traffic(), step.arithmetic()
    seconds = step.seconds(traffic, arithmetic, rates)
    return Plan(partitions, replicas, step.memory(), traffic, arithmetic, seconds)


class _Step:
    """The sizes of one optimizer step, and what follows from them."""

    def __init__(
        self, config: Config, sizes: Sizes, partitions: int, replicas: int, device: str
    ) -> None:
        self.config, self.sizes, self.device = config, sizes, device
        self.partitions, self.replicas, self.world = partitions, replicas, partitions * replicas
        self.model = measure_size(config, sizes.n_items, partitions)
        o, p = config.optimizer, config.parallel
        rows_per_user = 2 if config.halves else 1
        users = padded_users(sizes.n_users, config.data.batch_size, p.lanes, self.world)
        self.N = config.data.batch_size * rows_per_user
        self.B = rows_per_user * users / o.accumulation
        self.G = self.B * partitions
        self.E = sizes.items_per_user / rows_per_user  # of an input row
        self.J = math.ceil(sizes.n_items / partitions)
        self.X = sum(self.model.widths)  # width of the sources
        self.moments = 2 * FLOAT if o.item_state == "full" else FLOAT
        self.sharded = p.zero_stage > 0 and self.world > 1
        self.trunk_share = self.world if self.sharded else 1
        self.passes = 2 if o.clip_norm else 1

    def memory(self) -> dict[str, float]:
        """Return the bytes of each part at the peak of a step.

        The peak is while the output side computes a block, or in the backward of the trunk, when
        its gradients exist and not all activations are freed. Activations are counted by the
        operations whose inputs autograd keeps.
        """
        o, p, model, G = self.config.optimizer, self.config.parallel, self.model, self.G
        default = BLOCK_COLUMNS if self.device == "cpu" else GPU_BLOCK_COLUMNS
        C = min(self.J, p.block_columns or default)
        n_paths = len(model.widths) + model.matrices
        # A block: of (G, C) logits, misses and shares of each path and 14 others while the loss is
        # taken uncompiled. Then the gradient of each path and that of some rows of W (lean: of all
        # rows, and what their update makes).
        of_weights = GRADIENT_ROWS if o.item_state == "full" else 2 * self.sizes.n_items
        of_paths = G * n_paths + of_weights * model.matrices
        one_block = FLOAT * C * max(G * (3 * n_paths + 14), of_paths)
        # Stages 1 and up copy gradients into one flat bucket and keep their part of its average.
        trunk_gradients = FLOAT * (model.trunk + model.trunk / self.world * self.sharded)
        start = FLOAT * self.sizes.n_items * self.J * (o.nease_decay > 0)
        held = model.trunk / self.world if p.zero_stage == 3 else model.trunk
        master = FLOAT * model.trunk / self.world * self.sharded
        return {
            "process": PROCESS_BASE[self.device],
            "loaders": self.config.data.workers * LOADER_BASE,
            "item weights": FLOAT * model.items,
            "item moments": self.moments * model.trained + start,
            "item gradients": FLOAT * model.trained * (o.accumulation > 1),
            "trunk weights": FLOAT * held + master,
            "trunk buckets": FLOAT * min(model.trunk, ZERO_BUCKET) * self.sharded,
            "trunk moments": 2 * FLOAT * model.trunk / self.trunk_share,
            "trunk activations": FLOAT * self.B * model.activations,
            "rows of the group": FLOAT * 3 * G * self.X + IDS_BYTES * G * self.E,
            "one block, or trunk gradients": max(one_block, trunk_gradients),
        }

    def traffic(self) -> dict[str, float]:
        """Bytes of one rank: ring algorithms. Nothing grows with I but the replicas' sum."""
        model, micro = self.model, self.config.optimizer.accumulation
        received = FLOAT * (self.partitions - 1) * micro * self.B
        statistics = FLOAT * (self.partitions - 1) * micro * self.G * model.row_statistics
        item_passes = self.passes if micro == 1 else 1
        replicated = 2 * (self.replicas - 1) / self.replicas * item_passes
        ring = (self.world - 1) / self.world
        # Five scalars in float64, and three of each path of the loss.
        scalars = 8 * (5 + 3 * model.paths_in_loss)
        return {
            "ids": received * (2 * self.E + 2),
            "input: pre-activations and their gradient": received * 2 * model.hidden,
            "output: d, z and their gradient": received * 2 * self.X,
            "output: statistics of rows": statistics * self.passes,
            "replicas: item gradients": FLOAT * replicated * model.trained,
            "trunk under ZeRO": FLOAT
            * ring
            * model.trunk
            * ZERO_MESSAGES[self.config.parallel.zero_stage],
            "loss, norm and statistics": scalars * 2 * ring,
        }

    def arithmetic(self) -> dict[str, float]:
        """Of one rank: three products per weight and row (forward, two backward)."""
        group_rows = self.N / self.replicas
        gathered = self.J * self.model.matrices_in_loss + self.model.hidden / self.partitions
        return {
            "trunk": 6 * self.N / self.world * self.model.trunk,
            "output heads": 6 * group_rows * self.J * self.X,
            "gathers (bytes)": 2 * group_rows * self.E * gathered * FLOAT,
        }

    def seconds(
        self, traffic: dict[str, float], arithmetic: dict[str, float], rates: Rates
    ) -> dict[str, float]:
        trained = self.model.trained + self.model.trunk / self.trunk_share
        return {
            "trunk": arithmetic["trunk"] / rates.flops,
            "output heads": self.passes * arithmetic["output heads"] / rates.flops,
            "gathers": self.passes * arithmetic["gathers (bytes)"] / rates.gather,
            "update": trained * 2 * (FLOAT + self.moments) / rates.copy,
            "communication": sum(traffic.values()) / rates.network,
        }


def padded_users(n_users: int, batch_size: int, lanes: int, world: int) -> float:
    """Users of the rank that has most in a step, meaned over an epoch: the others pad to it
    (DESIGN.md, section 4)."""
    if not n_users or lanes % world:
        return math.ceil(batch_size / world)
    steps = -(-n_users // batch_size)
    lane = np.arange(lanes)
    phase, users = lane * steps // lanes, np.diff(np.arange(lanes + 1) * n_users // lanes)
    step = np.arange(min(steps, SAMPLED_STEPS) + 1)[:, None]
    given = (step * users + phase) // steps
    return float(
        np.diff(given, axis=0).reshape(len(step) - 1, world, -1).sum(axis=2).max(axis=1).mean()
    )


def _ease_plan(
    config: Config, sizes: Sizes, partitions: int, replicas: int, rates: Rates, device: str
) -> Plan:
    """The closed form for one lambda (model/ease.py): its Gram matrix and its inverse are what a
    step is elsewhere."""
    I, J, C = sizes.n_items, math.ceil(sizes.n_items / partitions), EASE_COLUMNS
    word = {"fp32": 4, "fp64": 8}[config.model.ease_dtype]
    interactions = sizes.n_users * sizes.items_per_user
    together = min(
        interactions, EASE_INTERACTIONS_PER_ITEM * I
    )  # interactions of users whose sums are made at once
    memory = {
        "process": PROCESS_BASE[device],
        "item weights": word * I * J,
        "one block": word * I * C * (3 + (partitions > 1)) + FLOAT * I * 256,
        "ids": 8 * 6 * together,
    }
    traffic = {"panels of the inverse": 2 * (partitions - 1) / partitions * 2 * word * I * I}
    arithmetic = {
        "inverse": I * I * (J + 4 * C),
        "gathers (bytes)": interactions * J / 2 * FLOAT,
    }
    seconds = {
        "Gram matrix": arithmetic["gathers (bytes)"] / rates.gather,
        "inverse": arithmetic["inverse"] / rates.flops * (word / FLOAT),
        "passes over the matrix": math.ceil(I / C) * word * I * J / rates.copy,
        "communication": sum(traffic.values()) / rates.network,
    }
    return Plan(partitions, replicas, memory, traffic, arithmetic, seconds)


def smallest_that_fits(
    config: Config, sizes: Sizes, device_memory: float, rates: Rates, device: str
) -> Plan | None:
    """The plan with the fewest partitions (one replica) whose memory fits; None where even one item
    a rank does not."""
    partitions = 1
    while partitions <= min(sizes.n_items, 1 << 16):
        plan = make_plan(config, sizes, partitions, 1, rates, device)
        if plan.memory_total <= device_memory:
            return plan
        partitions += max(1, partitions // 8)
    return None


def dense_reference_memory(config: Config, sizes: Sizes) -> float:
    """Return the bytes that plain dense torch needs in the optimizer's step, for comparison.

    Every matrix with gradient and two moments, two temporaries of torch.optim.NAdam for the largest
    matrix (v / correction, its root), and dense x and y (benchmarks/bench_dense.py). For the closed
    form: the matrix and three copies of numpy.linalg.inv in float64 (benchmarks/bench_ease.py).
    """
    I = sizes.n_items
    if kind_of(config.model.kind).closed_form:
        return 4 * 8 * I**2
    model = measure_size(config, I)
    rows = config.data.batch_size * (2 if config.halves else 1)
    return PROCESS_BASE["cpu"] + FLOAT * (4 * model.parameters + 2 * model.largest + 2 * rows * I)

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

from dist_vasp.config import Config

FLOAT = 4
PROCESS_BASE = {
    "cpu": 0.47e9,
    "cuda": 1.2e9,
}  # interpreter, torch, deepspeed and gloo, with next to no model (docs/experiments.md)
# a loader process beside what it shares with its rank: estimated, 50 decoded shards of 2 MB and
# what it writes to
LOADER_BASE = 0.15e9
BLOCK_COLUMNS = {"cpu": 256, "cuda": 2048}  # parallel.block_columns 0
GRADIENT_ROWS = 1024
# an interaction of a row: int64 as it came, sorted by item and its row, of x and of y; int32 on its
# way
IDS_BYTES = 80
ROW_STATS = {
    "cosine": 3,
    "multinomial": 2,
}  # floats of a row that a loss sums over the partitions first
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
    if config.model.linear:
        return _ease_plan(config, sizes, partitions, replicas, rates, device)
    m, o, p = config.model, config.optimizer, config.parallel
    H, L = m.hidden, m.latent * m.latent_head
    world = partitions * replicas
    rows_per_user = 2 if config.halves else 1
    N = config.data.batch_size * rows_per_user
    padded = padded_users(sizes.n_users, config.data.batch_size, p.lanes, world)
    B = rows_per_user * padded / o.accumulation
    G = B * partitions
    E = sizes.items_per_user / rows_per_user  # of an input row
    J = math.ceil(sizes.n_items / partitions)
    deep, shallow = m.deep, m.shallow
    n_paths = deep * (1 + m.latent_head) + shallow
    C = min(J, p.block_columns or BLOCK_COLUMNS[device])
    n_item, n_trunk = m.item_parameters(sizes.n_items, J), m.trunk_parameters()
    n_trained = n_item - m.frozen_parameters(sizes.n_items, J)
    moments = 2 * FLOAT if o.item_state == "full" else FLOAT
    gathered = J * (shallow and m.nease != "apart")  # of W's columns, in a step

    # Memory: weights and state stay; the peak comes when the output side has a block at hand, or in
    # the trunk's backward, when its gradients exist and not all activations are gone. Counts of
    # activations follow the operations that autograd keeps inputs of.
    trunk_share = 1 if p.zero_stage == 0 else world
    master = FLOAT * n_trunk / world if p.zero_stage else 0
    held = n_trunk / world if p.zero_stage == 3 else n_trunk
    # a block: of (G, C) logits, misses and shares of each path and 14 others while the loss is
    # taken uncompiled; then the gradient of each path and that of some rows of W (lean: of all
    # rows, and what their update makes)
    of_weights = GRADIENT_ROWS if o.item_state == "full" else 2 * sizes.n_items
    one_block = FLOAT * C * max(G * (3 * n_paths + 14), G * n_paths + of_weights * shallow)
    # stages 1 and up copy gradients into one flat bucket and keep their own share of its average
    trunk_gradients = FLOAT * (n_trunk + n_trunk / world * (p.zero_stage > 0))
    memory = {
        "process": PROCESS_BASE[device],
        "loaders": config.data.workers * LOADER_BASE,
        "item weights": FLOAT * n_item,
        "item moments": moments * n_trained + FLOAT * sizes.n_items * J * (o.nease_decay > 0),
        "item gradients": FLOAT * n_trained * (o.accumulation > 1),
        "trunk weights": FLOAT * held + master,
        "trunk buckets": FLOAT * min(n_trunk, ZERO_BUCKET) * (p.zero_stage > 0),
        "trunk moments": 2 * FLOAT * n_trunk / trunk_share,
        "trunk activations": FLOAT
        * deep
        * B
        * (H * (3 * (m.encoder_layers + m.decoder_layers) + 3) + 8 * L),
        "rows of the group": FLOAT * deep * 3 * G * (H + L) + IDS_BYTES * G * E,
        "one block, or trunk gradients": max(one_block, trunk_gradients),
    }

    # Traffic of one rank in one step: ring algorithms, nothing grows with I but the replicas' sum.
    others = partitions - 1
    micro = o.accumulation
    passes = 2 if o.clip_norm else 1
    stats = ROW_STATS.get(config.loss.kind, 0)
    traffic = {
        "ids": FLOAT * others * micro * B * (2 * E + 2),
        "input: pre-activations and their gradient": FLOAT * deep * others * micro * B * 2 * H,
        "output: d, z and their gradient": FLOAT * deep * others * micro * B * 2 * (H + L),
        "output: statistics of rows": FLOAT * others * micro * G * stats * passes,
        "replicas: item gradients": FLOAT
        * 2
        * (replicas - 1)
        / replicas
        * n_trained
        * (passes if micro == 1 else 1),
        "trunk under ZeRO": FLOAT
        * deep
        * (world - 1)
        / world
        * n_trunk
        * ZERO_MESSAGES[p.zero_stage],
        # five words in float64, and three of each path of the loss
        "loss, norm and statistics": 8
        * (5 + 3 * (n_paths - (shallow and m.nease == "apart")))
        * 2
        * (world - 1)
        / world,
    }

    # Arithmetic of one rank in one step: three products per weight and row (forward, two backward).
    per_rank_rows = N / world
    group_rows = N / replicas
    arithmetic = {
        "trunk": 6 * per_rank_rows * n_trunk,
        "output heads": 6 * group_rows * J * (H + L) * deep,
        "gathers (bytes)": 2 * group_rows * E * (gathered + H * deep / partitions) * FLOAT,
    }
    updated = (n_trained + n_trunk / trunk_share) * 2 * (FLOAT + moments)
    seconds = {
        "trunk": arithmetic["trunk"] / rates.flops,
        "output heads": passes * arithmetic["output heads"] / rates.flops,
        "gathers": passes * arithmetic["gathers (bytes)"] / rates.gather,
        "update": updated / rates.copy,
        "communication": sum(traffic.values()) / rates.network,
    }
    return Plan(partitions, replicas, memory, traffic, arithmetic, seconds)


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
    """What plain dense torch (benchmarks/bench_dense.py) holds in the optimizer's step: every matrix
    whole with gradient and two moments, the two temporaries that torch.optim.NAdam makes of the
    largest matrix (v / correction, its root), dense x and y. The closed form: what numpy.linalg.inv
    holds, the matrix and three copies, in float64 (benchmarks/bench_ease.py measured it)."""
    I = sizes.n_items
    if config.model.linear:
        return 4 * 8 * I**2
    n = config.model.item_parameters(I, I) + config.model.trunk_parameters()
    largest = max(I * I * config.model.shallow, I * config.model.hidden * config.model.deep)
    rows = config.data.batch_size * (2 if config.halves else 1)
    return PROCESS_BASE["cpu"] + FLOAT * (4 * n + 2 * largest + 2 * rows * I)

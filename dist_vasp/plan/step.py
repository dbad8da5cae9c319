"""The step of DESIGN.md, section 3, in numbers: memory, traffic and time of one rank.

Shapes: B rows of a rank, G = P * B rows of a partition group, N rows of a step, I items, J items of
a rank, E items of a row.
"""

from __future__ import annotations

import math

import numpy as np

from dist_vasp.config.schema import Config
from dist_vasp.model.build import gpu_width, measure_size
from dist_vasp.model.sinks import GRADIENT_ROWS
from dist_vasp.model.slices import BLOCK_COLUMNS, GPU_ALIGN
from dist_vasp.plan.rates import Rates, planned_precision
from dist_vasp.plan.terms import FLOAT, PROCESS_BASE, Device, Sizes, communication

HALF = 2  # bytes of a number in bf16
# a loader process beside what it shares with its rank: estimated, 50 decoded shards of 2 MB and
# what it writes to
LOADER_BASE = 0.15e9
# an interaction of a row: int64 as it came, sorted by item and its row, of x and of y; int32 on its
# way
IDS_BYTES = 80
# by ZeRO stage, how often the trunk passes each link of a ring: DeepSpeed all-reduces gradients (2)
# and gathers parameters (1); stage 3 scatters gradients (1) and gathers what is not small twice (2)
ZERO_MESSAGES = {0: 2, 1: 3, 2: 3, 3: 3}
ZERO_BUCKET = 500e6  # elements; the flat buckets of training/step/zero.py, which stay between steps
SAMPLED_STEPS = 4096


class Step:
    """The sizes of one optimizer step, and what follows from them."""

    def __init__(
        self, config: Config, sizes: Sizes, partitions: int, replicas: int, device: Device
    ) -> None:
        self.config, self.sizes, self.device = config, sizes, device
        halved = planned_precision(config, device.type) == "bf16"
        self.word = HALF if halved else FLOAT  # bytes of what enters a product
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
        align = GPU_ALIGN if device.type == "cuda" else 1
        self.padding = math.ceil(self.J / align) * align / self.J  # memory of items over their own

    def memory(self) -> dict[str, float]:
        """Return the bytes of each part at the peak of a step.

        The peak is while the output side computes a block, or in the backward of the trunk, when
        its gradients exist and not all activations are freed. Activations are counted by the
        operations whose inputs autograd keeps.
        """
        o, p, model, word = self.config.optimizer, self.config.parallel, self.model, self.word
        # Stages 1 and up copy gradients into one flat bucket and keep their part of its average.
        trunk_gradients = FLOAT * (model.trunk + model.trunk / self.world * self.sharded)
        copies = HALF if word == HALF else 0
        start = FLOAT * self.sizes.n_items * self.J * (o.nease_decay > 0)
        held = model.trunk / self.world if p.zero_stage == 3 else model.trunk
        master = FLOAT * model.trunk / self.world * self.sharded
        return {
            "process": PROCESS_BASE[self.device.type],
            "loaders": self.config.data.workers * LOADER_BASE * (self.device.type == "cpu"),
            "item weights": FLOAT * (model.items + model.old_items) * self.padding,
            "copies of weights in bf16": copies
            * ((model.items + model.old_items) * self.padding + model.trunk),
            "item moments": (self.moments * model.trained + start) * self.padding,
            "item gradients": FLOAT * model.trained * (o.accumulation > 1) * self.padding,
            "trunk weights": FLOAT * (held + model.old_trunk) + master,
            "trunk buckets": FLOAT * min(model.trunk, ZERO_BUCKET) * self.sharded,
            "trunk moments": 2 * FLOAT * model.trunk / self.trunk_share,
            "gradients of the heads": self._waiting(),
            "trunk activations": word * self.B * model.activations,
            "rows of the group": FLOAT * 3 * self.G * self.X + IDS_BYTES * self.G * self.E,
            "one block, or trunk gradients": max(self._one_block(), trunk_gradients),
        }

    def _waiting(self) -> float:
        """The bytes of the heads' gradients, which wait for one update of all on a GPU."""
        at_once = self.device.type == "cuda" and self.config.optimizer.accumulation == 1
        return self.word * self.J * self.X * at_once * self.padding

    def _one_block(self) -> float:
        """The bytes of a block of the output side while its loss and gradients are computed."""
        o, model, G, word = self.config.optimizer, self.model, self.G, self.word
        n_paths = len(model.widths) + model.matrices + model.supports
        if self.device.type == "cuda":
            # Logits and gradients of each path, targets, and temporaries of the loss.
            C = min(self.J, gpu_width(self.config, self.device.memory))
            return G * C * (2 * word * n_paths + 1 + 2 * FLOAT) * self.padding
        # (G, C) logits, misses and shares of each path and 14 others while the loss is taken
        # uncompiled. Then the gradient of each path and that of some rows of W (lean: of all rows,
        # and what their update makes).
        C = min(self.J, self.config.parallel.block_columns or BLOCK_COLUMNS)
        of_weights = GRADIENT_ROWS if o.item_state == "full" else 2 * self.sizes.n_items
        of_paths = G * n_paths + of_weights * model.matrices
        return FLOAT * C * max(G * (3 * n_paths + 14), of_paths)

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
            "input: pre-activations and their gradient": received
            * (3 if model.old_items else 2)
            * model.hidden,
            "output: d, z and their gradient": received * (1 + self.word / FLOAT) * self.X,
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
            "gathers (bytes)": 2 * group_rows * self.E * gathered * self.word,
        }

    def seconds(
        self, traffic: dict[str, float], arithmetic: dict[str, float], rates: Rates
    ) -> dict[str, float]:
        trained = self.model.trained + self.model.trunk / self.trunk_share
        updated = 2 * (FLOAT + self.moments) + (self.word if self.word != FLOAT else 0)
        seconds = {
            "trunk": arithmetic["trunk"] / rates.flops,
            "output heads": self.passes * arithmetic["output heads"] / rates.flops,
            "gathers": self.passes * arithmetic["gathers (bytes)"] / rates.gather,
            "update": trained * updated / rates.copy,
        }
        return seconds | communication(traffic, rates)


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

"""The singular vectors of `puresvd` (model/truncated_svd.py) in numbers."""

from __future__ import annotations

import math

from dist_vasp.config.schema import Config
from dist_vasp.model.truncated_svd import MORE_COLUMNS, users_of_a_block
from dist_vasp.plan.rates import Rates
from dist_vasp.plan.terms import FLOAT, PROCESS_BASE, Device, Plan, Sizes, communication

_BYTES_PER_INTERACTION = 4 + 24  # the users, and by blocks: two ids and what sorts them
_DOUBLE = 2  # an operation in float64 takes as long as so many in float32
_EIGEN = 25  # operations for each of C^3, at the rate of products


def svd_plan(
    config: Config,
    sizes: Sizes,
    partitions: int,
    replicas: int,
    rates: Rates | None,
    device: Device,
) -> Plan:
    """All iterations of one setting."""
    keys, J = config.model, math.ceil(sizes.n_items / partitions)
    C = min(keys.svd_rank + MORE_COLUMNS, sizes.n_items)
    n_products = keys.svd_iterations + 1
    interactions = sizes.n_users * sizes.items_per_user
    of_a_block = users_of_a_block(sizes.n_items, C, partitions)
    blocks = math.ceil(sizes.n_users / of_a_block)
    memory = {
        "process": PROCESS_BASE[device.type],
        "item weights": 2 * FLOAT * J * keys.svd_rank,
        "vectors": 5 * FLOAT * J * C,
        "eigenvectors": 6 * 8 * C * C,
        "interactions": _BYTES_PER_INTERACTION * interactions + 8 * blocks * J,
        "products of users": 2 * FLOAT * min(of_a_block, sizes.n_users) * C,
    }
    sums = 2 * (partitions - 1) / partitions * FLOAT * n_products * sizes.n_users * C
    eigenvectors = 2 * (partitions - 1) / partitions * 8 * (n_products + 2) * 2 * C * C
    traffic = {"products of users": sums, "eigenvectors": eigenvectors}
    arithmetic = {
        "products (bytes)": n_products * 2 * interactions / partitions * FLOAT * C,
        "passes over the vectors (bytes)": n_products * blocks * 3 * FLOAT * J * C,
        "orthonormal": n_products * (2 + 2 * _DOUBLE) * J * C**2,
        "eigenvectors": (n_products + 2) * _DOUBLE * _EIGEN * C**3,
    }
    if rates is None:
        return Plan(partitions, replicas, memory, traffic, arithmetic, {})
    seconds = {
        "products": arithmetic["products (bytes)"] / rates.gather
        + arithmetic["passes over the vectors (bytes)"] / rates.copy,
        "orthonormal": arithmetic["orthonormal"] / rates.flops,
        "eigenvectors": arithmetic["eigenvectors"] / rates.flops,
    }
    seconds |= communication(traffic, rates)
    return Plan(partitions, replicas, memory, traffic, arithmetic, seconds)

"""The closed form for one lambda (model/ease.py) in numbers.

Its Gram matrix and its inverse are what a step is elsewhere.
"""

from __future__ import annotations

import math

from dist_vasp.config.schema import Config
from dist_vasp.model.ease import DENSE_BYTES
from dist_vasp.plan.rates import Rates
from dist_vasp.plan.terms import FLOAT, PROCESS_BASE, Device, Plan, Sizes, communication

EASE_COLUMNS = {"cpu": 512, "cuda": 1024}
EASE_INTERACTIONS_PER_ITEM = 8


def closed_form_plan(
    config: Config,
    sizes: Sizes,
    partitions: int,
    replicas: int,
    rates: Rates | None,
    device: Device,
) -> Plan:
    """The closed form for one lambda (model/ease.py): its Gram matrix and its inverse are what a
    step is elsewhere."""
    I, J = sizes.n_items, math.ceil(sizes.n_items / partitions)
    C = min(EASE_COLUMNS[device.type], I)
    word = {"fp32": 4, "fp64": 8}[config.model.ease_dtype]
    interactions = sizes.n_users * sizes.items_per_user
    together = min(
        interactions, EASE_INTERACTIONS_PER_ITEM * I
    )  # interactions of users whose sums are made at once
    memory = {
        "process": PROCESS_BASE[device.type],
        "item weights": word * I * J,
        "one block": word * I * C * (3 + (partitions > 1)) + FLOAT * I * 256,
        "ids": 8 * 6 * together,
    }
    if device.type == "cuda":
        memory["dense users"] = min(DENSE_BYTES, word * sizes.n_users * I)
    traffic = {"panels of the inverse": 2 * (partitions - 1) / partitions * 2 * word * I * I}
    arithmetic = {
        "inverse": I * I * (J + 4 * C),
        "gathers (bytes)": interactions * J / 2 * FLOAT,
    }
    if device.type == "cuda":  # of dense users
        arithmetic["gathers (bytes)"] = 0.0
        arithmetic["Gram matrix"] = sizes.n_users * I * J
    if rates is None:
        return Plan(partitions, replicas, memory, traffic, arithmetic, {})
    seconds = {
        "Gram matrix": arithmetic["gathers (bytes)"] / rates.gather
        + arithmetic.get("Gram matrix", 0.0) / rates.flops,
        "inverse": arithmetic["inverse"] / rates.flops * (word / FLOAT),
        "passes over the matrix": math.ceil(I / C) * word * I * J / rates.copy,
    }
    seconds |= communication(traffic, rates)
    return Plan(partitions, replicas, memory, traffic, arithmetic, seconds)

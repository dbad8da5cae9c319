"""The closed form on a support (model/closed_form_on_support.py) in numbers, and which K fits."""

from __future__ import annotations

import math
from dataclasses import replace

from dist_vasp.config.schema import Config
from dist_vasp.model.closed_form_on_support import items_of_a_pass
from dist_vasp.model.support import support_width
from dist_vasp.plan.rates import Rates
from dist_vasp.plan.terms import FLOAT, PROCESS_BASE, Plan, Sizes

_BYTES_PER_INTERACTION = 24  # two sparse matrices, the users and a pointer
_ROWS_BYTES = 0.25e9  # rows of the Gram matrix, as they are made and sorted
# measured on one core of a CPU (docs/experiments.md): products of two ones in a sparse product, and
# numbers read out of a row
_PRODUCTS, _NUMBERS = 1e8, 5e7
_PAIRS_OVER_MEAN = 2.0  # mean of n^2 of the users over the square of its mean


def support_plan(
    config: Config, sizes: Sizes, partitions: int, replicas: int, rates: Rates | None
) -> Plan:
    """The closed form for one lambda of the supports `model.neighbours`; ranks share its items."""
    J = math.ceil(sizes.n_items / partitions)
    K = support_width(config.model.neighbours, sizes.n_items)
    word = {"fp32": 4, "fp64": 8}[config.model.ease_dtype]
    interactions = sizes.n_users * sizes.items_per_user
    at_once = min(J, items_of_a_pass(int(interactions), K, word))
    passes = math.ceil(J / at_once)
    memory = {
        "process": PROCESS_BASE["cpu"],
        "item weights and ids": 2 * FLOAT * J * K,
        "systems": word * at_once * K * (K + 1),
        "interactions": _BYTES_PER_INTERACTION * interactions,
        "rows of the Gram matrix": _ROWS_BYTES,
    }
    products = _PAIRS_OVER_MEAN * interactions * sizes.items_per_user
    arithmetic = {
        "Gram matrix": (passes + 1 / partitions) * products,
        "systems (numbers)": float(J * K * (K + 1)),
        "Cholesky": J * K**3 / 3,
    }
    if rates is None:
        return Plan(partitions, replicas, memory, {}, arithmetic, {})
    seconds = {
        "Gram matrix": arithmetic["Gram matrix"] / _PRODUCTS,
        "systems": arithmetic["systems (numbers)"] / _NUMBERS,
        "Cholesky": arithmetic["Cholesky"] / rates.flops * (word / FLOAT) * 2,
    }
    return Plan(partitions, replicas, memory, {}, arithmetic, seconds)


def with_neighbours(config: Config, neighbours: int) -> Config:
    """The configuration with so many inputs for each output item."""
    return replace(config, model=replace(config.model, neighbours=neighbours))

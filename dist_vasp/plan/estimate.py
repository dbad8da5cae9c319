"""Memory, traffic and time of one rank before a cluster is rented: arithmetic on the configuration,
nothing is built.

The terms follow the step of DESIGN.md, section 3. Memory is what a process holds at its peak;
traffic is what one rank puts on the wire in a step (ring algorithms); time is a sum without
overlap, so a little more than a step takes.
"""

from __future__ import annotations

from dist_vasp.config.schema import Config
from dist_vasp.model.build import measure_size
from dist_vasp.model.registry import kind_of
from dist_vasp.plan.closed_form import closed_form_plan
from dist_vasp.plan.rates import Rates
from dist_vasp.plan.step import Step
from dist_vasp.plan.terms import CPU, FLOAT, PROCESS_BASE, Device, Plan, Sizes


def make_plan(
    config: Config,
    sizes: Sizes,
    partitions: int,
    replicas: int,
    rates: Rates | None,
    device: Device = CPU,
) -> Plan:
    """The estimate for one rank of a `replicas` x `partitions` world, without times where there are
    no rates."""
    if kind_of(config.model.kind).closed_form:
        return closed_form_plan(config, sizes, partitions, replicas, rates, device)
    step = Step(config, sizes, partitions, replicas, device)
    traffic, arithmetic = step.traffic(), step.arithmetic()
    seconds = step.seconds(traffic, arithmetic, rates) if rates else {}
    return Plan(partitions, replicas, step.memory(), traffic, arithmetic, seconds)


def smallest_that_fits(
    config: Config, sizes: Sizes, device_memory: float, rates: Rates | None, device: Device
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

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
from dist_vasp.parallel.partition import Layout
from dist_vasp.plan.closed_form import closed_form_plan
from dist_vasp.plan.on_support import support_plan, with_neighbours
from dist_vasp.plan.rates import Rates
from dist_vasp.plan.step import Step
from dist_vasp.plan.svd import svd_plan
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
        if config.model.neighbours:
            return support_plan(config, sizes, partitions, replicas, rates)
        if not has_items_x_items(config):
            return svd_plan(config, sizes, partitions, replicas, rates, device)
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


def has_items_x_items(config: Config) -> bool:
    """Whether the model has a matrix that `model.neighbours` can make sparse."""
    size = measure_size(with_neighbours(config, 0), 2)
    return size.matrices > 0


def most_neighbours(
    config: Config, sizes: Sizes, layout: Layout, device_memory: float, device: Device
) -> int:
    """The most inputs for each output item, a power of 2, whose memory fits a rank; 0 where none
    does."""
    found, K = 0, 1
    while sizes.n_items > K:
        plan = make_plan(
            with_neighbours(config, K), sizes, layout.partitions, layout.replicas, None, device
        )
        if plan.memory_total > device_memory:
            break
        found, K = K, 2 * K
    return found


def exact_matrix_memory(sizes: Sizes) -> float:
    """The bytes of an items x items matrix in fp32."""
    return FLOAT * float(sizes.n_items) ** 2


def dense_reference_memory(config: Config, sizes: Sizes) -> float:
    """Return the bytes that plain dense torch needs in the optimizer's step, for comparison.

    Every matrix with gradient and two moments, two temporaries of torch.optim.NAdam for the largest
    matrix (v / correction, its root), and dense x and y (benchmarks/bench_dense.py). For the closed
    form: the matrix and three copies of numpy.linalg.inv in float64 (benchmarks/bench_ease.py).
    """
    I = sizes.n_items
    if kind_of(config.model.kind).closed_form:
        return 4 * 8 * I**2
    model = measure_size(with_neighbours(config, 0), I)
    rows = config.data.batch_size * (2 if config.halves else 1)
    return PROCESS_BASE["cpu"] + FLOAT * (4 * model.parameters + 2 * model.largest + 2 * rows * I)

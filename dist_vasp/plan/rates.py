"""What devices do in a second, as measured."""

from __future__ import annotations

from dataclasses import dataclass

from dist_vasp.config.schema import Config
from dist_vasp.model.registry import kind_of


@dataclass(frozen=True)
class Rates:
    """What a device does in a second; `benchmark.py --floor` measures them.

    name: for people. network: None where it is not known.
    """

    flops: float = 80e9  # matrix products, in the precision of the run
    copy: float = 15e9  # bytes read and written
    gather: float = 20e9  # bytes of weight rows summed
    network: float | None = 1e9  # bytes on the wire
    name: str = "a CPU machine of 2 cores"


# docs/gpu.md. A copy and sums of rows were measured in bf16; their bytes are counted.
_H100_FLOPS = {"fp32": 51e12, "tf32": 413e12, "bf16": 790e12}
BUILT_IN = {"cpu": "cpu", "h100": "cuda"}  # the device of each


def built_in_rates(name: str, precision: str) -> Rates:
    """The rates of `BUILT_IN`, for a precision of `planned_precision`."""
    if name == "cpu":
        return Rates()
    return Rates(_H100_FLOPS[precision], 3.0e12, 3.9e12, None, f"one H100 in {precision}")


def planned_precision(config: Config, device: str) -> str:
    """What `parallel.precision` means on a device that need not be here.

    It is taken to have bf16 where it is a GPU. Closed forms are fp32 or more everywhere.
    """
    if kind_of(config.model.kind).closed_form:
        return "fp32"
    wanted = config.parallel.wanted_precision
    if wanted == "auto":
        return "bf16" if device == "cuda" else "fp32"
    return "fp32" if wanted == "tf32" and device == "cpu" else wanted

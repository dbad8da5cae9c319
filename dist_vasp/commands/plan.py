"""Compute memory, traffic and time of a step, before you rent the cluster."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_vasp.bounded_json import read_json
from dist_vasp.command_line import program
from dist_vasp.config.command_line import ConfigParser, make_parser, parse
from dist_vasp.config.schema import Config
from dist_vasp.data.manifest import MANIFEST, Manifest
from dist_vasp.files import new_file
from dist_vasp.model.registry import kind_of
from dist_vasp.parallel.partition import Layout
from dist_vasp.places import check_file
from dist_vasp.plan.estimate import (
    dense_reference_memory,
    exact_matrix_memory,
    has_items_x_items,
    make_plan,
    most_neighbours,
    smallest_that_fits,
)
from dist_vasp.plan.rates import BUILT_IN, Rates, built_in_rates, planned_precision
from dist_vasp.plan.terms import Device, Plan, Sizes
from dist_vasp.recognise import is_json
from dist_vasp.training.closed_form.settings import largest

_JSON_FIELDS = (
    "partitions",
    "replicas",
    "memory",
    "traffic",
    "arithmetic",
    "seconds",
    "memory_total",
    "traffic_total",
    "step_seconds",
)
_RATES = ("flops", "copy", "gather", "network")


def main(argv: Sequence[str] | None = None) -> None:
    config, arguments = _parse(argv)
    config = largest(config)  # of a search
    sizes = _sizes(config.data.shards, arguments["items"], arguments["items_per_user"])
    device = _device(config, arguments)
    precision = planned_precision(config, device.type)
    rates = _rates(arguments.rates, device, precision)
    layout = Layout.of(arguments.ranks, config.parallel.partitions, config.parallel.replicas)
    plan = make_plan(config, sizes, layout.partitions, layout.replicas, rates, device)
    print(
        f"{config.model.kind}, {sizes.n_items:,} items, {sizes.items_per_user:.0f} items a user, "
        f"{arguments.ranks} ranks on {device.type} in {precision}"
    )
    closed = kind_of(config.model.kind).closed_form
    if closed:
        print(f"a step is {closed.what}, evaluation excluded")
    print(describe(plan, 0 if closed else config.data.batch_size))
    print(_of_rates(rates, arguments.ranks))
    if not closed or has_items_x_items(config):
        other = "numpy.linalg.inv in float64" if closed else "plain dense torch"
        dense_gb = dense_reference_memory(config, sizes) / 1e9
        print(f"{other} would hold about {dense_gb:.1f} GB on one device")
    if arguments.device_memory_gb:
        room_gb = arguments.device_memory_gb
        print(_smallest(smallest_that_fits(config, sizes, room_gb * 1e9, rates, device), room_gb))
    if has_items_x_items(config):
        most = None
        if arguments.device_memory_gb:
            most = most_neighbours(config, sizes, layout, room_gb * 1e9, device)
        print(_of_the_matrix(sizes, most, arguments.device_memory_gb))
    if arguments.json:
        fields = {name: getattr(plan, name) for name in _JSON_FIELDS}
        fields |= {"rates": rates and rates.name}
        if not plan.seconds:
            fields["step_seconds"] = None
        text = json.dumps(fields, indent=1) + "\n"
        with new_file(arguments.json, "--json", ours=_is_plan, inputs=_inputs(arguments)) as file:
            file.write(text.encode())


def parser() -> ConfigParser:
    parser = make_parser(program("plan"), __doc__ or "")
    add = parser.add_argument
    add("--ranks", type=int, default=1, help="ranks of the world")
    add(
        "--device_memory_gb",
        type=float,
        default=0.0,
        help="memory of one rank; the smallest partitioning that fits is named",
    )
    add("--items", type=int, default=0, help="items of the catalogue; default: as data.shards")
    add(
        "--items_per_user",
        type=float,
        default=0.0,
        help="mean interactions of a user; default: those of data.shards, else 100",
    )
    add(
        "--rates",
        default="",
        metavar="cpu|h100|FILE",
        help="rates of a small CPU machine, of one H100, or benchmark.json of "
        "`launch/benchmark.py --floor`; default: cpu, and no times for a GPU",
    )
    add("--json", default="", metavar="FILE", help="write the plan to this file")
    return parser


def _parse(argv: Sequence[str] | None) -> tuple[Config, Any]:
    """Return the configuration and the checked arguments."""
    config, arguments = parse(parser(), argv)
    if arguments.ranks < 1:
        raise ValueError(f"--ranks is {arguments.ranks}, expected at least 1")
    for option in ("items", "items_per_user", "device_memory_gb"):
        if not 0 <= arguments[option] < math.inf:
            raise ValueError(
                f"--{option} is {arguments[option]}, expected 0 or more, and finite; correct it"
            )
    if arguments.json:
        check_file(arguments.json, "--json", ours=_is_plan, inputs=_inputs(arguments))
    return config, arguments


def _inputs(arguments: Any) -> list[tuple[str, str]]:
    """Return the files that are read, which the plan must not replace, by their options."""
    configs = [("--config", str(path)) for path in arguments.config or ()]
    rates = [] if arguments.rates in BUILT_IN else [("--rates", arguments.rates)]
    return rates + configs


_is_plan = is_json(lambda found: {"partitions", "memory_total", "traffic_total"} <= set(found))


def describe(plan: Plan, users: int) -> str:
    """Return the plan as a table for people.

    `users` of a step; 0 where its speed is not counted in users.
    """
    speed = f"   ({users / plan.step_seconds:,.0f} users/s)" if users and plan.seconds else ""

    def rows(values: dict[str, float], unit: float, total: float) -> list[str]:
        shown = {kind: value for kind, value in values.items() if value} | {"in all": total}
        return [f"    {kind:<44}{value / unit:10.3f}" for kind, value in shown.items()]

    lines = [
        f"{plan.partitions} partitions x {plan.replicas} replicas; for one rank:",
        "  memory at the peak of a step, GB",
        *rows(plan.memory, 1e9, plan.memory_total),
        "  on the wire in a step, MB",
        *rows(plan.traffic, 1e6, plan.traffic_total),
    ]
    if not plan.seconds:
        return "\n".join(lines)
    unit, name = (1.0, "s") if plan.step_seconds >= 1 else (1e-3, "ms")
    lines.append(f"  time of a step without overlap, {name}")
    return "\n".join(lines + rows(plan.seconds, unit, plan.step_seconds)) + speed


def _smallest(fits: Plan | None, room_gb: float) -> str:
    if fits is None:
        return f"no partitioning fits {room_gb:g} GB a rank"
    time = f", {fits.step_seconds:.3g} s a step" if fits.seconds else ""
    return (
        f"smallest partitioning that fits {room_gb:g} GB a rank: {fits.partitions} partitions "
        f"({fits.memory_total / 1e9:.2f} GB each{time})"
    )


def _of_the_matrix(sizes: Sizes, most: int | None, room_gb: float) -> str:
    """Return a line on what an exact items x items matrix takes, and how many inputs fit."""
    gb = exact_matrix_memory(sizes) / 1e9
    text = f"an exact items x items matrix takes {gb:,.1f} GB"
    if most is None:
        return f"{text}; --device_memory_gb M says which model.neighbours fits"
    fits = f"model.neighbours {most} fits" if most else "no model.neighbours fits"
    return f"{text}; {fits} {room_gb:g} GB a rank"


def _sizes(shards: str, items: int, items_per_user: float) -> Sizes:
    n_users = 0
    if shards and (Path(shards) / MANIFEST).is_file():
        manifest = Manifest.load(shards)
        train = manifest.splits["train"]
        items, n_users = items or manifest.n_items, train.users
        items_per_user = items_per_user or train.interactions / max(train.users, 1)
    if items < 1:
        raise ValueError(
            "the size of the catalogue is not known: pass --items N, or data.shards with a data "
            "folder"
        )
    return Sizes(items, items_per_user or 100.0, n_users)


def _device(config: Config, arguments: Any) -> Device:
    """Return what a rank computes on: `device`, or for auto what the rates are of.

    ValueError where the two differ.
    """
    of_rates = BUILT_IN.get(arguments.rates)
    if of_rates and config.device not in ("auto", of_rates):
        raise ValueError(
            f"--rates {arguments.rates} is for device {of_rates}, but device is "
            f"{config.device}; set one of them to fit the other"
        )
    type_ = of_rates or ("cuda" if config.device == "cuda" else "cpu")
    if arguments.device_memory_gb:
        return Device(type_, int(arguments.device_memory_gb * 1e9))
    return Device(type_)


def _rates(wanted: str, device: Device, precision: str) -> Rates | None:
    """Return the rates of that name or file; None for a GPU without any."""
    if wanted in BUILT_IN:
        return built_in_rates(wanted, precision)
    if not wanted:
        return built_in_rates("cpu", precision) if device.type == "cpu" else None
    try:
        raw = read_json(wanted)
        if isinstance(raw, dict) and raw.get("rows"):
            raw = raw["rows"][0]["rates"]  # benchmark.json
        if not isinstance(raw, dict) or not raw.keys() & set(_RATES):
            raise ValueError("it names none of them")
        return Rates(**{name: float(raw[name]) for name in _RATES if name in raw}, name=wanted)
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise ValueError(
            f"--rates {wanted} cannot be read ({error}); expected cpu, h100, or "
            "JSON with flops, copy, gather, network per second"
        ) from None


def _of_rates(rates: Rates | None, n_ranks: int) -> str:
    if rates is None:
        return "no time: no rates of this device are given; pass --rates h100 or --rates FILE"
    text = f"rates of {rates.name}: {rates.flops / 1e12:g} TFLOP/s, "
    text += f"{rates.copy / 1e9:g} GB/s copied, {rates.gather / 1e9:g} GB/s of rows summed"
    if rates.network is not None:
        return f"{text}, {rates.network / 1e9:g} GB/s on the wire"
    return text + ("; communication was not measured and is left out" if n_ranks > 1 else "")

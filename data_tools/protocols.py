"""From the options of data_tools.shard to a plan: the filters and the protocol."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from data_tools.given import DEFAULT_VALIDATION_FRACTION, GivenPlan
from data_tools.hashed import DEFAULT_FRACTION, hashed_plan
from data_tools.interactions import Interactions
from data_tools.liang import liang_plan, liang_plan_like
from data_tools.like import OldSplit
from data_tools.ordered import LastRule, OrderedPlan, TimeRule
from data_tools.plan import Plan
from data_tools.rare_items import drop_rare_items
from data_tools.times import kth_smallest
from dist_vasp.data.positives import DEFAULT_MIN_RATING


@dataclass(frozen=True)
class Planned:
    """Filtered interactions and their plan; what the manifest says about both."""

    data: Interactions
    plan: Plan
    arguments: dict[str, Any]
    dropped: dict[str, int]
    """Counts of what the filters left out, by reason."""


def min_rating_of(args: argparse.Namespace) -> float:
    """Return the lowest rating of a positive; minus infinity where the protocol reads no
    ratings."""
    if args.protocol == "given":
        return float("-inf")
    return DEFAULT_MIN_RATING if args.min_rating is None else args.min_rating


def make_plan(args: argparse.Namespace, data: Interactions, old: OldSplit | None) -> Planned:
    """Apply the filters and the protocol. `old`: the split of `--like`.

    ValueError where nothing is left to train on, or an option does not fit the data.
    """
    if args.protocol == "given":
        given = GivenPlan(data, args.validation_fraction, args.seed)
        return Planned(data, given, {"validation_fraction": given.fraction}, {})
    min_items, min_users = args.min_items or 5, args.min_users or 1
    split_time = _split_time(args, data) if args.protocol == "time" else None
    data, dropped = drop_rare_items(data, min_users, min_items, bool(args.core))
    plan: Plan
    if split_time is not None:
        fraction = _or_else(args.validation_fraction, DEFAULT_VALIDATION_FRACTION)
        plan = OrderedPlan(data, TimeRule(split_time, fraction), min_items, args.seed)
        own = {"split_time": split_time, "split_quantile": args.split_quantile}
        own["validation_fraction"] = fraction
    elif args.protocol == "last":
        plan, own = OrderedPlan(data, LastRule(), min_items, args.seed), {}
    else:
        plan, own = _split_users(args, data, min_items, old)
    arguments = {
        "min_rating": min_rating_of(args),
        "min_items": min_items,
        "min_users": min_users,
        "core": bool(args.core),
        **own,
    }
    if old:
        arguments["like"] = old.data_sha256
    return Planned(data, plan, arguments, dropped)


def _split_time(args: argparse.Namespace, data: Interactions) -> float:
    """Return the time at which training ends: asked for, or the quantile over all positives."""
    if args.split_time is not None:
        return float(args.split_time)
    return kth_smallest(data.store.files("times"), int(args.split_quantile * data.sizes.sum()))


def _split_users(
    args: argparse.Namespace, data: Interactions, min_items: int, old: OldSplit | None
) -> tuple[Plan, dict[str, Any]]:
    """Return the plan of a protocol that splits users, and its arguments."""
    if args.protocol == "hashed":
        chosen = _fractions(args, old)
        plan = hashed_plan(data, min_items, chosen, args.seed, old)
        return plan, {"val_fraction": chosen[0], "test_fraction": chosen[1]}
    if old:
        plan = liang_plan_like(data, min_items, old, args.seed)
        fractions = {"val_fraction": old.val_fraction, "test_fraction": old.test_fraction}
    else:
        plan = liang_plan(data, min_items, args.val_users, args.test_users, args.seed)
        fractions = {}
    n_users = {f"{short}_users": len(plan.users[split]) for short, split in _HELD_OUT}
    return plan, {**n_users, **fractions}


_HELD_OUT = (("val", "validation"), ("test", "test"))


def _fractions(args: argparse.Namespace, old: OldSplit | None) -> tuple[float, float]:
    """Return the fractions of the users for validation and test: asked for, else those of `old`."""
    default = (old.val_fraction, old.test_fraction) if old else (DEFAULT_FRACTION,) * 2
    asked = (args.val_fraction, args.test_fraction)
    val, test = (_or_else(a, d) for a, d in zip(asked, default, strict=True))
    return val, test


def _or_else(asked: float | None, default: float) -> float:
    return default if asked is None else asked

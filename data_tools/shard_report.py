"""What the command `shard` prints: the splits, the rule of the positives, and every row's fate."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from data_tools import options
from data_tools.interactions import Interactions
from data_tools.plan import Plan
from data_tools.readers import Source
from data_tools.times import told
from dist_vasp.data.manifest import SplitEntry
from dist_vasp.data.positives import from_json
from dist_vasp.data.role_columns import unused_columns


@dataclass(frozen=True)
class Prepared:
    """Everything that is to be written."""

    data: Interactions
    plan: Plan
    preparation: dict[str, Any]  # what the manifest says about it
    users_per_shard: int


def report(
    args: argparse.Namespace,
    source: Source,
    prepared: Prepared,
    splits: dict[str, SplitEntry],
    seconds: float,
) -> None:
    """Print what was read and written."""
    for note in [*source.notes, *_order(args, source, prepared.preparation["arguments"])]:
        print(note)
    _print_splits(args, prepared.plan, splits)
    rule = str(from_json(prepared.preparation["positives"]))
    kept = "every row counts, and its rating is kept beside the item"
    print(f"  {kept if args.keep_ratings else rule}")
    for line in _unused(args, source):
        print(f"  {line}")
    _print_left_out(prepared.preparation, splits, seconds)


def _print_splits(args: argparse.Namespace, plan: Plan, splits: dict[str, SplitEntry]) -> None:
    would_hold = " would hold" if args.dry_run else ""
    print(f"{args.output}{would_hold}: {len(plan.vocabulary):,} items")
    for name, split in splits.items():
        heldout = f", {split.heldout:,} held out" if name != "train" else ""
        print(
            f"  {name:<10} {split.users:,} users, {split.interactions:,} interactions{heldout}, "
            f"{len(split.shards)} shards"
        )


def _order(args: argparse.Namespace, source: Source, arguments: dict[str, Any]) -> list[str]:
    """Return a line on what orders the interactions of a user, and where training ends."""
    if args.protocol not in options.BY_TIME:
        return []
    column = source.match_columns()[0].get("time")
    if args.protocol == "time":
        return [f"training ends before {told(arguments['split_time'])} of {column}"]
    by = f"by {column}" if column else "in the order of the input, because no times were read"
    return [f"the interactions of a user are ordered {by}"]


def _unused(args: argparse.Namespace, source: Source) -> list[str]:
    """Return a line on the columns that are not used, and the options that would use them."""
    names, unused = source.match_columns()
    roles = []
    if args.protocol != "given":
        roles = ["split"] if "rating" in names else ["rating", "split"]
    if "time" not in names and (args.repeats == "last" or args.protocol == "last"):
        roles.append("time")
    return unused_columns([*names.values(), *unused], names.values(), roles)


def _print_left_out(
    preparation: dict[str, Any], splits: dict[str, SplitEntry], seconds: float
) -> None:
    """Print how many rows were read, used and left out; together they are all rows."""
    n_read = preparation["rows_read"]
    left_out = {reason: n for reason, n in preparation["left_out"].items() if n}
    rows = {reason: n for reason, n in left_out.items() if _counts_rows(reason)}
    n_used = _rows_used(preparation["protocol"], splits)
    assert n_read == n_used + sum(rows.values()), (n_read, n_used, left_out)
    print(f"  read {n_read:,} rows in {seconds:.1f} s, used {n_used:,}; left out:")
    for reason, count in rows.items():
        print(f"    {count:,} {reason.replace('_', ' ')}")
    if not rows:
        print("    nothing")
    others = [
        f"{n:,} {reason.replace('_', ' ')}" for reason, n in left_out.items() if reason not in rows
    ]
    if others:
        print(f"  with them {', '.join(others)}")


def _counts_rows(reason: str) -> bool:
    """Return whether a count of what was left out is one of rows, not of users or items."""
    return not reason.startswith(("users_", "items_"))


def _rows_used(protocol: str, splits: dict[str, SplitEntry]) -> int:
    """Return the number of input rows that the shards hold.

    In `given`, `time` and `last` the fold-in of a user repeats its train rows.
    """
    held_out = splits["validation"].heldout + splits["test"].heldout
    if protocol in ("given", *options.BY_TIME):
        return splits["train"].interactions + held_out
    return sum(split.interactions for split in splits.values()) + held_out

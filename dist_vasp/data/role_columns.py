"""Choose the columns of a table by their roles: user, item, rating, time and split.

Histories are read from the columns that the model's shards were made from, from columns with plain
names, or from columns that the user names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dist_vasp.data.positives import PositiveRule

_SHOWN = 20  # names of columns in a line

# Names of columns, in lower case and without `_`, that suggest a role.
_NAMES = {
    "user": ("user", "userid", "uid", "users", "customer", "customerid", "reviewerid"),
    "item": ("item", "itemid", "iid", "items", "movieid", "movie", "productid", "product", "asin"),
    "rating": ("rating", "ratings", "score", "stars", "star", "overall", "rate"),
    "time": ("timestamp", "time", "ts", "date", "datetime"),
    "split": ("split", "fold", "xlabel"),
}


def unused_columns(
    names: Sequence[str], used: Iterable[str], options: Sequence[str], dashes: str = "--"
) -> list[str]:
    """Return a line on the unused columns, if any, with the options that would use them.

    options: roles without a column, for which the caller has an option `ROLE_column`. dashes: how
    options are written, `--` or nothing.
    """
    used = set(used)
    unused = [name for name in dict.fromkeys(names) if name not in used]
    if not unused:
        return []
    hints = []
    for role in options:
        matching = [name for name in unused if role_of(name) == role]
        if matching:
            option = _option(dashes, role, matching[0])
            if role == "split":
                hints.append(f"--protocol given {option} follows it")
            else:
                hints.append(f"{option} reads {role}s from it")
    shown = [name or "(without a name)" for name in unused[:_SHOWN]]
    more = f" and {len(unused) - _SHOWN:,} more" if len(unused) > _SHOWN else ""
    return [f"columns not used: {', '.join(shown)}{more}" + "".join(f"; {hint}" for hint in hints)]


def role_of(name: str) -> str | None:
    """Return the role that a column's name suggests, None for other names."""
    plain = re.sub(r"[\s_.-]", "", name.lower())
    return next((role for role, known in _NAMES.items() if plain in known), None)


@dataclass(frozen=True)
class ServingColumns:
    """Names of a history's columns, and notes for the user on how they were chosen."""

    user: str
    item: str
    rating: str | None
    time: str | None
    notes: tuple[str, ...]


def serving_columns(
    names: Sequence[str],
    rule: PositiveRule | None,
    asked: Mapping[str, str | None],
    where: str,
    all_positive: bool = False,
    dashes: str = "--",
) -> ServingColumns:
    """Choose the columns of a table of histories that a model with this rule reads.

    asked: names that the user gave, by role. all_positive: every row is a like, whatever its
    rating. dashes: how options are written, `--` or nothing. ValueError where a column is missing,
    or an option contradicts the rule.
    """
    notes: list[str] = []
    columns: dict[str, str | None] = {}
    for role, remembered in (
        ("user", rule and rule.user_column),
        ("item", rule and rule.item_column),
    ):
        name, more = _named_or_plain(names, asked.get(role), remembered or role, role, where)
        notes += more
        columns[role] = _only(names, name, role, where, dashes)
    if columns["user"] == columns["item"]:
        raise ValueError(
            f"{where}: column {columns['user']!r} is named as user and as item; name another for "
            "one of them"
        )
    columns["rating"], more = _rating_column(
        names, rule, asked.get("rating"), where, all_positive, dashes
    )
    notes += more
    columns["time"], more = _time_column(
        names, rule, asked.get("time"), where, columns["rating"] is not None, dashes
    )
    notes += more
    wanted = (
        ["rating"]
        if rule and not rule.is_implicit and not all_positive and columns["rating"] is None
        else []
    )
    notes += unused_columns(names, [name for name in columns.values() if name], wanted, dashes)
    return ServingColumns(
        columns["user"] or "",
        columns["item"] or "",
        columns["rating"],
        columns["time"],
        tuple(notes),
    )


def _only(names: Sequence[str], name: str, role: str, where: str, dashes: str) -> str:
    """Return `name` if exactly one column has it; the error names a column of the same role."""
    if list(names).count(name) == 1:
        return name
    problem = "has more than one column" if name in names else "has no column"
    alike = next((other for other in names if other != name and role_of(other) == role), "NAME")
    there = ", ".join(names[:20]) or "none"
    raise ValueError(
        f"{where} {problem} {name!r}; its columns are {there}; pass {_option(dashes, role, alike)}"
    )


def _named_or_plain(
    names: Sequence[str], asked: str | None, remembered: str, plain: str, where: str
) -> tuple[str, list[str]]:
    """Return the name that the user or the rule gives; `plain`, with a note, if only that exists.

    RecBole's files add a type to a name, as in `rating:float`.
    """
    wanted = asked or remembered
    typed = next((name for name in names if name in (f"{wanted}:float", f"{wanted}:token")), wanted)
    name = wanted if wanted in names else typed
    if name in names or asked or plain not in names:
        return name, []
    return plain, [
        f"{where} has no column {wanted}, which the shards were made from; column {plain} is read"
    ]


def _option(dashes: str, role: str, name: str) -> str:
    """Return how an option is written: `--item_column movie`, in Python `item_column='movie'`."""
    return f"{dashes}{role}_column {name}" if dashes else f"{role}_column={name!r}"


def _rating_column(
    names: Sequence[str],
    rule: PositiveRule | None,
    asked: str | None,
    where: str,
    all_positive: bool,
    dashes: str,
) -> tuple[str | None, list[str]]:
    """Return the column of ratings (None: every row is a like), and notes on the choice."""
    option = f"{dashes}rating_column"
    if all_positive:
        if asked:
            raise ValueError(
                f"{option} and {dashes}all_positive contradict each other; leave one of them out"
            )
        return None, [f"{where}: every row is taken as a like ({dashes}all_positive)"]
    if rule is None:
        if asked:
            raise ValueError(
                f"{option} is {asked}, but the model does not know which ratings are likes; leave "
                "it out, or train again"
            )
        return None, [
            (
                "warning: what made a positive in training is not known, every row is taken as a "
                "like; train or export again to keep it"
            )
        ]
    if rule.is_implicit:
        if asked:
            raise ValueError(
                f"{option} is {asked}, but the model was trained on every row, without ratings; "
                "leave it out"
            )
        return None, []
    assert rule.rating_column is not None
    name, notes = _named_or_plain(names, asked, rule.rating_column, "rating", where)
    if name in names or asked:
        return _only(names, name, "rating", where, dashes), notes
    return None, [f"{where} has no column {name}: every row is taken as a like"]


def _time_column(
    names: Sequence[str],
    rule: PositiveRule | None,
    asked: str | None,
    where: str,
    rated: bool,
    dashes: str,
) -> tuple[str | None, list[str]]:
    """Return the column of times and notes; None where the rule is not `last` or there is none."""
    needed = rule is not None and rule.repeats == "last" and rated
    if asked and not needed:
        raise ValueError(
            f"{dashes}time_column is {asked}, but no rating is chosen by its time here; leave it "
            "out"
        )
    remembered = rule.time_column if rule else None
    if not needed or not (asked or remembered):
        return None, []
    name, notes = _named_or_plain(names, asked, remembered or "timestamp", "timestamp", where)
    if name in names or asked:
        return _only(names, name, "time", where, dashes), notes
    return None, [
        (
            f"{where} has no column {name}: of several ratings of a user and an item the last row "
            "counts"
        )
    ]

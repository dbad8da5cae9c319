"""What makes an interaction a positive: one rule for training and for serving.

The rule is chosen by data_tools.shard, stored in the manifest, the checkpoints of a run and the
export, and applied again to the histories that lists are made for.

A pair of a user and an item may have several rows. With E rows and P distinct pairs:

    first   a pair is a positive if any of its ratings is at least min_rating; the first such row
            stays (Liang et al. 2018: filter, then drop duplicates)
    last    the last row of the pair decides: by time where there is one, else by position
    max     the highest rating of the pair decides
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeGuard

import numpy as np

REPEATS = ("first", "last", "max")
DEFAULT_MIN_RATING = 4.0
_SHOWN = 20  # names of columns in a line

# Names of columns, in lower case and without `_`, that suggest a role.
_NAMES = {
    "user": ("user", "userid", "uid", "users", "customer", "customerid", "reviewerid"),
    "item": ("item", "itemid", "iid", "items", "movieid", "movie", "productid", "product", "asin"),
    "rating": ("rating", "ratings", "score", "stars", "star", "overall", "rate"),
    "time": ("timestamp", "time", "ts", "date", "datetime"),
    "split": ("split", "fold", "xlabel"),
}


@dataclass(frozen=True)
class PositiveRule:
    """Which rows of a table are positives, and the names of its columns.

    `rating_column` None is implicit feedback: every row is a positive, and `min_rating` is None.
    `time_column` orders the rows of a pair; None: their position does. `missing` are the texts
    that stood for a missing value.
    """

    user_column: str = "user"
    item_column: str = "item"
    rating_column: str | None = None
    time_column: str | None = None
    min_rating: float | None = None
    repeats: str = "first"
    missing: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if (self.rating_column is None) != (self.min_rating is None):
            raise ValueError("rating_column and min_rating come together, only one is set")
        if self.repeats not in REPEATS:
            raise ValueError(f"repeats is {self.repeats!r}, expected one of {', '.join(REPEATS)}")
        if self.repeats == "max" and self.rating_column is None:
            raise ValueError("repeats is max, which needs ratings, and no rating column was read")

    @property
    def is_implicit(self) -> bool:
        return self.rating_column is None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def same_meaning(self, other: PositiveRule) -> bool:
        """Return whether both call the same rows positives, whatever their columns are named."""
        return (self.min_rating, self.repeats) == (other.min_rating, other.repeats)

    def __str__(self) -> str:
        """Describe the rule in one line."""
        if self.rating_column is None:
            text = "implicit feedback: no rating column was read, every row counts"
            which = "row"
        else:
            text = f"positives: {self.rating_column} of at least {self.min_rating:g}"
            which = "rating"
        if self.repeats == "first":
            return text + (
                "" if self.is_implicit else "; of several such rows of a pair the first counts"
            )
        if self.repeats == "max":
            return text + "; of several ratings of a pair the highest counts"
        by = f"by {self.time_column}" if self.time_column else "in input order"
        return text + f"; of several {which}s of a pair the last {by} counts"


def from_json(raw: Any) -> PositiveRule:
    """Read what `to_json` gave; ValueError where it is not that."""
    if not isinstance(raw, Mapping):
        raise ValueError(f"positives is {raw!r:.100}, expected a table of keys")
    names = (raw.get("user_column"), raw.get("item_column"))
    optional = (raw.get("rating_column"), raw.get("time_column"))
    if not all(isinstance(name, str) for name in names) or not all(
        _text_or_none(name) for name in optional
    ):
        raise ValueError("positives holds a column name that is not text")
    least, missing = raw.get("min_rating"), raw.get("missing")
    if least is not None and not _is_finite(least):
        raise ValueError(f"positives holds min_rating {least!r:.100}, expected a number")
    if missing is not None and not (
        isinstance(missing, list | tuple) and all(isinstance(m, str) for m in missing)
    ):
        raise ValueError("positives holds missing markers that are not texts")
    return PositiveRule(
        *names,  # type: ignore[arg-type]
        *optional,
        None if least is None else float(least),
        raw.get("repeats", "first"),
        None if missing is None else tuple(missing),
    )


def _text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def of_preparation(preparation: Mapping[str, Any]) -> PositiveRule | None:
    """Read the rule out of a manifest's `preparation`; None where it does not say.

    Earlier manifests hold no rule. Their protocol `liang` took a column `rating` where there was
    one, and `given` took every row. ValueError where the rule is malformed.
    """
    if "positives" in preparation:
        return from_json(preparation["positives"])
    if preparation.get("protocol") == "given":
        return PositiveRule()
    arguments = preparation.get("arguments")
    least = arguments.get("min_rating") if isinstance(arguments, Mapping) else None
    if preparation.get("protocol") != "liang" or not _is_finite(least):
        return None
    return PositiveRule(rating_column="rating", min_rating=float(least))


def in_header(header: Mapping[str, Any]) -> PositiveRule | None:
    """Read the rule out of the header of a checkpoint or export; None where an earlier version
    wrote it.

    ValueError where the rule is malformed.
    """
    raw = header.get("positives")
    return None if raw is None else from_json(raw)


def for_header(rule: PositiveRule | None) -> dict[str, Any]:
    """Return the entries of a header that keep the rule; none where it is not known."""
    return {} if rule is None else {"positives": rule.to_json()}


# --- which row of a pair decides ------------------------------------------------------------------


def deciding_rows(
    pairs_E: np.ndarray, repeats: str, priority_E: np.ndarray | None
) -> np.ndarray | None:
    """Return the ascending positions of the row that decides for each distinct pair.

    pairs_E: one number for each pair, in input order. priority_E: the times (`first`, `last`; None:
    position alone) or the ratings (`max`). Ties go to the first row, for `last` to the last one.
    Returns None where every row is a pair of its own, which a plain sort finds out faster.
    """
    in_order = np.sort(pairs_E)
    if (in_order[1:] != in_order[:-1]).all():
        return None
    if priority_E is not None and priority_E.dtype.kind == "f":
        priority_E = np.where(np.isnan(priority_E), -np.inf, priority_E)
    if priority_E is None and repeats == "first":
        return np.sort(np.unique(pairs_E, return_index=True)[1])
    keys = (pairs_E,) if priority_E is None else (priority_E, pairs_E)
    if repeats == "max":  # descending, so that the first of equal ratings comes first
        assert priority_E is not None, "the ratings decide"
        keys = (-priority_E, pairs_E)
    order = np.lexsort(keys)
    ordered = pairs_E[order]
    changes = np.flatnonzero(ordered[1:] != ordered[:-1])
    ends = np.append(changes, len(order) - 1) if repeats == "last" else np.append(0, changes + 1)
    return np.sort(order[ends])


def positive_rows(
    rule: PositiveRule,
    pairs_E: np.ndarray,
    ratings_E: np.ndarray | None,
    times_E: np.ndarray | None,
) -> np.ndarray:
    """Return the ascending positions of one row for each pair that is a positive.

    Without ratings every pair is one. A rating that is NaN is below every minimum.
    """
    if ratings_E is None or rule.min_rating is None:
        rows = deciding_rows(pairs_E, "first" if rule.repeats == "max" else rule.repeats, times_E)
        return np.arange(len(pairs_E)) if rows is None else rows
    liked_E = ratings_E >= rule.min_rating
    if rule.repeats == "first":
        passing = np.flatnonzero(liked_E)
        times = None if times_E is None else times_E[passing]
        rows = deciding_rows(pairs_E[passing], "first", times)
        return passing if rows is None else passing[rows]
    rows = deciding_rows(pairs_E, rule.repeats, times_E if rule.repeats == "last" else ratings_E)
    return np.flatnonzero(liked_E) if rows is None else rows[liked_E[rows]]


# --- which columns are read -----------------------------------------------------------------------


def unused_columns(
    names: Sequence[str], used: Iterable[str], options: Sequence[str], dashes: str = "--"
) -> list[str]:
    """Return a line on the columns that are not used, with the option that would use one of them.

    options: the roles for which the caller has an option `ROLE_column` and reads no column now.
    Empty where every column is used.
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
    """Return the role that the name of a column suggests, None where it suggests none."""
    plain = re.sub(r"[\s_.-]", "", name.lower())
    return next((role for role, known in _NAMES.items() if plain in known), None)


@dataclass(frozen=True)
class ServingColumns:
    """Names of a history's columns; `notes` are lines for the user on what was chosen."""

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

    asked: by role, what the user named. all_positive: every row is a like, whatever its rating.
    dashes: how options are written, `--` or nothing. ValueError where a column is not there, or an
    option does not go with the rule.
    """
    notes: list[str] = []
    columns: dict[str, str | None] = {}
    for role, remembered in (
        ("user", rule and rule.user_column),
        ("item", rule and rule.item_column),
    ):
        name, said = _there(names, asked.get(role), remembered or role, role, where)
        notes += said
        columns[role] = _only(names, name, role, where, dashes)
    if columns["user"] == columns["item"]:
        raise ValueError(
            f"{where}: column {columns['user']!r} is named as user and as item; name another for "
            "one of them"
        )
    columns["rating"], said = _rating_column(
        names, rule, asked.get("rating"), where, all_positive, dashes
    )
    notes += said
    columns["time"], said = _time_column(
        names, rule, asked.get("time"), where, columns["rating"] is not None, dashes
    )
    notes += said
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
    """Return `name`, which must be there once; the error names a column that looks like it."""
    if list(names).count(name) == 1:
        return name
    problem = "has more than one column" if name in names else "has no column"
    alike = next((other for other in names if other != name and role_of(other) == role), "NAME")
    there = ", ".join(names[:20]) or "none"
    raise ValueError(
        f"{where} {problem} {name!r}; its columns are {there}; pass {_option(dashes, role, alike)}"
    )


def _there(
    names: Sequence[str], asked: str | None, remembered: str, plain: str, where: str
) -> tuple[str, list[str]]:
    """Return the name that was asked for or remembered, else `plain` where that is there; and a
    note on the latter.

    RecBole's files add a type to a name, `rating:float`.
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
    """Return how the caller names a column: `--item_column movie`, or `item_column='movie'` in
    Python."""
    return f"{dashes}{role}_column {name}" if dashes else f"{role}_column={name!r}"


def _rating_column(
    names: Sequence[str],
    rule: PositiveRule | None,
    asked: str | None,
    where: str,
    all_positive: bool,
    dashes: str,
) -> tuple[str | None, list[str]]:
    """Choose the column of ratings (None: every row is a like), and say why."""
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
    name, notes = _there(names, asked, rule.rating_column, "rating", where)
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
    """Choose the column of times (None: the order of the rows), which only the rule `last` reads."""
    needed = rule is not None and rule.repeats == "last" and rated
    if asked and not needed:
        raise ValueError(
            f"{dashes}time_column is {asked}, but no rating is chosen by its time here; leave it "
            "out"
        )
    remembered = rule.time_column if rule else None
    if not needed or not (asked or remembered):
        return None, []
    name, notes = _there(names, asked, remembered or "timestamp", "timestamp", where)
    if name in names or asked:
        return _only(names, name, "time", where, dashes), notes
    return None, [
        (
            f"{where} has no column {name}: of several ratings of a user and an item the last row "
            "counts"
        )
    ]

"""The rule that decides which interactions are positives, in training and in serving.

data_tools.shard chooses the rule. It is stored in the manifest, in the checkpoints of a run and in
the export, and is applied to the histories for which lists are made.

A pair of a user and an item may have several rows:

    first   a pair is a positive if any of its ratings is at least min_rating; its first such row
            is kept (Liang et al. 2018: filter, then drop duplicates)
    last    the last row of the pair decides: by time where there is one, else by position
    max     the highest rating of the pair decides

Shapes: E rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeGuard

import numpy as np

REPEATS = ("first", "last", "max")
DEFAULT_MIN_RATING = 4.0


@dataclass(frozen=True)
class PositiveRule:
    """Which rows of a table are positives, and the names of its columns.

    `rating_column` None: implicit feedback, where every row is a positive and `min_rating` is None.
    `time_column` None: the order of the rows counts as their time. `missing`: texts that stand for
    a missing value.
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
    """Return the rule that `to_json` has written; ValueError where it is malformed."""
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
    """Return the rule in a manifest's `preparation`, None where it is unknown.

    Manifests of earlier versions hold no rule: their protocol `liang` used a column `rating` if
    there was one, and `given` used every row. ValueError where the rule is malformed.
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
    """Return the rule in the header of a checkpoint or export; None in headers of earlier versions.

    ValueError where the rule is malformed.
    """
    raw = header.get("positives")
    return None if raw is None else from_json(raw)


def for_header(rule: PositiveRule | None) -> dict[str, Any]:
    """Return the header entries that store the rule; none where it is unknown."""
    return {} if rule is None else {"positives": rule.to_json()}


# --- which row of a pair decides ------------------------------------------------------------------


def deciding_rows(
    pairs_E: np.ndarray, repeats: str, priority_E: np.ndarray | None
) -> np.ndarray | None:
    """Return the ascending positions of the row that decides for each distinct pair.

    pairs_E: one number for each pair, in input order. priority_E: the times (`first`, `last`; None:
    position alone) or the ratings (`max`). Ties go to the first row, for `last` to the last one.
    Return None where every row is a different pair, which a plain sort finds faster.
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

    Without ratings every pair is a positive. A rating that is NaN is below every minimum.
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

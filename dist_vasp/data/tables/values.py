"""Convert and check the values of a column by its role.

Ratings become float64 without gaps, splits and titles strings, and times float64: a number as it
is, a date in microseconds since 1970. Errors name the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dist_vasp.data import ids

_ZONE = r":[0-9]{2}(\.[0-9]+)?(Z|[+-][0-9]{2}(:?[0-9]{2})?)$"  # the end of a time


def convert(role: str, column: pa.Array, numbers: Sequence[int], where: str) -> pa.Array:
    """Return the values of a column with this role.

    ValueError for a value that does not fit names `where` (file and column) and the row; `numbers`
    are the rows' numbers.
    """
    return _CONVERT[role](column, numbers, where)


def _ids(column: pa.Array, numbers: Sequence[int], where: str) -> pa.Array:
    return ids.compact(column)


def _ratings(column: pa.Array, numbers: Sequence[int], where: str) -> pa.Array:
    values = _numbers(column, numbers, where)
    _refuse(
        pc.is_null(values, nan_is_null=True),
        numbers,
        where,
        "the rating is missing; give every row a number, or leave the column out",
    )
    _refuse(pc.is_inf(values), numbers, where, "the rating is not a finite number; correct it")
    return values


def _texts(column: pa.Array, numbers: Sequence[int], where: str) -> pa.Array:
    """Return text, null where it is missing."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (
        ids.is_text(column.type)
        or pa.types.is_integer(column.type)
        or pa.types.is_null(column.type)
    ):
        raise ValueError(
            f"{where} is of type {column.type}, expected text or integers; convert it first"
        )
    return column.cast(pa.string())


def _splits(column: pa.Array, numbers: Sequence[int], where: str) -> pa.Array:
    values = _texts(column, numbers, where)
    missing = pc.or_kleene(pc.is_null(values), pc.equal(values, ""))
    _refuse(missing, numbers, where, "the split is missing; expected train, test or validation")
    return values


def _times(column: pa.Array, numbers: Sequence[int], where: str) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        values = _microseconds(column)
    elif ids.is_text(column.type) and _is_date(column):
        values = _dates(pc.utf8_trim_whitespace(column), where)
    else:
        values = _numbers(column, numbers, where)
    _refuse(
        pc.is_null(values, nan_is_null=True),
        numbers,
        where,
        "the time is missing; give every row one, or do not name the column",
    )
    return values


def _microseconds(column: pa.Array) -> pa.Array:
    """Return microseconds since 1970, float64, of times or texts of times.

    Digits of a text beyond microseconds are dropped.
    """
    if ids.is_text(column.type):
        column = pc.replace_substring_regex(column, r"(\.[0-9]{6})[0-9]+", r"\1")
        column = pc.replace_substring_regex(column, r"\s*(UTC|Z)$", "Z")
    kind = pa.timestamp("us")
    if (
        ids.is_text(column.type)
        and pc.all(pc.match_substring_regex(column, _ZONE), min_count=0).as_py()
    ):
        kind = pa.timestamp("us", "UTC")
    return column.cast(kind, safe=False).cast(pa.int64()).cast(pa.float64(), safe=False)


def _dates(column: pa.Array, where: str) -> pa.Array:
    try:
        return _microseconds(column)
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{where} holds a time that is no date ({str(error).splitlines()[0].rstrip('.')}); "
            "write all as 2026-01-31 12:00:00, all with an offset such as +02:00 or Z, or all as "
            "numbers"
        ) from None


def _is_date(column: pa.Array) -> bool:
    return bool(
        pc.any(
            pc.match_substring_regex(column, r"^\s*[0-9]{4}-[0-9]{2}-[0-9]{2}"), min_count=0
        ).as_py()
    )


_CONVERT = {
    "user": _ids,
    "item": _ids,
    "rating": _ratings,
    "split": _splits,
    "time": _times,
    "title": _texts,
}


def of_memory(column: Any, role: str, where: str) -> pa.Array:
    """Return the float64 values of a rating or time column in memory.

    ValueError names `where` and the row.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return convert(role, column, range(1, len(column) + 1), where)


def _numbers(column: pa.Array, numbers: Sequence[int], where: str) -> pa.Array:
    """Return numbers as float64, null where the text is empty."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not ids.is_text(column.type):
        try:
            return column.cast(pa.float64(), safe=not pa.types.is_integer(column.type))
        except pa.ArrowException:
            raise ValueError(
                f"{where} of type {column.type} holds no numbers; convert it first"
            ) from None
    try:
        return column.cast(pa.float64())
    except pa.ArrowInvalid:
        pass
    column = pc.utf8_trim_whitespace(column)
    column = pc.if_else(pc.equal(column, ""), pa.scalar(None, column.type), column)
    try:
        return column.cast(pa.float64())
    except pa.ArrowInvalid:
        at, text = next(
            (i, t) for i, t in enumerate(column.to_pylist()) if t is not None and not _is_number(t)
        )
        raise ValueError(
            f"{where}, row {numbers[at]}: {text[:80]!r} is not a number; correct it"
        ) from None


def _is_number(text: str) -> bool:
    try:
        pa.scalar(text).cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return True


def _refuse(bad: pa.Array, numbers: Sequence[int], where: str, problem: str) -> None:
    if pc.any(bad, min_count=0).as_py():
        raise ValueError(
            f"{where.rsplit(': column ', 1)[0]}, row {numbers[pc.index(bad, True).as_py()]}: "
            f"{problem}"
        )

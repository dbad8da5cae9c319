"""Ids, for every command and for Python: non-negative 64-bit integers, or text kept byte for byte.

A column is numeric only when the text of every id is the canonical decimal form of an integer in
[0, 2^63): no sign, leading zero, blank or exponent. Then int64 represents the text exactly.
Otherwise all ids are strings, sorted by their UTF-8 bytes. So 17 in a Parquet file and the text 17
in a CSV are the same id; 017, ` 17` and 17.0 are other ids.

Shapes: E ids of a batch, I ids of a vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MISSING = ("NULL", "\\N", "nan", "None", "NA")  # besides the empty text, null and NaN
MAX_BYTES = 4096  # of one id
_LARGEST = 2**63 - 1
_INTEGER = re.compile("0|-?[1-9][0-9]{0,18}")
_CANONICAL = "^(0|[1-9][0-9]{0,18})$"
_LIKE_MISSING = r"^(null|nil|none|nan|nat|na|n/a|#n/a|<na>|\\n|undefined|missing|-|\?)$"
# by width of the float: larger whole numbers may be rounded
_WHOLE_LIMIT = {16: 2.0**11, 32: 2.0**24, 64: 2.0**53}


def is_text(kind: pa.DataType) -> bool:
    return (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def as_text(ids: pa.Array) -> pa.Array:
    """Return the ids as strings."""
    return ids.cast(pa.string())


def compact(ids: pa.Array) -> pa.Array:
    """Return the ids as int64 if all strings are canonical integers, else unchanged.

    No id may be null.
    """
    if not len(ids):
        return pa.array([], pa.int64())
    if not is_text(ids.type):
        return ids
    ids = as_text(ids)
    _, offset_buffer, data = ids.buffers()
    offsets = np.frombuffer(offset_buffer, np.int32)[ids.offset : ids.offset + len(ids) + 1]
    lengths = np.diff(offsets)
    if lengths.min() < 1 or lengths.max() > 19:
        return ids
    letters = np.frombuffer(data, np.uint8)
    if ((letters[offsets[:-1]] == ord("0")) & (lengths > 1)).any():
        return ids
    # unsigned: characters below "0" wrap around
    if (letters[offsets[0] : offsets[-1]] - ord("0") > 9).any():
        return ids
    try:
        return ids.cast(pa.int64())
    except pa.ArrowInvalid:  # 19 digits beyond 2^63-1
        return ids


def same_type(one: pa.Array, other: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Return both as int64 if both are, else both as strings."""
    return (one, other) if one.type == other.type else (as_text(one), as_text(other))


def join(arrays: Sequence[pa.Array]) -> pa.Array:
    """Return all ids in one array, as strings unless all are int64."""
    kinds = {a.type for a in arrays if len(a)}
    kind = kinds.pop() if len(kinds) == 1 else pa.string() if kinds else pa.int64()
    return pa.concat_arrays([pa.array([], kind), *(a.cast(kind) for a in arrays if len(a))])


def find(ids: pa.Array, vocabulary: pa.Array) -> np.ndarray:
    """Return the positions of `ids` in `vocabulary` (I,), (E,) int32, -1 for unknown ids.

    Ids are equal when their texts are equal.
    """
    if pa.types.is_integer(vocabulary.type):
        wanted = _numbers(ids)
        positions = pc.index_in(wanted, value_set=vocabulary.cast(pa.int64()))
    else:
        positions = pc.index_in(as_text(ids), value_set=as_text(vocabulary))
    return np.asarray(pc.fill_null(positions, -1)).astype(np.int32)


def _numbers(ids: pa.Array) -> pa.Array:
    """Return the ids as (E,) int64, null for an id that is not a canonical integer."""
    if is_text(ids.type):
        canonical = pc.match_substring_regex(ids, _CANONICAL)
        small = pc.or_(
            pc.less(pc.binary_length(ids), 19),
            pc.less_equal(ids, pa.scalar(str(_LARGEST), ids.type)),
        )
        return pc.if_else(pc.and_(canonical, small), ids, pa.scalar(None, ids.type)).cast(
            pa.int64()
        )
    if pa.types.is_uint64(ids.type):
        return pc.if_else(pc.less_equal(ids, pa.scalar(_LARGEST, pa.uint64())), ids, None).cast(
            pa.int64()
        )
    return ids.cast(pa.int64())


class IdIndex:
    """Assigns codes to ids in order of first appearance, a batch at a time."""

    def __init__(self) -> None:
        self.ids: pa.Array | None = None

    def encode(self, ids: pa.Array) -> pa.Array:
        """Return the codes of `ids`, (E,) uint32."""
        if self.ids is None:
            self.ids = ids.slice(0, 0)
        if len(ids):
            self.ids, ids = (
                (self.ids.cast(ids.type), ids) if not len(self.ids) else same_type(self.ids, ids)
            )
        codes = pc.index_in(ids, value_set=self.ids)
        if codes.null_count:
            self.ids = pa.concat_arrays([self.ids, pc.unique(ids.filter(pc.is_null(codes)))])
            codes = pc.index_in(ids, value_set=self.ids)
        return codes.cast(pa.uint32())


def remarks(role: str, ids: pa.Array, column: str) -> list[str]:
    """Return lines for the user on ids that look like mistakes; they are kept unchanged."""
    if not is_text(ids.type):
        return []
    lines = []
    heading = next(
        (name for name in (column, role) if pc.index(ids, pa.scalar(name, ids.type)).as_py() >= 0),
        None,
    )
    if heading is not None:
        lines.append(
            f"the {role} id {heading!r:.60} is the name of a column; is a row of the input a "
            "header?"
        )
    for pattern, problem in (
        (r"^\s|\s$", "begin or end with blanks, which belong to the id"),
        (_LIKE_MISSING, "look like a missing one; --missing leaves them out"),
    ):
        matches = pc.match_substring_regex(ids, pattern, ignore_case=True)
        n_matches = pc.sum(matches).as_py() or 0
        if n_matches:
            example = ids[pc.index(matches, True).as_py()].as_py()
            lines.append(f"{n_matches:,} {role} ids, such as {example!r:.60}, {problem}")
    return lines


# --- ids of a column ------------------------------------------------------------------------------


def of_column(
    values: Any, numbers: Sequence[int], where: str, missing: Sequence[str] = MISSING
) -> pa.Array:
    """Return the ids of an Arrow column, (E,) int64 or string, null for missing ones.

    Integers must be in [0, 2^63). Floats must be whole numbers that a float represents exactly.
    Text must be UTF-8 of at most 4,096 bytes. The ValueError names `where` (file and column) and
    the row; `numbers` are the rows' numbers.
    """
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if pa.types.is_dictionary(values.type):
        return of_column(
            values.dictionary, _FirstUses(values.indices, numbers), where, missing
        ).take(values.indices)
    if pa.types.is_string_view(values.type):  # of polars; few functions of Arrow take it
        values = values.cast(pa.large_string())
    kind = values.type
    if pa.types.is_null(kind):
        return values.cast(pa.string())
    if pa.types.is_integer(kind):
        return _of_integers(_without(values, missing), numbers, where)
    if pa.types.is_floating(kind):
        return _of_floats(_without(values, missing), numbers, where)
    if is_text(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return _of_text(values, numbers, where, missing)
    raise ValueError(
        f"{where} is of type {kind}, expected integers, whole numbers or text; convert it first"
    )


class _FirstUses(Sequence[int]):
    """For each entry of a dictionary, the number of the first row that has it."""

    def __init__(self, indices: pa.Array, numbers: Sequence[int]) -> None:
        self._indices = indices
        self._numbers = numbers

    def __getitem__(self, entry: Any) -> Any:
        return self._numbers[
            max(0, pc.index(self._indices, pa.scalar(entry, self._indices.type)).as_py())
        ]

    def __len__(self) -> int:
        return len(self._numbers)


def _without(values: pa.Array, missing: Sequence[str]) -> pa.Array:
    """Return the values, null where one equals a number among the missing texts, such as -1."""
    markers = [
        float(text) if pa.types.is_floating(values.type) else int(text)
        for text in missing
        if _INTEGER.fullmatch(text)
    ]
    for marker in markers:
        try:
            equal = pc.equal(values, pa.scalar(marker, values.type))
        except (pa.ArrowInvalid, OverflowError):  # no value of this type can equal it
            continue
        values = pc.if_else(equal, pa.scalar(None, values.type), values)
    return values


def _of_integers(values: pa.Array, numbers: Sequence[int], where: str) -> pa.Array:
    limit = pa.scalar(_LARGEST, pa.uint64())
    outside = pc.greater(values, limit) if pa.types.is_uint64(values.type) else pc.less(values, 0)
    _refuse(
        outside,
        values,
        numbers,
        where,
        "is outside 0 to 2^63-1; make the ids non-negative, or write the column as text",
    )
    return values.cast(pa.int64())


def _of_floats(values: pa.Array, numbers: Sequence[int], where: str) -> pa.Array:
    limit = _WHOLE_LIMIT[values.type.bit_width]
    values = values.cast(pa.float64())
    values = pc.if_else(pc.is_nan(values), pa.scalar(None, pa.float64()), values)
    whole = pc.and_(
        pc.equal(values, pc.floor(values)),
        pc.and_(pc.greater_equal(values, 0.0), pc.less(values, limit)),
    )
    problem = (
        f"is not a whole number from 0 to 2^{int(np.log2(limit))}-1, which a column of floats may "
        "hold; write it as text"
    )
    _refuse(pc.invert(whole), values, numbers, where, problem)
    return values.cast(pa.int64())


def _of_text(
    values: pa.Array, numbers: Sequence[int], where: str, missing: Sequence[str]
) -> pa.Array:
    long = pc.greater(pc.binary_length(values), MAX_BYTES)
    if pc.any(long, min_count=0).as_py():
        at = pc.index(long, True).as_py()
        raise ValueError(
            f"{where}, row {numbers[at]}: the id has more than {MAX_BYTES:,} bytes; expected an "
            "id, not a text"
        )
    try:
        values = values.cast(pa.string())
        values.validate(full=True)
    except pa.ArrowInvalid:
        at = next(
            i
            for i, one in enumerate(values.cast(pa.binary()).to_pylist())
            if one is not None and not _is_utf8(one)
        )
        raise ValueError(
            f"{where}, row {numbers[at]}: the id is not UTF-8 text; write the column as UTF-8 "
            "strings"
        ) from None
    absent = pc.is_in(values, value_set=pa.array(["", *missing], pa.string()))
    return (
        pc.if_else(absent, pa.scalar(None, pa.string()), values)
        if pc.any(absent, min_count=0).as_py()
        else values
    )


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _refuse(
    bad: pa.Array, values: pa.Array, numbers: Sequence[int], where: str, problem: str
) -> None:
    if pc.any(bad, min_count=0).as_py():
        at = pc.index(bad, True).as_py()
        raise ValueError(f"{where}, row {numbers[at]}: the id {values[at].as_py()} {problem}")

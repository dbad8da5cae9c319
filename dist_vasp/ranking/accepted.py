"""Recognise what Python callers pass as ids and as histories; the error says what to pass instead.

Data frames are recognised by the Arrow C interface and by the module of their class, so that their
libraries are not imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dist_vasp.data.ids import find, of_column
from dist_vasp.text import one_line

EXPECTED = (
    "expected one of: lists of ids, a SciPy sparse matrix, or a table with the Arrow C interface "
    "(pandas, polars, pyarrow, DuckDB)"
)
_FRAMES = (
    "pandas",
    "polars",
    "modin",
    "cudf",
    "dask",
    "vaex",
    "pyspark",
    "duckdb",
    "_duckdb",
    "ibis",
    "datatable",
    "narwhals",
    "pyarrow",
)
_CONVERSIONS = {
    "polars.LazyFrame": "frame.collect()",
    "dask.DataFrame": "frame.compute()",
    "pyspark.DataFrame": "frame.toArrow()",
}
_INTERFACE = ("__arrow_c_stream__", "__arrow_c_array__")


def as_table(histories: Any) -> pa.Table | None:
    """Return a data frame or table as an Arrow table; None for an object that is neither.

    ValueError for a frame that Arrow cannot read, by the name of its class.
    """
    if isinstance(histories, pa.Table):
        return histories
    if _is_column(histories):
        return None
    if not any(getattr(histories, name, None) for name in _INTERFACE):
        _refuse_frame(histories, "histories are")
        return None
    try:
        return pa.table(histories)
    except (ValueError, TypeError, NotImplementedError, pa.ArrowException) as error:
        raise ValueError(
            f"histories are a {_name(histories)} that Arrow cannot read "
            f"({one_line(str(error))}); give every column a name of its own and values of one type"
        ) from None


def refuse_frame(value: Any, what: str) -> None:
    """Raise ValueError where `value`, a list of ids, is a data frame or table.

    Iterating over most of them gives column names, which would be mistaken for ids.
    """
    if not _is_column(value) and (_is_frame(value) or hasattr(value, _INTERFACE[0])):
        raise ValueError(
            f"{what} is a {_name(value)}, expected a list of ids; pass one column, such as "
            "frame['item']"
        )


def _refuse_frame(value: Any, what: str) -> None:
    """Raise ValueError where `value` is a frame without the Arrow C interface."""
    if _is_frame(value):
        conversion = _CONVERSIONS.get(_name(value), "a pyarrow.Table made from it")
        raise ValueError(f"{what} a {_name(value)}, {EXPECTED}; pass {conversion}")


def _is_column(value: Any) -> bool:
    """Return whether a value is one column or array, which is a list of ids."""
    if isinstance(value, pa.Array | pa.ChunkedArray | np.ndarray):
        return True
    return type(value).__name__ in ("Series", "Index") or getattr(value, "ndim", None) == 1


def _is_frame(value: Any) -> bool:
    roots = {kind.__module__.split(".")[0] for kind in type(value).__mro__}
    return not roots.isdisjoint(_FRAMES) or hasattr(value, "__dataframe__")


def _name(value: Any) -> str:
    """Return the name of a value's class with its package, such as `polars.LazyFrame`."""
    kind = type(value)
    root = kind.__module__.split(".")[0]
    return kind.__name__ if root == "builtins" else f"{root.lstrip('_')}.{kind.__name__}"


def id_list(ids: Any, what: str, remedy: str = "pass [id] for one") -> list[Any]:
    """Return the ids as a list; ValueError where `ids` is not a list of ids."""
    refuse_frame(ids, what)
    if (
        isinstance(ids, str | bytes | dict)
        or not isinstance(ids, Iterable)
        or getattr(ids, "ndim", 1) != 1
    ):
        raise ValueError(f"{what} is {ids!r:.50}, expected a list of ids; {remedy}")
    return ids.to_pylist() if isinstance(ids, pa.Array | pa.ChunkedArray) else list(ids)


def history_lists(histories: Any, n_items: int) -> list[list[Any]]:
    """Return the histories as lists of ids; ValueError for other objects."""
    if isinstance(histories, str | bytes | dict) or not isinstance(histories, Iterable):
        raise ValueError(f"histories are of type {_name(histories)}, {EXPECTED}")
    if isinstance(histories, np.ndarray) and histories.ndim == 2 and histories.shape[1] == n_items:
        raise ValueError(
            f"histories are an array of shape {histories.shape}, as wide as the catalogue: "
            "ids, or one column for each item? pass histories.tolist() for ids, "
            "scipy.sparse.csr_matrix(histories) for columns"
        )
    if isinstance(histories, pa.Array | pa.ChunkedArray):
        histories = histories.to_pylist()
    return [
        id_list(history, f"history {u}", "pass [history] for one user")
        for u, history in enumerate(histories)
    ]


def find_ids(ids: Sequence[Any], vocabulary: pa.Array, what: str) -> np.ndarray:
    """Return the positions of ids in `vocabulary`, -1 where unknown; ValueError unless they are all
    whole numbers or all strings."""
    if len(ids) == 0:
        return np.empty(0, np.int32)
    try:
        array = pa.array(ids, from_pandas=False)
    except (pa.ArrowException, TypeError, OverflowError):
        array = pa.nulls(1)
    if pa.types.is_floating(array.type):
        # 17.0 is 17, 17.5 is no id
        array = of_column(array, range(1, len(array) + 1), what, ())
    if array.null_count or not (pa.types.is_integer(array.type) or pa.types.is_string(array.type)):
        raise ValueError(
            f"{what} must hold original ids, all whole numbers or all strings; some are of "
            "another kind"
        )
    return find(array, vocabulary)

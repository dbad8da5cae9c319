"""Check what Python callers pass as ids and as histories; the error says what to pass instead.

Data frames are recognised by the module of their class, so that their libraries are not imported.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

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
)
_CONVERSIONS = {"pandas": "pyarrow.Table.from_pandas(frame)", "polars": "frame.to_arrow()"}


def refuse_frame(value: Any, what: str) -> None:
    """Raise ValueError where `value` is a data frame or table.

    Iterating over most of them gives column names, which would be mistaken for ids.
    """
    if isinstance(value, pa.Array | pa.ChunkedArray | np.ndarray):
        return
    kind = type(value)
    root = next(
        (r for r in (c.__module__.split(".")[0] for c in kind.__mro__) if r in _FRAMES), None
    )
    is_series = kind.__name__ in ("Series", "Index") or getattr(value, "ndim", None) == 1
    if root is not None and not is_series:
        conversion = _CONVERSIONS.get(root, "a pyarrow.Table made from it")
        if kind.__name__ == "LazyFrame":
            conversion = "frame.collect().to_arrow()"
        raise ValueError(
            f"{what} is a {root}.{kind.__name__}, which is not read; pass {conversion}"
        )
    package = kind.__module__.split(".")[0]
    is_table = package == "pyarrow" or any(
        hasattr(value, name) for name in ("__dataframe__", "__arrow_c_stream__")
    )
    if is_table and not is_series:
        raise ValueError(
            f"{what} is a {package}.{kind.__name__}, which is not read; pass lists of ids, or "
            "histories as a pyarrow.Table"
        )


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
    refuse_frame(histories, "the argument histories")
    if isinstance(histories, str | bytes | dict) or not isinstance(histories, Iterable):
        raise ValueError(
            f"histories are {type(histories).__name__}, expected a list of lists of ids, a sparse "
            "matrix or a pyarrow.Table"
        )
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

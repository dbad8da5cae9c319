"""What Python callers may pass as ids and as histories; other objects are refused by name, with the
way out.

Frames are recognised by where their classes come from, so that no library of theirs is imported.
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
_WAYS_OUT = {"pandas": "pyarrow.Table.from_pandas(frame)", "polars": "frame.to_arrow()"}


def refuse_frame(value: Any, what: str) -> None:
    """Raise ValueError where `value` is a frame, or another table than a pyarrow.Table.

    Iterating over most of them gives the names of columns, which would pass for ids.
    """
    if isinstance(value, pa.Array | pa.ChunkedArray | np.ndarray):
        return
    kind = type(value)
    root = next(
        (r for r in (c.__module__.split(".")[0] for c in kind.__mro__) if r in _FRAMES), None
    )
    is_series = kind.__name__ in ("Series", "Index") or getattr(value, "ndim", None) == 1
    if root is not None and not is_series:
        way_out = _WAYS_OUT.get(root, "a pyarrow.Table made from it")
        if kind.__name__ == "LazyFrame":
            way_out = "frame.collect().to_arrow()"
        raise ValueError(f"{what} is a {root}.{kind.__name__}, which is not read; pass {way_out}")
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
    """Return the ids as a list; ValueError where they are no list of ids."""
    refuse_frame(ids, what)
    if (
        isinstance(ids, str | bytes | dict)
        or not isinstance(ids, Iterable)
        or getattr(ids, "ndim", 1) != 1
    ):
        raise ValueError(f"{what} is {ids!r:.50}, expected a list of ids; {remedy}")
    return ids.to_pylist() if isinstance(ids, pa.Array | pa.ChunkedArray) else list(ids)


def history_lists(histories: Any, n_items: int) -> list[list[Any]]:
    """Return lists of ids; ValueError where `histories` are something else."""
    refuse_frame(histories, "the argument histories")
    if isinstance(histories, str | bytes | dict) or not isinstance(histories, Iterable):
        raise ValueError(
            f"histories are {type(histories).__name__}, expected a list of lists of ids, a sparse "
            "matrix or a pyarrow.Table"
        )
    if isinstance(histories, np.ndarray) and histories.ndim == 2 and histories.shape[1] == n_items:
        raise ValueError(
            f"histories are an array of shape {histories.shape}, as wide as the catalogue: ids, "
            "or one column for each item? "
            "pass histories.tolist() for ids, scipy.sparse.csr_matrix(histories) for columns"
        )
    if isinstance(histories, pa.Array | pa.ChunkedArray):
        histories = histories.to_pylist()
    return [
        id_list(history, f"history {u}", "pass [history] for one user")
        for u, history in enumerate(histories)
    ]

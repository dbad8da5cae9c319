"""Top-N lists with original ids: histories in, user, rank, item, score out.

Items that are not in the vocabulary are ignored and counted; a user without a known item is listed in
`<output stem>.skipped.csv` with the reason, never dropped silently.

Shapes: U users, E interactions.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from dist_vasp.data.format import ItemTable
from dist_vasp.data.stream import Rows, indptr_of
from dist_vasp.parallel.comm import Ranks, agree
from dist_vasp.ranking.evaluate import USERS_PER_BLOCK, Scorer, top_items

_COLUMNS = ("user", "item")
_WRITERS = {".csv": pa_csv.CSVWriter, ".parquet": pq.ParquetWriter}


@dataclass(frozen=True)
class Histories:
    """The users with a known item, in order of first appearance, and what was left out."""

    users: pa.Array  # (U,) original ids
    rows: Rows  # (U,) their item rows, ascending, without repeats
    skipped: pa.Array  # users without a known item
    n_unknown: int  # interactions with an item outside the vocabulary

    @property
    def n_users(self) -> int:
        return len(self.users)


def check_output(output: str | Path, overwrite: bool) -> None:
    """ValueError unless `output` has a known ending, a folder to lie in, and does not exist yet."""
    path = Path(output)
    if path.suffix not in _WRITERS:
        raise ValueError(f"--output {output} ends in {path.suffix or 'nothing'}, expected one of {', '.join(_WRITERS)}")
    if not path.parent.is_dir():
        raise ValueError(f"--output {output}: the folder {path.parent} does not exist; create it first")
    if path.exists() and not overwrite:
        raise ValueError(f"--output {output} exists; pass --overwrite to replace it, or choose another name")


def skipped_file(output: str | Path) -> Path:
    path = Path(output)
    return path.with_name(f"{path.stem}.skipped.csv")


def read_histories(path: str | Path, items: ItemTable) -> Histories:
    """Read a CSV(.gz) or Parquet file with columns user and item; ValueError if it cannot be used."""
    table = _read_table(Path(path))
    columns = {name: _ids(table.column(name), f"{path}: column {name}") for name in _COLUMNS}
    # ids compare as text, so that 17 in a CSV is 17 in a Parquet column of integers
    known = pc.index_in(columns["item"].cast(pa.string()), value_set=items.ids.cast(pa.string()))
    item_rows = np.asarray(pc.fill_null(known, -1)).astype(np.int32)
    encoded = columns["user"].dictionary_encode()
    users, user_of = encoded.dictionary, np.asarray(encoded.indices).astype(np.int64)

    listed = item_rows >= 0
    pairs = np.unique(user_of[listed] * len(items.keys) + item_rows[listed])
    owner, rows = np.divmod(pairs, len(items.keys))
    lengths = np.bincount(owner, minlength=len(users))
    found = lengths > 0
    return Histories(
        users=users.filter(pa.array(found)),
        rows=Rows(indptr_of(lengths[found]), rows.astype(np.int32)),
        skipped=users.filter(pa.array(~found)),
        n_unknown=int((~listed).sum()),
    )


def _read_table(path: Path) -> pa.Table:
    try:
        if path.suffix == ".parquet":
            names = pq.read_schema(path).names
        elif path.name.endswith((".csv", ".csv.gz")):
            with pa_csv.open_csv(path) as reader:
                names = reader.schema.names
        else:
            raise ValueError(f"--histories {path} ends in {path.suffix or 'nothing'}, expected .csv, .csv.gz or .parquet")
        missing = [name for name in _COLUMNS if name not in names]
        if missing:
            raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(names)}; expected user and item")
        if path.suffix == ".parquet":
            return pq.read_table(path, columns=list(_COLUMNS))
        # as text: a type guessed from the first rows would change ids such as 007, and only an empty cell is no id
        options = pa_csv.ConvertOptions(
            include_columns=list(_COLUMNS),
            column_types=dict.fromkeys(_COLUMNS, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
        )
        table = pa_csv.read_csv(path, convert_options=options)
        return table.set_column(table.column_names.index("user"), "user", _as_numbers(table.column("user")))
    except FileNotFoundError:
        raise ValueError(f"--histories {path} does not exist") from None
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read ({error}); expected a CSV or Parquet file with columns user and item") from None


def _as_numbers(ids: pa.ChunkedArray) -> pa.ChunkedArray:
    """The ids as int64 if that loses nothing of any of them."""
    try:
        numbers = ids.cast(pa.int64())
    except pa.ArrowInvalid:
        return ids
    return numbers if numbers.cast(pa.string()).equals(ids) else ids


def _ids(column: pa.ChunkedArray, where: str) -> pa.Array:
    """One array of numbers or text; ValueError names `where` if there is another type or an empty cell."""
    ids = column.combine_chunks()
    if pa.types.is_dictionary(ids.type):
        ids = ids.dictionary_decode()
    if ids.null_count:
        row = int(np.flatnonzero(np.asarray(ids.is_null()))[0])
        raise ValueError(f"{where} is empty in row {row + 1}; every row needs a user and an item")
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_string, pa.types.is_large_string)
    if not any(is_kind(ids.type) for is_kind in kinds):
        raise ValueError(f"{where} holds {ids.type}, expected whole numbers or text; convert it first")
    return ids


def recommend_to_file(
    scorer: Scorer,
    histories: Histories,
    items: ItemTable,
    k: int,
    output: str | Path,
    ranks: Ranks,
    progress: Callable[[int], None] | None = None,
    show: int = 0,
    to_score: Callable[[np.ndarray], np.ndarray] = np.exp,
) -> str:
    """Write each user's k best unseen items block by block; returns one line that says what was written and left out.

    With `show` the histories and lists of that many first users stand before it.

    `score` is `to_score` of what the scorer ranks by: p of the log p of VASP, FLVAE and NEASE; for EASE x B itself, which is no
    probability (launch/recommend.py). Fewer than k rows where fewer unseen items exist. The file appears when complete.
    """
    output = Path(output)
    temporary = output.with_name(f".{output.name}.tmp")
    schema = pa.schema([("user", histories.users.type), ("rank", pa.int32()), ("item", items.ids.type), ("score", pa.float32())])
    writer: Any = None
    n_rows, error = 0, None
    examples: list[str] = []
    try:
        if ranks.is_main:
            writer = _WRITERS[output.suffix](str(temporary), schema)
    except OSError as raised:
        error = ValueError(f"{temporary} cannot be written ({raised}); choose another --output")
    agree(error, ranks)
    try:
        for start in range(0, histories.n_users, USERS_PER_BLOCK):
            stop = min(start + USERS_PER_BLOCK, histories.n_users)
            scores, ids = top_items(scorer, histories.rows.slice(start, stop), k, len(items.keys), ranks)
            for u in range(start, min(stop, show)):
                examples.append(_example(histories, u, to_score(scores[u - start]), ids[u - start], items))
            if writer is not None:
                table = _lists(histories.users.slice(start, stop - start), to_score(scores), ids, items, schema)
                writer.write_table(table)
                n_rows += table.num_rows
            if progress:
                progress(stop)
        if writer is not None:
            writer.close()
            os.replace(temporary, output)
            _write_skipped(histories, output)
    finally:
        if ranks.is_main:
            temporary.unlink(missing_ok=True)
    left_out = f"; {histories.n_unknown:,} interactions with unknown items ignored" if histories.n_unknown else ""
    if len(histories.skipped):
        left_out += f"; {len(histories.skipped):,} users without a known item listed in {skipped_file(output)}"
    examples.append("")
    return "\n".join(examples) + f"{output}: {n_rows:,} recommendations for {histories.n_users:,} users{left_out}"


def _lists(users: pa.Array, scores: np.ndarray, ids: np.ndarray, items: ItemTable, schema: pa.Schema) -> pa.Table:
    user, rank = np.nonzero(ids >= 0)
    columns = [
        users.take(pa.array(user)),
        pa.array(rank + 1, pa.int32()),
        items.ids.take(pa.array(ids[user, rank])),
        pa.array(scores[user, rank].astype(np.float32)),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _example(histories: Histories, user: int, scores: np.ndarray, ids: np.ndarray, items: ItemTable, most: int = 10) -> str:
    """A user's history (popular items first) and list, by title where there are titles."""
    names = items.titles if items.titles is not None else items.ids
    first, last = histories.rows.indptr[user], histories.rows.indptr[user + 1]
    seen = [str(names[int(i)]) for i in histories.rows.items[first : min(last, first + most)]]
    more = f" and {last - first - most} more" if last - first > most else ""
    listed = [f"{names[int(i)]} ({s:.3f})" for s, i in zip(scores, ids, strict=True) if i >= 0]
    return f"user {histories.users[user]}\n  history  {', '.join(seen)}{more}\n  list     {', '.join(listed)}"


def _write_skipped(histories: Histories, output: Path) -> None:
    """The skipped file belongs to this output: one that an earlier run left is removed if nobody is skipped now."""
    path = skipped_file(output)
    if not len(histories.skipped):
        path.unlink(missing_ok=True)
        return
    reasons = pa.array(["no item of the history is in the vocabulary"] * len(histories.skipped))
    pa_csv.write_csv(pa.table({"user": histories.skipped, "reason": reasons}), path)

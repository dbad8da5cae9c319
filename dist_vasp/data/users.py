"""Read the users of a split of a data folder, `users-SPLIT.parquet`."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dist_vasp.data.manifest import MANIFEST, Manifest, users_file


def read_users(folder: str | Path, split: str, manifest: Manifest) -> tuple[np.ndarray, pa.Array]:
    """Return the keys (uint64) and original ids of the users of a split.

    ValueError unless the file is the one that the manifest lists.
    """
    name = users_file(split)
    path = Path(folder) / name
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != manifest.files.get(name):
            raise ValueError(
                f"{path} is not the file that {MANIFEST} lists; restore it or shard the data again"
            )
        table = pq.read_table(pa.BufferReader(data), columns=["key", "id"])
        keys = np.asarray(table.column("key")).astype(np.uint64)
        return keys, table.column("id").combine_chunks()
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ValueError(
            f"{path} cannot be read as the list of users ({error}); shard the data again"
        ) from None

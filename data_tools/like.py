"""`--like OLD_SHARDS`: the users of an earlier data folder keep their split.

Shapes: U users of the input, O users of the earlier folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dist_vasp.data.manifest import SPLITS, Manifest
from dist_vasp.data.users import read_users

_PROTOCOLS = ("liang", "hashed")  # each of their users is in one split


@dataclass(frozen=True)
class OldSplit:
    """The split of every user of an earlier data folder, and the fractions for new users."""

    folder: Path
    data_sha256: str
    val_fraction: float
    test_fraction: float
    _ids: pa.Array  # (O,) string
    _codes: np.ndarray  # (O,) int8, places in SPLITS

    def keep(self, ids: pa.Array, codes: np.ndarray) -> np.ndarray:
        """Return `codes` (U,), in which the known of the users `ids` (U,) have their earlier split;
        ids are compared as text. ValueError where no user is known."""
        places = self._places(ids)
        known = places >= 0
        if not known.any():
            raise ValueError(
                f"--like {self.folder}: none of the {len(ids)} users is there; are the ids of one "
                "kind?"
            )
        kept = codes.copy()
        kept[known] = self._codes[places[known]]
        return kept

    def n_known(self, ids: pa.Array) -> int:
        """Return how many of the users `ids` have an earlier split."""
        return int((self._places(ids) >= 0).sum())

    def _places(self, ids: pa.Array) -> np.ndarray:
        found = pc.index_in(ids.cast(pa.string()), value_set=self._ids)
        return np.asarray(pc.fill_null(found, -1)).astype(np.int64)


def read_old_split(folder: Path) -> OldSplit:
    """Read the users of a data folder.

    The fractions are those of its preparation if it names them, else the shares of its users.
    ValueError where it is damaged, or of a protocol in which every user trains.
    """
    manifest = Manifest.load(folder)
    protocol = manifest.preparation.get("protocol")
    if protocol not in _PROTOCOLS:
        raise ValueError(
            f"--like {folder} is of protocol {protocol}, in which held-out users train, too; "
            f"expected shards of {' or '.join(_PROTOCOLS)}; leave it out"
        )
    ids, codes = [], []
    for code, split in enumerate(SPLITS):
        _, of_split = read_users(folder, split, manifest)
        ids.append(of_split.cast(pa.string()))
        codes.append(np.full(len(of_split), code, np.int8))
    n_users = [len(part) for part in codes]
    named = manifest.preparation.get("arguments")
    named = named if isinstance(named, dict) else {}

    def fraction(name: str, code: int) -> float:
        value = named.get(name)
        if isinstance(value, int | float) and 0 <= value < 1:
            return float(value)
        return n_users[code] / max(sum(n_users), 1)

    return OldSplit(
        folder,
        manifest.data_sha256,
        fraction("val_fraction", 1),
        fraction("test_fraction", 2),
        pa.concat_arrays(ids),
        np.concatenate(codes),
    )

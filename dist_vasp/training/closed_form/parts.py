"""The parts of a long closed form on a support, on disk: a killed run resumes after the last one.

    RUN_DIR/closed-form-parts/inputs-LO-HI.safetensors    the inputs of the items [LO, HI)
                              weights-LO-HI.safetensors   the weights of items of [LO, HI)

A part is a safetensors file of `items` (n,), int32 and ascending, and `rows` (n, K), the row of
each of them. Its metadata has `made_for`, the data and the keys that the rows depend on, as JSON;
`seconds`, what they took; and `sha256`, the hash of all of these. A part that is damaged, or made
for anything else, is ignored, and its items are computed again.

Shapes: J items of this rank, n items of a part, K neighbours.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from dist_vasp.files import remove_leftovers, replacing
from dist_vasp.model.slices import ItemSlice
from dist_vasp.tensor_file import TensorFile, check_dtype, write_tensors

FOLDER = "closed-form-parts"
SECONDS_BETWEEN_PARTS = 10.0  # of computing; what takes less writes nothing
_FORMAT = 1  # to be raised where the same data and keys give other rows


def parts_folder(run_dir: str | Path) -> Path:
    """Return the folder of the parts of a run."""
    return Path(run_dir) / FOLDER


def has_parts(folder: Path) -> bool:
    """Return whether the folder holds a part, sound or not."""
    return any(folder.glob("*.safetensors"))


def remove_parts(folder: Path, kind: str = "") -> None:
    """Remove the parts of a kind, or the whole folder."""
    if not kind:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in folder.glob(f"{kind}-*.safetensors"):
        with suppress(OSError):
            path.unlink()


class Parts:
    """The parts of one computation, which this rank reads first, and then writes.

    folder: None: nothing is read or written. kind: `inputs` or `weights`. made_for: the data and
    the keys that the rows depend on. dtype: of the rows; int32 rows are item rows. say: prints a
    line. n_writers: ranks that write parts at the same time. A part that cannot be written is no
    error: it is said, and none is written any more.
    """

    def __init__(
        self,
        folder: Path | None,
        kind: str,
        made_for: dict[str, Any],
        n_items: int,
        width: int,
        dtype: torch.dtype,
        say: Callable[[str], None],
        n_writers: int = 1,
    ) -> None:
        self._folder, self.kind, self._say = folder, kind, say
        self._made_for = json.dumps({"format": _FORMAT, "rows": kind, **made_for}, sort_keys=True)
        self._n_items, self._width, self._dtype = n_items, width, dtype
        self._n_writers = n_writers
        self.n_ignored = 0  # parts that could not be used, of those that were read
        self._waiting: list[tuple[np.ndarray, Tensor]] = []
        self._last = time.monotonic()

    # --- reading ----------------------------------------------------------------------------------

    def read(self, own: ItemSlice) -> tuple[np.ndarray, float]:
        """Write the rows that are on disk into `own`.

        Return which items of `own` have one, (J,) bool, and the seconds that these took.
        """
        is_done_J, seconds = np.zeros(own.hi - own.lo, bool), 0.0
        ignored: list[str] = []
        for path in self._overlapping(own):
            try:
                item_n, rows_nK, took = self._read_part(path)
            except (OSError, ValueError) as error:
                text = str(getattr(error, "strerror", None) or error)
                ignored.append(text if str(path) in text else f"{path}: {text}")
                continue
            is_own_n = (item_n >= own.lo) & (item_n < own.hi)
            is_own_n[is_own_n] = ~is_done_J[item_n[is_own_n] - own.lo]
            local = torch.from_numpy(item_n[is_own_n] - own.lo).long()
            own.tensor[local.to(own.tensor.device)] = rows_nK[is_own_n].to(own.tensor.device)
            is_done_J[local.numpy()] = True
            seconds += took * len(local) / len(item_n)
        self.n_ignored = len(ignored)
        if ignored:
            n = f"{len(ignored)} parts are" if len(ignored) > 1 else "a part is"
            self._say(f"{n} ignored, and computed again: {ignored[0]}")
        self._last = time.monotonic()
        return is_done_J, seconds

    def _overlapping(self, own: ItemSlice) -> list[Path]:
        """The parts that may have items of `own`, by name."""
        if self._folder is None:
            return []
        found = []
        for path in sorted(self._folder.glob(f"{self.kind}-*.safetensors")):
            bounds = re.fullmatch(rf"{self.kind}-(\d{{10}})-(\d{{10}})\.safetensors", path.name)
            if bounds and int(bounds[1]) < own.hi and int(bounds[2]) > own.lo:
                found.append(path)
        return found

    def _read_part(self, path: Path) -> tuple[np.ndarray, Tensor, float]:
        """Return items, rows and seconds; ValueError or OSError where they cannot be used."""
        with _regular(path) as handle:
            file = TensorFile(handle, path)
            texts = [file.metadata.get(name, "") for name in ("made_for", "seconds", "sha256")]
            if texts[0] != self._made_for:
                raise ValueError("it was made for other data or other keys")
            self._check_sizes(file)
            item_n, rows_nK = file.read("items"), file.read("rows")
        if _sha256(texts[0], texts[1], item_n, rows_nK) != texts[2]:
            raise ValueError("its content does not have the SHA-256 that it names")
        seconds = float(texts[1])
        if not 0 <= seconds < math.inf:
            raise ValueError(f"it took {seconds} seconds")
        self._check_rows(item_n.numpy(), rows_nK)
        return item_n.numpy(), rows_nK, seconds

    def _check_sizes(self, file: TensorFile) -> None:
        """ValueError unless the file holds at most a row of K numbers for each item."""
        shapes = {name: file.shape(name) for name in file}
        n = shapes.get("items", (0,))[0]
        if not 0 < n <= self._n_items or shapes != {"items": (n,), "rows": (n, self._width)}:
            raise ValueError(f"its tensors have the shapes {shapes!s:.200}")
        check_dtype("items", file.stored["items"].dtype, torch.int32)
        check_dtype("rows", file.stored["rows"].dtype, self._dtype)

    def _check_rows(self, item_n: np.ndarray, rows_nK: Tensor) -> None:
        """ValueError where an item is none of the catalogue."""
        columns = [item_n[None]]
        if self._dtype == torch.int32:
            columns.append(rows_nK.numpy())
            if (rows_nK.numpy() == item_n[:, None]).any():
                raise ValueError("it has an item that is its own input")
        for ascending in columns:
            if ascending.min() < 0 or ascending.max() >= self._n_items:
                raise ValueError(f"it has items outside of 0 to {self._n_items - 1}")
            if (np.diff(ascending, axis=1) <= 0).any():
                raise ValueError("its items do not ascend")

    # --- writing ----------------------------------------------------------------------------------

    def add(self, item_n: np.ndarray, rows_nK: Tensor) -> None:
        """Keep the rows of items that were computed, each group above the ones before; write all
        that wait as one part, if the last one is long ago."""
        if self._folder is None or not len(item_n):
            return
        self._waiting.append((item_n, rows_nK))
        if time.monotonic() - self._last >= SECONDS_BETWEEN_PARTS:
            self._write(self._folder)

    def _write(self, folder: Path) -> None:
        now = time.monotonic()
        # the seconds of all writers add up to those that passed
        seconds, self._last = str((now - self._last) / self._n_writers), now
        items = torch.from_numpy(np.concatenate([item_n for item_n, _ in self._waiting]))
        tensors = {"items": items.int(), "rows": torch.cat([rows for _, rows in self._waiting])}
        self._waiting.clear()
        metadata = {"made_for": self._made_for, "seconds": seconds}
        metadata["sha256"] = _sha256(self._made_for, seconds, *tensors.values())
        name = f"{self.kind}-{int(items[0]):010d}-{int(items[-1]) + 1:010d}.safetensors"
        try:
            folder.mkdir(exist_ok=True)
            with replacing(folder / name) as handle:
                write_tensors(handle, tensors, metadata=metadata)
        except (OSError, ValueError) as error:
            self._folder = None
            self._say(f"parts are no longer saved: {error}; a killed run resumes from the last one")


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed process was writing."""
    if folder.is_dir():
        remove_leftovers(folder)


@contextmanager
def _regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file; OSError where it is a link, ValueError where it is another thing."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags), "rb") as handle:
        if not stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        yield handle


def _sha256(made_for: str, seconds: str, items_n: Tensor, rows_nK: Tensor) -> str:
    digest = hashlib.sha256(f"{made_for}\n{seconds}\n".encode())
    for tensor in (items_n, rows_nK):
        digest.update(tensor.contiguous().numpy().reshape(-1).view("u1").data)
    return digest.hexdigest()

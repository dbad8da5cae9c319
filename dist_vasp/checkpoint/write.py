"""Write a checkpoint from all ranks: a folder of safetensors and JSON (DESIGN.md, section 5).

    checkpoints/step-00000180/   trunk.safetensors                  the trunk and its moments, whole
                                 items-00000-of-00002.safetensors   partition 0's part of every item
                                 items-00001-of-00002.safetensors   matrix and moment
                                 checkpoint.json                    see header.py
    checkpoints/best -> best-00000180/                              the same without moments

A tensor of an items file is named `NAME[lo:hi]` by the global items it covers. A checkpoint is
written to a temporary folder, synced and renamed: it exists whole or not at all.
"""

from __future__ import annotations

import json
import secrets
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from torch import Tensor

from dist_vasp.checkpoint.header import TRUNK, Header, items_file
from dist_vasp.checkpoint.json_header import write_header
from dist_vasp.files import rename_folder
from dist_vasp.model.slices import ItemSlice
from dist_vasp.parallel.agree import agree
from dist_vasp.parallel.comm import Ranks, all_gather_bytes, all_reduce
from dist_vasp.parallel.launched import launched_world
from dist_vasp.temporary import sync
from dist_vasp.tensor_file import write_safetensors

_FIX = "free some space or move run.dir; earlier checkpoints are good"


def save(
    path: Path,
    header: Header,
    pieces: list[ItemSlice],
    trunk: dict[str, Tensor],
    ranks: Ranks,
) -> None:
    """Write a checkpoint from all ranks together, in the foreground; see `Save`."""
    pending = Save(path, header, pieces, trunk, ranks)
    pending.write()
    pending.commit()


class Save:
    """One checkpoint that is being written: prepared and committed by all ranks together, written
    by each rank alone.

    `header` comes without `files` and `item_axis`, which are added here. `trunk` is used on rank 0
    alone, `pieces` on replica 0 alone. Raises AgreedError on every rank, and leaves nothing behind,
    when the disk is too small or a file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        header: Header,
        pieces: list[ItemSlice],
        trunk: dict[str, Tensor],
        ranks: Ranks,
    ) -> None:
        self.path = path
        self.ranks = ranks
        self.header = replace(header, item_axis={p.name: p.item_dim for p in pieces})
        token = all_gather_bytes(secrets.token_hex(8).encode(), ranks.world, ranks.device)[0]
        self.temporary = path.with_name(f".{path.name}.{token.decode()}.tmp")
        self._digests: dict[str, str] = {}
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        self.files: dict[str, dict[str, Tensor]] = {}
        if ranks.is_main and trunk:
            self.files[TRUNK] = trunk
        layout = ranks.layout
        if layout.replica_of(ranks.rank) == 0:
            name = items_file(layout.partition_of(ranks.rank), layout.partitions)
            self.files[name] = {f"{p.name}[{p.lo}:{p.hi}]": p.tensor for p in pieces}
        self.n_bytes = sum(
            tensor.numel() * tensor.element_size()
            for tensors in self.files.values()
            for tensor in tensors.values()
        )
        self._prepare()

    def _prepare(self) -> None:
        """Make an empty temporary folder on a disk that is large enough."""
        mine = torch.tensor(float(self.n_bytes), dtype=torch.float64, device=self.ranks.device)
        needed = int(all_reduce(mine, self.ranks.world))
        error: Exception | None = None
        if self.ranks.is_main:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                free = shutil.disk_usage(self.path.parent).free
                if free < needed * 1.01 + (1 << 20):
                    raise ValueError(
                        f"{self.path.parent} has {free / 1e9:.3g} GB free but the checkpoint needs "
                        f"{needed / 1e9:.3g} GB; {_FIX}"
                    )
                self.temporary.mkdir()
            except (OSError, ValueError) as raised:
                error = self._unwritable(raised)
        agree(error, self.ranks)

    def write(self) -> None:
        """Write this rank's files, one tensor after the other; `commit` raises what goes wrong."""
        try:
            for name, tensors in self.files.items():
                self._digests[name] = write_safetensors(self.temporary / name, tensors)
        except OSError as raised:
            self._error = self._unwritable(raised)
        except Exception as raised:  # a bug in the thread: `commit` must not call it whole
            self._error = raised
        self.files = {}

    def write_in_background(self) -> bool:
        """Copy this rank's tensors and write them from a thread, if every rank has the memory for
        a copy; else return False."""
        fits = self.n_bytes * launched_world()[3] < psutil.virtual_memory().available / 2
        lacking = torch.tensor(float(not fits), device=self.ranks.device)
        if all_reduce(lacking, self.ranks.world, "max") > 0:
            return False
        self.files = {
            name: {k: t.detach().to("cpu", copy=True) for k, t in tensors.items()}
            for name, tensors in self.files.items()
        }
        self._thread = threading.Thread(target=self.write, name=f"checkpoint {self.path.name}")
        self._thread.start()
        return True

    @property
    def in_foreground(self) -> bool:
        return self._thread is None

    @property
    def written(self) -> bool:
        """Whether this rank's part is on disk (or has failed)."""
        return self._thread is None or not self._thread.is_alive()

    def commit(self) -> None:
        """Wait for every rank's part, write the header and rename: now the checkpoint exists."""
        if self._thread is not None:
            self._thread.join()
        ranks = self.ranks
        messages = all_gather_bytes(json.dumps(self._digests).encode(), ranks.world, ranks.device)
        try:
            agree(self._error, ranks)
            error: Exception | None = None
            if ranks.is_main:
                files: dict[str, str] = {}
                for message in messages:
                    files |= json.loads(message)
                try:
                    self._appear(replace(self.header, files=files))
                except OSError as raised:
                    error = self._unwritable(raised)
            agree(error, ranks)
        except ValueError:
            if ranks.is_main:
                shutil.rmtree(self.temporary, ignore_errors=True)
            raise

    def _appear(self, header: Header) -> None:
        write_header(self.temporary, header)
        sync(self.temporary)
        remove(self.path)
        rename_folder(self.temporary, self.path)

    def abandon(self) -> None:
        """Give up what was started: nothing of it stays on the disk."""
        if self._thread is not None:
            self._thread.join()
        if self.ranks.is_main:
            shutil.rmtree(self.temporary, ignore_errors=True)

    def _unwritable(self, raised: Exception) -> ValueError:
        if isinstance(raised, ValueError):
            return raised
        return ValueError(f"checkpoint {self.path} could not be written ({raised}); {_FIX}")


def remove(path: Path) -> None:
    """Remove a checkpoint, its header first: from then on it is no checkpoint.

    Of a link only the link goes.
    """
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
        return
    (path / Header.FILE).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)

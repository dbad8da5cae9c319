"""The folder of a run: one owner at a time, metrics line by line, TensorBoard events, the result.

RUN_DIR/config.yaml  environment.json  metrics.jsonl  items.parquet  checkpoints/  tensorboard/  result.json
"""

from __future__ import annotations

import json
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from dist_vasp.config import Config
from dist_vasp.data.format import ITEMS_FILE
from dist_vasp.files import lock_or_owner, remove_leftovers, replace_text
from dist_vasp.parallel.comm import Ranks, agreed, all_gather_bytes
from dist_vasp.places import check_run_folder, unwritable
from dist_vasp.training.board import Board
from dist_vasp.training.tracking import Tracking

_REMEDY = "free some space or move run.dir; earlier checkpoints are good"
_SHARED_WITHIN_S = 5.0  # a network filesystem may show a new file late


class RunDir:
    """What rank 0 writes. Raises ValueError if another run owns the folder, or it cannot be written."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.checkpoints = self.folder / "checkpoints"
        self._metrics: TextIO | None = None
        self._board: Board | None = None
        self._tracking: Tracking | None = None
        self._step, self._ended = 0, False
        check_run_folder(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock_or_owner(self.folder / ".lock")
        except OSError as error:
            raise unwritable(error, folder, "run.dir", "choose another folder") from None
        if isinstance(self._lock, str):
            owner = self._lock or "another process"
            raise ValueError(f"run.dir {folder} is in use by {owner}; wait for it to end or choose another run.dir")
        remove_leftovers(self.folder)

    def open(self, config: Config, after_step: int, environment: dict[str, Any]) -> None:
        """Write the resolved config, add `environment` to those of earlier starts, and continue metrics after `after_step`: later
        lines belong to a future that is undone. ValueError where a service of `run` has no library."""
        write_atomically(self.folder / "config.yaml", config.to_yaml())
        path = self.folder / "environment.json"
        starts = [*earlier_starts(path), {"after_step": after_step, **environment}]
        write_atomically(path, json.dumps({"starts": starts}, indent=1) + "\n")
        path = self.folder / "metrics.jsonl"
        if path.exists():
            write_atomically(path, "".join(_lines_until(path, after_step)))
        with _writing(self.folder):
            shutil.copyfile(Path(config.data.shards) / ITEMS_FILE, self.folder / ITEMS_FILE)
            self._metrics = open(path, "a")  # noqa: SIM115
            self._board = Board(self.folder / "tensorboard", after_step)
        self._tracking, self._step = Tracking(self.folder, config), after_step

    def record(self, line: dict[str, Any], prefix: str) -> None:
        """Append one line to metrics.jsonl, and its numbers to TensorBoard and the tracking services under `prefix/`."""
        assert self._metrics is not None
        with _writing(self.folder / "metrics.jsonl"):
            self._metrics.write(json.dumps(line) + "\n")
            self._metrics.flush()
            assert self._board is not None
            self._board.add(prefix, line)
        assert self._tracking is not None
        self._tracking.add(prefix, line)
        self._step = line["step"]

    def write_result(self, result: dict[str, Any]) -> None:
        write_atomically(self.folder / "result.json", json.dumps(result, indent=1) + "\n")
        self._ended = True
        if self._tracking and result.get("test"):
            self._tracking.add("test", {"step": self._step, **result["test"]})

    def close(self) -> None:
        if self._tracking is not None:
            self._tracking.close(self._ended)
        if self._metrics is not None and self._board is not None:
            with _writing(self.folder / "metrics.jsonl"):
                self._metrics.close()
                self._board.close()


@contextmanager
def _writing(path: Path, remedy: str = _REMEDY) -> Iterator[None]:
    """A full or failing disk becomes an error that the user can mend."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} could not be written ({error.strerror or error}); {remedy}") from None


def check_shared(folder: str | Path, ranks: Ranks) -> None:
    """AgreedError unless every rank sees the folder that rank 0 writes into: hosts without a shared filesystem would each see
    their own, and a resume would find nothing or something else."""
    token: Path | None = None
    with agreed(ranks):
        if ranks.is_main:
            token = Path(folder) / f".seen-by-all-{secrets.token_hex(8)}"
            try:
                token.touch()
            except OSError as error:
                raise ValueError(f"run.dir {folder} cannot be written ({error.strerror}); choose another folder") from None
    name = all_gather_bytes(token.name.encode() if token else b"", ranks.world, ranks.device)[0].decode()
    try:
        with agreed(ranks):
            deadline = time.monotonic() + _SHARED_WITHIN_S
            while not (Path(folder) / name).exists():
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"run.dir {folder} on {socket.gethostname()} is not the folder that rank 0 sees; "
                        "with several hosts it must lie on a filesystem that they share"
                    )
                time.sleep(0.1)
    finally:
        if token:
            token.unlink(missing_ok=True)


def write_atomically(path: Path, text: str, remedy: str = _REMEDY) -> None:
    replace_text(path, text, remedy)


def earlier_starts(path: Path) -> list[dict[str, Any]]:
    """What environment.json says of earlier starts of the run; nothing where it is damaged."""
    try:
        starts = json.loads(path.read_text())["starts"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []


def _lines_until(path: Path, step: int) -> list[str]:
    """The whole lines of metrics.jsonl that belong to steps up to `step`; a line cut short by a kill is dropped."""
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not line.endswith("\n") or record["step"] > step:
            break
        kept.append(line)
    return kept

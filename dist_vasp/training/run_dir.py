"""The folder of a run: its lock, its metrics line by line, TensorBoard events and the result.

RUN_DIR/config.yaml  environment.json  metrics.jsonl  items.parquet  trained-users.parquet
        result.json
        checkpoints/  tensorboard/  closed-form-parts/
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from dist_vasp.bounded_json import parse_json, read_json
from dist_vasp.config.schema import Config
from dist_vasp.data.hashing import sha256_of
from dist_vasp.data.manifest import ITEMS_FILE, Manifest
from dist_vasp.files import open_append, remove_leftovers, replace_text, replacing
from dist_vasp.locks import lock_or_owner
from dist_vasp.parallel.agree import agreed
from dist_vasp.parallel.comm import Ranks, all_gather_bytes
from dist_vasp.places import check_run_folder, unwritable
from dist_vasp.training.events import EventFile
from dist_vasp.training.tracking import Tracking

REMEDY = "free some space or move run.dir; earlier checkpoints are good"
_LONGEST_LINE = 1 << 20  # of metrics.jsonl; a longer one is none of ours
_SHARED_WITHIN_S = 5.0  # a network filesystem may show a new file late


class RunDir:
    """The run's folder, as rank 0 writes it; locked as long as the process lives.

    Raises ValueError if another run owns the folder, or it cannot be written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.checkpoints = self.folder / "checkpoints"
        self._metrics: TextIO | None = None
        self._events: EventFile | None = None
        self._tracking: Tracking | None = None
        self._config: Config | None = None
        self._step = 0
        self._ended = False
        check_run_folder(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock_or_owner(self.folder / ".lock")
        except OSError as error:
            raise unwritable(error, folder, "run.dir", "choose another folder") from None
        if isinstance(self._lock, str):
            owner = self._lock or "another process"
            raise ValueError(
                f"run.dir {folder} is in use by {owner}; "
                "wait for it to end or choose another run.dir"
            )
        remove_leftovers(self.folder)

    def open(
        self,
        config: Config,
        manifest: Manifest,
        after_step: int,
        environment: dict[str, Any],
        evaluation_due: bool = False,
    ) -> int:
        """Write the resolved config, add `environment` to those of earlier starts, and continue
        the metrics after `after_step`.

        Lines of later steps are removed: the run resumes before them. Returns how many lines were
        damaged; metrics.damaged.jsonl keeps them. ValueError where a service of `run` has no
        library, or items.parquet is not what the manifest says.
        """
        write_atomically(self.folder / "config.yaml", config.to_yaml())
        path = self.folder / "environment.json"
        starts = [*earlier_starts(path), {"after_step": after_step, **environment}]
        write_atomically(path, json.dumps({"starts": starts}, indent=1) + "\n")
        path = self.folder / "metrics.jsonl"
        n_damaged = cut_after(path, after_step, evaluation_due) if path.exists() else 0
        with _writing(self.folder):
            _copy_items(config.data.shards, manifest, self.folder / ITEMS_FILE)
            self._metrics = open(path, "a", opener=_no_link)  # noqa: SIM115
            if EventFile.is_possible():
                self._events = EventFile(self.folder / "tensorboard", after_step)
        self._tracking = Tracking(self.folder, config)
        self._config = config
        self._step = after_step
        return n_damaged

    def record(self, line: dict[str, Any], prefix: str) -> None:
        """Append one line to metrics.jsonl, and its numbers to TensorBoard and the tracking
        services under `prefix/`."""
        assert self._metrics is not None
        with _writing(self.folder / "metrics.jsonl"):
            self._metrics.write(json.dumps(line) + "\n")
            self._metrics.flush()
            if self._events is not None:
                self._events.add(prefix, line)
        assert self._tracking is not None
        self._tracking.add(prefix, line)
        self._step = line["step"]

    def drop_result(self, unless: str = "") -> None:
        """Remove the result.json of an earlier end, unless it names the checkpoint with the header
        hash `unless`: it speaks of other weights."""
        path = self.folder / "result.json"
        with suppress(OSError, ValueError, KeyError, TypeError):
            if unless and read_json(path)["checkpoint_sha256"] == unless:
                return
        with _writing(path):
            path.unlink(missing_ok=True)

    def write(self, name: str, text: str) -> None:
        """Write a file of the folder."""
        write_atomically(self.folder / name, text)

    def write_result(self, result: dict[str, Any]) -> None:
        write_atomically(self.folder / "result.json", json.dumps(result, indent=1) + "\n")
        self._ended = True
        test = {"step": self._step, **(result.get("test") or {})}
        if self._events and self._config:
            with _writing(self.folder / "tensorboard"):
                self._events.add("test", test)
                self._events.add_hparams(self._config, result)
        if self._tracking:
            self._tracking.add("test", test)

    def close(self) -> None:
        if self._tracking is not None:
            self._tracking.close(self._ended)
        if self._metrics is not None:
            with _writing(self.folder / "metrics.jsonl"):
                self._metrics.close()
                if self._events is not None:
                    self._events.close()


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


@contextmanager
def _writing(path: Path, remedy: str = REMEDY) -> Iterator[None]:
    """Turn a full or failing disk into a ValueError that says what to do."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{path} could not be written ({error.strerror or error}); {remedy}"
        ) from None


def check_shared(folder: str | Path, ranks: Ranks) -> None:
    """Raise AgreedError unless every rank sees the folder that rank 0 writes into.

    Hosts without a shared filesystem would each see a folder of their own, and a resume would find
    nothing there, or something else.
    """
    token: Path | None = None
    with agreed(ranks):
        if ranks.is_main:
            token = Path(folder) / f".seen-by-all-{secrets.token_hex(8)}"
            try:
                token.touch()
            except OSError as error:
                raise ValueError(
                    f"run.dir {folder} cannot be written ({error.strerror}); choose another folder"
                ) from None
    name = all_gather_bytes(token.name.encode() if token else b"", ranks.world, ranks.device)[
        0
    ].decode()
    try:
        with agreed(ranks):
            deadline = time.monotonic() + _SHARED_WITHIN_S
            while not (Path(folder) / name).exists():
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"run.dir {folder} on {socket.gethostname()} is not the folder that rank 0 "
                        "sees; with several hosts it must lie on a filesystem that they share"
                    )
                time.sleep(0.1)
    finally:
        if token:
            token.unlink(missing_ok=True)


def write_atomically(path: Path, text: str, remedy: str = REMEDY) -> None:
    replace_text(path, text, remedy)


def earlier_starts(path: Path) -> list[dict[str, Any]]:
    """Return what environment.json says of earlier starts; nothing where it is damaged."""
    try:
        starts = read_json(path)["starts"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return (
        [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []
    )


def cut_after(path: Path, step: int, evaluation_due: bool = False) -> int:
    """Keep the lines of metrics.jsonl up to `step`; move damaged ones to metrics.damaged.jsonl and
    return their number.

    With `evaluation_due` the evaluation of `step` is removed too: it is made again. (An earlier
    start may have written it and then been stopped.)
    """
    n_damaged = 0
    with ExitStack() as stack:
        try:
            lines = stack.enter_context(open(path, "rb"))
        except OSError as error:
            raise ValueError(
                f"{path} cannot be read ({error.strerror}); correct that, or remove it"
            ) from None
        kept = stack.enter_context(replacing(path, REMEDY))
        while line := lines.readline(_LONGEST_LINE):
            line = line.removesuffix(b"\n")
            found = _step_of(line)
            if found is None:
                begin = max(
                    line.rfind(b'{"step"'), 0
                )  # a whole line may follow on one that was cut short
                found = _step_of(line[begin:]) if begin else None
                broken, line = (line[:begin], line[begin:]) if found is not None else (line, b"")
                if not n_damaged:
                    damaged = stack.enter_context(
                        open_append(path.with_name("metrics.damaged.jsonl"), REMEDY)
                    )
                damaged.write(broken + b"\n")
                n_damaged += 1
            told_again = evaluation_due and found == step and b'"split":' in line
            if found is not None and found <= step and not told_again:
                kept.write(line + b"\n")
    return n_damaged


def _step_of(line: bytes) -> int | None:
    """Return the step of a line of metrics.jsonl; None where the line is damaged."""
    try:
        record = parse_json(line.decode())
        step = record["step"] if isinstance(record, dict) else None
    except (ValueError, KeyError):
        return None
    return step if type(step) is int and step >= 0 else None


def _copy_items(shards: str, manifest: Manifest, target: Path) -> None:
    """Copy the vocabulary into the run's folder; ValueError where it is not the one that training
    began with."""
    source = Path(shards) / ITEMS_FILE
    data = source.read_bytes()
    if sha256_of(data) != manifest.files.get(ITEMS_FILE):
        raise ValueError(
            f"{source} changed while the run was starting; "
            "restore the shards and start the same command again"
        )
    with replacing(target, REMEDY) as handle:
        handle.write(data)

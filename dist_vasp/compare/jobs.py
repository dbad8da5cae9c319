"""Jobs of one or several ranks as processes: started, watched for memory, and stopped so that they
save.

A job has a process group of its own, so a Ctrl-C reaches this process alone; it then asks the
ranks, not the launcher, to stop: DeepSpeed's launcher would end rank 0 before the others have heard
of it (docs/cluster.md).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from dist_vasp.files import open_append
from dist_vasp.signals import SignalWatch

_LOOK_EVERY_S = 0.1
_LAUNCHED = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


class Stopped(Exception):  # noqa: N818 - not an error
    """The user asked to stop; what runs has been asked to save and has ended."""


@dataclass(frozen=True)
class Ended:
    """How a job went."""

    status: int
    seconds: float  # from start to end
    peak_memory: list[
        int
    ]  # bytes, the largest resident size of each rank; loader workers are not counted


def launcher(ranks: int, port: int) -> list[str]:
    """Plain python for one rank, else DeepSpeed's launcher out of the same environment."""
    if ranks == 1:
        return [sys.executable]
    return [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_accelerators",
        str(ranks),
        "--master_port",
        str(port),
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Jobs:
    """Runs one job after another.

    While it is entered, signals stop the job and then end the whole: Stopped.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = 0

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        watch = SignalWatch(self._stop)
        try:
            yield
        finally:
            watch.close()

    def _stop(self, number: int) -> None:
        self._asked += 1

    def run(
        self, script: Path, arguments: Sequence[str], ranks: int, log: Path, device: str = "auto"
    ) -> Ended:
        """Run `script` on `ranks` ranks, its output added to `log`, to the end. Raises Stopped when
        a signal came meanwhile.

        A first signal asks the ranks to save, as Ctrl-C does for training; a second one kills them.
        """
        environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHED}
        if device == "cpu":
            environment["DS_ACCELERATOR"] = "cpu"
        peaks: dict[int, int] = {}
        found: list[int] = []
        answered = 0
        start = time.monotonic()
        if self._asked:
            raise Stopped
        with open_append(log, "choose another --output") as output:
            job = subprocess.Popen(
                [*launcher(ranks, free_port()), str(script), *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            while True:
                found = found if len(found) == ranks else ranks_of(job.pid, ranks)
                for pid in found:
                    peaks[pid] = max(peaks.get(pid, 0), peak_resident(pid))
                if self._asked > answered:
                    answered = self._asked
                    _ask_to_stop(job.pid, found, kill=answered > 1)
                try:
                    status = job.wait(_LOOK_EVERY_S)
                    break
                except subprocess.TimeoutExpired:
                    continue
        finally:
            _end_group(job.pid)
            job.wait()
        ended = Ended(status, time.monotonic() - start, [peaks[pid] for pid in sorted(peaks)])
        if self._asked:
            raise Stopped(ended)
        return ended


def ranks_of(pid: int, ranks: int) -> list[int]:
    """The process ids of the ranks of the job that `pid` started; empty while they do not run yet.

    With several, a rank is a child of the launcher, which puts RANK into its environment; its own
    children are loader workers.
    """
    if ranks == 1:
        return [pid]
    found = []
    try:
        for process in psutil.Process(pid).children(recursive=True):
            try:
                parent = process.parent()
                if "RANK" in process.environ() and (
                    parent is None or "RANK" not in parent.environ()
                ):
                    found.append(process.pid)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
    except psutil.NoSuchProcess:
        return []
    return found


def peak_resident(pid: int) -> int:
    """Bytes of the largest resident size so far, as the kernel keeps it; 0 when the process is
    gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ProcessLookupError):
        pass
    return 0


def _ask_to_stop(pid: int, ranks: Sequence[int], kill: bool) -> None:
    if kill or not ranks:
        _end_group(pid)
        return
    for rank in ranks:
        try:
            os.kill(rank, signal.SIGTERM)
        except ProcessLookupError:
            continue


def _end_group(pid: int) -> None:
    """Kill what is left of a job: nothing of it may go on unseen."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return

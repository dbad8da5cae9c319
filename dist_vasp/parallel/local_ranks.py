"""Start the ranks of a job as processes of this machine, without a launcher program between.

Each rank is `python -m dist_vasp COMMAND ...` with the variables that launchers set (RANK,
WORLD_SIZE, ...), in a session of its own: a Ctrl-C reaches the process that started it, which
passes it on once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import BinaryIO

from dist_vasp.signals import holding_signals

_POLL_S = 0.05
_GRACE_S = 20.0  # ranks notice by themselves that another one is gone; then they are killed
_LAUNCHED = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_USE_AGENT_STORE",
)


class LocalRanks:
    """The running ranks of one job. Use it as a context: it kills what is left at the end.

    `arguments` are the name of a command and its options. `logs` holds one file for each rank, for
    its standard output and error; None: those of this process. `threads` is OMP_NUM_THREADS of a
    rank; 0 leaves it to the rank, which divides the cores among the ranks.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        n_ranks: int,
        logs: Sequence[BinaryIO] | None = None,
        threads: int = 0,
    ) -> None:
        self._failed_at = 0.0
        self._status = 0
        self._processes: list[subprocess.Popen[bytes]] = []
        command = [sys.executable, "-P", "-m", "dist_vasp", *arguments]
        try:
            with holding_signals():
                self._start(command, _environments(n_ranks, threads), logs)
        except BaseException:
            self.kill()
            raise

    def _start(
        self,
        command: Sequence[str],
        environments: Sequence[dict[str, str]],
        logs: Sequence[BinaryIO] | None,
    ) -> None:
        """Start the ranks. A signal waits in each until it can answer: see `end_on_ctrl_c`."""
        for rank, environment in enumerate(environments):
            log = logs[rank] if logs else None
            self._processes.append(
                subprocess.Popen(
                    list(command),
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    @property
    def pids(self) -> list[int]:
        """Return the process of each rank, in the order of the ranks."""
        return [process.pid for process in self._processes]

    @property
    def statuses(self) -> list[int | None]:
        """Return each rank's exit status; 128 + N where signal N ended it, None where it runs."""
        return [_exit_status(process.poll()) for process in self._processes]

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Wait for all ranks. Return 0 or the status of the rank that failed first; None: timeout.

        The other ranks are killed where they do not end soon after a rank that failed.
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            statuses = self.statuses
            failed = [status for status in statuses if status]
            now = time.monotonic()
            if failed and not self._status:
                self._status = failed[0]
                self._failed_at = now
            if None not in statuses:
                return self._status
            if self._status and now - self._failed_at > _GRACE_S:
                self.kill()
            if end is not None and now >= end:
                return None
            time.sleep(_POLL_S)

    def signal(self, number: int) -> None:
        """Send a signal to every rank that still runs."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def kill(self) -> None:
        """Kill what is left of the ranks and of the loader workers that they have started."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()

    def __enter__(self) -> LocalRanks:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def _environments(n_ranks: int, threads: int) -> list[dict[str, str]]:
    """Return the environment of each rank; one rank alone needs no meeting point."""
    common = {name: value for name, value in os.environ.items() if name not in _LAUNCHED}
    if threads:
        common["OMP_NUM_THREADS"] = str(threads)
    if n_ranks == 1:
        return [common]
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"), str(n_ranks))
    return [
        common | sizes | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n_ranks)
    ]


def free_port() -> int:
    """Return a port of the loopback interface that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _exit_status(code: int | None) -> int | None:
    return 128 - code if code is not None and code < 0 else code

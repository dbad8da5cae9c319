"""Run the commands of a comparison, one after another: watch their memory, stop them on request.

A signal that stops a comparison asks the ranks of the running command to stop; a training then
saves.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dist_vasp.files import open_append
from dist_vasp.parallel.local_ranks import LocalRanks
from dist_vasp.signals import SignalWatch

_POLL_S = 0.1


class Stopped(Exception):  # noqa: N818 - not an error
    """The user asked to stop; the running command has been asked to save and has ended."""


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    status: int
    seconds: float
    """From start to end."""
    peak_memory: list[int]
    """Largest resident size of each rank in bytes, without its loader workers."""


class Jobs:
    """Run one job after another. While `stoppable`, a signal stops the job and raises Stopped."""

    def __init__(self) -> None:
        self._asked = 0
        self.interrupted = False  # by Ctrl-C

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        watch = SignalWatch(self._stop)
        try:
            yield
        finally:
            watch.close()

    def _stop(self, number: int) -> None:
        self._asked += 1
        self.interrupted = self.interrupted or number == signal.SIGINT

    def run(self, arguments: Sequence[str], n_ranks: int, log: Path) -> Ended:
        """Run a command with its options to its end; append what it prints to `log`.

        The first signal asks the ranks to save, as Ctrl-C does for a training; a second one kills
        them. Raises Stopped where a signal has arrived.
        """
        if self._asked:
            raise Stopped
        peaks = [0] * n_ranks
        answered = 0
        start = time.monotonic()
        with (
            open_append(log, "choose another --output") as output,
            LocalRanks(arguments, n_ranks, [output] * n_ranks) as ranks,
        ):
            status = None
            while status is None:
                for rank, pid in enumerate(ranks.pids):
                    peaks[rank] = max(peaks[rank], peak_resident(pid))
                if self._asked > answered:
                    answered = self._asked
                    if answered > 1:
                        ranks.kill()
                    else:
                        ranks.signal(signal.SIGTERM)
                status = ranks.wait(_POLL_S)
        ended = Ended(status, time.monotonic() - start, peaks)
        if self._asked:
            raise Stopped(ended)
        return ended


def peak_resident(pid: int) -> int:
    """Return the largest resident size so far in bytes, as the kernel keeps it.

    0 when the process is gone.
    """
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ProcessLookupError):
        pass
    return 0

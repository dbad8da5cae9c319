"""A worker process that computes batches and sends them to its rank; see workers.py.

    python -m dist_vasp.data.reader FILE_DESCRIPTOR

The rank starts it, and sends a `Task` through its standard input. The batches go into the pipe that
the descriptor names.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NoReturn

_PREFETCH = 4  # batches that a worker runs ahead
_ORPHAN_CHECK_S = 0.2  # how often a worker checks that its rank is still there
GROUP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


@dataclass(frozen=True)
class Task:
    """Compute the batch of each of `steps`, in order, for the process `rank_process`."""

    compute: Callable[[int], Any]
    steps: range
    rank_process: int


def main(descriptor: int) -> NoReturn:
    """Send a batch for each step of the task, then end."""
    status = 1
    try:
        for number in GROUP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # for every thread of the process
        signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)
        task: Task = Connection(sys.stdin.fileno(), writable=False).recv()
        connection = Connection(descriptor, readable=False)
        threading.Thread(target=_end_with, args=(task.rank_process,), daemon=True).start()
        ready: queue.Queue[Any] = queue.Queue(_PREFETCH)
        sending = threading.Thread(target=_send, args=(ready, connection), daemon=True)
        sending.start()
        try:
            for step in task.steps:
                ready.put(task.compute(step))
            status = 0
        finally:
            ready.put(None)
            sending.join()  # batches computed before an error still arrive
    except BaseException:
        pass  # the rank computes this batch again and raises the same error
    finally:
        os._exit(status)


def _send(ready: queue.Queue[Any], connection: Connection) -> None:
    try:
        while (batch := ready.get()) is not None:
            connection.send(batch)
    except BaseException:
        os._exit(1)  # the rank no longer reads


def _end_with(rank_process: int) -> None:
    """End this process when its rank is gone."""
    while os.getppid() == rank_process:
        time.sleep(_ORPHAN_CHECK_S)
    os._exit(1)


if __name__ == "__main__":
    # webdataset imports torch where it can, which takes seconds; reading needs nothing of it.
    sys.modules["torch"] = None  # type: ignore[assignment]
    from dist_vasp.data import reader

    reader.main(int(sys.argv[1]))

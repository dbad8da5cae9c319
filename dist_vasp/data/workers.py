"""Read batches ahead of the training in worker processes.

Each worker is a new Python process (dist_vasp/data/reader.py) that computes every n-th batch and
sends it back. It is no fork: a rank has threads, of gloo and of Arrow among others, and a fork
keeps for ever what one of them has locked at that moment. A worker ignores the signals that a
terminal, a launcher or a cluster sends to a whole process group, because only the rank decides when
to stop. It ends when the rank ends it, or when the rank is gone.

A batch is a function of its step. If a worker is killed, the rank computes that worker's batches
itself, so this only costs time.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any, TypeVar

from dist_vasp.data.reader import GROUP_SIGNALS, Task

T = TypeVar("T")


class Worker:
    """One process that computes the steps of a task and sends the results.

    OSError where it cannot be started.
    """

    def __init__(self) -> None:
        # A pipe needs no /dev/shm, which may be full, and holds fewer batches than a socket.
        self._receiver, sender = Pipe(duplex=False)
        task, self._task = Pipe(duplex=False)
        self.exit_code: int | None = None
        # A signal before the process ignores it is held back, and then ignored.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "dist_vasp.data.reader", str(sender.fileno())],
                stdin=task.fileno(),
                env=_environment(),
                pass_fds=[sender.fileno()],
            )
        except OSError:
            self._receiver.close()
            self._task.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            sender.close()
            task.close()
        self.pid = self._process.pid

    def begin(self, task: Task) -> None:
        """Send the process its task."""
        with self._task:
            try:
                self._task.send(task)
            except OSError:  # it is gone
                self.end()

    def receive(self) -> Any | None:
        """Return the next batch; None, with `exit_code` set, where the worker is gone."""
        if self.exit_code is not None:
            return None
        try:
            return self._receiver.recv()
        except (EOFError, OSError):  # possible in the middle of a batch, too
            self.end()
            return None

    def end(self) -> None:
        """End the process if it still runs, and collect its status."""
        if self.exit_code is not None:
            return
        self._receiver.close()
        self._process.kill()  # has no effect on a process that has ended
        self.exit_code = self._process.wait()


def _environment() -> dict[str, str]:
    """The variables of a worker: it finds this package, and computes on one thread."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


class ReadAhead(Iterator[T]):
    """`compute(start)` to `compute(stop - 1)` in order, computed ahead by `n_workers` processes.

    `compute` is pickled, so it is a method of an object that can be. The processes start at once,
    and live until the last batch or `close`. After an exception in a worker, `next` computes that
    batch again and raises the same exception.
    """

    def __init__(self, compute: Callable[[int], T], start: int, stop: int, n_workers: int) -> None:
        self._compute = compute
        self._start = self._next = start
        self._stop = stop
        self._workers: list[Worker] = []
        for w in range(min(n_workers, stop - start)):
            try:
                self._workers.append(Worker())
            except OSError as error:  # too little memory, or a limit of processes or files
                _warn(f"loader worker {w + 1} of {n_workers} cannot be started ({error.strerror})")
                break
        for w, worker in enumerate(self._workers):
            worker.begin(Task(compute, range(start + w, stop, n_workers), os.getpid()))
        self._stride = n_workers

    def __next__(self) -> T:
        if self._next >= self._stop:
            self.close()
            raise StopIteration
        step, self._next = self._next, self._next + 1
        place = (step - self._start) % self._stride
        if place >= len(self._workers):
            return self._compute(step)
        worker = self._workers[place]
        known = worker.exit_code is not None
        batch = worker.receive()
        if batch is None:
            batch = self._compute(step)
            if not known:
                _warn(f"loader worker {worker.pid} {_how_it_ended(worker.exit_code or 0)}")
        return batch

    def close(self) -> None:
        """End the processes; there are no more batches."""
        self._next = self._stop
        for worker in self._workers:
            worker.end()

    def __del__(self) -> None:
        self.close()


def _how_it_ended(code: int) -> str:
    return (
        f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    )


def _warn(what: str) -> None:
    print(
        f"warning: {what}; training continues, and its batches are read without it",
        file=sys.stderr,
        flush=True,
    )

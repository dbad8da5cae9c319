"""Read batches ahead of the training in worker processes.

Each worker is a fork that computes every n-th batch and sends it through a pipe. It ignores the
signals that a terminal, a launcher or a cluster sends to a whole process group, because only the
rank decides when to stop. It ends when the rank ends it, or when the rank is gone.

A batch is a function of its step. If a worker is killed, the rank computes that worker's batches
itself, so this only costs time.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe
from typing import Any, NoReturn, TypeVar

import torch

T = TypeVar("T")

_PREFETCH = 4  # batches that a worker runs ahead
_ORPHAN_CHECK_S = 0.2  # how often a worker checks that its rank is still there
_GROUP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


class Worker:
    """One process that sends `compute(first)`, `compute(first + stride)`, ... up to `stop`."""

    def __init__(
        self,
        compute: Callable[[int], Any],
        first: int,
        stop: int,
        stride: int,
        others: list[Worker],
    ) -> None:
        rank_process = os.getpid()
        self._receiver, sender = Pipe(duplex=False)  # needs no /dev/shm, which may be full
        self.exit_code: int | None = None
        # A signal between the fork and the child's SIG_IGN is held back, and then ignored.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
        try:
            self.pid = os.fork()
            if self.pid == 0:
                inherited = [self._receiver, *(other._receiver for other in others)]
                _work(compute, range(first, stop, stride), sender, inherited, rank_process)
        except OSError:
            self._receiver.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            sender.close()

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
        try:
            os.kill(self.pid, signal.SIGKILL)  # has no effect on a process that has ended
            self.exit_code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        except (ChildProcessError, ProcessLookupError):  # something else has collected its status
            self.exit_code = -signal.SIGKILL


class ReadAhead(Iterator[T]):
    """`compute(start)` to `compute(stop - 1)` in order, computed ahead by `n_workers` processes.

    The processes start at once, and live until the last batch or `close`. After an exception in a
    worker, `next` computes that batch again and raises the same exception.
    """

    def __init__(self, compute: Callable[[int], T], start: int, stop: int, n_workers: int) -> None:
        self._compute = compute
        self._start = self._next = start
        self._stop = stop
        self._workers: list[Worker] = []
        for w in range(min(n_workers, stop - start)):
            try:
                self._workers.append(Worker(compute, start + w, stop, n_workers, self._workers))
            except OSError as error:  # too little memory, or a limit of processes or files
                _warn(f"loader worker {w + 1} of {n_workers} cannot be started ({error.strerror})")
                break
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


# --- in the worker --------------------------------------------------------------------------------


def _work(
    compute: Callable[[int], Any],
    steps: range,
    sender: Connection,
    inherited: list[Connection],
    rank_process: int,
) -> NoReturn:
    """Send a batch for each of `steps`, then end; never returns into the rank's code."""
    status = 1
    try:
        for receiver in inherited:  # a pipe is closed for its writer when its last reader has gone
            receiver.close()
        for number in _GROUP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # for every thread of the process
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _GROUP_SIGNALS)
        threading.Thread(target=_end_with, args=(rank_process,), daemon=True).start()
        torch.set_num_threads(1)
        ready: queue.Queue[Any] = queue.Queue(_PREFETCH)
        sending = threading.Thread(target=_send, args=(ready, sender), daemon=True)
        sending.start()
        try:
            for step in steps:
                ready.put(compute(step))
            status = 0
        finally:
            ready.put(None)
            sending.join()  # batches computed before an error still arrive
    except BaseException:
        pass  # the rank computes this batch again and raises the same error
    finally:
        os._exit(status)


def _send(ready: queue.Queue[Any], sender: Connection) -> None:
    try:
        while (batch := ready.get()) is not None:
            sender.send(batch)
    except BaseException:
        os._exit(1)  # the rank no longer reads


def _end_with(rank_process: int) -> None:
    """End this process when its rank is gone.

    Until then this process holds what it inherited, such as the lock on run.dir.
    """
    while os.getppid() == rank_process:
        time.sleep(_ORPHAN_CHECK_S)
    os._exit(1)

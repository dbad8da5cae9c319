"""Detect requests to stop: SIGTERM, Ctrl-C, SIGHUP, or a launcher that is gone.

A request only sets a flag. The flag is sent with the next step's all-reduce, so that all ranks save
after the same step. A second Ctrl-C ends the process at once, and so does a save that takes too
long after the launcher has gone. A checkpoint is complete if it exists.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import psutil

from dist_vasp.progress import Progress
from dist_vasp.signals import Repeats, SignalWatch

_ORPHAN_CHECK_S = 1.0
_ORPHAN_PATIENCE_S = 20.0


class StoppedError(Exception):
    """A rank was asked to stop; all ranks raise it together."""


Interrupted = Callable[[], bool]


def tick_of(progress: Progress, interrupted: Interrupted) -> Callable[[int], None]:
    """What counts the work that is done on top of what `progress` began with; StoppedError where a
    stop was requested. All ranks call it as often."""
    before = progress.done

    def tick(done: int) -> None:
        progress.update(before + done)
        if interrupted():
            raise StoppedError

    return tick


class StopRequest:
    """`requested` becomes True when this rank is asked to stop, `interrupted` at a Ctrl-C.

    `close` restores the old signal handlers.
    """

    def __init__(self) -> None:
        self.requested = False
        self.interrupted = False
        self._repeats = Repeats()
        self._interrupts = 0
        self._closed = threading.Event()
        self._watch = SignalWatch(self._on_signal)
        if "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            threading.Thread(target=self._watch_launcher, args=(_launchers(),), daemon=True).start()

    def _on_signal(self, number: int) -> None:
        self.requested = True
        if number != signal.SIGINT or self._repeats(number):
            return
        self.interrupted = True
        self._interrupts += 1
        if self._interrupts > 1:
            os._exit(130)

    def _watch_launcher(self, parents: dict[int, int]) -> None:
        """Request a stop when the launcher is gone; otherwise the rank would run unnoticed."""
        while not self._closed.wait(_ORPHAN_CHECK_S):
            if any(_parent_of(process) != parent for process, parent in parents.items()):
                self.requested = True
                time.sleep(_ORPHAN_PATIENCE_S)
                if not self._closed.is_set():
                    os._exit(1)

    def close(self) -> None:
        self._closed.set()
        self._watch.close()


def _parent_of(process: int) -> int | None:
    try:
        return os.getppid() if process == os.getpid() else psutil.Process(process).ppid()
    except psutil.Error:
        return None


def _launchers() -> dict[int, int]:
    """Return the parent of this rank, and of its launcher if `deepspeed` started that.

    SIGTERM ends only the front end `deepspeed`, and the launcher that it started keeps running.
    """
    rank, launcher = os.getpid(), os.getppid()
    parents = {rank: launcher}
    try:
        front_end = psutil.Process(launcher).ppid()
        if any(
            os.path.basename(word) == "deepspeed"
            for word in psutil.Process(front_end).cmdline()[:3]
        ):
            parents[launcher] = front_end
    except psutil.Error:
        pass  # processes of other users may be hidden
    return parents

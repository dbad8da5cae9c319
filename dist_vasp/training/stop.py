"""When to stop early: SIGTERM, Ctrl-C, or a launcher that is gone.

A rank that is asked only notes it; the note travels with the next step's all-reduce, so that all ranks save after the same
step. A second Ctrl-C, or a save that does not come to an end, ends the process at once: a checkpoint is whole or absent.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

_ORPHAN_CHECK_S = 1.0
_ORPHAN_PATIENCE_S = 20.0


class StopRequest:
    """`requested` turns True when this rank is asked to stop; `close` puts the old signal handlers back."""

    def __init__(self) -> None:
        self.requested = False
        self._signals = 0
        self._closed = threading.Event()
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        if "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            threading.Thread(target=self._watch_parent, args=(os.getppid(),), daemon=True).start()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._signals += number == signal.SIGINT
        if self._signals > 1:
            os._exit(130)

    def _watch_parent(self, parent: int) -> None:
        """A rank without its launcher would train on unseen, or wait in a collective for ever."""
        while not self._closed.wait(_ORPHAN_CHECK_S):
            if os.getppid() != parent:
                self.requested = True
                time.sleep(_ORPHAN_PATIENCE_S)
                if not self._closed.is_set():
                    os._exit(1)

    def close(self) -> None:
        self._closed.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)

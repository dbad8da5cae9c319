"""Handle SIGTERM, SIGINT (Ctrl-C) and SIGHUP at once, whatever the main thread is doing.

Python runs a signal handler in the main thread, between two of its instructions. While the main
thread waits in a collective or a long library call, no handler runs. So a separate thread reads
from a socket to which Python writes as soon as a signal arrives.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SAME_CTRL_C_S = 0.5  # torchrun passes on what the terminal has sent to all
INTERRUPTED = 128 + signal.SIGINT  # the exit status after Ctrl-C
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def end_on_ctrl_c() -> None:
    """Until the command handles signals itself, end at Ctrl-C with one line and status 130.

    Signals that arrived while they were held back (`holding_signals`) count, too.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_at_once)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    if is_main_rank():
        os.write(2, b"error: stopped by Ctrl-C\n")  # sys.stderr may be locked by the code below
    os._exit(INTERRUPTED)


@contextmanager
def holding_signals() -> Iterator[None]:
    """Hold SIGTERM, SIGINT and SIGHUP back until the end of the block. Processes started in it hold
    them back, too, until `end_on_ctrl_c`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def is_main_rank() -> bool:
    """Whether this is rank 0, or no rank of several."""
    return os.environ.get("RANK", "0") == "0"


class SignalWatch:
    """Calls `on_signal(number)` on a separate thread for every signal of STOPPING.

    `handler` also runs, in the main thread. SIGHUP stays ignored if it was, as under `nohup`.
    `close` restores the old handlers. Created outside the main thread, it does nothing.
    """

    def __init__(
        self,
        on_signal: Callable[[int], None],
        handler: Callable[[int, FrameType | None], None] | None = None,
    ) -> None:
        self._on_signal = on_signal
        self._handler = handler or _do_nothing
        self._before: dict[int, Any] = {}  # the old handlers
        if threading.current_thread() is not threading.main_thread():
            return
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        for number in STOPPING:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handler)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while numbers := self._read.recv(16):
            for number in numbers:
                # a library may have replaced the handler
                if number in self._before and signal.getsignal(number) is self._handler:
                    self._on_signal(number)
        self._read.close()

    def close(self) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._before = {}
        self._write.close()


def _do_nothing(number: int, frame: FrameType | None) -> None:
    pass


class Repeats:
    """Recognises the same Ctrl-C that comes twice: from the terminal and from a launcher."""

    def __init__(self) -> None:
        self._first = 0.0

    def __call__(self, number: int) -> bool:
        """Return whether this SIGINT follows the first one at once."""
        now = time.monotonic()
        self._first = self._first or now
        return 0 < now - self._first < _SAME_CTRL_C_S


class EndedBySignal(BaseException):
    """A signal ends this command; `status` is its exit status."""

    def __init__(self, number: int) -> None:
        by_user = number == signal.SIGINT
        super().__init__(
            "stopped by Ctrl-C" if by_user else f"ended by {signal.Signals(number).name}"
        )
        self.status = 128 + number


@contextmanager
def ending_on_signals(patience_s: float) -> Iterator[None]:
    """Raise EndedBySignal in the body when a signal arrives, so that its `finally` clauses run.

    The process ends at the latest `patience_s` after the first signal, or at a second Ctrl-C.
    """
    ended, interrupts = threading.Event(), 0
    repeats = Repeats()
    first = True

    def raise_once(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if first:
            first = False
            raise EndedBySignal(number)

    def on_signal(number: int) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT and not repeats(number)
        if interrupts > 1:
            os._exit(128 + number)
        threading.Thread(target=end_late, args=(number,), daemon=True).start()

    def end_late(number: int) -> None:
        if not ended.wait(patience_s):
            if number != signal.SIGINT or is_main_rank():
                print(f"error: {EndedBySignal(number)}", file=sys.stderr, flush=True)
            os._exit(128 + number)

    watch = SignalWatch(on_signal, raise_once)
    try:
        yield
    finally:
        ended.set()
        watch.close()

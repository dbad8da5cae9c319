"""Progress of long work: a bar on a terminal, elsewhere a line every ten seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_TO_WAIT_SILENTLY = 3.0


class Progress:
    """Count `unit`s (a singular noun) of `what`, and show their rate and the remaining time.

    `brief` work is a part of something longer. Its bar vanishes at the end, its lines go to
    standard error, and it prints nothing where it ends before the first line is due. `total` is
    None where it is not known; `done` is what an earlier run has done.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        unit: str,
        done: int = 0,
        show: bool = True,
        brief: bool = False,
    ) -> None:
        self.what = what
        self.total = total
        self.unit = unit
        self.done = done
        self._first = done
        self._show = show
        self._brief = brief
        self._printed = False
        self._start = self._last = time.monotonic()
        self._bar = None
        if show and sys.stderr.isatty():
            large = total is None or total > 100_000
            self._bar = tqdm(
                desc=what,
                total=total,
                initial=done,
                unit=unit,
                dynamic_ncols=True,
                leave=not brief,
                unit_scale=large,
            )

    def add(self, n: int) -> None:
        """Count `n` more units."""
        self.update(self.done + n)

    def update(self, done: int, text: str = "") -> None:
        """Set the number of units done; `text` is shown in place of the rate."""
        self.done = done
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
        elif self._show:
            now = time.monotonic()
            is_last = done == self.total and (self._printed or not self._brief)
            if is_last or now - self._last >= _SECONDS_BETWEEN_LINES:
                self._last = now
                self._printed = True
                self._print(self._line(now, text))

    def _line(self, now: float, text: str) -> str:
        rate = (self.done - self._first) / max(now - self._start, 1e-9)
        text = text or f"{rate:,.{0 if rate >= 10 else 2}f} {self.unit}s/s"
        if self.total is None:
            return f"{self.what}: {self.done} {self.unit}s, {text}"
        left = duration((self.total - self.done) / rate if rate else 0.0)
        return f"{self.what}: {self.done}/{self.total} {self.unit}s, {text}, {left} left"

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self._bar is not None:
            self._bar.write(text)
        elif self._show:
            self._print(text)

    def _print(self, text: str) -> None:
        print(text, file=sys.stderr if self._brief else sys.stdout, flush=True)

    def close(self) -> None:
        """Remove the bar, or leave it as it is."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def say(text: str) -> None:
    """Print a line that stays above any bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


@contextmanager
def counting(what: str, unit: str, per: int = 1) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback (done, total) that shows the progress of brief work.

    `per` of what is counted make one `unit`.
    """
    progress: Progress | None = None

    def show(done: int, total: int) -> None:
        nonlocal progress
        progress = progress or Progress(what, total // per, unit, brief=True)
        progress.update(done // per)

    try:
        yield show
    finally:
        if progress:
            progress.close()


class Waiting:
    """Work in one piece: after 3 s, print once `what` it is, and about how long it takes.

    estimate: seconds, 0 where there is no estimate. After the work, `seconds` is what it took.
    """

    def __init__(self, what: str, show: bool, estimate: float = 0.0) -> None:
        left = estimate - _SECONDS_TO_WAIT_SILENTLY
        text = f"{what}, about {max(left, 1):.0f} s left" if estimate else what
        self._timer = threading.Timer(_SECONDS_TO_WAIT_SILENTLY, say, [text])
        self._timer.daemon = True
        self._show = show
        self.seconds = 0.0

    def __enter__(self) -> Waiting:
        self._start = time.monotonic()
        if self._show:
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self.seconds = time.monotonic() - self._start


def duration(seconds: float) -> str:
    """Return seconds as h:mm:ss."""
    minutes, s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}"

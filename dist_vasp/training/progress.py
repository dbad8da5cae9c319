"""Progress of long work on rank 0: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

_PLAIN_EVERY_S = 10.0


class Progress:
    """`update(done, text)` as often as you like; shows rate and remaining time. With `brief` it is a part of something longer: its
    bar vanishes, and work that is done before the first plain line is due says nothing."""

    def __init__(
        self,
        what: str,
        total: int,
        unit: str,
        done: int = 0,
        show: bool = True,
        brief: bool = False,
    ) -> None:
        self.what, self.total, self.unit, self.first, self.show, self.brief = (
            what,
            total,
            unit,
            done,
            show,
            brief,
        )
        self._spoken = False
        self._start = self._last = time.monotonic()
        terminal = show and sys.stderr.isatty()
        self._bar = (
            tqdm(
                desc=what,
                total=total,
                initial=done,
                unit=unit,
                dynamic_ncols=True,
                leave=not brief,
                unit_scale=total > 100_000,
            )
            if terminal
            else None
        )

    def update(self, done: int, text: str = "") -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
        elif self.show:
            now = time.monotonic()
            last_word = done == self.total and (self._spoken or not self.brief)
            if now - self._last >= _PLAIN_EVERY_S or last_word:
                self._last, self._spoken = now, True
                rate = (done - self.first) / max(now - self._start, 1e-9)
                left = (self.total - done) / rate if rate else 0.0
                text = text or f"{rate:,.{0 if rate >= 10 else 2}f} {self.unit}s/s"
                print(
                    f"{self.what}: {done}/{self.total} {self.unit}s, {text}, {duration(left)} left",
                    flush=True,
                )

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.write(text)
        elif self.show:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


@contextmanager
def counting(what: str, unit: str, per: int = 1) -> Iterator[Callable[[int, int], None]]:
    """A callback (done, in all) for brief work whose size is known when it begins; `per` of what it
    counts make a `unit`."""
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


def duration(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}"

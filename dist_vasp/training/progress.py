"""Progress of long work on rank 0: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

_PLAIN_EVERY_S = 10.0


class Progress:
    """`update(done, text)` as often as you like; shows rate and remaining time."""

    def __init__(self, what: str, total: int, unit: str, done: int = 0, show: bool = True) -> None:
        self.what, self.total, self.unit, self.first, self.show = what, total, unit, done, show
        self._start = self._last = time.monotonic()
        terminal = show and sys.stderr.isatty()
        self._bar = tqdm(desc=what, total=total, initial=done, unit=unit, dynamic_ncols=True) if terminal else None

    def update(self, done: int, text: str = "") -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
        elif self.show:
            now = time.monotonic()
            if now - self._last >= _PLAIN_EVERY_S or done == self.total:
                self._last = now
                rate = (done - self.first) / max(now - self._start, 1e-9)
                left = (self.total - done) / rate if rate else 0.0
                print(
                    f"{self.what}: {done}/{self.total} {self.unit}s, {text}{', ' if text else ''}{_duration(left)} left", flush=True
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


def _duration(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}"

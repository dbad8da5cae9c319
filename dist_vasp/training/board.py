"""TensorBoard events of a run: the numbers of a metrics line, under one prefix each for training
and validation."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from dist_vasp.training.tracking import numbers


class Board:
    """An event file in `folder`; events of steps after `after_step`, of a future that is undone,
    are no longer shown.

    OSError from `add` and `close` when the file could not be written.
    """

    def __init__(self, folder: Path, after_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _let_the_caller_report()
        self._events = SummaryWriter(str(folder), purge_step=after_step + 1)

    def add(self, prefix: str, line: dict[str, Any]) -> None:
        for name, value in numbers(prefix, line).items():
            self._events.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._events.flush()  # closing alone would not tell of a failed write
        self._events.close()


def _let_the_caller_report() -> None:
    """A failed write of the writer's own thread raises again in the next `add` or `close`, where it
    gets one readable line; the thread need not print its traceback first."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        of_the_writer = type(args.thread).__module__.startswith("tensorboard.")
        if not (of_the_writer and isinstance(args.exc_value, OSError)):
            before(args)

    threading.excepthook = hook

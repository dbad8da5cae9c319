"""Write the numbers of metrics.jsonl as TensorBoard events."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from dist_vasp.config.schema import Config
from dist_vasp.extras import has_library
from dist_vasp.training.tracking import flat, numbers


class EventFile:
    """An event file in `folder`; TensorBoard no longer shows earlier events after `after_step`.

    OSError from `add` and `close` when the file could not be written.
    """

    @staticmethod
    def is_possible() -> bool:
        """Return whether TensorBoard is installed."""
        return has_library("tensorboard")

    def __init__(self, folder: Path, after_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _let_the_caller_report()
        self._events = SummaryWriter(str(folder), purge_step=after_step + 1)

    def add(self, prefix: str, line: dict[str, Any]) -> None:
        for name, value in numbers(prefix, line).items():
            self._events.add_scalar(name, value, line["step"])

    def add_hparams(self, config: Config, result: dict[str, Any]) -> None:
        """Add the configuration as hyperparameters, and the metrics of result.json by which
        TensorBoard's HPARAMS tab compares runs."""
        from torch.utils.tensorboard.summary import hparams

        metrics = {
            name: value
            for split in ("test", "validation")
            for name, value in numbers(split, result.get(split) or {}).items()
            if "@" in name
        }
        writer: Any = self._events.file_writer
        for summary in hparams(flat(config), metrics):
            writer.add_summary(summary)

    def close(self) -> None:
        self._events.flush()  # `close` does not report a failed write
        self._events.close()


def _let_the_caller_report() -> None:
    """Keep the writer's thread from printing a traceback after a failed write.

    The next `add` or `close` raises the same error, and the caller reports it in one line.
    """
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        is_writer = type(args.thread).__module__.startswith("tensorboard.")
        if not (is_writer and isinstance(args.exc_value, OSError)):
            before(args)

    threading.excepthook = hook

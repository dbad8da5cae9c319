"""Protect a command from its standard output and error, and the terminal from the command.

The streams may be closed, full or broken, or unable to show a character. None of this ends a
command, because its files matter more. Control characters in titles and file names never reach a
terminal.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import select
import sys
from pathlib import Path
from typing import TextIO

from dist_vasp.text import printable

_READER_LEFT = (errno.EPIPE, errno.EIO, errno.ECONNRESET)  # `| head`, a terminal that was closed
_CURSOR = re.compile(r"(\r|\x1b\[A)")  # cursor movements of a progress bar, allowed on stderr
_stdout_errors: list[OSError] = []  # empty, or the first error of standard output


class _Descriptor(io.RawIOBase):
    """A file descriptor whose writes never fail: after the first error they do nothing."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._works = True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        while self._works:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:
                select.select([], [self._descriptor], [])
            except OSError as error:
                self._works = False
                if self._descriptor == 1:
                    _stdout_errors.append(error)
                    print(
                        f"warning: standard output cannot be written ({error.strerror}); the "
                        "command continues",
                        file=sys.stderr,
                    )
        return len(data)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return self._works and os.isatty(self._descriptor)


class _Stream(io.TextIOWrapper):
    """A text stream over such a descriptor.

    Control characters, and characters that the encoding lacks, become escape sequences.
    """

    def __init__(self, descriptor: int, encoding: str) -> None:
        buffer = io.BufferedWriter(_Descriptor(descriptor))  # type: ignore[type-var]
        super().__init__(buffer, encoding, errors="backslashreplace", line_buffering=True)

    def write(self, text: str) -> int:
        if self.fileno() == 2:
            parts = _CURSOR.split(text)
            super().write("".join(p if _CURSOR.fullmatch(p) else printable(p) for p in parts))
        else:
            super().write(printable(text))
        return len(text)


def guard() -> None:
    """Replace the standard streams of this process, except those that a test has replaced."""
    _restart_in_utf8()
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None and not _is_open(descriptor):
            os.open(os.devnull, os.O_RDWR)  # so that no file of the command gets this number
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            null = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: SIM115
            setattr(sys, name, null)
        elif stream is getattr(sys, f"__{name}__"):
            replacement = _Stream(descriptor, stream.encoding)
            setattr(sys, name, replacement)
            _move_handlers(stream, replacement)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _restart_in_utf8() -> None:
    """Restart this command in Python's UTF-8 mode if the locale has another encoding.

    In an ASCII locale, files and their names could not hold most languages' letters, and libraries
    that expect UTF-8 would fail.
    """
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
    folder = script.resolve().parent.name
    # and not a test that calls a command
    is_command = folder in ("launch", "data_tools", "dist_vasp") or script.name == "dist-vasp"
    is_restarted = os.environ.get("PYTHONUTF8") == "1"
    if is_command and sys.getfilesystemencoding() != "utf-8" and not is_restarted:
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _move_handlers(before: TextIO, now: TextIO) -> None:
    """Redirect the log handlers of libraries from the stream `before` to `now`."""
    for logger in [logging.getLogger(), *logging.root.manager.loggerDict.values()]:
        if not isinstance(logger, logging.Logger):
            continue
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                handler.setStream(now)


def final_status(status: int) -> int:
    """Return the exit status of a command: `status`, or 1 where a failing disk lost its output."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    if status or not _stdout_errors or _stdout_errors[0].errno in _READER_LEFT:
        return status
    print(
        f"error: standard output could not be written ({_stdout_errors[0].strerror}); "
        "what was printed is lost, files are complete",
        file=sys.stderr,
    )
    return 1

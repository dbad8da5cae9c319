"""Standard output and error of a command, which may be closed, full, broken, or unable to show a
character.

Nothing that happens to them ends a command: what it writes to files matters more. Control
characters never reach a terminal, whoever put them into a title or a file name.
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
_CURSOR = re.compile(r"(\r|\x1b\[A)")  # how a progress bar moves the cursor, on standard error
_lost: list[OSError] = []  # the first error of standard output, if there was one


class _Descriptor(io.RawIOBase):
    """A file descriptor to which every write succeeds: after its first error everything is dropped."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._works = descriptor, True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        while self._works:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:
                select.select([], [self._descriptor], [])
            except OSError as error:
                self._works = False
                if self._descriptor == 1:
                    _lost.append(error)
                    print(
                        (
                            f"warning: standard output cannot be written ({error.strerror}); the "
                            "command continues"
                        ),
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
    """Text to such a descriptor.

    Control characters, and what the encoding lacks, become escape sequences.
    """

    def __init__(self, descriptor: int, encoding: str) -> None:
        buffer = io.BufferedWriter(_Descriptor(descriptor))  # type: ignore[type-var]
        super().__init__(buffer, encoding, errors="backslashreplace", line_buffering=True)

    def write(self, text: str) -> int:
        if self.fileno() == 2:
            super().write(
                "".join(
                    part if _CURSOR.fullmatch(part) else printable(part)
                    for part in _CURSOR.split(text)
                )
            )
        else:
            super().write(printable(text))
        return len(text)


def guard() -> None:
    """Make the standard streams of this process such streams; those that a test has replaced stay."""
    _restart_in_utf8()
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None and not _is_open(descriptor):
            os.open(os.devnull, os.O_RDWR)  # takes this number, so that no file of the command does
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="replace"))  # noqa: SIM115 - until the process ends
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
    """Start this command again in Python's UTF-8 mode, where the locale says another encoding.

    In an ASCII locale neither a file's text nor its name could hold a letter of most languages, and
    libraries, which expect UTF-8, fail in ways of their own.
    """
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
    folder = script.resolve().parent.name
    # not a test that calls a command
    ours = folder in ("launch", "data_tools", "dist_vasp") or script.name == "dist-vasp"
    if ours and sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _move_handlers(before: TextIO, now: TextIO) -> None:
    """What libraries log at `before` goes to `now`."""
    loggers = [
        logging.getLogger(),
        *(
            found
            for found in logging.root.manager.loggerDict.values()
            if isinstance(found, logging.Logger)
        ),
    ]
    for logger in loggers:
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                handler.setStream(now)


def final_status(status: int) -> int:
    """The exit status after a command that would exit with `status`: 1 where its output was lost to
    a failing disk."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    if status or not _lost or _lost[0].errno in _READER_LEFT:
        return status
    print(
        (
            f"error: standard output could not be written ({_lost[0].strerror}); what was printed is "
            "lost, files are complete"
        ),
        file=sys.stderr,
    )
    return 1

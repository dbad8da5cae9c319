"""The other end of a liveness connection: what it has sent, and the loss of its rank."""

from __future__ import annotations

import socket
import sys
import time
from dataclasses import dataclass
from typing import Any

from dist_vasp.parallel.secret import Channel
from dist_vasp.text import one_line

ANSWER_S = 10.0  # to connect to rank 0, and to send a valid hello
MAX_TEXT = 2000  # characters of an error; up to 12 bytes each
MAX_HOST = 255


@dataclass(frozen=True)
class Loss:
    """A rank that is gone; `text` is its error, empty where it could not send one."""

    rank: int
    host: str
    text: str
    status: int = 1

    @classmethod
    def from_message(cls, rank: Any, host: Any, text: Any, status: Any = 1) -> Loss:
        """Return a loss from another process's message, safe to print and with a failing status."""
        if type(rank) is not int or not isinstance(host, str) or not isinstance(text, str):
            raise ValueError("not a loss")
        status = status if type(status) is int and 1 <= status <= 255 else 1
        return cls(rank, one_line(host[:MAX_HOST]), one_line(text[:MAX_TEXT]), status)


@dataclass
class Link:
    """What is known about the other end of a connection."""

    rank: int
    host: str
    nonce: str = ""  # of rank 0, until the hello
    channel: Channel | None = None
    proven: bool = False  # the other end knows the secret
    buffer: bytes = b""
    since: float = 0.0

    def __post_init__(self) -> None:
        self.since = time.monotonic()


def say_unwatched(rank: int, why: str) -> None:
    text = f"rank {rank} {one_line(why)}; if a rank dies the others may take long to notice"
    print(f"warning: {text}", file=sys.stderr, flush=True)


def first_line(connection: socket.socket) -> bytes:
    """Return the first line of rank 0; ValueError where it is too slow or too long."""
    line, deadline = b"", time.monotonic() + ANSWER_S
    while not line.endswith(b"\n"):
        if len(line) > 200 or time.monotonic() > deadline:
            raise ValueError("it does not answer as rank 0 does")
        data = connection.recv(1)
        if not data:
            raise ValueError("it closed the connection")
        line += data
    return line

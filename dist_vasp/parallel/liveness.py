"""Who is still there: a rank that dies, fails or falls silent is named within seconds, whatever the others are waiting for.

A collective whose peer is gone may wait for half an hour, and what it says then names nobody. So every rank keeps one connection
to rank 0, which the kernel closes with the process and gives up when the host no longer answers. Rank 0 tells the others. What
travels is a line of JSON, nothing else is understood:

    {"token", "rank", "host"}    hello, to rank 0
    {"goodbye": true}            I leave on purpose, either way
    {"failed": text, "status"}   I leave because of an error that I alone met, and have said what it is; either way
    {"lost": {rank, host, ...}}  that one is gone, from rank 0

The first surviving rank of each host says which rank was lost, except where that rank has spoken for itself. Then every rank ends,
with the exit status of the lost one where it has left one.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

_ANSWER_S = 10.0  # to connect to rank 0, and for a stranger to say who it is
_GRACE_S = 5.0  # between a loss and the end of this process: time for the main thread to end by itself
_LINE = 8192  # bytes
_SILENT_HOST = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 25_000}  # seconds; the last in ms


@dataclass(frozen=True)
class Loss:
    """A rank that is gone; `text` is the error it met, empty where it could not say."""

    rank: int
    host: str
    text: str
    status: int = 1


class Liveness:
    """This rank's end of it. `server` is a listening socket on rank 0, None elsewhere; `address` is where the others find it."""

    def __init__(self, rank: int, local_rank: int, world_size: int, token: str, address: Any, server: socket.socket | None) -> None:
        self.loss: Loss | None = None
        self._rank, self._local_rank, self._host, self._token = rank, local_rank, socket.gethostname(), token
        self._lost, self._left, self._lock = threading.Event(), threading.Event(), threading.Lock()
        self._links: dict[socket.socket, _Link] = {}
        self._server = server
        self._expected = world_size - 1
        self._all_here = threading.Event()
        if server is None and not self._connect(address):
            return  # this rank goes unwatched, and has said so
        os.register_at_fork(after_in_child=self._forget)  # a loader worker must not keep its rank's connections open
        threading.Thread(target=self._watch, daemon=True).start()
        if world_size > 1:
            self._all_here.wait(_ANSWER_S)

    @staticmethod
    def new_token() -> str:
        return secrets.token_hex(16)

    def leave(self, failed: str = "", status: int = 1) -> None:
        """Tell the others that this process ends; `failed`: because of an error that this rank alone has met, and has printed."""
        self._left.set()
        self._tell({"failed": failed[: _LINE // 2], "status": status} if failed else {"goodbye": True})

    def wait_for_loss(self, seconds: float) -> Loss | None:
        """The loss that explains a collective which has just failed, if there is one."""
        self._lost.wait(seconds)
        return self.loss

    # --- the connections ---------------------------------------------------------------------------------------------

    def _connect(self, address: Any) -> bool:
        try:
            connection = socket.create_connection(address, timeout=_ANSWER_S)
            connection.sendall(_line({"token": self._token, "rank": self._rank, "host": self._host}))
        except OSError as error:
            text = f"rank {self._rank} cannot reach rank 0 at {address[0]}:{address[1]} ({error.strerror or error})"
            print(f"warning: {text}; if a rank dies the others may take long to notice", file=sys.stderr, flush=True)
            return False
        self._add(connection, _Link(rank=0, host=""))
        return True

    def _add(self, connection: socket.socket, link: _Link) -> None:
        connection.setblocking(False)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _SILENT_HOST.items():
                if hasattr(socket, option):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        with self._lock:
            self._links[connection] = link

    def _forget(self) -> None:
        """In a forked child: the connections are the parent's."""
        for connection in [*self._links, *([self._server] if self._server else [])]:
            with contextlib.suppress(OSError):
                os.close(connection.detach())

    def _tell(self, message: dict[str, Any], besides: socket.socket | None = None) -> None:
        with self._lock:
            known = [connection for connection, link in self._links.items() if link.rank is not None and connection is not besides]
            for connection in known:
                with contextlib.suppress(OSError):
                    connection.send(_line(message))

    # --- the thread --------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for source in [*self._links, *([self._server] if self._server else [])]:
                selector.register(source, selectors.EVENT_READ)
            while not self._left.is_set() and self.loss is None:
                for key, _ in selector.select(timeout=1.0):
                    if key.fileobj is self._server:
                        with contextlib.suppress(OSError):
                            connection, _ = self._server.accept()
                            self._add(connection, _Link(rank=None, host=""))
                            selector.register(connection, selectors.EVENT_READ)
                    elif not self._hear(key.fileobj):
                        self._drop(key.fileobj, selector)
                for connection, link in list(self._links.items()):
                    if link.rank is None and time.monotonic() - link.since > _ANSWER_S:
                        self._drop(connection, selector)
        if self.loss is not None and not self._left.wait(_GRACE_S):
            os._exit(self.loss.status)

    def _drop(self, connection: Any, selector: selectors.BaseSelector) -> None:
        selector.unregister(connection)
        with self._lock:
            self._links.pop(connection, None)
        connection.close()

    def _hear(self, connection: Any) -> bool:
        """Take in what has come on one connection; False: it is of no use any more."""
        link = self._links[connection]
        try:
            came = connection.recv(_LINE)
        except BlockingIOError:
            return True
        except OSError:
            came = b""
        if not came:
            if link.rank is not None:
                self._note(Loss(link.rank, link.host, ""), connection)
            return False
        link.heard += came
        *lines, link.heard = link.heard.split(b"\n")
        return len(link.heard) <= _LINE and all(self._understand(line, link, connection) for line in lines)

    def _understand(self, line: bytes, link: _Link, connection: socket.socket) -> bool:
        try:
            message = json.loads(line)
            if link.rank is None:
                if not secrets.compare_digest(str(message["token"]), self._token):
                    return False
                link.rank, link.host = int(message["rank"]), str(message["host"])
                self._expected -= 1
                connection.send(_line({"host": self._host}))
                if not self._expected:
                    self._all_here.set()
            elif "host" in message:
                link.host = str(message["host"])
                self._all_here.set()
            elif "lost" in message:
                self._note(Loss(**message["lost"]), connection)
            elif "failed" in message:
                self._note(Loss(link.rank, link.host, str(message["failed"]), int(message["status"])), connection)
            return "goodbye" not in message
        except (ValueError, KeyError, TypeError, OSError):
            return False

    def _note(self, loss: Loss, where_from: socket.socket) -> None:
        """Pass a loss on, and say it where nobody has."""
        if self.loss is not None or self._left.is_set():
            return
        self.loss = loss
        self._tell({"lost": asdict(loss)}, besides=where_from)
        next_of_kin = self._local_rank == 1 and loss.rank == self._rank - 1  # the lost rank was the first of this host
        spoken = loss.text and loss.host == self._host
        if (self._local_rank == 0 or next_of_kin) and not spoken:
            why = f"failed: {loss.text}" if loss.text else "was killed, or its machine is gone"
            print(f"error: rank {loss.rank} on {loss.host} {why}; start the same command again", file=sys.stderr, flush=True)
        self._lost.set()


@dataclass
class _Link:
    """What is known of the other end of a connection; `rank` is None until it has said hello with the token."""

    rank: int | None
    host: str
    heard: bytes = b""
    since: float = 0.0

    def __post_init__(self) -> None:
        self.since = time.monotonic()


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"

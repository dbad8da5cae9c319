"""Who is still there: a rank that dies, fails or falls silent is named within seconds, whatever the
others are waiting for.

A collective whose peer is gone may wait for half an hour, and what it says then names nobody. So
every rank keeps one connection to rank 0, which the kernel closes with the process and gives up
when the host no longer answers. Rank 0 tells the others. What travels is a line of JSON, nothing
else is understood:

    {"nonce"}                    from rank 0, to whoever connects; every line after it is signed (secret.py)
    {"nonce", "rank", "host"}    hello, to rank 0; its answer is {"host"}
    {"goodbye": true}            I leave on purpose, either way
    {"failed": text, "status"}   I leave because of an error that I alone met, and have said what it is; either way
    {"lost": {rank, host, ...}}  that one is gone, from rank 0

The first surviving rank of each host says which rank was lost, except where that rank has spoken
for itself. Then every rank ends, with the exit status of the lost one where it has left one.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

from dist_vasp.parallel.secret import Channel, SharedSecret, new_nonce
from dist_vasp.text import one_line

_ANSWER_S = 10.0  # to connect to rank 0, and for a stranger to say who it is
_GRACE_S = (
    5.0  # between a loss and the end of this process: time for the main thread to end by itself
)
_LINE = 32_768  # bytes
_TEXT = 2000  # characters of an error; up to 12 bytes each
_HOST = 255
_STRANGERS = 64  # connections that have not proven who they are
_SILENT_HOST = {
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 25_000,
}  # seconds; the last in ms


@dataclass(frozen=True)
class Loss:
    """A rank that is gone; `text` is the error it met, empty where it could not say."""

    rank: int
    host: str
    text: str
    status: int = 1

    @classmethod
    def told(cls, rank: Any, host: Any, text: Any, status: Any = 1) -> Loss:
        """A loss as another process tells it: safe to print, and with a status that is a failure."""
        if type(rank) is not int or not isinstance(host, str) or not isinstance(text, str):
            raise ValueError("not a loss")
        status = status if type(status) is int and 1 <= status <= 255 else 1
        return cls(rank, one_line(host[:_HOST]), one_line(text[:_TEXT]), status)


class Liveness:
    """This rank's end of it. `server` is a listening socket on rank 0, None elsewhere; `address` is
    where the others find it.

    `secret`: what all ranks share; rank 0 removes its file when all have come.
    """

    def __init__(
        self,
        rank: int,
        local_rank: int,
        world_size: int,
        secret: SharedSecret | bytes,
        address: Any,
        server: socket.socket | None,
    ) -> None:
        self.loss: Loss | None = None
        self._rank, self._local_rank, self._host, self._world = (
            rank,
            local_rank,
            socket.gethostname(),
            world_size,
        )
        self._file = secret if isinstance(secret, SharedSecret) else None
        self._secret = secret.value if isinstance(secret, SharedSecret) else secret
        self._lost, self._left, self._lock = threading.Event(), threading.Event(), threading.Lock()
        self._links: dict[socket.socket, _Link] = {}
        self._server = server
        self._expected = world_size - 1
        self._all_here = threading.Event()
        if server is None and not self._connect(address):
            return  # this rank goes unwatched, and has said so
        os.register_at_fork(
            after_in_child=self._forget
        )  # a loader worker must not keep its rank's connections open
        threading.Thread(target=self._watch, daemon=True).start()
        if world_size > 1:
            self._all_here.wait(_ANSWER_S)

    def leave(self, failed: str = "", status: int = 1) -> None:
        """Tell the others that this process ends; `failed`: because of an error that this rank
        alone has met, and has printed."""
        self._left.set()
        self._tell({"failed": failed[:_TEXT], "status": status} if failed else {"goodbye": True})
        if self._file:
            self._file.remove()

    def wait_for_loss(self, seconds: float) -> Loss | None:
        """The loss that explains a collective which has just failed, if there is one."""
        self._lost.wait(seconds)
        return self.loss

    # --- the connections --------------------------------------------------------------------------

    def _connect(self, address: Any) -> bool:
        try:
            connection = socket.create_connection(address, timeout=_ANSWER_S)
            server_nonce, nonce = str(json.loads(_first_line(connection))["nonce"]), new_nonce()
            channel = Channel(self._secret, server_nonce, nonce, server=False)
            # The signed hello names the nonce in the clear: rank 0 needs it to check the signature.
            connection.sendall(
                channel.sign(json.dumps({"nonce": nonce, "rank": self._rank, "host": self._host}))
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            say_unwatched(
                self._rank,
                (
                    f"cannot reach rank 0 at {address[0]}:{address[1]} "
                    f"({getattr(error, 'strerror', None) or error})"
                ),
            )
            return False
        self._add(connection, _Link(rank=0, host="", channel=channel))
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
            for connection, link in self._links.items():
                if link.channel and connection is not besides:
                    with contextlib.suppress(OSError):
                        connection.send(link.channel.sign(json.dumps(message)))

    # --- the thread -------------------------------------------------------------------------------

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for source in [*self._links, *([self._server] if self._server else [])]:
                selector.register(source, selectors.EVENT_READ)
            while not self._left.is_set() and self.loss is None:
                for key, _ in selector.select(timeout=1.0):
                    if key.fileobj is self._server:
                        self._accept(selector)
                    elif not self._hear(key.fileobj):
                        self._drop(key.fileobj, selector)
                for connection, link in list(self._links.items()):
                    if not link.proven and time.monotonic() - link.since > _ANSWER_S:
                        self._drop(connection, selector)
        if self.loss is not None and not self._left.wait(_GRACE_S):
            os._exit(self.loss.status)

    def _accept(self, selector: selectors.BaseSelector) -> None:
        assert self._server is not None
        with contextlib.suppress(OSError):
            connection, _ = self._server.accept()
            if len(self._links) >= self._world + _STRANGERS:
                connection.close()
                return
            link = _Link(rank=-1, host="", nonce=new_nonce())
            self._add(connection, link)
            selector.register(connection, selectors.EVENT_READ)
            connection.send(json.dumps({"nonce": link.nonce}).encode() + b"\n")

    def _drop(self, connection: Any, selector: selectors.BaseSelector) -> None:
        selector.unregister(connection)
        with self._lock:
            link = self._links.pop(connection)
        connection.close()
        if not link.proven and self._server is None:  # somebody in rank 0's place
            say_unwatched(self._rank, "was not answered by rank 0")
            self._all_here.set()

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
            if link.proven:
                self._note(Loss(link.rank, link.host, ""), connection)
            return False
        link.heard += came
        *lines, link.heard = link.heard.split(b"\n")
        return len(link.heard) <= _LINE and all(
            self._understand(line, link, connection) for line in lines
        )

    def _understand(self, line: bytes, link: _Link, connection: socket.socket) -> bool:
        """Act on one line; False: nothing more is wanted from this connection."""
        try:
            if link.channel is None:
                self._welcome(line, link, connection)
                return True
            message = json.loads(link.channel.verify(line))
            if not link.proven:
                link.proven, link.host = True, one_line(str(message["host"])[:_HOST])
                self._all_here.set()
            elif "lost" in message and self._server is None:
                self._note(Loss.told(**message["lost"]), connection)
            elif "failed" in message:
                self._note(
                    Loss.told(link.rank, link.host, message["failed"], message.get("status")),
                    connection,
                )
            return "goodbye" not in message
        except (ValueError, KeyError, TypeError, OSError, RecursionError):
            return False

    def _welcome(self, line: bytes, link: _Link, connection: socket.socket) -> None:
        """Rank 0 hears a first line; ValueError unless it is the hello of a rank that has not come
        yet."""
        claimed = json.loads(line.partition(b" ")[2])
        channel = Channel(self._secret, link.nonce, str(claimed["nonce"]), server=True)
        hello = json.loads(channel.verify(line))
        rank, here = hello["rank"], {other.rank for other in self._links.values()}
        if type(rank) is not int or not 0 < rank < self._world or rank in here:
            raise ValueError("not a rank that is expected")
        with self._lock:
            link.rank, link.host = rank, one_line(str(hello["host"])[:_HOST])
            link.channel, link.proven = channel, True
            connection.send(channel.sign(json.dumps({"host": self._host})))
        self._expected -= 1
        if not self._expected:
            if self._file:
                self._file.remove()
            self._all_here.set()

    def _note(self, loss: Loss, where_from: socket.socket) -> None:
        """Pass a loss on, and say it where nobody has."""
        if self.loss is not None or self._left.is_set():
            return
        self.loss = loss
        self._tell({"lost": asdict(loss)}, besides=where_from)
        next_of_kin = (
            self._local_rank == 1 and loss.rank == self._rank - 1
        )  # the lost rank was the first of this host
        spoken = loss.text and loss.host == self._host
        if (self._local_rank == 0 or next_of_kin) and not spoken:
            why = f"failed: {loss.text}" if loss.text else "was killed, or its machine is gone"
            print(
                f"error: rank {loss.rank} on {loss.host} {why}; start the same command again",
                file=sys.stderr,
                flush=True,
            )
        self._lost.set()


@dataclass
class _Link:
    """What is known of the other end of a connection."""

    rank: int
    host: str
    nonce: str = ""  # of rank 0, until the other end has said hello
    channel: Channel | None = None
    proven: bool = False  # the other end knows the secret
    heard: bytes = b""
    since: float = 0.0

    def __post_init__(self) -> None:
        self.since = time.monotonic()


def say_unwatched(rank: int, why: str) -> None:
    text = f"rank {rank} {one_line(why)}; if a rank dies the others may take long to notice"
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _first_line(connection: socket.socket) -> bytes:
    """What rank 0 says first; ValueError where it is slow or long."""
    line, deadline = b"", time.monotonic() + _ANSWER_S
    while not line.endswith(b"\n"):
        if len(line) > 200 or time.monotonic() > deadline:
            raise ValueError("it does not answer as rank 0 does")
        came = connection.recv(1)
        if not came:
            raise ValueError("it closed the connection")
        line += came
    return line

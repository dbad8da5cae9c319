"""Detect within seconds that a rank has died, failed or stopped to answer, and report which one.

A collective whose peer is gone may wait for half an hour, and its error names no rank. So every
rank keeps one connection to rank 0. The kernel closes it when the process ends, and gives it up
when the host no longer answers. Rank 0 informs the others. Each message is one line of JSON:

    {"nonce"}                    rank 0 to everyone who connects; all later lines are signed
                                 (secret.py)
    {"nonce", "rank", "host"}    hello, to rank 0, which answers {"host"}
    {"goodbye": true}            the sender ends on purpose; both directions
    {"failed": text, "status"}   the sender ends because of an error that only it has met, and has
                                 printed; both directions
    {"lost": {rank, host, ...}}  that rank is gone; from rank 0

The first surviving rank of each host prints which rank was lost, unless that rank has printed its
own error there. Then every rank ends, with the exit status of the lost rank if it sent one.
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
from dataclasses import asdict
from typing import Any

from dist_vasp.parallel.link import (
    ANSWER_S,
    MAX_HOST,
    MAX_TEXT,
    Link,
    Loss,
    first_line,
    say_unwatched,
)
from dist_vasp.parallel.secret import Channel, SharedSecret, new_nonce
from dist_vasp.text import one_line

_GRACE_S = 5.0  # after a loss, the time in which the main thread can end by itself
_LINE = 32_768  # bytes
_STRANGERS = 64  # connections without a valid hello
_SILENT_HOST = {
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 25_000,
}  # seconds; the last in ms


class Liveness:
    """Watches the other ranks from this one.

    `server` is a listening socket on rank 0, None elsewhere; `address` is where the others connect
    to. All ranks have the same `secret`; rank 0 removes its file when all have connected.
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
        self._rank = rank
        self._local_rank = local_rank
        self._host = socket.gethostname()
        self._world = world_size
        self._file = secret if isinstance(secret, SharedSecret) else None
        self._secret = secret.value if isinstance(secret, SharedSecret) else secret
        self._lost = threading.Event()
        self._left = threading.Event()
        self._lock = threading.Lock()  # of the links
        self._links: dict[socket.socket, Link] = {}
        self._server = server
        self._expected = world_size - 1
        self._all_connected = threading.Event()
        if server is None and not self._connect(address):
            return  # this rank is not watched, and has printed a warning
        # a forked child must not keep its rank's connections open
        os.register_at_fork(after_in_child=self._forget)
        threading.Thread(target=self._watch, daemon=True).start()
        if world_size > 1:
            self._all_connected.wait(ANSWER_S)

    def leave(self, failed: str = "", status: int = 1) -> None:
        """Tell the others that this process ends.

        `failed`: the error that only this rank has met, and has printed.
        """
        self._left.set()
        self._tell({"failed": failed[:MAX_TEXT], "status": status} if failed else {"goodbye": True})
        if self._file:
            self._file.remove()

    def wait_for_loss(self, seconds: float) -> Loss | None:
        """Return the loss that explains a failed collective, None if there is none."""
        self._lost.wait(seconds)
        return self.loss

    # --- the connections --------------------------------------------------------------------------

    def _connect(self, address: Any) -> bool:
        try:
            connection = socket.create_connection(address, timeout=ANSWER_S)
            server_nonce, nonce = str(json.loads(first_line(connection))["nonce"]), new_nonce()
            channel = Channel(self._secret, server_nonce, nonce, server=False)
            # The hello holds the nonce as plain text: rank 0 needs it to check the signature.
            connection.sendall(
                channel.sign(json.dumps({"nonce": nonce, "rank": self._rank, "host": self._host}))
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = getattr(error, "strerror", None) or error
            say_unwatched(
                self._rank, f"cannot reach rank 0 at {address[0]}:{address[1]} ({reason})"
            )
            return False
        self._add(connection, Link(rank=0, host="", channel=channel))
        return True

    def _add(self, connection: socket.socket, link: Link) -> None:
        connection.setblocking(False)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _SILENT_HOST.items():
                if hasattr(socket, option):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        with self._lock:
            self._links[connection] = link

    def _forget(self) -> None:
        """Close the connections in a forked child: they belong to the parent."""
        for connection in [*self._links, *([self._server] if self._server else [])]:
            with contextlib.suppress(OSError):
                os.close(connection.detach())

    def _tell(self, message: dict[str, Any], except_to: socket.socket | None = None) -> None:
        with self._lock:
            for connection, link in self._links.items():
                if link.channel and connection is not except_to:
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
                    elif not self._receive(key.fileobj):
                        self._drop(key.fileobj, selector)
                for connection, link in list(self._links.items()):
                    if not link.proven and time.monotonic() - link.since > ANSWER_S:
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
            link = Link(rank=-1, host="", nonce=new_nonce())
            self._add(connection, link)
            selector.register(connection, selectors.EVENT_READ)
            connection.send(json.dumps({"nonce": link.nonce}).encode() + b"\n")

    def _drop(self, connection: Any, selector: selectors.BaseSelector) -> None:
        selector.unregister(connection)
        with self._lock:
            link = self._links.pop(connection)
        connection.close()
        if not link.proven and self._server is None:  # it is not rank 0 that answers
            say_unwatched(self._rank, "was not answered by rank 0")
            self._all_connected.set()

    def _receive(self, connection: Any) -> bool:
        """Handle what one connection has sent; return False when the connection is to be closed."""
        link = self._links[connection]
        try:
            data = connection.recv(_LINE)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        if not data:
            if link.proven:
                self._note(Loss(link.rank, link.host, ""), connection)
            return False
        link.buffer += data
        *lines, link.buffer = link.buffer.split(b"\n")
        return len(link.buffer) <= _LINE and all(
            self._handle(line, link, connection) for line in lines
        )

    def _handle(self, line: bytes, link: Link, connection: socket.socket) -> bool:
        """Handle one line; return False when the connection is to be closed."""
        try:
            if link.channel is None:
                self._welcome(line, link, connection)
                return True
            message = json.loads(link.channel.verify(line))
            if not link.proven:
                link.host = one_line(str(message["host"])[:MAX_HOST])
                link.proven = True
                self._all_connected.set()
            elif "lost" in message and self._server is None:
                self._note(Loss.from_message(**message["lost"]), connection)
            elif "failed" in message:
                self._note(
                    Loss.from_message(
                        link.rank, link.host, message["failed"], message.get("status")
                    ),
                    connection,
                )
            return "goodbye" not in message
        except (ValueError, KeyError, TypeError, OSError, RecursionError):
            return False

    def _welcome(self, line: bytes, link: Link, connection: socket.socket) -> None:
        """Handle the hello of a rank, on rank 0; ValueError unless that rank is still expected."""
        claimed = json.loads(line.partition(b" ")[2])
        channel = Channel(self._secret, link.nonce, str(claimed["nonce"]), server=True)
        hello = json.loads(channel.verify(line))
        rank, connected = hello["rank"], {other.rank for other in self._links.values()}
        if type(rank) is not int or not 0 < rank < self._world or rank in connected:
            raise ValueError("this rank is not expected")
        with self._lock:
            link.host = one_line(str(hello["host"])[:MAX_HOST])
            link.rank = rank
            link.channel = channel
            link.proven = True
            connection.send(channel.sign(json.dumps({"host": self._host})))
        self._expected -= 1
        if not self._expected:
            if self._file:
                self._file.remove()
            self._all_connected.set()

    def _note(self, loss: Loss, sender: socket.socket) -> None:
        """Record a loss, send it on, and print it if no other rank of this host has."""
        if self.loss is not None or self._left.is_set():
            return
        self.loss = loss
        self._tell({"lost": asdict(loss)}, except_to=sender)
        first_was_lost = self._local_rank == 1 and loss.rank == self._rank - 1
        is_printed = loss.text and loss.host == self._host
        if (self._local_rank == 0 or first_was_lost) and not is_printed:
            why = f"failed: {loss.text}" if loss.text else "was killed, or its machine is gone"
            print(
                f"error: rank {loss.rank} on {loss.host} {why}; start the same command again",
                file=sys.stderr,
                flush=True,
            )
        self._lost.set()

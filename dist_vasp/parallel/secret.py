"""A secret that the ranks of one job share, and lines of text signed with it.

Every user of the machine can read and write the store at which the ranks meet, so the secret is not
sent through it. Rank 0 writes it to a file that only its own user can read, and the store holds the
file's path. A forged path is useless: the file must belong to this user, be private, and hold a
secret written by this module.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import stat
from pathlib import Path

_NAME = re.compile(r"\.dist_vasp-[0-9a-f]{16}")
_DIGITS = 64  # of the secret, and of a signature
_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class SharedSecret:
    """The secret on rank 0, in a file until `remove`; OSError where `folder` cannot be written."""

    def __init__(self, folder: str | Path) -> None:
        self.value = secrets.token_hex(_DIGITS // 2).encode()
        self.path = os.path.join(os.path.realpath(folder), f".dist_vasp-{secrets.token_hex(8)}")
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as handle:
                handle.write(self.value)
        except OSError:
            self.remove()
            raise

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self.path)


def read_secret(path: str) -> bytes:
    """Return the secret in a file of SharedSecret.

    OSError or ValueError where the file cannot be one that this user's rank 0 has written.
    """
    if not _NAME.fullmatch(os.path.basename(path)):
        raise ValueError("not the name of a secret")
    with os.fdopen(os.open(path, os.O_RDONLY | _FLAGS), "rb") as handle:
        status = os.fstat(handle.fileno())
        private = (
            stat.S_ISREG(status.st_mode)
            and status.st_uid == os.geteuid()
            and not status.st_mode & 0o077
        )
        value = handle.read(_DIGITS + 1) if private else b""
    if not re.fullmatch(rb"[0-9a-f]{%d}" % _DIGITS, value):
        raise ValueError("not a secret of this user")
    return value


def nearest_folder(path: str) -> Path:
    """Return `path` if it is a folder, else the nearest folder above it that exists."""
    folder = Path(path).absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


class Channel:
    """Signed lines of one connection.

    Every line is numbered in its direction, so none can be forged, repeated or sent back. The
    nonces of both ends are part of the key, so lines of other connections are not valid here.
    """

    def __init__(self, secret: bytes, server_nonce: str, client_nonce: str, server: bool) -> None:
        self._key = hmac.digest(secret, f"{server_nonce} {client_nonce}".encode(), hashlib.sha256)
        self._server = server
        self._sent = 0
        self._received = 0

    def sign(self, text: str) -> bytes:
        self._sent += 1
        return f"{self._signature(self._server, self._sent, text)} {text}\n".encode()

    def verify(self, line: bytes) -> str:
        """Return the text of a line that the other end has signed, else raise ValueError."""
        signature, _, text = line.decode().partition(" ")
        self._received += 1
        expected = self._signature(not self._server, self._received, text)
        if not hmac.compare_digest(signature.encode(), expected.encode()):
            raise ValueError("not signed by the other end")
        return text

    def _signature(self, by_server: bool, number: int, text: str) -> str:
        return hmac.new(
            self._key, f"{int(by_server)} {number} {text}".encode(), hashlib.sha256
        ).hexdigest()


def new_nonce() -> str:
    return secrets.token_hex(16)

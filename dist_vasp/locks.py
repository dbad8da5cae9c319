"""Locks that a process holds on a file until it ends.

A filesystem without locks never refuses a lock.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

# errors of filesystems without flock
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def lock_or_owner(path: Path) -> io.FileIO | str:
    """Lock the file `path` and write this process's name into it.

    Return the open file, which holds the lock until it is closed or the process ends. Where another
    process holds the lock, return the name in the file instead. OSError where the file cannot be
    opened; it is never a link.
    """
    descriptor = os.open(path, _FLAGS, 0o666)
    try:
        _check_regular(descriptor, f"{path} is not a regular file", path)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(descriptor, 500, 0).decode(errors="replace").strip()
        os.close(descriptor)
        return owner
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return io.FileIO(descriptor, "r+")


def open_lock(path: Path) -> tuple[int | None, bool]:
    """Lock a lock file that its holder removes; return its descriptor, and whether it is locked.

    The descriptor is None where another process holds the lock. It is not locked where the
    filesystem has no locks.
    """
    while True:
        descriptor = os.open(path, _FLAGS, 0o666)
        try:
            _check_regular(descriptor, "its lock file is not a regular file", path)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.lstat()):
                    return descriptor, True
            os.close(descriptor)  # its holder has just removed it: try again
        except BlockingIOError:
            os.close(descriptor)
            return None, False
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor, False
            os.close(descriptor)
            raise


def _check_regular(descriptor: int, message: str, path: Path) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise OSError(errno.EEXIST, message, str(path))

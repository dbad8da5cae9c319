"""A lost rank is named at once, by one rank of each host, however it went; a rank that leaves on purpose is not missed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from dist_vasp.parallel.liveness import Liveness
from tests.jobs import ROOT

RANK = """
import socket, sys, time
from dist_vasp.parallel import liveness
rank, world, port, fd, host, local_rank, what = (a if a[0].isalpha() else int(a) for a in sys.argv[1:])
liveness.socket.gethostname = lambda: host
liveness._GRACE_S = 0.5
server = socket.socket(fileno=fd) if rank == 0 else None
alive = liveness.Liveness(rank, local_rank, world, "token", ("127.0.0.1", port), server)
print("here", flush=True)
if sys.stdin.readline() and what != "nothing":
    alive.leave("" if what == "leaves" else what)
    sys.exit(0)
time.sleep(60)
"""


class World:
    """`ranks` processes that watch over each other and do nothing else; `does`: what a rank does when told to `go`."""

    def __init__(self, hosts: str, **does: str) -> None:
        server = socket.create_server(("127.0.0.1", 0))
        port, fd = server.getsockname()[1], server.fileno()
        self.ranks = []
        for rank, host in enumerate(hosts):
            local_rank = hosts[:rank].count(host)
            argv = [rank, len(hosts), port, fd if rank == 0 else 0, f"host-{host}", local_rank, does.get(f"rank_{rank}", "nothing")]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            fds = (fd,) if rank == 0 else ()
            self.ranks.append(
                subprocess.Popen([sys.executable, "-c", RANK, *map(str, argv)], cwd=ROOT, text=True, pass_fds=fds, **pipes)
            )
        server.close()
        for process in self.ranks:
            assert process.stdout.readline() == "here\n"

    def go(self, rank: int) -> None:
        self.ranks[rank].stdin.write("go\n")
        self.ranks[rank].stdin.flush()

    def end(self) -> tuple[list[int], list[str]]:
        said = [process.communicate(timeout=30)[1] for process in self.ranks]
        return [process.returncode for process in self.ranks], said

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.ranks:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("hosts", "dead", "speakers"), [("aaa", 2, {0}), ("aaa", 0, {1}), ("aabb", 1, {0, 2}), ("aabb", 2, {0, 3})]
)
def test_a_killed_rank_is_named_once_on_each_host(hosts, dead, speakers):
    with World(hosts) as world:
        world.ranks[dead].send_signal(signal.SIGKILL)
        statuses, said = world.end()
    assert statuses == [-signal.SIGKILL if rank == dead else 1 for rank in range(len(hosts))]
    assert {rank for rank, text in enumerate(said) if text} == speakers
    for rank in speakers:
        assert re.fullmatch(
            f"error: rank {dead} on host-{hosts[dead]} was killed, or .*; start the same command again\n", said[rank]
        )


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_has_said_its_error_is_named_on_other_hosts_only(failing):
    with World("aab", **{f"rank_{failing}": "IndexError: list index out of range"}) as world:
        world.go(failing)
        statuses, said = world.end()
    assert statuses == [0 if rank == failing else 1 for rank in range(3)]
    expected = f"error: rank {failing} on host-a failed: IndexError: list index out of range; start the same command again\n"
    assert said == ["", "", expected]


def test_a_rank_that_leaves_on_purpose_is_not_missed():
    with World("aaa", rank_0="leaves", rank_1="leaves", rank_2="leaves") as world:
        for rank in (1, 0, 2):
            world.go(rank)
            time.sleep(0.3)
        assert world.end() == ([0, 0, 0], ["", "", ""])


def test_strangers_are_not_listened_to():
    """Junk, a wrong token, a line without an end: the ranks go on."""
    server = socket.create_server(("127.0.0.1", 0))
    address = server.getsockname()
    strangers = [socket.create_connection(address) for _ in range(4)]
    lines = [b"\xff\x00{[\n", b'{"token": "wrong", "rank": 1, "host": "h"}\n', b"x" * 9000, b'{"lost": {"rank": 1}}\n']
    for stranger, line in zip(strangers, lines, strict=True):
        stranger.sendall(line)
    alive = Liveness(0, 0, 1, "right", address, server)
    for stranger in strangers:
        stranger.settimeout(10)
        with contextlib.suppress(ConnectionResetError):  # closed with some of the junk unread
            assert stranger.recv(10) == b"", "told nothing, and the connection closed"
    assert alive.wait_for_loss(0) is None
    alive.leave()


def test_a_rank_that_cannot_reach_rank_0_goes_on_unwatched(capfd):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    alive = Liveness(1, 1, 2, "token", address, None)
    assert "warning: rank 1 cannot reach rank 0 at 127.0.0.1" in capfd.readouterr().err
    assert alive.wait_for_loss(0) is None
    alive.leave()


def open_files(pid: int) -> set[str]:
    return {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}


def test_a_forked_worker_does_not_hold_its_ranks_connection():
    """Else the death of a rank would be seen only when its loader workers have ended too."""
    server = socket.create_server(("127.0.0.1", 0))
    address = server.getsockname()
    alive = Liveness(0, 0, 1, "token", address, server)
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        ours, deadline = os.readlink(f"/proc/self/fd/{server.fileno()}"), time.monotonic() + 10
        assert ours.startswith("socket:")
        while ours in open_files(child) and time.monotonic() < deadline:
            time.sleep(0.01)  # it has not come to it yet
        assert ours not in open_files(child)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        alive.leave()

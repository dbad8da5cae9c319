"""A lost rank is named at once, by one rank of each host, however it went; a rank that leaves on
purpose is not missed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dist_vasp.parallel.link import Loss
from dist_vasp.parallel.liveness import Liveness
from dist_vasp.parallel.secret import Channel, SharedSecret, read_secret
from tests.support.paths import ROOT

RANK = """
import socket, sys, time
from dist_vasp.parallel import liveness
arguments = [a if a[0].isalpha() else int(a) for a in sys.argv[1:]]
rank, world, port, fd, host, local_rank, what = arguments
liveness.socket.gethostname = lambda: host
liveness._GRACE_S = 0.5
server = socket.socket(fileno=fd) if rank == 0 else None
alive = liveness.Liveness(rank, local_rank, world, b"secret", ("127.0.0.1", port), server)
print("here", flush=True)
if sys.stdin.readline() and what != "nothing":
    alive.leave("" if what == "leaves" else what)
    sys.exit(0)
time.sleep(60)
"""


class World:
    """`ranks` processes that watch over each other and do nothing else; `does`: what a rank does
    when told to `go`."""

    def __init__(self, hosts: str, **does: str) -> None:
        server = socket.create_server(("127.0.0.1", 0))
        port, fd = server.getsockname()[1], server.fileno()
        self.ranks = []
        for rank, host in enumerate(hosts):
            local_rank = hosts[:rank].count(host)
            argv = [
                rank,
                len(hosts),
                port,
                fd if rank == 0 else 0,
                f"host-{host}",
                local_rank,
                does.get(f"rank_{rank}", "nothing"),
            ]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            fds = (fd,) if rank == 0 else ()
            self.ranks.append(
                subprocess.Popen(
                    [sys.executable, "-c", RANK, *map(str, argv)],
                    cwd=ROOT,
                    text=True,
                    pass_fds=fds,
                    **pipes,
                )
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
    ("hosts", "dead", "speakers"),
    [("aaa", 2, {0}), ("aaa", 0, {1}), ("aabb", 1, {0, 2}), ("aabb", 2, {0, 3})],
)
def test_a_killed_rank_is_named_once_on_each_host(hosts, dead, speakers):
    with World(hosts) as world:
        world.ranks[dead].send_signal(signal.SIGKILL)
        statuses, said = world.end()
    assert statuses == [-signal.SIGKILL if rank == dead else 1 for rank in range(len(hosts))]
    assert {rank for rank, text in enumerate(said) if text} == speakers
    for rank in speakers:
        assert re.fullmatch(
            f"error: rank {dead} on host-{hosts[dead]} was killed, or .*; start "
            f"the same command again\n",
            said[rank],
        )


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_has_said_its_error_is_named_on_other_hosts_only(failing):
    with World("aab", **{f"rank_{failing}": "IndexError: list index out of range"}) as world:
        world.go(failing)
        statuses, said = world.end()
    assert statuses == [0 if rank == failing else 1 for rank in range(3)]
    expected = (
        f"error: rank {failing} on host-a failed: IndexError: list index out of "
        f"range; start the same command again\n"
    )
    assert said == ["", "", expected]


def test_a_rank_that_leaves_on_purpose_is_not_missed():
    with World("aaa", rank_0="leaves", rank_1="leaves", rank_2="leaves") as world:
        for rank in (1, 0, 2):
            world.go(rank)
            time.sleep(0.3)
        assert world.end() == ([0, 0, 0], ["", "", ""])


def hello(rank: int, secret: bytes, nonce: str) -> tuple[Channel, bytes]:
    channel = Channel(secret, nonce, "mine", server=False)
    return channel, channel.sign(json.dumps({"nonce": "mine", "rank": rank, "host": "h"}))


def nonce_of(connection: socket.socket) -> str:
    connection.settimeout(10)
    return json.loads(connection.makefile("rb").readline())["nonce"]


def test_strangers_are_not_listened_to():
    """Junk, a wrong secret, a greeting of another connection, a line without an end: the ranks go
    on."""
    server = socket.create_server(("127.0.0.1", 0))
    address = server.getsockname()
    alive = Liveness(0, 0, 1, b"right", address, server)
    alive._world = 3  # two could still come
    other = nonce_of(socket.create_connection(address))
    lines = [
        b"\xff\x00{[\n",
        b'{"token": "right", "rank": 1, "host": "h"}\n',
        b"x" * 40_000,
        b"0 " + b"[" * 30_000 + b"\n",
    ]
    lines += [
        hello(1, b"wrong", "?")[1],
        hello(1, b"right", other)[1],
        b'0 {"lost": {"rank": 1}}\n',
    ]
    for line in lines:
        stranger = socket.create_connection(address)
        nonce_of(stranger)
        with contextlib.suppress(ConnectionError):  # closed with some of the junk unread
            stranger.sendall(line)
            assert stranger.recv(10) == b"", "told nothing, and the connection closed"
    assert alive.wait_for_loss(0) is None
    alive.leave()


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            {"failed": "all is well\x1b[2J\u202e\n", "status": 0},
            Loss(1, "h", r"all is well\x1b[2J\u202e", 1),
        ),
        ({"failed": "x", "status": 256}, Loss(1, "h", "x", 1)),
        ({"failed": "x", "status": True}, Loss(1, "h", "x", 1)),
        ({"failed": "x", "status": -9}, Loss(1, "h", "x", 1)),
        ({"failed": "x"}, Loss(1, "h", "x", 1)),
        ({"failed": "y" * 9000, "status": 2}, Loss(1, "h", "y" * 2000, 2)),
        ({"failed": 7, "status": 2}, None),
        (
            {"lost": {"rank": 2, "host": "h", "text": "", "status": 0}},
            None,
        ),  # rank 0 alone says that
    ],
)
def test_what_a_failing_rank_says_is_no_success(monkeypatch, capfd, message, expected):
    """A status that is no failure, characters that control a terminal, no end of text."""
    monkeypatch.setattr("dist_vasp.parallel.liveness._GRACE_S", 60)
    server = socket.create_server(("127.0.0.1", 0))
    address = server.getsockname()
    alive = Liveness(0, 0, 1, b"right", address, server)
    alive._world = 2
    with socket.create_connection(address) as rank:
        channel, line = hello(1, b"right", nonce_of(rank))
        rank.sendall(line)
        assert json.loads(channel.verify(rank.makefile("rb").readline().strip())) == {
            "host": socket.gethostname()
        }
        rank.sendall(channel.sign(json.dumps(message)))
        assert alive.wait_for_loss(10 if expected else 0.3) == expected
        alive.leave()
    said = capfd.readouterr().err
    assert said.count("\n") == (1 if expected else 0) and said.replace("\n", "").isprintable()


def test_somebody_in_rank_0s_place_ends_nothing(capfd):
    """It knows no secret: what it says is not believed, and its end is not the end of rank 0."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address, results = server.getsockname(), []
        thread = threading.Thread(
            target=lambda: results.append(Liveness(1, 1, 2, b"right", address, None))
        )
        thread.start()
        impostor, _ = server.accept()
        impostor.sendall(
            b'{"nonce": "n"}\n' + Channel(b"wrong", "n", "n", server=True).sign('{"host": "h"}')
        )
        impostor.recv(10)
        impostor.close()
        thread.join(30)
    assert results[0].wait_for_loss(0.2) is None
    results[0].leave()
    assert "if a rank dies the others may take long to notice" in capfd.readouterr().err


def test_a_line_is_good_once_on_one_connection_in_one_direction():
    ours, theirs = Channel(b"s", "a", "b", server=False), Channel(b"s", "a", "b", server=True)
    first, second = ours.sign("one"), ours.sign("two")
    assert theirs.verify(first.strip()) == "one"
    for channel, line in (
        (theirs, first),  # again
        (Channel(b"s", "a", "b", server=True), second),  # before the first
        (Channel(b"s", "a", "b", server=False), first),  # turned back
        (Channel(b"s", "x", "b", server=True), first),  # another connection
        (Channel(b"s", "a", "b", server=True), first.replace(b"one", b"two")),
    ):
        with pytest.raises(ValueError, match="not signed"):
            channel.verify(line.strip())


def test_the_secret_is_readable_by_its_user_alone(tmp_path):
    secret = SharedSecret(tmp_path)
    assert os.stat(secret.path).st_mode & 0o777 == 0o600
    assert read_secret(secret.path) == secret.value
    link = tmp_path / ".dist_vasp-0123456789abcdef"
    link.symlink_to(secret.path)
    plain, loose = tmp_path / "plain", tmp_path / ".dist_vasp-fedcba9876543210"
    plain.write_bytes(secret.value)
    loose.write_bytes(secret.value)
    plain.chmod(0o600)
    loose.chmod(0o640)
    other = SharedSecret(tmp_path)
    Path(other.path).write_bytes(b"a private key")
    for path in (link, plain, loose, other.path, tmp_path / ".dist_vasp-aaaaaaaaaaaaaaaa", ""):
        with pytest.raises((OSError, ValueError)):
            read_secret(str(path))
    secret.remove()
    assert not os.path.exists(secret.path)


def test_a_rank_that_cannot_reach_rank_0_goes_on_unwatched(capfd):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    alive = Liveness(1, 1, 2, b"secret", address, None)
    assert "warning: rank 1 cannot reach rank 0 at 127.0.0.1" in capfd.readouterr().err
    assert alive.wait_for_loss(0) is None
    alive.leave()


def open_files(pid: int) -> set[str]:
    """What a process holds open now; a file that it closes meanwhile is left out."""
    files = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            files.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return files


def test_a_forked_worker_does_not_hold_its_ranks_connection():
    """Else the death of a rank would be seen only when its loader workers have ended too."""
    server = socket.create_server(("127.0.0.1", 0))
    address = server.getsockname()
    alive = Liveness(0, 0, 1, b"secret", address, server)
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

"""The process group listens on the loopback, or on the interface it is given, and nowhere else."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from dist_vasp.parallel.network import choose_interface, listen
from tests.support.fuzz_server import arguments
from tests.support.jobs import Job, RunFolder
from tests.support.make_shards import write_folder

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


@pytest.fixture
def unset(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # remembers what to put back
        monkeypatch.delenv(name)


def listening(pid: int) -> set[str]:
    """Addresses, as /proc writes them, on which a process listens."""
    sockets = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            sockets.add(os.readlink(descriptor))
        except OSError:
            continue  # closed meanwhile
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].split(":")[0])
    return found


@pytest.mark.slow
def test_ranks_listen_on_the_loopback_only(tmp_path):
    write_folder(tmp_path / "shards", [[u % 9, 9 + u % 7] for u in range(64)], n_items=20)
    more = (
        "--optimizer.schedule",
        "[{epochs: 100000, lr: 0.001}]",
        "--run.checkpoint_every_steps",
        "100000",
    )
    argv = arguments(tmp_path, tmp_path / "run", "vasp", 0, *more)
    with Job(*argv, log=tmp_path / "log") as job:
        job.wait_until(lambda: RunFolder(tmp_path / "run").step() >= 2, "the second step")
        found = {pid: listening(pid) for pid in job.ranks()}
    assert len(found) == 2
    assert set.union(*found.values())
    assert all(addresses <= LOOPBACK for addresses in found.values()), found


def test_loopback_where_all_ranks_are_here(unset):
    choose_interface("", is_one_host=False)
    assert not any(name in os.environ for name in VARIABLES)
    choose_interface("", is_one_host=True)
    assert {os.environ[name] for name in VARIABLES} <= {"lo", "lo0"}


def test_the_given_interface_wins_over_the_environment_and_that_over_the_loopback(unset):
    os.environ["NCCL_SOCKET_IFNAME"] = "eth7"
    choose_interface("", is_one_host=True)
    assert os.environ["NCCL_SOCKET_IFNAME"] == "eth7"
    choose_interface("lo", is_one_host=False)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_an_interface_of_the_environment_that_does_not_exist(unset):
    os.environ["GLOO_SOCKET_IFNAME"] = "eth99"
    with pytest.raises(
        ValueError,
        match=r"GLOO_SOCKET_IFNAME is 'eth99' in the environment, but 'eth99' is not one of .*lo",
    ):
        choose_interface("", is_one_host=True)


def test_an_interface_that_does_not_exist(unset):
    with pytest.raises(ValueError, match=r"parallel\.interface is 'eth99', expected one of .*lo"):
        choose_interface("eth99", is_one_host=True)


def address_of(descriptor: int | None) -> tuple[str, int]:
    assert descriptor is not None
    with socket.socket(fileno=descriptor) as server:
        return server.getsockname()[:2]


def test_the_store_listens_on_the_master_address_alone():
    address, port = address_of(listen("127.0.0.1", 0, "", is_one_host=True))
    assert (address, port > 0) == ("127.0.0.1", True)


def test_a_host_that_takes_its_own_name_for_the_loopback(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    assert listen("127.0.0.1", 0, "", is_one_host=False) is None  # the others could not come in
    assert address_of(listen("127.0.0.1", 0, "lo", is_one_host=False))[0] == "127.0.0.1"


def test_an_address_that_is_not_here(monkeypatch):
    """Such as that of a service: the host's own is taken, where its name has one."""
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    assert listen("192.0.2.1", 0, "", is_one_host=False) is None
    assert address_of(listen("192.0.2.1", 0, "lo", is_one_host=False))[0] == "127.0.0.1"


def test_a_port_that_is_taken():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(
            ValueError,
            match=r"port \d+ of 127\.0\.0\.1 is in use; choose another with --master_port",
        ):
            listen("127.0.0.1", other.getsockname()[1], "", is_one_host=True)

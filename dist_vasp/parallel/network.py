"""Choose the addresses on which the ranks listen.

They listen on the loopback where all ranks are on one machine, else on the chosen interface. By
default gloo would listen on the address that the host's name resolves to, and torch's rendezvous
store on every address.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket

import psutil

LOOPBACK = "127.0.0.1"
_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def choose_interface(interface: str, is_one_host: bool) -> None:
    """Make gloo and NCCL use `interface`, or the loopback if all ranks are on this host.

    Variables that are set already are kept unless `interface` is given. ValueError where the
    machine has no such interface.
    """
    present = [name for _, name in socket.if_nameindex()]
    if interface and interface not in present:
        raise ValueError(
            f"parallel.interface is {interface!r}, expected one of {', '.join(present)}; or leave "
            "it empty"
        )
    loopback = next((name for name in ("lo", "lo0") if name in present), "") if is_one_host else ""
    for variable in _VARIABLES:
        if interface:
            os.environ[variable] = interface
        elif loopback:
            os.environ.setdefault(variable, loopback)
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if unknown := [name for name in chosen.split(",") if chosen and name not in present]:
        raise ValueError(
            f"GLOO_SOCKET_IFNAME is {chosen!r} in the environment, but {unknown[0]!r} is not one "
            f"of {', '.join(present)}; unset it"
        )


def listen(address: str, port: int, interface: str, is_one_host: bool) -> int | None:
    """Return a listening socket for the rendezvous store, on the address of MASTER_ADDR only.

    Some hosts resolve their own name to the loopback, where other hosts cannot reach them, and some
    addresses are only forwarded to a host (the name of a service). Then, with ranks on several
    hosts, the address of `interface` is used, or the one that the host's name resolves to. Return
    None where none of these works: torch then listens on every address. ValueError where the port
    is in use, or may not be used.
    """
    for where in _addresses(address, interface, is_one_host):
        try:
            return _listen_at(where, port).detach()
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                why = "is in use" if error.errno == errno.EADDRINUSE else "may not be used"
                raise ValueError(
                    f"port {port} of {address} {why}; choose another with --master_port"
                ) from None
            if error.errno != errno.EADDRNOTAVAIL:
                raise ValueError(
                    f"MASTER_ADDR {address} cannot be listened on ({error.strerror}); choose "
                    "another"
                ) from None
    return None


def private_server(address: str, interface: str, is_one_host: bool) -> socket.socket:
    """Return a listening socket on a free port, at the address that `listen` chooses."""
    listening = listen(address, 0, interface, is_one_host)
    return socket.create_server(("", 0)) if listening is None else socket.socket(fileno=listening)


def _addresses(address: str, interface: str, is_one_host: bool) -> list[str]:
    """Return the addresses to try, best first."""
    wanted = _resolve(address)
    if is_one_host:
        return wanted
    of_interface = [
        a.address
        for a in psutil.net_if_addrs().get(interface, [])
        if a.family in (socket.AF_INET, socket.AF_INET6)
    ]
    if interface:
        return [a for a in wanted if not _is_loopback(a)] + of_interface
    return [a for a in (*wanted, *_resolve(socket.gethostname())) if not _is_loopback(a)]


def _resolve(name: str) -> list[str]:
    try:
        return [str(entry[4][0]) for entry in socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)]
    except OSError:
        return []


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.split("%")[0]).is_loopback


def _listen_at(where: str, port: int) -> socket.socket:
    family, kind, protocol, _, at = socket.getaddrinfo(where, port, type=socket.SOCK_STREAM)[0]
    server = socket.socket(family, kind, protocol)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(at)
        server.listen(socket.SOMAXCONN)
    except OSError:
        server.close()
        raise
    return server

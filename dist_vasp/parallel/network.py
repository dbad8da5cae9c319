"""On which addresses the ranks listen: the loopback where all of them are on one machine, else the interface that was chosen.

Left to themselves gloo listens on the address that the host's name resolves to, and torch's rendezvous store on every address.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket

import psutil

_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def choose_interface(interface: str, all_here: bool) -> None:
    """Tell gloo and NCCL to use `interface`, or where there is none and all ranks are here, the loopback.

    A choice that is already in the environment stands unless `interface` is given. ValueError where the machine has no such
    interface.
    """
    present = [name for _, name in socket.if_nameindex()]
    if interface and interface not in present:
        raise ValueError(f"parallel.interface is {interface!r}, expected one of {', '.join(present)}; or leave it empty")
    loopback = next((name for name in ("lo", "lo0") if name in present), "") if all_here else ""
    for variable in _VARIABLES:
        if interface:
            os.environ[variable] = interface
        elif loopback:
            os.environ.setdefault(variable, loopback)


def listen(address: str, port: int, interface: str, all_here: bool) -> int | None:
    """A listening socket for the rendezvous store on the address of MASTER_ADDR alone; None: let torch listen everywhere.

    Some hosts take their own name for the loopback, where the others would not find them: with ranks elsewhere the address of
    `interface` is used then. ValueError where the port is taken.
    """
    family, _, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    if ipaddress.ip_address(str(where[0]).split("%")[0]).is_loopback and not all_here:
        addresses = [a.address for a in psutil.net_if_addrs().get(interface, []) if a.family == family]
        if not addresses:
            return None
        where = (addresses[0], port)
    server = socket.socket(family, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind(where)
        server.listen(socket.SOMAXCONN)
    except OSError as error:
        server.close()
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"port {port} of {address} is in use; choose another with --master_port") from None
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        return None  # an address that only leads here, as the name of a service does
    return server.detach()

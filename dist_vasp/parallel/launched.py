"""Read and check the environment variables that a launcher (deepspeed, torchrun, srun) sets."""

from __future__ import annotations

import os
import re
import socket
from typing import NamedTuple

_HINT = "unset it, or start with deepspeed or torchrun"


class LaunchedRank(NamedTuple):
    """This process among all that the launcher has started."""

    rank: int
    world_size: int
    local_rank: int
    local_world: int  # ranks on this host

    @property
    def is_one_host(self) -> bool:
        """Whether all ranks run on this host."""
        return self.local_world == self.world_size


def launched_world() -> LaunchedRank:
    """Return what the launcher says about this rank; without a launcher there is one rank.

    ValueError names the variable that is not a number, or contradicts the others.
    """
    world = _number("WORLD_SIZE", 1, at_least=1)
    for variable in ("RANK", "WORLD_SIZE"):
        other = "WORLD_SIZE" if variable == "RANK" else "RANK"
        if variable in os.environ and other not in os.environ and (variable == "RANK" or world > 1):
            raise ValueError(
                f"{variable} is {os.environ[variable]} in the environment but {other} is not set; "
                f"{_HINT}"
            )
    rank = _number("RANK", 0)
    if rank >= world:
        raise ValueError(
            f"RANK is {rank} in the environment, expected 0 to {world - 1} with WORLD_SIZE "
            f"{world}; {_HINT}"
        )
    here = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "LOCAL_SIZE"
    local_world = _number(here, world, at_least=1)
    if local_world > world:
        raise ValueError(
            f"{here} is {local_world} in the environment, expected at most WORLD_SIZE {world}; "
            f"{_HINT}"
        )
    if "LOCAL_RANK" not in os.environ and 1 < local_world < world:
        raise ValueError(
            f"LOCAL_RANK is not set in the environment, expected 0 to {local_world - 1} with "
            f"{here} {local_world}; set it, or start with deepspeed or torchrun"
        )
    local_rank = _number("LOCAL_RANK", rank if local_world == world else 0)
    if local_rank >= local_world:
        raise ValueError(
            f"LOCAL_RANK is {local_rank} in the environment, expected 0 to {local_world - 1} with "
            f"{here} {local_world}; {_HINT}"
        )
    return LaunchedRank(rank, world, local_rank, local_world)


def meeting_point(world_size: int) -> tuple[str, int]:
    """Return (MASTER_ADDR, MASTER_PORT), where the ranks meet; ValueError if unusable."""
    for variable in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(variable):
            raise ValueError(
                f"WORLD_SIZE is {world_size} but {variable} is not set; start with deepspeed or "
                "torchrun"
            )
    address, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT", 0)
    if not 1 <= port <= 65535:
        raise ValueError(
            f"MASTER_PORT is {port} in the environment, expected 1 to 65535; choose one with "
            "--master_port"
        )
    try:
        socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"MASTER_ADDR is {address!r} in the environment, which is no host ({reason}); choose "
            "one with --master_addr"
        ) from None
    return address, port


def threads_per_rank(local_world: int) -> int:
    """Return the threads of one rank: OMP_NUM_THREADS if the user has set it, else cores / ranks.

    torchrun sets OMP_NUM_THREADS to 1 where it was not set, so a 1 under torchrun is ignored.
    """
    cores = max(1, len(os.sched_getaffinity(0)) // local_world)
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if by_torchrun or not os.environ.get("OMP_NUM_THREADS"):
        return cores
    first = os.environ["OMP_NUM_THREADS"].split(",")[0]  # OpenMP's list for nested levels
    return _whole("OMP_NUM_THREADS", first.strip(), 1, "unset it, or set the threads of a rank")


def _number(variable: str, default: int, at_least: int = 0) -> int:
    text = os.environ.get(variable)
    return default if text is None else _whole(variable, text, at_least, _HINT)


def _whole(variable: str, text: str, at_least: int, hint: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < at_least:
        raise ValueError(
            f"{variable} is {text[:80]!r} in the environment, expected a whole number of at least "
            f"{at_least}; {hint}"
        )
    return int(text)

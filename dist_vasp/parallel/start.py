"""Start and end this process's part in a job: join the process group, notice lost ranks, leave."""

from __future__ import annotations

import datetime
import json
import os
import tempfile

import torch
import torch.distributed as dist

from dist_vasp.parallel.comm import Ranks, form_groups
from dist_vasp.parallel.launched import (
    LaunchedRank,
    launched_world,
    meeting_point,
    threads_per_rank,
)
from dist_vasp.parallel.link import Loss, say_unwatched
from dist_vasp.parallel.liveness import Liveness
from dist_vasp.parallel.network import LOOPBACK, choose_interface, listen, private_server
from dist_vasp.parallel.partition import Layout
from dist_vasp.parallel.secret import SharedSecret, nearest_folder, read_secret

_ALL_STARTED_S = 300.0  # hosts of one job do not start at the same moment
_liveness: Liveness | None = None  # one per process, like torch's default group
_LOST_PEER_SIGNS = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "gloo",
    "nccl",
)


class LostPeerError(RuntimeError):
    """Another rank did not start, or is gone."""


def resolve_device(device: str, local_rank: int) -> torch.device:
    """Return the device that a name stands for; `auto` is this rank's CUDA device, else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                "device is cuda but this machine offers no CUDA device; use --device cpu"
            )
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {local_rank} has no CUDA device of its own: "
                f"{torch.cuda.device_count()} found; start fewer ranks"
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device(device)


def init_ranks(
    partitions: int = 0,
    replicas: int = 1,
    device: str = "auto",
    timeout_s: float = 1800,
    threads: int = 0,
    interface: str = "",
    shared: str = "",
) -> Ranks:
    """Join the process group that the launcher describes, and form the groups of this layout.

    Without a launcher there is one rank. `shared`: a folder on a filesystem that all hosts share;
    it need not exist yet. ValueError when partitions x replicas is not the number of ranks, when
    the device or `interface` does not exist, or when the environment does not describe a group.
    """
    launched = launched_world()
    layout = Layout.of(launched.world_size, partitions, replicas)
    torch_device = resolve_device(device, launched.local_rank)
    torch.set_num_threads(threads or threads_per_rank(launched.local_world))
    if not dist.is_initialized():
        backend = "nccl" if torch_device.type == "cuda" else "gloo"
        _join(launched, backend, timeout_s, interface, shared)
    return form_groups(launched.rank, layout, torch_device)


def _join(
    launched: LaunchedRank, backend: str, timeout_s: float, interface: str, shared: str
) -> None:
    """Meet the other ranks at a store, start to watch them, and start the process group."""
    global _liveness
    rank, world_size = launched.rank, launched.world_size
    timeout = datetime.timedelta(seconds=timeout_s)
    start_up = datetime.timedelta(seconds=min(timeout_s, _ALL_STARTED_S))
    choose_interface(interface, launched.is_one_host)
    if world_size == 1:
        store: dist.Store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    address, port = meeting_point(world_size)
    if launched.is_one_host:
        address = LOOPBACK  # the name of this machine may resolve to an address open to others
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun serves the store
            store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=start_up))
        else:
            socket_fd = None
            if rank == 0:
                socket_fd = listen(address, port, interface, launched.is_one_host)
            store = dist.TCPStore(
                address, port, world_size, rank == 0, timeout=start_up, master_listen_fd=socket_fd
            )
        _liveness = _watch_ranks(launched, store, address, interface, shared)
    except dist.DistError as error:
        text = (
            f"rank {rank} waited {start_up.seconds} s for {world_size} ranks to start, but some "
            f"never came ({error})"
        )
        hint = ""
        if launched.is_one_host:
            hint = "set LOCAL_SIZE to the ranks of this machine if others run elsewhere; "
        raise LostPeerError(
            f"{text}; {hint}see what the others say, and start the same command again"
        ) from None
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _watch_ranks(
    launched: LaunchedRank, store: dist.Store, address: str, interface: str, shared: str
) -> Liveness | None:
    """Connect this rank to the liveness server of rank 0; return None where that is impossible.

    Rank 0 listens on a port of its own, at the address of the store, and publishes it in the store.
    Every user of this machine can read and write the store, so the secret is in a file that only
    this user can read, and the store holds the file's path.
    """
    rank, world_size, local_rank, _ = launched
    if rank == 0:
        server = private_server(address, interface, launched.is_one_host)
        try:
            folder = tempfile.gettempdir() if launched.is_one_host else nearest_folder(shared)
            secret = SharedSecret(folder)
        except OSError as error:
            say_unwatched(rank, f"cannot write a file for its user alone ({error})")
            store.set("liveness", json.dumps(["", address, 0]))
            return None
        store.set("liveness", json.dumps([secret.path, address, server.getsockname()[1]]))
        return Liveness(rank, local_rank, world_size, secret, (address, 0), server)
    try:
        path, host, port = json.loads(store.get("liveness"))
        return Liveness(
            rank, local_rank, world_size, read_secret(str(path)), (str(host), int(port)), None
        )
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        say_unwatched(rank, f"cannot read the secret of rank 0 ({error})")
        return None


def is_initialized() -> bool:
    return dist.is_initialized()


def is_lost_peer(error: RuntimeError) -> bool:
    """Return whether a collective failed because another rank is gone."""
    text = str(error).lower()
    return isinstance(error, dist.DistBackendError | LostPeerError) or any(
        sign in text for sign in _LOST_PEER_SIGNS
    )


def leave(failed: str = "", status: int = 1) -> None:
    """Tell the other ranks that this process ends.

    `failed`: the error that only this rank has met, and has printed.
    """
    if _liveness:
        _liveness.leave(failed, status)


def lost_rank(wait_s: float) -> Loss | None:
    """Return the rank whose end explains that a collective has just failed, None if there is none.

    Its loss has already been reported to the user.
    """
    return _liveness.wait_for_loss(wait_s) if _liveness else None


def shut_down() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()

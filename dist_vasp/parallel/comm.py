"""Process groups and collectives: the only user of torch.distributed.

Two kinds of group cross each other (DESIGN.md, section 3):

    partition group   the P ranks of one replica, which share the catalogue out among them
    replica group     the ranks of all replicas that own the same item range

Collectives never write into their input and always return the reduced buffer; over one rank each is
the identity.

Shapes: B rows of this rank, G = P * B rows of the partition group.
"""

from __future__ import annotations

import datetime
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dist_vasp.parallel.launched import launched_world, meeting_point, threads_per_rank
from dist_vasp.parallel.liveness import Liveness, Loss, say_unwatched
from dist_vasp.parallel.network import LOOPBACK, choose_interface, listen, private_server
from dist_vasp.parallel.partition import ItemPartition, Layout
from dist_vasp.parallel.secret import SharedSecret, nearest_folder, read_secret

_MESSAGE_BYTES = 1024
_ALL_STARTED_S = 300.0  # hosts of one job do not start at the same moment
_liveness: Liveness | None = None  # of this process's group, as torch keeps one default group


class AgreedError(ValueError):
    """A user's error that every rank raises together, so that rank 0 alone reports it."""


class LostPeerError(RuntimeError):
    """Another rank never came, or is gone."""


@dataclass
class Group:
    """Some ranks that talk to each other; by collective, the bytes this rank has put on the wire
    and the seconds it waited."""

    size: int
    rank: int  # this rank's place in the group
    handle: dist.ProcessGroup | None = None
    bytes_moved: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(
        default_factory=dict
    )  # of the host: on a GPU a collective only enters a queue

    def count(self, collective: str, n_bytes: int, since: float) -> None:
        self.bytes_moved[collective] = self.bytes_moved.get(collective, 0) + n_bytes
        self.seconds[collective] = self.seconds.get(collective, 0.0) + time.perf_counter() - since


@dataclass(frozen=True)
class Ranks:
    """Where this process stands: the world, its partition group and its replica group."""

    rank: int
    layout: Layout
    device: torch.device
    world: Group
    partition_group: Group
    replica_group: Group

    @property
    def world_size(self) -> int:
        return self.layout.world_size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def bytes_moved(self) -> dict[str, int]:
        """Bytes this rank has put on the wire so far, by collective, in all its groups; the trunk
        engine's own only where somebody counts them."""
        moved: dict[str, int] = {}
        for group in (self.world, self.partition_group, self.replica_group):
            for name, n_bytes in group.bytes_moved.items():
                moved[name] = moved.get(name, 0) + n_bytes
        return moved

    def partition_of_items(self, n_items: int) -> ItemPartition:
        return ItemPartition(n_items, self.layout.partitions, self.layout.partition_of(self.rank))


def resolve_device(device: str, local_rank: int) -> torch.device:
    """`auto` is this rank's CUDA device where there is one, else the CPU."""
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
    """Join the process group that the launcher describes (one rank without a launcher) and cut it
    into groups.

    `shared`: a folder, perhaps still to be made, on a filesystem that all hosts share. Raises ValueError when partitions x replicas
    is not the number of ranks, the device or `interface` does not exist, or the environment does not describe a group.
    """
    rank, world_size, local_rank, local_world = launched_world()
    layout = Layout.of(world_size, partitions, replicas)
    torch_device = resolve_device(device, local_rank)
    torch.set_num_threads(threads or threads_per_rank(local_world))
    if not dist.is_initialized():
        _join(rank, world_size, local_rank, local_world, torch_device, timeout_s, interface, shared)
    return form_groups(rank, layout, torch_device)


def _join(
    rank: int,
    world_size: int,
    local_rank: int,
    local_world: int,
    device: torch.device,
    timeout_s: float,
    interface: str,
    shared: str,
) -> None:
    """Meet the other ranks at a store, start the process group, and from then on know who is still
    there."""
    global _liveness
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout, start_up = (
        datetime.timedelta(seconds=s) for s in (timeout_s, min(timeout_s, _ALL_STARTED_S))
    )
    all_here = local_world == world_size
    choose_interface(interface, all_here)
    if world_size == 1:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
        return
    address, port = meeting_point(world_size)
    if all_here:
        address = LOOPBACK  # the name of this machine may stand for an address that others reach
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store, _, _ = next(
                dist.rendezvous("env://", rank, world_size, timeout=start_up)
            )  # torchrun serves the store itself
        else:
            listening = listen(address, port, interface, all_here) if rank == 0 else None
            store = dist.TCPStore(
                address, port, world_size, rank == 0, timeout=start_up, master_listen_fd=listening
            )
        _liveness = _watch_over(
            rank, local_rank, world_size, store, address, interface, all_here, shared
        )
    except dist.DistError as error:
        text = (
            f"rank {rank} waited {start_up.seconds} s for {world_size} ranks to start, but some "
            f"never came ({error})"
        )
        hint = (
            "set LOCAL_SIZE to the ranks of this machine if others run elsewhere; "
            if all_here
            else ""
        )
        raise LostPeerError(
            f"{text}; {hint}see what the others say, and start the same command again"
        ) from None
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _watch_over(
    rank: int,
    local_rank: int,
    world_size: int,
    store: dist.Store,
    address: str,
    interface: str,
    all_here: bool,
    shared: str,
) -> Liveness | None:
    """Rank 0 listens where the store does, on a port of its own, and tells the others at the store;
    None: it cannot be done.

    Anybody on this machine can read and write the store: the secret itself lies in a file that only
    this user can read.
    """
    if rank == 0:
        server = private_server(address, interface, all_here)
        try:
            secret = SharedSecret(tempfile.gettempdir() if all_here else nearest_folder(shared))
        except OSError as error:
            say_unwatched(rank, f"cannot write a file for its user alone ({error})")
            store.set("liveness", json.dumps(["", address, 0]))
            return None
        store.set("liveness", json.dumps([secret.path, address, server.getsockname()[1]]))
        return Liveness(rank, local_rank, world_size, secret, (address, 0), server)
    try:
        path, at, port = json.loads(store.get("liveness"))
        return Liveness(
            rank, local_rank, world_size, read_secret(str(path)), (str(at), int(port)), None
        )
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        say_unwatched(rank, f"cannot read the secret of rank 0 ({error})")
        return None


def form_groups(rank: int, layout: Layout, device: torch.device) -> Ranks:
    """The groups of `layout` over an initialised process group.

    Every rank creates every group, in one order.
    """
    P, R = layout.partitions, layout.replicas
    world = Group(layout.world_size, rank, None)
    if R == 1:
        partition_group, replica_group = Group(P, rank, None), Group(1, 0)
    else:
        across = [
            dist.new_group([p + r * P for r in range(R)]) if P > 1 else None for p in range(P)
        ]
        within = (
            [dist.new_group([r * P + p for p in range(P)]) for r in range(R)]
            if P > 1
            else [None] * R
        )
        partition_group = Group(P, layout.partition_of(rank), within[layout.replica_of(rank)])
        replica_group = Group(R, layout.replica_of(rank), across[layout.partition_of(rank)])
    return Ranks(rank, layout, device, world, partition_group, replica_group)


def is_initialized() -> bool:
    return dist.is_initialized()


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone."""
    text = str(error).lower()
    return isinstance(error, dist.DistBackendError | LostPeerError) or any(
        sign in text
        for sign in (
            "connection closed by peer",
            "connection reset by peer",
            "broken pipe",
            "gloo",
            "nccl",
        )
    )


def leave(failed: str = "", status: int = 1) -> None:
    """Before this process ends: tell the others that it does.

    `failed`: the error that this rank alone has met and printed.
    """
    if _liveness:
        _liveness.leave(failed, status)


def lost_rank(wait_s: float) -> Loss | None:
    """The rank whose end explains that a collective has just failed; it has been named already.

    None: no rank is known to be lost.
    """
    return _liveness.wait_for_loss(wait_s) if _liveness else None


def shut_down() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


# --- collectives ----------------------------------------------------------------------------------


def all_gather(local: Tensor, group: Group) -> Tensor:
    """(B, ...) on each rank -> (size * B, ...) on every rank, in the order of the ranks."""
    return local if group.size == 1 else Gathering(local, group).wait()


class Gathering:
    """An `all_gather` that goes on while this rank does other work, until `wait`."""

    def __init__(self, local: Tensor, group: Group) -> None:
        self._local, self._group, self._work = local.contiguous(), group, None
        self._gathered = local
        if group.size > 1:
            self._gathered = local.new_empty((group.size * local.shape[0], *local.shape[1:]))
            self._work = dist.all_gather_single(
                self._gathered, self._local, group=group.handle, async_op=True
            )

    def wait(self) -> Tensor:
        """(size * B, ...) of every rank, in the order of the ranks."""
        if self._work is not None:
            since = time.perf_counter()
            self._work.wait()
            self._work = None
            n_bytes = self._local.numel() * self._local.element_size()
            self._group.count("all_gather", (self._group.size - 1) * n_bytes, since)
        return self._gathered


def reduce_scatter(partial: Tensor, group: Group) -> Tensor:
    """(size * B, ...) on each rank -> the sum over the ranks of this rank's B rows."""
    if group.size == 1:
        return partial
    since = time.perf_counter()
    partial = partial.contiguous()
    reduced = partial.new_empty((partial.shape[0] // group.size, *partial.shape[1:]))
    dist.reduce_scatter_single(reduced, partial, group=group.handle)
    group.count(
        "reduce_scatter", (group.size - 1) * reduced.numel() * reduced.element_size(), since
    )
    return reduced


def all_reduce(local: Tensor, group: Group, op: str = "sum") -> Tensor:
    """The sum (or `max`) over the ranks; the input is left alone."""
    if group.size == 1:
        return local
    since = time.perf_counter()
    reduced = local.clone()
    dist.all_reduce(
        reduced, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op], group=group.handle
    )
    group.count(
        "all_reduce",
        2 * (group.size - 1) * local.numel() * local.element_size() // group.size,
        since,
    )
    return reduced


def barrier(group: Group) -> None:
    if group.size > 1:
        dist.barrier(group=group.handle)


def all_gather_bytes(
    message: bytes, group: Group, device: torch.device, capacity: int = _MESSAGE_BYTES
) -> list[bytes]:
    """Every rank's message, cut off at `capacity` bytes; nothing is pickled."""
    message = message[:capacity]
    sizes = all_gather(torch.tensor([len(message)], device=device), group).tolist()
    padded = torch.zeros(max(1, *sizes), dtype=torch.uint8)
    padded[: len(message)] = torch.tensor(list(message), dtype=torch.uint8)
    rows = all_gather(padded[None].to(device), group).cpu().numpy()
    return [bytes(row[:n]) for row, n in zip(rows, sizes, strict=True)]


def any_rank(flag: bool, ranks: Ranks) -> bool:
    """Whether any rank says True; all ranks ask together."""
    return bool(all_reduce(torch.tensor(float(flag), device=ranks.device), ranks.world, "max") > 0)


def all_gather_keys(keys: np.ndarray, ranks: Ranks) -> list[int]:
    """The uint64 keys of all ranks, in the order of the ranks."""
    sizes = all_gather(torch.tensor([len(keys)], device=ranks.device), ranks.world).tolist()
    padded = torch.zeros(max(sizes), dtype=torch.int64)
    padded[: len(keys)] = torch.from_numpy(keys.view(np.int64))
    rows = all_gather(padded[None].to(ranks.device), ranks.world).cpu().numpy().view(np.uint64)
    return [int(key) for row, n in zip(rows, sizes, strict=True) for key in row[:n]]


def agree(error: Exception | None, ranks: Ranks) -> None:
    """Raise one AgreedError on every rank if any rank brings a user's error (ValueError); call it
    on all ranks."""
    if error is not None and not isinstance(error, ValueError):
        raise error
    text = "" if error is None else str(error) or type(error).__name__
    messages = [
        m.decode(errors="replace")
        for m in all_gather_bytes(text.encode(errors="replace"), ranks.world, ranks.device)
    ]
    for rank, message in enumerate(messages):
        if message:
            everywhere = all(m == message for m in messages)
            raise AgreedError(message if everywhere else f"{message} (rank {rank})") from error


@contextmanager
def agreed(ranks: Ranks) -> Iterator[None]:
    """A ValueError that any rank meets in the body becomes one AgreedError on all.

    The body must hold no collective.
    """
    error: Exception | None = None
    try:
        yield
    except ValueError as raised:
        error = raised
    agree(error, ranks)

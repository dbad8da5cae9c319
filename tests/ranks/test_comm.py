"""Collectives against numpy over real ranks, the bytes they count, and errors that all ranks raise
together."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from dist_vasp.parallel.agree import AgreedError, agree, agreed
from dist_vasp.parallel.comm import (
    Group,
    all_gather,
    all_gather_bytes,
    all_reduce,
    barrier,
    reduce_scatter,
)
from dist_vasp.parallel.launched import launched_world, meeting_point, threads_per_rank
from dist_vasp.parallel.start import resolve_device
from tests.support.ranks import run_ranks

DTYPES = [torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8]
SHAPES = {"vector": (6,), "matrix": (6, 3), "cube": (3, 2, 2), "no columns": (3, 0)}


def _values(shape: tuple[int, ...], rank: int) -> np.ndarray:
    """Small whole numbers: sums are exact in every dtype."""
    return np.random.default_rng([rank, *shape]).integers(0, 20, shape)


def _tensors(rank: int):
    """(name, tensor) of every dtype and shape; one of each is not contiguous."""
    for dtype in DTYPES:
        for name, shape in SHAPES.items():
            yield f"{name} {dtype}", torch.from_numpy(_values(shape, rank)).to(dtype)
    yield "strided", torch.from_numpy(_values((6, 6), rank)).double()[:, ::2]


def _collectives(ranks):
    group, found = ranks.world, {}
    operations = {
        "all_gather": all_gather,
        "reduce_scatter": reduce_scatter,
        "sum": all_reduce,
        "max": lambda t, g: all_reduce(t, g, "max"),
    }
    for name, tensor in _tensors(ranks.rank):
        for operation, collective in operations.items():
            before, group.bytes_moved = tensor.clone(), {}
            out = collective(tensor, group)
            assert torch.equal(tensor, before), f"{operation} wrote into its input"
            out.zero_()
            assert torch.equal(tensor, before), f"{operation} returned its input"
            out = collective(tensor, group)
            assert out.dtype == tensor.dtype
            found[name, operation] = (
                out.numpy(),
                dict(group.bytes_moved),
                tensor.numel() * tensor.element_size(),
            )
    messages = ["", "a" * ranks.rank, "\N{GREEK SMALL LETTER PHI}" * 700 * (ranks.rank == 1)]
    found["bytes"] = [all_gather_bytes(m.encode(), group, ranks.device) for m in messages]
    found["capacity"] = all_gather_bytes(bytes([ranks.rank]) * 9, group, ranks.device, capacity=4)
    barrier(group)
    return found


def test_collectives_equal_numpy():
    world = 3
    by_rank = run_ranks(_collectives, world)
    inputs = [{name: t.numpy() for name, t in _tensors(rank)} for rank in range(world)]
    for rank, found in enumerate(by_rank):
        for name in inputs[0]:
            per_rank = [i[name] for i in inputs]
            total = np.sum(per_rank, axis=0)
            share = len(total) // world
            expected = {
                "all_gather": np.concatenate(per_rank),
                "reduce_scatter": total[rank * share : (rank + 1) * share],
                "sum": total,
                "max": np.max(per_rank, axis=0),
            }
            for operation, value in expected.items():
                out, moved, n_bytes = found[name, operation]
                np.testing.assert_array_equal(out, value, err_msg=f"{name} {operation}")
                # twice the collective was called; bytes that this rank sends to the others, in the
                # ring's count
                sent = {
                    "all_gather": {"all_gather": 2 * (world - 1) * n_bytes},
                    "reduce_scatter": {"reduce_scatter": 2 * (world - 1) * (n_bytes // world)},
                }.get(operation, {"all_reduce": 2 * (2 * (world - 1) * n_bytes // world)})
                assert moved == sent, f"{name} {operation}"
        phi = "\N{GREEK SMALL LETTER PHI}".encode()
        assert found["bytes"] == [[b""] * 3, [b"", b"a", b"aa"], [b"", phi * 512, b""]]
        assert found["capacity"] == [bytes([r]) * 4 for r in range(3)]


def test_one_rank_is_the_identity():
    group, tensor = Group(1, 0), torch.arange(6.0).reshape(2, 3)
    for out in (
        all_gather(tensor, group),
        reduce_scatter(tensor, group),
        all_reduce(tensor, group),
        all_reduce(tensor, group, "max"),
    ):
        assert torch.equal(out, tensor)
    barrier(group)
    assert all_gather_bytes(b"alone", group, torch.device("cpu")) == [b"alone"]
    assert group.bytes_moved == {}


# --- errors ---------------------------------------------------------------------------------------

ERRORS: list[list[Exception | None]] = [
    [None, None, None],
    [None, ValueError("rows are damaged"), None],
    [ValueError("rows are damaged")] * 3,
    [None, ValueError("first"), ValueError("second")],
    [
        None,
        None,
        ValueError("x" + "\N{LATIN SMALL LETTER A WITH DIAERESIS}" * 4000),
    ],  # cut in the middle of a character
    [ValueError("long " * 4000)] * 3,
    [None, ValueError("a name that is no UTF-8: \udcff"), None],
    [None, ValueError(), None],
    [None, UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), None],
]


def _agree(ranks):
    found = []
    for errors in ERRORS:
        for way in ("agree", "agreed"):
            try:
                if way == "agree":
                    agree(errors[ranks.rank], ranks)
                else:
                    with agreed(ranks):
                        if errors[ranks.rank] is not None:
                            raise errors[ranks.rank]
                found.append(None)
            except AgreedError as error:
                found.append(str(error))
    for way in (lambda: agree(KeyError("our own bug"), ranks), lambda: _raise_within(ranks)):
        try:
            way()
        except KeyError as error:
            found.append(repr(error))
    return found


def _raise_within(ranks):
    with agreed(ranks):
        raise KeyError("our own bug")


def test_errors_are_raised_by_all_ranks_alike():
    by_rank = run_ranks(_agree, 3)
    assert by_rank[0] == by_rank[1] == by_rank[2]
    *found, bug, bug_within = by_rank[0]
    assert found[::2] == found[1::2], "agree and agreed differ"
    nothing, one, same, two, cut, long, surrogate, wordless, undecodable = found[::2]
    assert nothing is None
    assert one == "rows are damaged (rank 1)"
    assert same == "rows are damaged"
    assert two == "first (rank 1)"
    assert cut.startswith("x\N{LATIN SMALL LETTER A WITH DIAERESIS}") and cut.endswith(" (rank 2)")
    assert 500 < len(cut) < 1100
    assert long.startswith("long long") and "rank" not in long
    assert surrogate.startswith("a name that is no UTF-8") and surrogate.endswith(" (rank 1)")
    assert wordless == "ValueError (rank 1)"
    assert undecodable.endswith("(rank 1)")
    assert bug == bug_within == "KeyError('our own bug')"


# --- groups ---------------------------------------------------------------------------------------


def _groups(ranks):
    mine = torch.tensor([ranks.rank])
    groups = (ranks.world, ranks.partition_group, ranks.replica_group)
    part = ranks.partition_of_items(11)
    return (
        [all_gather(mine, group).tolist() for group in groups],
        [(group.size, group.rank) for group in groups],
        (part.start, part.stop),
        int(all_reduce(mine, ranks.partition_group)),
        int(all_reduce(mine, ranks.replica_group, "max")),
        (ranks.is_main, ranks.world_size),
    )


def test_groups_of_two_by_two():
    found = run_ranks(_groups, 4, replicas=2)
    everyone = [0, 1, 2, 3]
    partition_of = [[0, 1], [0, 1], [2, 3], [2, 3]]
    replica_of = [[0, 2], [1, 3], [0, 2], [1, 3]]
    for rank, (members, places, items, total, largest, rest) in enumerate(found):
        assert members == [everyone, partition_of[rank], replica_of[rank]]
        assert places == [(4, rank), (2, rank % 2), (2, rank // 2)]
        assert items == [(0, 5), (5, 11)][rank % 2]
        assert total == sum(partition_of[rank])
        assert largest == max(replica_of[rank])
        assert rest == (rank == 0, 4)


def test_groups_of_replicas_alone():
    for rank, (members, places, items, _, largest, _) in enumerate(
        run_ranks(_groups, 2, replicas=2)
    ):
        assert members == [[0, 1], [rank], [0, 1]]
        assert places == [(2, rank), (1, 0), (2, rank)]
        assert items == (0, 11)
        assert largest == 1


# --- where a process stands -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 0, 1)),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
            (3, 4, 1, 2),
        ),  # torchrun
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"},
            (3, 4, 1, 2),
        ),  # deepspeed
    ],
)
def test_launched_world(environment, expected, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched_world() == expected


VARIABLES = (
    *(
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "LOCAL_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ),
    *("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"),
)


def given_environment(monkeypatch, text: str) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for word in text.split():
        monkeypatch.setenv(*word.split("="))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            "RANK=zero WORLD_SIZE=2",
            "RANK is 'zero' in the environment, expected a whole number of at least 0",
        ),
        (
            "RANK=-1 WORLD_SIZE=2",
            "RANK is '-1' in the environment, expected a whole number of at least 0",
        ),
        ("RANK=² WORLD_SIZE=2", "RANK is '²' in the environment"),
        ("RANK= WORLD_SIZE=2", "RANK is '' in the environment"),
        ("RANK=2 WORLD_SIZE=2", "RANK is 2 in the environment, expected 0 to 1 with WORLD_SIZE 2"),
        (
            "RANK=0 WORLD_SIZE=0",
            "WORLD_SIZE is '0' in the environment, expected a whole number of at least 1",
        ),
        (
            f"RANK=0 WORLD_SIZE={'9' * 5000}",
            "WORLD_SIZE is '9999.*' in the environment, expected a whole number of at least 1",
        ),
        ("RANK=0", "RANK is 0 in the environment but WORLD_SIZE is not set"),
        ("WORLD_SIZE=2", "WORLD_SIZE is 2 in the environment but RANK is not set"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=x", "LOCAL_RANK is 'x' in the environment"),
        (
            "RANK=0 WORLD_SIZE=2 LOCAL_RANK=2",
            "LOCAL_RANK is 2 in the environment, expected 0 to 1 with LOCAL_SIZE 2",
        ),
        (
            "RANK=0 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_SIZE=1",
            "LOCAL_RANK is 1 in the environment, expected 0 to 0 with LOCAL_SIZE 1",
        ),
        (
            "RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=3",
            "LOCAL_WORLD_SIZE is 3 in the environment, expected at most WORLD_SIZE 2",
        ),
        (
            "RANK=3 WORLD_SIZE=4 LOCAL_SIZE=2",
            "LOCAL_RANK is not set in the environment, expected 0 to 1 with LOCAL_SIZE 2",
        ),
    ],
)
def test_an_environment_that_describes_no_group(environment, message, monkeypatch):
    given_environment(monkeypatch, environment)
    with pytest.raises(ValueError, match=message):
        launched_world()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ("", "WORLD_SIZE is 2 but MASTER_ADDR is not set"),
        ("MASTER_ADDR=localhost", "WORLD_SIZE is 2 but MASTER_PORT is not set"),
        ("MASTER_ADDR= MASTER_PORT=29500", "WORLD_SIZE is 2 but MASTER_ADDR is not set"),
        (
            "MASTER_ADDR=localhost MASTER_PORT=http",
            "MASTER_PORT is 'http' in the environment, expected a whole number",
        ),
        (
            "MASTER_ADDR=localhost MASTER_PORT=0",
            "MASTER_PORT is 0 in the environment, expected 1 to 65535",
        ),
        (
            "MASTER_ADDR=localhost MASTER_PORT=70000",
            "MASTER_PORT is 70000 in the environment, expected 1 to 65535",
        ),
        (
            "MASTER_ADDR=no.such.host.invalid MASTER_PORT=29500",
            "MASTER_ADDR is 'no.such.host.invalid' .* which is no host",
        ),
        (
            f"MASTER_ADDR={'x' * 300} MASTER_PORT=29500",
            "MASTER_ADDR is 'x.*' in the environment, which is no host",
        ),
    ],
)
def test_a_meeting_point_that_is_none(environment, message, monkeypatch):
    given_environment(monkeypatch, environment)
    with pytest.raises(ValueError, match=message):
        meeting_point(2)


def test_threads_of_a_rank(monkeypatch):
    """OMP_NUM_THREADS where the user has set it, else the cores divided among the ranks of the
    host."""
    cores = len(os.sched_getaffinity(0))
    given_environment(monkeypatch, "")
    assert (threads_per_rank(1), threads_per_rank(cores), threads_per_rank(3 * cores)) == (
        cores,
        1,
        1,
    )
    given_environment(monkeypatch, "OMP_NUM_THREADS=7")
    assert threads_per_rank(4) == 7
    given_environment(monkeypatch, "OMP_NUM_THREADS=7,2")
    assert threads_per_rank(4) == 7
    given_environment(monkeypatch, "OMP_NUM_THREADS=1 TORCHELASTIC_RUN_ID=none")
    assert threads_per_rank(1) == cores, "torchrun sets a 1 of its own"
    given_environment(monkeypatch, "OMP_NUM_THREADS=5 TORCHELASTIC_RUN_ID=none")
    assert threads_per_rank(1) == 5
    for text in ("0", "-2", "all"):
        given_environment(monkeypatch, f"OMP_NUM_THREADS={text}")
        with pytest.raises(
            ValueError,
            match=f"OMP_NUM_THREADS is '{text}' in the environment, expected a whole "
            f"number of at least 1",
        ):
            threads_per_rank(1)


def test_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto", 0) == resolve_device("cpu", 3) == torch.device("cpu")
    with pytest.raises(ValueError, match=r"device is cuda but .* no CUDA device; use --device cpu"):
        resolve_device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="local rank 1 has no CUDA device of its own: 1 found"):
        resolve_device("auto", 1)

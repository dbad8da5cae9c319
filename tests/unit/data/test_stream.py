"""The order of training users: every user once, the same for any number of ranks, workers, lanes
and any sharding."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_vasp.data.held_out import evaluation_blocks
from dist_vasp.data.lanes import LaneOrder
from dist_vasp.data.rows import Rows, concatenate_rows
from dist_vasp.data.shard import read_shard
from dist_vasp.data.stream import Batch, StreamOptions, TrainStream
from tests.support.make_shards import write_folder

N_USERS, N_ITEMS = 203, 60


def random_rows(n: int, seed: int, n_items: int = N_ITEMS) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [
        np.sort(random.choice(n_items, random.integers(1, 12), replace=False)).astype(np.int32)
        for _ in range(n)
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same users in shards of 16 and of 37."""
    base = tmp_path_factory.mktemp("stream")
    rows = random_rows(N_USERS, 0)
    heldout = [(random_rows(1, 100 + i)[0], random_rows(1, 900 + i)[0][: i % 4]) for i in range(45)]
    for size in (16, 37):
        write_folder(
            base / str(size), rows, heldout, heldout[:5], n_items=N_ITEMS, users_per_shard=size
        )
    return base


def row_list(rows: Rows) -> list[tuple[int, ...]]:
    return [
        tuple(rows.items[a:b].tolist())
        for a, b in zip(rows.indptr[:-1], rows.indptr[1:], strict=True)
    ]


def triples(batch: Batch) -> list[tuple]:
    """(user key, input, target) of every row, after the batch was checked against itself."""
    n = batch.inputs.n_rows
    assert (
        batch.targets.n_rows
        == len(batch.user_keys)
        == n
        == sum(r for _, r in batch.lane_rows)
        <= batch.padded_rows
    )
    assert [lane for lane, _ in batch.lane_rows] == sorted({lane for lane, _ in batch.lane_rows})
    assert batch.user_keys.dtype == np.uint64
    for rows in (batch.inputs, batch.targets):
        assert (rows.indptr.dtype, rows.items.dtype) == (np.int64, np.int32)
        assert rows.indptr[-1] == len(rows.items)
    return list(
        zip(batch.user_keys.tolist(), row_list(batch.inputs), row_list(batch.targets), strict=True)
    )


def read_epochs(
    folder, epochs: int, world_size: int, workers: int = 0, **options
) -> list[list[list[tuple]]]:
    """triples by step and rank over whole epochs; checks what the ranks must agree on."""
    streams = [
        TrainStream(folder, StreamOptions(**options), r, world_size) for r in range(world_size)
    ]
    steps = {s.steps_per_epoch for s in streams}
    assert len(steps) == 1
    n_steps = steps.pop() * epochs
    out = []
    for step, batches in enumerate(
        zip(*(s.batches(0, n_steps, workers) for s in streams), strict=True)
    ):
        for batch in batches:
            assert (batch.step, batch.epoch) == (step, step // streams[0].steps_per_epoch)
            assert batch.global_users == sum(b.n_users for b in batches)
            assert batch.global_rows == sum(b.inputs.n_rows for b in batches)
            assert batch.padded_rows == max(b.inputs.n_rows for b in batches)
        out.append([triples(b) for b in batches])
    assert len(out) == n_steps
    return out


def epoch_counts(steps: list[list[list[tuple]]], epochs: int) -> list[Counter]:
    per_epoch = len(steps) // epochs
    return [
        Counter(t for ranks in steps[e * per_epoch : (e + 1) * per_epoch] for r in ranks for t in r)
        for e in range(epochs)
    ]


OPTIONS = {"batch_size": 40, "lanes": 12, "seed": 5}


@pytest.fixture(scope="module")
def reference(folders):
    """Two epochs of one rank without workers."""
    return read_epochs(folders / "16", 2, 1, **OPTIONS)


def test_every_user_exactly_once_an_epoch_in_two_opposite_rows(folders, reference):
    originals = dict(
        zip(
            range(1, N_USERS + 1),
            map(tuple, (r.tolist() for r in random_rows(N_USERS, 0))),
            strict=True,
        )
    )
    for epoch in epoch_counts(reference, 2):
        assert Counter(key for key, _, _ in epoch.elements()) == dict.fromkeys(
            range(1, N_USERS + 1), 2
        )
    for (ranks,) in reference:
        for (key, a, b), (key_back, b_back, a_back) in zip(ranks[::2], ranks[1::2], strict=True):
            assert (key, a, b) == (key_back, a_back, b_back)
            assert tuple(sorted(a + b)) == originals[key]
            assert not set(a) & set(b)
            assert len(a) == len(originals[key]) // 2
            assert (list(a), list(b)) == (sorted(a), sorted(b))


def test_epochs_and_seeds_differ(folders, reference):
    first, second = epoch_counts(reference, 2)
    assert first != second
    assert epoch_counts(read_epochs(folders / "16", 1, 1, **{**OPTIONS, "seed": 6}), 1)[0] != first
    order = [
        [key for (ranks,) in half for key, _, _ in ranks] for half in (reference[:6], reference[6:])
    ]
    assert order[0] != order[1]


@pytest.mark.parametrize("world_size", [2, 3, 4, 12])
def test_ranks_change_nothing_step_by_step(folders, reference, world_size):
    steps = read_epochs(folders / "16", 2, world_size, **OPTIONS)
    # the ranks' rows one after another are exactly the rows of one rank: lanes lie in order
    assert [[t for r in ranks for t in r] for ranks in steps] == [ranks[0] for ranks in reference]


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 1)])
def test_workers_change_nothing(folders, reference, world_size, workers):
    steps = read_epochs(folders / "16", 2, world_size, workers, **OPTIONS)
    assert [[t for r in ranks for t in r] for ranks in steps] == [ranks[0] for ranks in reference]


@pytest.mark.parametrize(
    ("size", "lanes", "batch_size"),
    [("37", 12, 40), ("16", 24, 40), ("37", 24, 64), ("37", 1, 1), ("16", 12, 500)],
)
def test_sharding_lanes_and_batch_size_change_only_the_order(
    folders, reference, size, lanes, batch_size
):
    steps = read_epochs(folders / size, 2, 1, batch_size=batch_size, lanes=lanes, seed=5)
    assert epoch_counts(steps, 2) == epoch_counts(reference, 2)


@pytest.mark.parametrize(
    ("size", "world_size", "workers"), [("16", 1, 0), ("16", 3, 0), ("16", 2, 1), ("37", 1, 0)]
)
def test_input_dropout_thins_the_inputs_alone_the_same_for_every_layout(
    folders, reference, size, world_size, workers
):
    thinned = read_epochs(folders / size, 2, world_size, workers, **OPTIONS, input_dropout=0.4)
    for whole, part in zip(epoch_counts(reference, 2), epoch_counts(thinned, 2), strict=True):
        inputs = {(key, target): set(given) for key, given, target in whole.elements()}
        assert {(key, target) for key, _, target in part.elements()} == inputs.keys()
        assert all(set(given) <= inputs[key, target] for key, given, target in part.elements())
        share = sum(len(given) for _, given, _ in part.elements()) / sum(map(len, inputs.values()))
        assert 0.55 < share < 0.65
    if world_size > 1 or size != "16":
        assert epoch_counts(thinned, 2) == epoch_counts(
            read_epochs(folders / "16", 2, 1, **OPTIONS, input_dropout=0.4), 2
        )


def test_input_dropout_of_whole_rows_leaves_the_targets_whole(folders):
    steps = read_epochs(folders / "16", 1, 1, halves=False, **OPTIONS, input_dropout=0.4)
    rows = [t for ranks in steps for r in ranks for t in r]
    originals = [tuple(r.tolist()) for r in random_rows(N_USERS, 0)]
    assert all(set(x) <= set(y) and y == originals[key - 1] for key, x, y in rows)
    assert any(set(x) < set(y) for _, x, y in rows)


def test_input_dropout_holds_in_the_epochs_that_ask_for_it(folders):
    options = {**OPTIONS, "input_dropout": 0.4, "dropout_turns": ((1, False), (1, True))}
    stream = TrainStream(folders / "16", StreamOptions(**options, halves=False))
    for epoch in range(4):
        steps = range(epoch * stream.steps_per_epoch, (epoch + 1) * stream.steps_per_epoch)
        rows = [row for step in steps for row in triples(stream.batch(step))]
        assert all(x == y for _, x, y in rows) == (epoch % 2 == 0)


def test_without_halves_a_row_is_its_own_target(folders):
    steps = read_epochs(folders / "16", 1, 3, halves=False, **OPTIONS)
    rows = [t for ranks in steps for r in ranks for t in r]
    assert sorted(key for key, _, _ in rows) == list(range(1, N_USERS + 1))
    assert all(x == y for _, x, y in rows)


def test_batch_is_a_function_of_the_step_alone(folders, reference):
    stream = TrainStream(folders / "16", StreamOptions(**OPTIONS))
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.random.get_rng_state()
    for step in (11, 3, 7, 3, 0):
        assert triples(stream.batch(step)) == reference[step][0]
    assert [triples(b) for b in stream.batches(4, 9, 1)] == [reference[s][0] for s in range(4, 9)]
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert torch.equal(torch.random.get_rng_state(), torch_state)


def test_a_shard_is_decoded_once_a_pass_unless_it_lies_across_a_border(folders, monkeypatch):
    stream = TrainStream(folders / "16", StreamOptions(**OPTIONS))
    read = []
    monkeypatch.setattr(
        "dist_vasp.data.stream.read_shard",
        lambda f, s, entry, n, ratings: read.append(entry.name) or read_shard(f, s, entry, n),
    )
    for step in range(stream.steps_per_epoch):
        stream.batch(step)
    assert set(read) == {s.name for s in stream.manifest.splits["train"].shards}
    assert len(read) <= len(set(read)) + stream.options.lanes


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 5000), st.integers(1, 700), st.integers(1, 64))
def test_steps_are_about_batch_size(n_users, batch_size, lanes):
    """Every lane's counts add up to its users, and a step differs from U/S by fewer than 3
    users."""
    lanes = min(lanes, batch_size)
    order = LaneOrder([n_users], batch_size, lanes, seed=0)
    steps = order.steps_per_epoch
    assert steps == -(-n_users // batch_size)
    per_lane = np.stack([order.users_per_lane(s) for s in range(steps)])
    assert np.array_equal(per_lane.sum(axis=0), np.diff(np.arange(lanes + 1) * n_users // lanes))
    assert (per_lane >= 0).all()
    users = per_lane.sum(axis=1)
    assert users.sum() == n_users
    assert np.abs(users - n_users / steps).max() < 3
    assert users.max() <= batch_size + 2


@pytest.mark.parametrize("n_users", [1, 3, 13])
def test_fewer_users_than_lanes_and_empty_ranks(tmp_path, n_users):
    write_folder(tmp_path, random_rows(n_users, 1), n_items=N_ITEMS, users_per_shard=2)
    one = read_epochs(tmp_path, 2, 1, batch_size=24, lanes=24)
    four = read_epochs(tmp_path, 2, 4, batch_size=24, lanes=24)
    assert [[t for r in ranks for t in r] for ranks in four] == [ranks[0] for ranks in one]
    assert sum(len(ranks[0]) for ranks in one[: len(one) // 2]) == 2 * n_users
    assert n_users > 3 or any(not r for ranks in four for r in ranks)


def test_users_with_one_item_and_with_none(tmp_path):
    write_folder(tmp_path, [[3], [], [0, 1, 2]], n_items=5)
    rows = {
        t for ranks in read_epochs(tmp_path, 1, 1, batch_size=4, lanes=2) for r in ranks for t in r
    }
    assert {(1, (), (3,)), (1, (3,), ()), (2, (), ())} <= rows
    assert len(rows) == 5  # the empty user's two rows are equal


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lanes": 48, "world_size": 5},
            "parallel.lanes is 48 but 5 ranks do not divide it; choose a multiple of 5 or another",
        ),
        ({"lanes": 48, "batch_size": 32}, "parallel.lanes is 48 but data.batch_size is 32"),
        ({"lanes": 0}, "parallel.lanes is 0"),
        ({"batch_size": 0}, "data.batch_size is 0"),
    ],
)
def test_impossible_combinations_name_the_key(folders, options, message):
    options = {"batch_size": 100, **options}
    world_size = options.pop("world_size", 1)
    with pytest.raises(ValueError, match=message):
        TrainStream(folders / "16", StreamOptions(**options), world_size=world_size)


def test_a_folder_without_training_users(tmp_path):
    write_folder(tmp_path, [], [([1], [2])], n_items=5)
    with pytest.raises(ValueError, match="no training users"):
        TrainStream(tmp_path, StreamOptions(4, lanes=2))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_shard_is_a_plain_error_that_names_the_file(tmp_path, workers, damage):
    write_folder(tmp_path, random_rows(40, 2), n_items=N_ITEMS, users_per_shard=10)
    shard = tmp_path / "train-000002.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    if damage == "remove":
        shard.unlink()
    else:
        shard.write_bytes(data if damage == "flip" else data[:-100])
    stream = TrainStream(tmp_path, StreamOptions(10, lanes=2))
    with pytest.raises(ValueError, match=r"train-000002\.tar") as caught:
        list(stream.batches(0, stream.steps_per_epoch, workers))
    assert type(caught.value) is ValueError
    assert "Traceback" not in str(caught.value)
    assert "worker" not in str(caught.value)


def children() -> set[int]:
    """Process ids of this process's children that run."""
    found = set()
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended since they were listed
            if child.status() != psutil.STATUS_ZOMBIE:
                found.add(child.pid)
    return found


@pytest.mark.parametrize("started", [True, False])
def test_closing_the_iterator_ends_its_workers(folders, started):
    stream = TrainStream(folders / "16", StreamOptions(**OPTIONS))
    before = children()
    batches = stream.batches(0, 1000, 2)
    workers = children() - before
    assert len(workers) == 2, "they start at once"
    if started:
        next(batches)
    batches.close()
    assert not workers & children()
    assert next(batches, None) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_worker_ignores_what_is_sent_to_the_group(folders, reference, capfd, number):
    """On every thread, so that it does not matter which of them the kernel chooses."""
    stream, before = TrainStream(folders / "16", StreamOptions(**OPTIONS)), children()
    batches = stream.batches(0, 400, 2)
    workers = children() - before
    for step in range(len(reference)):
        assert triples(next(batches)) == reference[step][0]
        for pid in workers:
            for thread in os.listdir(f"/proc/{pid}/task") if step else []:  # both have sent a batch
                status = Path(f"/proc/{pid}/task/{thread}/status").read_text()
                assert int(re.search(r"SigIgn:\s*(\w+)", status)[1], 16) >> (number - 1) & 1
            os.kill(pid, number)
    assert workers <= children()
    batches.close()
    assert capfd.readouterr().err == ""


def test_without_a_worker_that_was_killed_the_batches_are_the_same(folders, reference, capfd):
    stream, before = TrainStream(folders / "16", StreamOptions(**OPTIONS)), children()
    batches = stream.batches(0, 400, 2)
    victim, other = sorted(children() - before)
    for step in range(400):
        if step == 3:
            os.kill(victim, signal.SIGKILL)
        assert triples(next(batches)) == triples(stream.batch(step))
    assert next(batches, None) is None
    said = capfd.readouterr().err
    assert re.fullmatch(
        rf"warning: loader worker {victim} was killed by SIGKILL; training continues, .*\n", said
    ), said
    assert other not in children(), "it ended after its last batch"


def test_where_no_process_can_be_started_the_batches_are_the_same(
    folders, reference, capfd, monkeypatch
):
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    batches = TrainStream(folders / "16", StreamOptions(**OPTIONS)).batches(0, len(reference), 2)
    assert [triples(batch) for batch in batches] == [step[0] for step in reference]
    said = capfd.readouterr().err
    assert said.startswith(
        "warning: loader worker 1 of 2 cannot be started (Resource temporarily "
        "unavailable); training continues"
    )


def test_python_ends_while_an_iterator_lives(folders):
    """Its workers ignore SIGTERM, which Python would send to processes of multiprocessing and
    wait."""
    lines = [
        "from dist_vasp.data.stream import StreamOptions, TrainStream",
        f"stream = TrainStream({str(folders / '16')!r}, StreamOptions(**{OPTIONS!r}))",
        "batches = stream.batches(0, 1000, 2)",
        "print(next(batches).n_users)",
    ]
    ended = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert int(ended.stdout) > 0


def test_rows_take_slice_and_concatenate():
    rows = random_rows(20, 3)
    csr = concatenate_rows([Rows(np.array([0, len(r)]), r) for r in rows])
    expected = [tuple(r.tolist()) for r in rows]
    assert row_list(csr) == expected
    assert row_list(csr.slice(4, 9)) == expected[4:9]
    assert row_list(csr.slice(4, 9).take(np.array([3, 0, 0]))) == [
        expected[7],
        expected[4],
        expected[4],
    ]
    assert (
        row_list(concatenate_rows([csr.slice(0, 3), csr.slice(3, 3), csr.slice(3, 20)])) == expected
    )
    assert concatenate_rows([]).n_rows == 0


@pytest.mark.parametrize("users_per_block", [1, 7, 16, 100])
def test_evaluation_blocks_are_the_users_in_order_whatever_the_shards(folders, users_per_block):
    read = []
    for size in ("16", "37"):
        blocks = list(evaluation_blocks(folders / size, "validation", users_per_block))
        assert [len(b.user_keys) for b in blocks[:-1]] == [users_per_block] * (len(blocks) - 1)
        assert 1 <= len(blocks[-1].user_keys) <= users_per_block
        read.append(
            [(b.user_keys.tolist(), row_list(b.fold_in), row_list(b.held_out)) for b in blocks]
        )
    assert read[0] == read[1]
    keys = [k for block in read[0] for k in block[0]]
    assert keys == list(range(N_USERS + 1, N_USERS + 46))
    held_out = [r for block in read[0] for r in block[2]]
    assert held_out == [tuple(random_rows(1, 900 + i)[0][: i % 4].tolist()) for i in range(45)]


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 20), (20, 45), (17, 18), (33, None), (45, None), (5, 5), (40, 900)]
)
def test_evaluation_blocks_of_a_range(folders, start, stop):
    blocks = list(evaluation_blocks(folders / "16", "validation", 6, start, stop))
    keys = [k for b in blocks for k in b.user_keys.tolist()]
    assert keys == list(range(N_USERS + 1, N_USERS + 46))[start:stop]


def test_evaluation_of_an_empty_and_of_an_unknown_split(folders, tmp_path):
    write_folder(tmp_path, [[1, 2]], n_items=5)
    assert not list(evaluation_blocks(tmp_path, "validation", 8))
    with pytest.raises(ValueError, match="expected validation or test"):
        next(evaluation_blocks(tmp_path, "train", 8))


def test_a_damaged_evaluation_shard(tmp_path):
    write_folder(tmp_path, [[1, 2]], test=[([0], [1])] * 5, n_items=5, users_per_shard=2)
    (tmp_path / "test-000001.tar").write_bytes(b"x" * 600)
    with pytest.raises(ValueError, match=r"test-000001\.tar"):
        list(evaluation_blocks(tmp_path, "test", 2))

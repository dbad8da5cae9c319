"""Item ranges and layouts: integers only."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_vasp.parallel.partition import ItemPartition, Layout


@given(st.integers(1, 40), st.integers(0, 10**7))
def test_ranges_cover_every_item_once_and_evenly(n_partitions, more):
    n_items = n_partitions + more
    parts = [ItemPartition(n_items, n_partitions, index) for index in range(n_partitions)]
    assert parts[0].start == 0 and parts[-1].stop == n_items
    assert all(a.stop == b.start for a, b in itertools.pairwise(parts))
    sizes = [part.size for part in parts]
    assert all(part.size == part.stop - part.start for part in parts)
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == n_items


@given(st.integers(1, 9), st.integers(0, 500), st.integers(1, 300), st.data())
def test_blocks_cover_the_range(n_partitions, more, width, data):
    part = ItemPartition(
        n_partitions + more, n_partitions, data.draw(st.integers(0, n_partitions - 1))
    )
    blocks = part.blocks(width)
    assert [item for lo, hi in blocks for item in range(lo, hi)] == list(
        range(part.start, part.stop)
    )
    assert all(hi - lo == width for lo, hi in blocks[:-1])
    assert 1 <= blocks[-1][1] - blocks[-1][0] <= width


@pytest.mark.parametrize(("n_items", "n_partitions", "index"), [(5, 0, 0), (5, 2, 2), (5, 2, -1)])
def test_a_partition_that_does_not_exist(n_items, n_partitions, index):
    with pytest.raises(ValueError, match=f"partition {index} of {n_partitions} does not exist"):
        ItemPartition(n_items, n_partitions, index)


def test_more_partitions_than_items():
    with pytest.raises(
        ValueError,
        match=r"3 items .*parallel\.partitions = 4.*fewer partitions.*parallel\.replicas",
    ):
        ItemPartition(3, 4, 0)


@given(st.integers(1, 12), st.integers(1, 12))
def test_layout_places_every_rank_once(partitions, replicas):
    world = partitions * replicas
    layouts = {Layout.of(world, partitions, replicas), Layout.of(world, 0, replicas)}
    assert layouts == {Layout(world, partitions, replicas)}
    layout = layouts.pop()
    places = [(layout.replica_of(rank), layout.partition_of(rank)) for rank in range(world)]
    assert places == [(r, p) for r in range(replicas) for p in range(partitions)]


@pytest.mark.parametrize(
    ("world", "partitions", "replicas", "words"),
    [
        (4, 0, 3, ["parallel.replicas is 3", "4 ranks", "divisor"]),
        (4, 0, 0, ["parallel.replicas is 0"]),
        (
            4,
            3,
            1,
            [
                "parallel.partitions 3 x parallel.replicas 1 is 3",
                "4 ranks",
                "set parallel.partitions to 4",
            ],
        ),
        (
            4,
            4,
            2,
            [
                "parallel.partitions 4 x parallel.replicas 2 is 8",
                "set parallel.partitions to 2",
                "or to 0",
            ],
        ),
    ],
)
def test_layout_errors_name_the_keys(world, partitions, replicas, words):
    with pytest.raises(ValueError) as error:
        Layout.of(world, partitions, replicas)
    for word in words:
        assert word in str(error.value)

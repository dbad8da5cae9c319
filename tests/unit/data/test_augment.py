"""Halves: the property that everything else rests on is that they depend on keys alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_vasp.data.augment import keep_inputs, split_halves
from dist_vasp.data.hashing import hash64, permutation

MASK = 2**64 - 1
WORD = st.integers(0, MASK)
STORED = [10451216379200822465, 14313760085442538175, 15191366389560486889]


def plain_hash64(*words: int) -> int:
    """hash64 in Python integers, one word at a time."""
    h = len(words)
    for word in words:
        h = (h + (word + 1) * 0x9E3779B97F4A7C15) & MASK
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & MASK
        h ^= h >> 31
    return h


def plain_halves(user_keys, indptr, item_keys, seed, epoch) -> np.ndarray:
    in_a = []
    for u, user in enumerate(user_keys):
        hashes = [
            plain_hash64(seed & MASK, epoch, int(user), int(i))
            for i in item_keys[indptr[u] : indptr[u + 1]]
        ]
        chosen = sorted(range(len(hashes)), key=lambda j, h=hashes: (h[j], j))[: len(hashes) // 2]
        in_a += [j in chosen for j in range(len(hashes))]
    return np.array(in_a, bool)


@st.composite
def users(draw) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(user_keys, indptr, item_keys); few distinct item keys at times, so that hashes tie within a
    row."""
    lengths = draw(st.lists(st.integers(0, 12), min_size=0, max_size=12))
    item = st.integers(0, 3) if draw(st.booleans()) else WORD
    keys = draw(st.lists(WORD, min_size=len(lengths), max_size=len(lengths)))
    items = draw(st.lists(item, min_size=sum(lengths), max_size=sum(lengths)))
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return np.array(keys, np.uint64), indptr, np.array(items, np.uint64)


@given(st.lists(WORD, min_size=1, max_size=5))
def test_hash64_is_the_documented_function(words):
    assert int(hash64(*words)) == plain_hash64(*words)
    assert int(hash64(*[np.array([w], np.uint64) for w in words])[0]) == plain_hash64(*words)


def test_hash64_broadcasts_and_takes_negative_words():
    table = hash64(-1, np.arange(3, dtype=np.uint64)[:, None], np.arange(4, dtype=np.int64))
    assert table.shape == (3, 4)
    assert table.dtype == np.uint64
    assert int(table[2, 3]) == plain_hash64(MASK, 2, 3)


def test_hash64_order_and_number_of_words_matter():
    values = [
        int(hash64(*w))
        for w in [(1,), (1, 2), (2, 1), (0, 1, 2), (1, 2, 0), (0,), (0, 0), (3,), (MASK,)]
    ]
    assert len(set(values)) == len(values)


def test_hash64_stays_the_same():
    # a run is resumed by a later version: these numbers may never change
    assert [int(hash64(*w)) for w in [(0,), (1, 2), (98765, 3, 4, 5)]] == STORED


def test_hash64_bits_are_balanced_over_consecutive_words():
    h = hash64(7, np.arange(20_000, dtype=np.uint64))
    ones = ((h[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)).mean(axis=0)
    assert np.abs(ones - 0.5).max() < 5 * 0.5 / np.sqrt(20_000)


@pytest.mark.parametrize("n", [0, 1, 2, 17, 1000])
def test_permutation(n):
    order = permutation(n, 5, 6)
    assert sorted(order) == list(range(n))
    assert np.array_equal(order, permutation(n, 5, 6))
    if n > 10:
        assert not np.array_equal(order, permutation(n, 6, 5))
        assert not np.array_equal(order, np.arange(n))


@settings(deadline=None)
@given(users(), st.integers(-(2**63), 2**63), st.integers(0, 1000))
def test_halves_equal_the_plain_definition(block, seed, epoch):
    in_a = split_halves(*block, seed, epoch)
    assert in_a.dtype == bool
    assert np.array_equal(in_a, plain_halves(*block, seed, epoch))
    n_a = np.array(
        [in_a[a:b].sum() for a, b in zip(block[1][:-1], block[1][1:], strict=True)], np.int64
    )
    assert np.array_equal(n_a, np.diff(block[1]) // 2)


@settings(deadline=None)
@given(users(), st.randoms(use_true_random=False))
def test_halves_do_not_depend_on_the_other_users_of_the_block(block, random):
    keys, indptr, items = block
    whole = split_halves(keys, indptr, items, 3, 4)
    order = list(range(len(keys)))
    random.shuffle(order)
    for u in order[:4]:
        row = slice(indptr[u], indptr[u + 1])
        alone = split_halves(
            keys[u : u + 1], np.array([0, indptr[u + 1] - indptr[u]]), items[row], 3, 4
        )
        assert np.array_equal(alone, whole[row])
    shuffled = [items[indptr[u] : indptr[u + 1]] for u in order]
    lengths = np.array([len(r) for r in shuffled], np.int64)
    again = split_halves(
        keys[order],
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.concatenate([np.empty(0, np.uint64), *shuffled]),
        3,
        4,
    )
    expected = [whole[indptr[u] : indptr[u + 1]] for u in order]
    assert np.array_equal(again, np.concatenate([np.empty(0, bool), *expected]))


def test_each_item_is_in_a_half_of_the_epochs_and_epochs_and_seeds_differ():
    keys = np.arange(50, dtype=np.uint64)
    indptr = np.arange(51, dtype=np.int64) * 20
    items = np.tile(np.arange(20, dtype=np.uint64), 50)
    epochs = np.stack([split_halves(keys, indptr, items, 1, e) for e in range(400)])  # (400, E)
    assert np.abs(epochs.mean(axis=0) - 0.5).max() < 5.5 * 0.5 / np.sqrt(400)
    # two items of a user are in the same half in 9 of 19 epochs, as in a uniform draw of 10 of 20
    together = (
        epochs.reshape(400, 50, 20)[:, :, :1] == epochs.reshape(400, 50, 20)[:, :, 1:]
    ).mean(axis=(0, 1))
    assert np.abs(together - 9 / 19).max() < 0.025
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], split_halves(keys, indptr, items, 2, 0))


@given(users(), st.integers(-1, 3), st.integers(0, 3), st.floats(0, 1, exclude_max=True))
def test_an_input_is_left_out_by_its_hash_alone(drawn, seed, epoch, dropout):
    user_keys, indptr, item_keys = drawn
    expected = [
        plain_hash64(seed & MASK, epoch, int(user), int(item), 1) >= dropout * 2**64
        for u, user in enumerate(user_keys)
        for item in item_keys[indptr[u] : indptr[u + 1]]
    ]
    kept = keep_inputs(user_keys, indptr, item_keys, dropout, seed, epoch)
    assert kept.dtype == bool
    assert kept.tolist() == expected


@pytest.mark.parametrize("dropout", [0.0, 0.3, 0.9])
def test_the_share_left_out_is_the_dropout_and_does_not_follow_the_halves(dropout):
    n = 40_000
    keys = np.arange(n, dtype=np.uint64) // np.uint64(200)
    user_keys, indptr, items = (
        np.unique(keys),
        np.arange(0, n + 1, 200),
        hash64(np.arange(n, dtype=np.uint64)),
    )
    kept = keep_inputs(user_keys, indptr, items, dropout, 3, 1)
    in_a = split_halves(user_keys, indptr, items, 3, 1)
    for chosen in (kept, kept[in_a], kept[~in_a]):
        assert abs(chosen.mean() - (1 - dropout)) <= 5 * np.sqrt(
            dropout * (1 - dropout) / len(chosen)
        )

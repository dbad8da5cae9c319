"""The protocols against a straight-line reference, on made-up and on real data."""

from __future__ import annotations

import gzip

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import shard
from data_tools.collect import collect
from data_tools.given import GivenPlan, moved_to_validation
from data_tools.liang import HeldOutDraw, liang_plan, liang_users
from dist_vasp.data.hashing import pair_hash
from dist_vasp.data.manifest import Manifest
from tests.oracles.liang_reference import liang
from tests.support.shard_folders import (
    assert_equal_to_reference,
    random_rows,
    read_folder,
    write_csv,
)


def collected(rows, folder, **options):
    """Interactions from (user, item, ...) tuples, in small batches."""
    return collect_rows(rows, folder, **options)[0]


def collect_rows(rows, folder, batch_rows=7, min_rating=4.0, **columns):
    names = ["user", "item", *columns]
    types = [
        pa.int64() if isinstance(rows[0][0], int) else pa.string(),
        pa.int64() if isinstance(rows[0][1], int) else pa.string(),
    ]
    types += list(columns.values())

    def batches():
        for start in range(0, len(rows), batch_rows):
            part = list(zip(*rows[start : start + batch_rows], strict=True))
            yield pa.RecordBatch.from_arrays(
                [pa.array(c, t) for c, t in zip(part, types, strict=True)], names
            )

    return collect(batches(), folder, min_rating, "200MB")


def plan_by_id(plan, data, users_per_block):
    """What read_folder returns, straight from a plan."""
    items = data.item_ids.take(pa.array(plan.vocabulary)).to_pylist()
    result = {"items": items, "popularity": dict(zip(items, plan.popularity.tolist(), strict=True))}
    for split in ("train", "validation", "test"):
        ids = data.user_ids.take(pa.array(plan.users[split])).to_pylist()
        sizes = [users_per_block] * (len(ids) // users_per_block) + (
            [len(ids) % users_per_block] if len(ids) % users_per_block else []
        )
        users, result[split], make = iter(ids), {}, plan.maker(split)
        for unmade in data.blocks(plan.users[split], sizes):
            block = make(unmade, plan.user_keys[unmade.users])
            block.check(len(items), split)
            for u in range(block.n_users):
                fold_in, held_out = (
                    [] if rows is None else [items[i] for i in rows.slice(u, u + 1).items]
                    for rows in (block.rows, block.held_out)
                )
                result[split][next(users)] = (fold_in, held_out)
        assert next(users, None) is None
    return result


RATED = st.lists(
    st.tuples(st.integers(0, 25), st.integers(0, 11), st.sampled_from([1.0, 3.5, 4.0, 5.0])),
    min_size=60,
    max_size=260,
)


@settings(max_examples=25, deadline=None)
@given(
    rows=RATED,
    seed=st.integers(0, 2**32 - 1),
    share=st.floats(0, 0.45),
    min_items=st.integers(1, 3),
    block=st.integers(1, 9),
)
def test_liang_equals_the_reference(tmp_path_factory, rows, seed, share, min_items, block):
    # rows of one user repeat pairs, come in any order, and lie across batches
    data = (
        collected(rows, tmp_path_factory.mktemp("scratch"), rating=pa.float64())
        if any(r[2] >= 4 for r in rows)
        else None
    )
    kept = 0 if data is None else int((data.sizes >= min_items).sum())
    if kept < 3:
        return
    held = int(share * kept)
    plan = liang_plan(data, min_items, held, held, seed)
    assert_equal_to_reference(
        plan_by_id(plan, data, block), liang(rows, 4.0, min_items, held, held, seed)
    )


@settings(max_examples=10, deadline=None)
@given(
    ids=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=4),
        min_size=6,
        max_size=12,
        unique=True,
    )
)
def test_string_ids_go_by_their_utf8_bytes(tmp_path_factory, ids):
    rows = [(user, item, 5.0) for user in ids for item in ids[: 1 + ids.index(user)]]
    data = collected(rows, tmp_path_factory.mktemp("scratch"), rating=pa.float64())
    assert data.user_ids.to_pylist() == sorted(ids, key=lambda s: s.encode())


def test_liang_users_takes_the_last_for_test():
    np.random.seed(3)
    order = np.random.permutation(20)
    found = liang_users(20, 4, 5, 3)
    np.testing.assert_array_equal(found["test"], order[15:])
    np.testing.assert_array_equal(found["validation"], order[11:15])
    np.testing.assert_array_equal(found["train"], order[:11])


@pytest.mark.parametrize(("val", "test"), [(10, 10), (20, 0), (0, 25)])
def test_no_train_user_left(val, test):
    with pytest.raises(
        ValueError,
        match=f"--val_users {val} and --test_users {test} leave no train user of 20 users",
    ):
        liang_users(20, val, test, 0)


def test_held_out_draw_does_not_depend_on_blocks_and_spares_small_users():
    sizes = np.array([3, 5, 40, 4, 9, 10, 0, 7])
    keys = np.empty(0, np.uint64)  # they play no part
    whole = HeldOutDraw(5).mask(keys, keys, sizes)
    draw = HeldOutDraw(5)
    parts = [draw.mask(keys, keys, part) for part in (sizes[:3], sizes[3:])]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    per_user = np.add.reduceat(whole, np.cumsum(sizes[:-1])[np.array([0, 1, 2, 3, 4, 6])])
    assert whole[:3].sum() == 0
    assert per_user[:2].tolist() == [1, 8]


# --- given ----------------------------------------------------------------------------------------


def given_rows(seed=0):
    random = np.random.default_rng(seed)
    pairs = random.permutation(40 * 25)[:420]
    return [
        (int(p // 25), int(p % 25), str(v))
        for p, v in zip(pairs, random.choice(["0", "train", "1", "test"], 420), strict=True)
    ]


def test_given_without_validation(tmp_path):
    rows = [*given_rows(), (77, 3, "1"), (5, 999, "test")]
    data = collected(rows, tmp_path, split=pa.string())
    plan = GivenPlan(data, 0.0, 1)
    found = plan_by_id(plan, data, 6)
    train: dict = {}
    test: dict = {}
    for user, item, split in rows:
        (train if split in ("0", "train") else test).setdefault(user, set()).add(item)
    vocabulary = set.union(*train.values())
    assert set(found["items"]) == vocabulary
    assert 999 not in vocabulary
    assert {u: set(f) for u, (f, _) in found["train"].items()} == train
    assert {u: (set(f), set(h)) for u, (f, h) in found["test"].items()} == {
        u: (train[u], test[u] & vocabulary) for u in test if u in train
    }
    assert found["validation"] == {}
    assert plan.left_out["users_without_train_interaction"] == sum(u not in train for u in test)
    assert plan.left_out["target_interactions_outside_vocabulary"] == sum(
        len(test[u] - vocabulary) for u in test if u in train
    )


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
def test_given_moves_a_fraction_to_validation(tmp_path, fraction):
    data = collected(given_rows(), tmp_path, split=pa.string())
    before = plan_by_id(GivenPlan(data, 0.0, 1), data, 6)
    after = plan_by_id(GivenPlan(data, fraction, 1), data, 11)
    assert set(after["items"]) == set(before["items"])  # the fraction does not shape the vocabulary
    for user, (items, _) in before["train"].items():
        n = max(1, int(fraction * len(items))) if len(items) >= 5 else 0
        kept, moved = after["validation"].get(user, (after["train"][user][0], []))
        assert len(moved) == n
        assert set(after["train"][user][0]) == set(kept) == set(items) - set(moved)
        assert set(moved) <= set(items)
        if user in before["test"]:
            fold_in, held_out = after["test"][user]
            assert set(fold_in) == set(kept)
            assert set(held_out) == set(before["test"][user][1])
    assert list(before["train"]) == list(after["train"])


def test_validation_does_not_depend_on_the_order_of_input(tmp_path):
    rows = given_rows()
    found = []
    for i, order in enumerate((rows, sorted(rows), rows[::-1])):
        data = collected(order, tmp_path / str(i), split=pa.string())
        found.append(
            {
                u: set(h)
                for u, (_, h) in plan_by_id(GivenPlan(data, 0.3, 1), data, 5)["validation"].items()
            }
        )
    assert found[0] == found[1] == found[2]


def test_own_validation_rows(tmp_path):
    rows = [
        *given_rows(),
        *((user, 100 + user % 3, "2") for user in range(10)),
        *((user, 100 + user % 3, "0") for user in range(20, 26)),
    ]
    data = collected(rows, tmp_path, split=pa.string())
    plan = GivenPlan(data, None, 1)
    assert plan.fraction == 0
    assert {u: h for u, (_, h) in plan_by_id(plan, data, 5)["validation"].items()} == {
        u: [100 + u % 3] for u in range(10)
    }
    with pytest.raises(ValueError, match=r"--validation_fraction 0\.2 would add others"):
        GivenPlan(data, 0.2, 1)


def test_a_pair_in_train_and_test_counts_once(tmp_path):
    rows = [
        (1, 1, "train"),
        (1, 2, "train"),
        (1, 1, "test"),
        (2, 2, "test"),
        (2, 2, "train"),
        (2, 1, "train"),
    ]
    data, summary = collect_rows(rows, tmp_path, split=pa.string())
    found = plan_by_id(GivenPlan(data, 0.0, 1), data, 5)
    assert summary.duplicates == 2
    assert {u: (sorted(f), h) for u, (f, h) in found["test"].items()} == {2: ([1], [2])}


def test_no_train_interaction(tmp_path):
    data = collected([(1, 1, "test")], tmp_path, split=pa.string())
    with pytest.raises(ValueError, match="no interaction as train"):
        GivenPlan(data, 0.0, 1)


def test_unknown_split_value(tmp_path):
    with pytest.raises(ValueError, match="'dev'; expected 0 or train"):
        collected([(1, 1, "train"), (1, 2, "dev")], tmp_path, split=pa.string())


def test_moved_to_validation_is_fair():
    user = np.repeat(np.arange(2000), 10)
    hashes = pair_hash(user.astype(np.uint64), np.tile(np.arange(10), 2000).astype(np.uint64), 7)
    assert len(np.unique(hashes)) == len(hashes)
    moved = moved_to_validation(user, hashes, 2000, 0.3).reshape(2000, 10)
    assert (moved.sum(1) == 3).all()
    assert (abs(moved.mean(0) - 0.3) < 0.06).all()  # no position is preferred: 6 standard errors
    other = moved_to_validation(
        user,
        pair_hash(user.astype(np.uint64), np.tile(np.arange(10), 2000).astype(np.uint64), 8),
        2000,
        0.3,
    )
    assert (other.reshape(2000, 10) != moved).any()


# --- real data ------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.slow
def test_ml1m_equals_the_reference(data_dir, tmp_path):
    source = data_dir / "ml-1m" / "ratings.csv.gz"
    assert (
        shard.main(
            [str(source), str(tmp_path / "out"), "--val_users", "500", "--test_users", "1000"]
        )
        == 0
    )
    with gzip.open(source, "rt") as file:
        next(file)
        rows = [(int(u), int(i), float(r)) for u, i, r in (line.split(",") for line in file)]
    found = read_folder(tmp_path / "out")
    assert_equal_to_reference(found, liang(rows, val_users=500, test_users=1000))
    splits = Manifest.load(tmp_path / "out").splits
    assert (splits["train"].users, splits["validation"].users, splits["test"].users) == (
        4534,
        500,
        1000,
    )
    assert len(found["items"]) == 3483
    assert splits["train"].interactions == 435_180
    assert sum(s.interactions + s.heldout for s in splits.values()) == 575_214


@pytest.mark.data
@pytest.mark.slow
def test_gowalla_is_kept_whole(data_dir, tmp_path):
    source = data_dir / "gowalla" / "interactions.csv.gz"
    arguments = ["--protocol", "given", "--split_column", "split", "--validation_fraction", "0"]
    assert shard.main([str(source), str(tmp_path / "out"), *arguments]) == 0
    manifest = Manifest.load(tmp_path / "out")
    left_out = manifest.preparation["left_out"]
    assert manifest.splits["train"].users == 29_858 - left_out["users_without_train_interaction"]
    assert (
        manifest.splits["train"].interactions
        == manifest.splits["test"].interactions
        == 810_128 - left_out["duplicate_rows"]
    )
    assert (
        manifest.splits["test"].heldout
        == 217_242 - left_out["target_interactions_outside_vocabulary"]
    )
    assert manifest.n_items == 40_981 - left_out["items_without_train_interaction"]
    assert manifest.splits["validation"].users == 0
    assert set(left_out.values()) == {0}


def test_written_folder_equals_the_reference(tmp_path):
    rows = random_rows()
    source = write_csv(tmp_path / "in.csv", rows)
    assert (
        shard.main(
            [
                str(source),
                str(tmp_path / "out"),
                "--val_users",
                "8",
                "--test_users",
                "9",
                "--users_per_shard",
                "7",
            ]
        )
        == 0
    )
    assert_equal_to_reference(read_folder(tmp_path / "out"), liang(rows, val_users=8, test_users=9))

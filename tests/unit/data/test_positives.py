"""The rule that makes a positive, held against a straight-line reference; what manifests and
headers keep of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_vasp.data.positives import (
    REPEATS,
    PositiveRule,
    for_header,
    from_json,
    in_header,
    of_preparation,
    positive_rows,
)
from dist_vasp.data.role_columns import role_of, serving_columns, unused_columns

RATED = PositiveRule(
    rating_column="stars", min_rating=4.0, time_column="when", repeats="last", missing=("NULL",)
)
ROWS = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from([1.0, 3.0, 4.0, 5.0]), st.integers(0, 3)),
    max_size=25,
)


def reference(rows: list[tuple[int, float, int]], repeats: str, by_time: bool) -> list[int]:
    """Positions of the rows that stay, as the module's docstring has it."""
    kept = []
    for pair in sorted({pair for pair, _, _ in rows}):
        mine = [(n, rating, time) for n, (p, rating, time) in enumerate(rows) if p == pair]
        if repeats == "first":
            liked = [row for row in mine if row[1] >= 4]
            chosen = (
                min(liked, key=lambda row: (row[2] if by_time else 0, row[0])) if liked else None
            )
        elif repeats == "last":
            chosen = max(mine, key=lambda row: (row[2] if by_time else 0, row[0]))
        else:
            chosen = max(mine, key=lambda row: (row[1], -row[0]))
        if chosen is not None and chosen[1] >= 4:
            kept.append(chosen[0])
    return sorted(kept)


@settings(max_examples=150, deadline=None)
@given(rows=ROWS, repeats=st.sampled_from(REPEATS), by_time=st.booleans())
def test_the_row_that_decides(rows, repeats, by_time):
    pairs, ratings, times = (np.array([row[n] for row in rows]) for n in range(3))
    rule = PositiveRule(rating_column="rating", min_rating=4.0, repeats=repeats)
    found = positive_rows(
        rule, pairs.astype(np.int64), ratings.astype(float), times if by_time else None
    )
    assert found.tolist() == reference(rows, repeats, by_time)
    everything = positive_rows(PositiveRule(), pairs.astype(np.int64), None, None)
    assert everything.tolist() == sorted(
        {pair: n for n, (pair, _, _) in reversed(list(enumerate(rows)))}.values()
    )


def test_missing_ratings_and_times_decide_nothing():
    pairs = np.zeros(3, np.int64)
    for repeats in REPEATS:
        rule = PositiveRule(rating_column="rating", min_rating=4.0, repeats=repeats)
        found = positive_rows(
            rule, pairs, np.array([np.nan, 5.0, np.nan]), np.array([9.0, 10.0, np.nan])
        )
        assert found.tolist() == [1], repeats


@pytest.mark.parametrize(
    "rule", [PositiveRule(), RATED, PositiveRule("u", "i", "r", None, 3.5, "max", ())]
)
def test_json_brings_the_rule_back(rule):
    assert from_json(json.loads(json.dumps(rule.to_json()))) == rule
    assert in_header(json.loads(json.dumps({"n_items": 3, **for_header(rule)}))) == rule
    assert of_preparation({"protocol": "liang", "positives": rule.to_json()}) == rule
    assert in_header(for_header(None)) is None


@pytest.mark.parametrize(
    "raw",
    [
        None,
        [],
        {},
        RATED.to_json() | {"user_column": 7},
        RATED.to_json() | {"rating_column": ["a"]},
        RATED.to_json() | {"min_rating": "4"},
        RATED.to_json() | {"min_rating": float("nan")},
        RATED.to_json() | {"min_rating": True},
        RATED.to_json() | {"min_rating": None},
        RATED.to_json() | {"repeats": "some"},
        RATED.to_json() | {"repeats": ["last"]},
        RATED.to_json() | {"missing": "NULL"},
        PositiveRule().to_json() | {"repeats": "max"},
    ],
)
def test_json_that_is_no_rule_is_refused(raw):
    with pytest.raises(ValueError):
        from_json(raw)


def test_earlier_manifests():
    """They hold no rule but the arguments: `liang` read a column rating where there was one."""
    assert of_preparation(
        {"protocol": "liang", "arguments": {"min_rating": 3, "min_items": 5}}
    ) == PositiveRule(rating_column="rating", min_rating=3.0)
    assert of_preparation({"protocol": "given", "arguments": {}}) == PositiveRule()
    for unknown in (
        {},
        {"protocol": "made for a test"},
        {"protocol": "liang"},
        {"protocol": "liang", "arguments": {"min_rating": "x"}},
    ):
        assert of_preparation(unknown) is None


# --- columns -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("Rating", "rating"),
        ("stars", "rating"),
        ("User_ID", "user"),
        (" userId", "user"),
        ("score", "rating"),
        ("movieId", "item"),
        ("Timestamp", "time"),
        ("genre", None),
        ("", None),
    ],
)
def test_names_that_suggest_a_role(name, role):
    assert role_of(name) == role


def test_many_columns_that_are_not_used_are_counted():
    names = ["", *(f"c{i}" for i in range(30))]
    assert unused_columns(names, [], []) == [
        f"columns not used: (without a name), {', '.join(f'c{i}' for i in range(19))} and 11 more"
    ]


def test_one_column_is_not_user_and_item():
    with pytest.raises(ValueError, match="column 'id' is named as user and as item"):
        serving_columns(["id"], None, {"user": "id", "item": "id"}, "the table")


def test_columns_that_are_not_used_are_named():
    assert unused_columns(["user", "item"], ["user", "item"], ["rating"]) == []
    assert unused_columns(["user", "item", "Stars", "genre"], ["user", "item"], ["rating"]) == [
        "columns not used: Stars, genre; --rating_column Stars reads ratings from it"
    ]
    assert unused_columns(["user", "item", "Stars"], ["user", "item"], []) == [
        "columns not used: Stars"
    ]


def _chosen(names, rule, all_positive=False, **asked):
    return serving_columns(names, rule, asked, "h.csv", all_positive)


def test_serving_reads_the_columns_of_the_shards():
    rule = PositiveRule("uid", "movie", "stars", None, 4.0)
    found = _chosen(["stars", "uid", "movie"], rule)
    assert (found.user, found.item, found.rating, found.time, found.notes) == (
        "uid",
        "movie",
        "stars",
        None,
        (),
    )
    found = _chosen(["user", "item", "stars"], rule)
    assert (found.user, found.item, found.rating) == ("user", "item", "stars")
    assert (
        found.notes[0]
        == "h.csv has no column uid, which the shards were made from; column user is read"
    )
    found = _chosen(["a", "movie", "score"], rule, user="a", rating="score")
    assert (found.user, found.item, found.rating, found.notes) == ("a", "movie", "score", ())


def test_serving_without_ratings_says_so():
    rule = PositiveRule(rating_column="rating", min_rating=4.0)
    found = _chosen(["user", "item", "Rating"], rule)
    assert found.rating is None
    assert found.notes == (
        "h.csv has no column rating: every row is taken as a like",
        "columns not used: Rating; --rating_column Rating reads ratings from it",
    )
    found = _chosen(["user", "item", "rating"], rule, all_positive=True)
    assert (
        found.rating is None
        and found.notes[0] == "h.csv: every row is taken as a like (--all_positive)"
    )
    found = _chosen(["user", "item", "rating"], None)
    assert found.rating is None and found.notes[0].startswith(
        "warning: what made a positive in training is not known"
    )
    found = _chosen(["user", "item", "rating"], PositiveRule())
    assert found.rating is None and found.notes == ("columns not used: rating",)


def test_serving_reads_rating_and_timestamp_where_the_remembered_names_are_not_there():
    rule = PositiveRule(rating_column="stars", min_rating=4.0, time_column="when", repeats="last")
    found = _chosen(["user", "item", "rating", "timestamp"], rule)
    assert (found.rating, found.time) == ("rating", "timestamp")
    assert found.notes == (
        "h.csv has no column stars, which the shards were made from; column rating is read",
        "h.csv has no column when, which the shards were made from; column timestamp is read",
    )
    found = _chosen(["user", "item", "stars:float", "rating", "when:float"], rule)
    assert (found.rating, found.time) == ("stars:float", "when:float")


def test_serving_by_time():
    rule = PositiveRule(rating_column="rating", min_rating=4.0, time_column="when", repeats="last")
    assert _chosen(["user", "item", "rating", "when"], rule).time == "when"
    assert _chosen(["user", "item", "rating", "t"], rule, time="t").time == "t"
    found = _chosen(["user", "item", "rating"], rule)
    assert found.time is None and "the last row counts" in found.notes[0]


@pytest.mark.parametrize(
    ("names", "rule", "asked", "message"),
    [
        (
            ["uid", "item"],
            PositiveRule(),
            {},
            "has no column 'user'; its columns are uid, item; pass --user_column uid",
        ),
        (
            ["user", "item"],
            PositiveRule(),
            {"item": "movie"},
            "has no column 'movie'; .*--item_column item",
        ),
        (["user", "item", "item"], PositiveRule(), {}, "has more than one column 'item'"),
        (
            ["user", "item"],
            PositiveRule(),
            {"rating": "stars"},
            "trained on every row, without ratings; leave it out",
        ),
        (
            ["user", "item", "stars"],
            None,
            {"rating": "stars"},
            "does not know which ratings are likes",
        ),
        (
            ["user", "item"],
            PositiveRule(rating_column="r", min_rating=1.0),
            {"rating": "x"},
            "has no column 'x'",
        ),
        (["user", "item", "t"], PositiveRule(), {"time": "t"}, "no rating is chosen by its time"),
        (["user", "item", "r"], RATED, {"rating": "r", "time": "t"}, "has no column 't'"),
    ],
)
def test_columns_that_cannot_be_read(names, rule, asked, message):
    with pytest.raises(ValueError, match=message):
        _chosen(names, rule, **asked)


def test_all_positive_and_a_rating_column_contradict():
    with pytest.raises(ValueError, match="contradict each other"):
        _chosen(["user", "item", "r"], RATED, all_positive=True, rating="r")

"""Protocols `time` and `last` told straight, with pandas: the oracle of data_tools.

It shares no code with data_tools. Both return what liang_reference.liang does; the users of a split
are in no particular order, the item ids of a user in the order of their times.
"""

from __future__ import annotations

import pandas as pd


def last(frame: pd.DataFrame, min_rating: float = 4.0, min_items: int = 5) -> dict:
    """frame: columns user, item, and optionally rating and time, in input order."""
    kept = _active(_in_order(_positives(frame, min_rating)), min_items)
    from_end = kept.groupby("user").cumcount(ascending=False)
    size = kept.groupby("user")["item"].transform("size")
    part = pd.Series("train", index=kept.index)
    part[(from_end == 0) & (size >= 2)] = "test"
    part[(from_end == 1) & (size >= 3)] = "validation"
    return _split(kept, part, kept[part == "train"])


def time(
    frame: pd.DataFrame,
    split_time: float | None = None,
    quantile: float | None = None,
    validation_fraction: float = 0.1,
    min_rating: float = 4.0,
    min_items: int = 5,
) -> dict:
    """frame: columns user, item, time, and optionally rating, in input order."""
    kept = _positives(frame, min_rating)
    if split_time is None:
        assert quantile is not None
        split_time = sorted(kept["time"])[int(quantile * len(kept))]
    kept = _active(_in_order(kept), min_items)
    before = kept["time"] < split_time
    kept = kept[kept["user"].isin(kept[before]["user"])]
    before = kept["time"] < split_time
    part = pd.Series("test", index=kept.index)
    part[before] = "train"
    for _, rows in kept[before].groupby("user"):
        if len(rows) >= 5 and validation_fraction:
            n = max(1, int(validation_fraction * len(rows)))
            part[rows.index[-n:]] = "validation"
    return _split(kept, part, kept[before])


def _positives(frame: pd.DataFrame, min_rating: float) -> pd.DataFrame:
    if "rating" in frame:
        frame = frame[frame["rating"] >= min_rating]
    if "time" in frame:  # the earliest row of a pair
        frame = frame.sort_values("time", kind="stable")
    return frame.drop_duplicates(["user", "item"]).sort_index()


def _in_order(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.sort_values("time", kind="stable") if "time" in frame else frame


def _active(frame: pd.DataFrame, min_items: int) -> pd.DataFrame:
    return frame[frame.groupby("user")["item"].transform("size") >= min_items]


def _split(kept: pd.DataFrame, part: pd.Series, of_vocabulary: pd.DataFrame) -> dict:
    popularity = kept[part == "train"].groupby("item").size()
    counts = {item: int(popularity.get(item, 0)) for item in of_vocabulary["item"].unique()}
    items = lambda rows: [i for i in rows["item"].tolist() if i in counts]  # noqa: E731
    result: dict = {
        "items": sorted(counts, key=lambda item: (-counts[item], item)),
        "popularity": counts,
    }
    result["train"] = {
        user: (items(rows), []) for user, rows in kept[part == "train"].groupby("user")
    }
    for split, inputs in (("validation", ["train"]), ("test", ["train", "validation"])):
        result[split] = {
            user: (
                items(kept[(kept["user"] == user) & part.isin(inputs)]),
                items(rows),
            )
            for user, rows in kept[part == split].groupby("user")
        }
    return result

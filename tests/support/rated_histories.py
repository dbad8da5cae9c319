"""Histories with ratings, and the lists that a rule of positives gives, for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dist_vasp import Recommender
from dist_vasp.data.positives import PositiveRule
from launch.recommend import main as recommend
from tests.support.runs import write_run

N_ITEMS = 31
IDS = [1000 + 3 * i for i in range(N_ITEMS)]
RULE = PositiveRule(rating_column="rating", min_rating=4.0)
K = 5


def a_run(folder: Path, rule: PositiveRule | None, partitions: int = 1) -> Path:
    path = folder / f"{hash(rule)}-{partitions}"
    if not path.is_dir():
        write_run(path, IDS, "vasp", partitions, rule=rule)
    return path


def rows_of(seed: int = 0, n_users: int = 14) -> list[tuple[int, int, int, int]]:
    """(user, item, rating, time) in any order; pairs repeat, one item in ten is unknown, user 0
    likes nothing."""
    random = np.random.default_rng(seed)
    rows = []
    for user in range(n_users):
        for _ in range(int(random.integers(4, 14))):
            item = int(random.choice([*IDS, 5, 6, 7]))
            rows.append(
                (
                    user,
                    item,
                    int(random.integers(1, 4 if user == 0 else 6)),
                    int(random.integers(0, 50)),
                )
            )
    return [rows[n] for n in random.permutation(len(rows))]


def split_by_user(
    rows, repeats: str, by_time: bool = False
) -> tuple[dict[int, set], dict[int, set]]:
    """(liked, seen) known items of every user, told straight."""
    pairs: dict[tuple[int, int], list] = {}
    for user, item, rating, time in rows:
        if item in IDS:
            pairs.setdefault((user, item), []).append((rating, time))
    liked: dict[int, set] = {}
    seen: dict[int, set] = {}
    for (user, item), given in pairs.items():
        decides = max(given, key=lambda g: g[0])[0]
        if repeats == "last":
            decides = given[
                max(range(len(given)), key=lambda n: (given[n][1] if by_time else 0, n))
            ][0]
        seen.setdefault(user, set()).add(item)
        if decides >= 4:
            liked.setdefault(user, set()).add(item)
    return liked, seen


def expected_lists(
    r: Recommender, liked: dict[int, set], seen: dict[int, set]
) -> dict[int, list[int]]:
    """Lists from the likes alone, with what was seen taken out of them by hand."""
    lists = {}
    for user, items in liked.items():
        ranked = r.recommend([sorted(items)], N_ITEMS, mask_input=False).ids[0].tolist()
        lists[user] = [item for item in ranked if item not in seen[user]][:K]
    return lists


def found_lists(lists) -> dict[int, list[int]]:
    pairs = zip(lists.users.to_pylist(), lists.ids.tolist(), strict=True)
    return {user: [i for i in row if i != -1] for user, row in pairs if row[0] != -1}


def table_of(rows) -> pa.Table:
    return pa.table(
        dict(
            zip(
                ("user", "item", "rating", "timestamp"),
                map(list, zip(*rows, strict=True)),
                strict=True,
            )
        )
    )


def written(folder: Path, name: str, rows, header: str = "user,item,rating,timestamp") -> Path:
    path = folder / name
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def command(capsys, *argv) -> str:
    """Run launch/recommend.py on one rank; returns what it prints."""
    recommend(["--device", "cpu", *map(str, argv)])
    return capsys.readouterr().out


def lists_in(path: Path) -> dict[int, list[int]]:
    table = pq.read_table(path)
    assert table.column_names == ["user", "rank", "item", "score"]
    lists: dict[int, list[int]] = {}
    for user, item in zip(table["user"].to_pylist(), table["item"].to_pylist(), strict=True):
        lists.setdefault(user, []).append(item)
    return lists

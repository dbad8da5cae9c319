"""The verdict of a report: the metrics of its lists against plain Python, and what it says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_vasp.compare.statistics import Scores, paired
from dist_vasp.data.rows import Rows
from dist_vasp.recommender import Recommender
from dist_vasp.report.by_time import open_times
from dist_vasp.report.gather import read_run
from dist_vasp.report.lists import Lists, Wanted, make_lists
from dist_vasp.report.measured import popular_items
from dist_vasp.report.verdict import judge
from dist_vasp.report.view import View
from launch.report import main
from tests.unit.report.test_report import (
    N_ITEMS,
    Tags,
    _rows,
    _write,
    shards,  # noqa: F401 - a fixture
)

TEST = [row.tolist() for row in _rows(24, 1)[8:]]  # test users: 8 items known, 4 held out


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory) -> tuple[Path, Path]:  # noqa: F811
    folder = tmp_path_factory.mktemp("runs")
    return _write(folder / "deep", shards), _write(folder / "closed", shards, "ease")


@pytest.fixture(scope="module")
def views(runs, shards) -> list[View]:  # noqa: F811
    found = []
    for colour, folder in enumerate(runs, 1):
        recommender = Recommender.load(folder)
        lists = make_lists(
            recommender, str(shards), Wanted(), lambda done, total: None, folder.name
        )
        found.append(View(colour, read_run(folder), lists))
    return found


def _ndcg(listed: list[int], target: list[int]) -> float:
    gain = sum(1 / math.log2(rank + 2) for rank, item in enumerate(listed) if item in target)
    return gain / sum(1 / math.log2(rank + 2) for rank in range(min(100, len(target))))


def _values(scores: Scores, column: str = "ndcg@100") -> list[float]:
    return scores.per_user(column).tolist()


def test_metrics_of_the_lists_are_those_of_plain_python(views, runs, shards):  # noqa: F811
    recommender, measured = Recommender.load(runs[0]), views[0].lists.measured
    known, held_out = [row[:-4] for row in TEST], [row[-4:] for row in TEST]
    ids, _ = recommender.recommend([[1000 + i for i in row] for row in known], 100)
    listed = [[int(i) - 1000 for i in row if i >= 0] for row in ids]
    expected = [_ndcg(*pair) for pair in zip(listed, held_out, strict=True)]
    assert _values(measured.model) == pytest.approx(expected, rel=1e-12)

    counts = recommender.items.popularity
    order = sorted(range(N_ITEMS), key=lambda i: (-counts[i], i))
    popular = [[i for i in order if i not in row] for row in known]
    expected = [_ndcg(*pair) for pair in zip(popular, held_out, strict=True)]
    assert _values(measured.popularity) == pytest.approx(expected, rel=1e-12)

    assert sum(third.held_out for third in measured.thirds) == pytest.approx(1)
    assert sum(third.recommended for third in measured.thirds) == pytest.approx(1)
    assert sum(third.n_items for third in measured.thirds) == N_ITEMS
    last = measured.thirds[2]
    tail = set(range(N_ITEMS - last.n_items, N_ITEMS))  # popularity falls with the row here
    of_tail = [
        _ndcg(row, [i for i in target if i in tail])
        for row, target in zip(listed, held_out, strict=True)
        if tail & set(target)
    ]
    assert last.quality["ndcg@100"].mean == pytest.approx(fmean(of_tail), rel=1e-12)
    assert last.quality["ndcg@100"].n == len(of_tail)


def test_popular_items_are_padded_and_never_known():
    history = Rows(np.array([0, 2, 2]), np.array([1, 3]))
    found = popular_items(np.array([3, 0, 1, 2]), history, 5)
    assert found.tolist() == [[0, 2, -1, -1, -1], [3, 0, 1, 2, -1]]
    assert popular_items(np.array([3, 0, 1, 2]), history, 1).tolist() == [[0], [3]]


def test_the_better_run_is_named_with_its_paired_difference(views, runs, tmp_path):
    found = judge(views)
    first, second = (one.view.lists.measured.model for one in found.judged)
    difference = [a - b for a, b in zip(_values(first), _values(second), strict=True)]
    error = stdev(difference) / math.sqrt(len(difference))
    told = found.judged[1].best.difference
    assert -told.mean == pytest.approx(fmean(difference)) and told.mean <= 0
    assert told.se == pytest.approx(error)
    assert found.best == (first.name if fmean(difference) > 2 * error else "")
    assert found.ease == "closed" and not found.commands
    deep = next(one for one in found.judged if one.view.run.name == "deep")
    assert deep.ease.difference == paired(
        views[0].lists.measured.model, views[1].lists.measured.model, "ndcg@100"
    )
    main([*map(str, runs), "--out", str(tmp_path / "page.html")])
    text = " ".join(Tags((tmp_path / "page.html").read_text()).text.split())
    assert "on the same 16 test users" in text and "less popularity" in text
    assert "less EASE (closed)" in text and "Head, middle and tail" in text


def test_a_run_alone_is_told_how_to_add_ease(views, runs, shards, tmp_path):  # noqa: F811
    found = judge(views[:1])
    assert found.judged[0].ease is None and found.best == ""
    train, report = found.commands
    assert train.startswith("dist-vasp train --model.kind ease") and f"{shards} " in train
    assert report == f"dist-vasp report {runs[0]} {runs[0]}-ease --shards {shards}"
    main([str(runs[0]), "--out", str(tmp_path / "page.html"), "--users", "5"])
    text = " ".join(Tags((tmp_path / "page.html").read_text()).text.split())
    assert "On the same 5 test users (of 16), deep is" in text and "popularity" in text
    assert f"dist-vasp report {runs[0]} {runs[0]}-ease" in text
    main([str(runs[0]), "--out", str(tmp_path / "page.html"), "--users", "0"])
    assert "not compared: no lists were made (--users 0)." in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("changed", ["users", "held-out items"])
def test_lists_of_other_data_are_not_paired(views, changed):
    lists = views[1].lists
    keys, values = lists.measured.model.keys, lists.measured.popularity.values
    if changed == "users":
        keys = keys + 1
    else:
        values = {name: found / 2 for name, found in values.items()}
    other = Scores("closed", (0,), keys, values)
    measured = type(lists.measured)(
        other, other, lists.measured.thirds, "shards", "test", lists.measured.n_split
    )
    view = View(2, views[1].run, Lists(lists.popularity, measured))
    found = judge([views[0], view])
    assert len(found.judged) == 1
    assert "its users or their held-out items are not those of" in found.missing[0]


def test_histories_in_order_of_time(runs, shards, tmp_path):  # noqa: F811
    """The lower the item, the later it was taken: the order that is shown turns round."""
    user_ids = pq.read_table(shards / "users-test.parquet").column("id").to_pylist()
    pairs = [(user, 1000 + i) for user, row in zip(user_ids, TEST, strict=True) for i in row]
    users, items = (list(column) for column in zip(*pairs, strict=True))
    times = [float(-i) for i in items]
    pq.write_table(pa.table({"user": users, "item": items, "at": times}), tmp_path / "t.parquet")
    page = tmp_path / "page.html"
    more = ["--out", str(page), "--samples", "1", "--histories", str(tmp_path / "t.parquet")]
    main([str(runs[0]), *more, "--time_column", "at"])
    text = Tags(page.read_text()).text
    assert "the latest items first" in text and "popular items first" not in text
    with pytest.raises(ValueError, match="has no column 'timestamp'"):
        open_times(str(tmp_path / "t.parquet"), None, None)
    with pytest.raises(ValueError, match="--time_column is of --histories"):
        main([str(runs[0]), "--time_column", "at"])


def test_the_command_and_the_commit_are_shown(runs, tmp_path):
    start = json.loads((runs[0] / "environment.json").read_text())["starts"][0]
    start |= {"command": "launch/train.py --config <b>", "commit": "0123abc"}
    (runs[0] / "environment.json").write_text(json.dumps({"starts": [start]}))
    main([str(runs[0]), "--users", "0", "--out", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "<pre>launch/train.py --config &lt;b&gt;</pre>" in page and "commit 0123abc" in page

"""What a Recommender reads and returns beyond lists of ids: data frames, filters for each user,
popularity for an empty history, held-out pairs, and a training in one process."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import scipy.sparse

from dist_vasp import Recommender
from dist_vasp.commands.recommend import main as recommend
from tests.support.make_shards import write_folder
from tests.support.runs import write_run

IDS = [f"i{n}" for n in range(37)]
TITLES = [f"Title {n}" for n in range(37)]
HISTORIES = [["i3", "i17"], ["i0"], ["i5", "i9", "i30", "stranger"]]
K = 5


@pytest.fixture(scope="module")
def r(tmp_path_factory) -> Recommender:
    path = tmp_path_factory.mktemp("runs") / "named"
    write_run(path, IDS, "vasp", titles=TITLES)
    return Recommender.load(path)


def pairs() -> dict[str, list]:
    users = [f"u{u}" for u, history in enumerate(HISTORIES) for _ in history]
    return {"user": users, "item": [item for history in HISTORIES for item in history]}


def frames() -> dict[str, object]:
    """The same histories in every kind that is read."""
    found: dict[str, object] = {"lists": HISTORIES, "arrow": pa.table(pairs())}
    known = [[IDS.index(i) for i in history if i in IDS] for history in HISTORIES]
    matrix = np.zeros((len(HISTORIES), len(IDS)))
    for u, rows in enumerate(known):
        matrix[u, rows] = 1
    found["csr_matrix"] = scipy.sparse.csr_matrix(matrix)
    found["csr_array"] = scipy.sparse.csr_array(matrix)
    found["record_batch"] = pa.record_batch(pairs())
    found["reader"] = pa.table(pairs()).to_reader()
    if importlib.util.find_spec("pandas"):
        import pandas

        found["pandas"] = pandas.DataFrame(pairs())
        found["pandas_categories"] = pandas.DataFrame(pairs()).astype("category")
        found["pandas_series"] = pandas.Series(HISTORIES)
        found["pandas_index"] = pandas.DataFrame(pairs(), index=range(9, 16)).set_index("user")
    if importlib.util.find_spec("polars"):
        import polars

        found["polars"] = polars.DataFrame(pairs())
        found["polars_categories"] = polars.DataFrame(pairs()).cast(polars.Categorical)
        found["polars_series"] = polars.Series(HISTORIES)
    return found


@pytest.mark.parametrize("kind", frames())
def test_every_kind_gives_equal_lists(r, kind):
    """Acceptance: pandas, polars, Arrow, CSR and lists of the same histories."""
    expected, found = r.recommend(HISTORIES, K), r.recommend(frames()[kind], K)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert (found.ids != None).all()  # noqa: E711
    if found.users is not None:
        assert found.users.to_pylist() == ["u0", "u1", "u2"]


def test_a_frame_that_arrow_cannot_read(r):
    pandas = pytest.importorskip("pandas")
    mixed = pandas.DataFrame({"user": [1, "a"], "item": ["i1", "i2"]})
    with pytest.raises(ValueError, match=r"histories are a pandas\.DataFrame that Arrow cannot"):
        r.recommend(mixed, K)


def test_a_lazy_frame_is_refused_by_name(r):
    polars = pytest.importorskip("polars")
    with pytest.raises(ValueError, match=r"are a polars\.LazyFrame, expected one of: .*collect\("):
        r.recommend(polars.DataFrame(pairs()).lazy(), K)


# --- results --------------------------------------------------------------------------------------


def test_results_are_frames(r):
    lists = r.recommend(HISTORIES, K)
    frame = lists.to_pandas()
    assert list(frame.columns) == ["user", "rank", "item", "score", "title"]
    assert pa.table(lists).equals(lists.to_table())
    assert frame["title"][0] == TITLES[IDS.index(frame["item"][0])]
    why = r.explain(HISTORIES[0], lists.ids[0, 0]).to_pandas()
    assert list(why.columns) == ["item", "title", "weight"] and len(why) == 2


def test_pandas_is_imported_on_request_alone(r, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.setattr("pyarrow.pandas_compat", None, raising=False)
    lists = r.recommend(HISTORIES, K)
    with pytest.raises(ValueError, match=r"to_pandas needs pandas, .* or use to_table\(\)"):
        lists.to_pandas()


def test_reprs_are_short(r):
    lists = r.recommend(HISTORIES, K)
    assert repr(r) == f"Recommender(vasp, 37 items, {str(r.sources.folder)!r})"
    assert repr(lists) == "Lists(3 users, k=5, 15 recommendations)"
    why = r.explain(HISTORIES[0], "i1")
    assert repr(why) == f"Explanation('i1', 'Title 1', p={why.p:.4g}, 2 reasons)"


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_the_command_writes_titles(r, tmp_path, ending):
    pq.write_table(pa.table(pairs()), tmp_path / "h.parquet")
    output = tmp_path / f"lists.{ending}"
    options = ["--histories", tmp_path / "h.parquet", "--output", output, "--k", K, "--explain", 2]
    recommend(["--run", *map(str, (r.sources.folder, *options)), "--with_titles"])
    if ending == "jsonl":
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        reasons = [reason for row in rows for reason in row["because"]]
        assert list(reasons[0]) == ["item", "title", "weight"]
    else:
        table = pa.csv.read_csv(output) if ending == "csv" else pq.read_table(output)
        rows = table.to_pylist()
        reasons = [{"item": row[f"because_{n}"], "title": row[f"title_{n}"]} for row in rows
                   for n in (1, 2) if row[f"because_{n}"]]  # fmt: skip
    expected = r.recommend(pa.table(pairs()), K).to_table().to_pylist()
    assert [(row["item"], row["title"]) for row in rows] == [
        (row["item"], row["title"]) for row in expected
    ]
    assert list(rows[0])[:5] == ["user", "rank", "item", "score", "title"]
    assert all(TITLES[IDS.index(reason["item"])] == reason["title"] for reason in reasons)
    assert len(reasons) == K * (2 + 1 + 2)  # known past items, two at most


# --- filters for each user ------------------------------------------------------------------------


def test_filters_of_each_user(r):
    whole = r.recommend(HISTORIES, len(IDS)).ids.tolist()
    everything = [[i for i in one if i is not None] for one in whole]
    hidden = [everything[0][:2], [], [everything[2][1], "stranger"]]
    only = [everything[0][3:6], everything[1], [*everything[2][:2], "i5"]]
    lists = r.recommend(HISTORIES, K, filter_items=hidden, restrict_to=only)
    for u in range(3):
        expected = [i for i in everything[u] if i in only[u] and i not in hidden[u]]
        found = [i for i in lists.ids[u].tolist() if i is not None]
        assert found == expected[:K], u
    assert "filter_items: 4 ids, 1 of them not in the vocabulary" in lists.notes
    mapped = r.recommend(
        pa.table(pairs()),
        K,
        filter_items={"u2": hidden[2], "u0": hidden[0], "nobody": ["i1"]},
        restrict_to={f"u{u}": ids for u, ids in enumerate(only)},
    )
    np.testing.assert_array_equal(mapped.ids, lists.ids)


def test_wrong_filters_of_each_user(r):
    table = pa.table(pairs())
    for call, message in (
        (
            lambda: r.recommend(HISTORIES, K, filter_items=[["i1"]]),
            "filter_items has lists for 1 users, the histories are those of 3; pass one list for",
        ),
        (
            lambda: r.recommend(HISTORIES, K, filter_items={"u1": ["i1"]}),
            "filter_items is a mapping of users, but the histories have no user ids; pass a list",
        ),
        (
            lambda: r.recommend(table, K, filter_items=[["i1"], [], []]),
            "filter_items is a list of lists, but the histories are a table, .* pass a mapping",
        ),
        (
            lambda: r.recommend(table, K, restrict_to={"u0": ["i1"], "u2": ["i1"]}),
            "restrict_to has no list for user 'u1'; pass one for every user",
        ),
        (
            lambda: r.recommend(HISTORIES, K, filter_items=[["i1"], "i2", []]),
            "filter_items of history 1 is 'i2', expected a list of ids",
        ),
        (lambda: r.recommend(HISTORIES, K, empty="random"), "empty is 'random', expected popula"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# --- popularity for an empty history --------------------------------------------------------------


def test_popularity_for_an_empty_history(r):
    histories = [[], ["i3"], ["stranger"]]
    plain = r.recommend(histories, K)
    assert plain.ids[0].tolist() == [None] * K and not plain.popular.any()
    hidden = [["i1"], [], []]
    lists = r.recommend(histories, K, empty="popularity", filter_items=hidden)
    assert lists.popular.tolist() == [True, False, True]
    np.testing.assert_array_equal(lists.ids[1], plain.ids[1])
    assert lists.ids[0].tolist() == ["i0", "i2", "i3", "i4", "i5"]  # the support's popularity
    assert lists.ids[2].tolist() == ["i0", "i1", "i2", "i3", "i4"]
    np.testing.assert_array_equal(lists.scores[0], r.items.popularity[[0, 2, 3, 4, 5]])


# --- evaluation -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[tuple[list[int], list[int]]], Recommender]:
    """A folder with shards and a closed form that `fit` made of them, and the test users."""
    folder = tmp_path_factory.mktemp("fit")
    random = np.random.default_rng(2)

    def rows(n: int) -> list[list[int]]:
        return [random.choice(23, size=8, replace=False).tolist() for _ in range(n)]

    test = [(row[:5], row[5:]) for row in rows(12)]
    test.append(([1, 2, 3], []))
    held_out = [(row[:5], row[5:]) for row in rows(4)]
    write_folder(folder / "shards", rows(50), held_out, test, n_items=23)
    config = {"model": {"kind": "ease", "ease_lambda": 5.0}, "device": "cpu"}
    return folder, test, Recommender.fit(folder / "shards", config, folder / "run")


def test_fit_makes_the_run_of_the_command(trained, capsys):
    folder, _, r = trained
    assert r.sources.kind == "ease" and r.n_items == 23
    result = json.loads((folder / "run" / "result.json").read_text())
    assert r.evaluate(folder / "shards") == result["test"]
    assert r.evaluate(folder / "shards", split="validation") == result["validation"]
    asked = r.evaluate(folder / "shards", metrics=["ndcg@3", "novelty@3"])
    assert asked["ndcg@100"] == result["test"]["ndcg@100"]
    assert {"ndcg@3", "ndcg@3_se", "novelty@3"} <= asked.keys()


@pytest.mark.slow
def test_a_step_model_is_fitted_and_resumed(trained):
    folder, _, _ = trained
    model = {"kind": "nease"}
    run = {"max_steps": 2, "evaluate_every_epochs": 0}
    config = {"model": model, "data": {"batch_size": 50, "halves": False, "workers": 0}, "run": run}
    first = Recommender.fit(folder / "shards", config | {"device": "cpu"}, folder / "steps")
    run["max_steps"] = 3
    second = Recommender.fit(folder / "shards", config | {"device": "cpu"}, folder / "steps")
    assert json.loads((folder / "steps" / "result.json").read_text())["checkpoint"].endswith("3")
    assert first.n_items == second.n_items == 23


def test_what_fit_refuses(trained, monkeypatch):
    folder, _, _ = trained
    shards = folder / "shards"
    for arguments, message in (
        ((shards, 7, folder / "no"), "config is of type int, expected the path of a YAML"),
        ((shards, {"model": {"kindly": 1}}, folder / "no"), "model.kindly is not a key"),
        ((None, {}, folder / "no"), "shards is None, expected the path of a folder"),
        ((folder, {}, folder / "no"), "manifest.json"),
        ((shards, {"data": {"ratings": True}}, folder / "no"), "ratings"),
    ):
        with pytest.raises(ValueError, match=message):
            Recommender.fit(*arguments)
    assert not (folder / "no").exists()
    monkeypatch.setitem(sys.modules, "dist_vasp.training.in_process", None)
    with pytest.raises(ValueError, match="training needs a library that cannot be imported: "):
        Recommender.fit(shards, {}, folder / "no")


def test_pairs_have_the_metrics_of_shards(trained):
    """Lists by position, and shuffled tables by user."""
    folder, test, r = trained
    expected = r.evaluate(folder / "shards") | {"n_unknown": 0}
    histories, held_out = (
        [[1000 + i for i in row] for row in half] for half in zip(*test, strict=True)
    )
    assert r.evaluate(histories, held_out) == expected
    tables = [
        pa.table(
            {
                "user": [f"u{u}" for u, row in enumerate(rows) for _ in row],
                "item": [i for row in rows for i in row],
            }
        )
        for rows in (histories, held_out)
    ]
    shuffled = tables[1].take(np.random.default_rng(1).permutation(len(tables[1])))
    found = r.evaluate(tables[0], shuffled)
    assert found.keys() == expected.keys()
    assert all(found[name] == pytest.approx(expected[name], rel=1e-12) for name in found)
    strange = pa.table({"user": ["new", "u0"], "item": [1004, 7]})
    more = r.evaluate(tables[0], pa.concat_tables([shuffled, strange]))
    assert more["n_users"] == expected["n_users"] + 1 and more["n_unknown"] == 1


def test_what_evaluate_refuses(trained, r):
    folder, _, ease = trained
    table = pa.table({"user": [1], "item": [1000]})
    for call, message in (
        (lambda: ease.evaluate([[1000]]), "held_out is missing; pass the items"),
        (lambda: ease.evaluate(folder / "shards", [[1]]), "has held-out items of its own; leave"),
        (lambda: ease.evaluate([[1000]], [[1001], [1002]]), "1 histories, and held-out items of 2"),
        (lambda: ease.evaluate([[1000]], table), "is a table with users, the other is not"),
        (lambda: ease.evaluate([[1000]], [[1000]]), "1 held-out items are also in the history of"),
        (lambda: ease.evaluate([[1000]], [[7]]), "no user has a held-out item that the model"),
        (lambda: ease.evaluate([[1]], [[2]], metrics="ndgc@9"), "'ndgc@9' is not a metric"),
        (lambda: ease.evaluate([[1]], [[2]], metrics="novelty@9"), "novelty@9 needs the number"),
        (lambda: r.evaluate(folder / "shards"), "has a vocabulary of 23 items .* trained on 37"),
        (lambda: ease.evaluate(folder / "shards", split="train"), "no train users|expected valid"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# --- vectors --------------------------------------------------------------------------------------


def test_vectors_rank_as_a_softmax_does(tmp_path):
    write_run(tmp_path, IDS, "flvae", partitions=2, loss="multinomial")
    flvae = Recommender.load(tmp_path)
    lists = flvae.recommend(HISTORIES, K, mask_input=False)
    items, users = flvae.item_vectors(), flvae.user_vectors(HISTORIES)
    assert items.shape == (len(IDS), users.shape[1]) and items.dtype == users.dtype == np.float32
    np.testing.assert_array_equal(np.argsort(-(users @ items.T), axis=1)[:, :K], lists.rows)


def test_models_without_vectors(r, trained):
    _, _, ease = trained
    with pytest.raises(ValueError, match="of kind ease scores items by an items x items matrix"):
        ease.item_vectors()
    assert r.item_vectors().shape == (37, r.user_vectors([]).shape[1])

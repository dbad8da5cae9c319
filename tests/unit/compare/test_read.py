"""The configuration of a comparison, and its mistakes."""

from __future__ import annotations

import re

import pytest

from dist_vasp.compare.read import read_comparison
from tests.support.compare_file import written
from tests.support.paths import ROOT


def entry(**changes) -> dict:
    found = {"name": "a", "config": {"model": {"kind": "nease"}}, **changes}
    return {"models": [{key: value for key, value in found.items() if value is not None}]}


def and_ensemble(members: dict, **changes) -> dict:
    return {"models": [*entry()["models"], {"name": "b", "ensemble": members, **changes}]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shards": None}, r"shards is None, expected a folder"),
        ({"shard": "x"}, r"'shard' is not a key of a comparison; expected shards, reference"),
        ({"reference": "b"}, r"reference is 'b', expected one of the models a; name one"),
        ({"metrics": "ndgc@5"}, r"metrics: 'ndgc@5' is not a metric; did you mean ndcg@5\?"),
        ({"metrics": ["ndcg@5"]}, r"metrics is \['ndcg@5'\], expected text such as"),
        ({"seeds": []}, r"seeds is \[\], expected a list of different whole numbers"),
        ({"seeds": [1, 1]}, r"seeds is \[1, 1\], expected a list of different"),
        ({"seeds": 3}, r"seeds is 3, expected a list"),
        ({"seeds": [True]}, r"seeds is \[True\], expected a list"),
        ({"models": []}, r"models is \[\], expected a list of models"),
        ({"models": ["a"]}, r"models\[0\] is 'a', expected keys with values"),
        (
            {"overrides": {"run.seed": 3}},
            r"overrides: run\.seed belongs to the comparison; set seeds in its place",
        ),
        (
            {"overrides": {"model": {"kind": "vasp"}}},
            r"overrides: model is not a key .* write section\.key: value",
        ),
        (entry(name="a b"), r"models\[0\]\.name is 'a b', expected letters"),
        (entry(name="../a"), r"models\[0\]\.name is '\.\./a', expected letters"),
        (entry(seed=1), r"models\[0\] \(a\): 'seed' is not a key of a comparison"),
        (
            entry(config=None),
            r"models\[0\] \(a\) has none of config, baseline, ensemble; give one of the three",
        ),
        (
            entry(baseline="popularity"),
            r"has config and baseline of config, baseline, ensemble; give one",
        ),
        (
            entry(config=None, ensemble={"b": 1}),
            r"\(a\)\.ensemble: 'b' is not a trained model above it; expected some of none",
        ),
        (
            entry(config=None, ensemble=["b"]),
            r"\(a\)\.ensemble: 'b' is not a trained model above it; expected some of none",
        ),
        (
            entry(config=None, ensemble="b"),
            r"\(a\)\.ensemble is 'b', expected models and their weights, such as",
        ),
        (
            and_ensemble(["a", "a"]),
            r"\(b\)\.ensemble is \['a', 'a'\]: a model is named twice",
        ),
        (
            entry(config=None, ensemble={"b": 1}, overrides={"run.keep": 1}),
            r"overrides is set, but an ensemble takes its members",
        ),
        (and_ensemble({"a": 0}), r"\(b\)\.ensemble\.a is 0, expected a weight above 0"),
        (
            and_ensemble({"a": 1}, seeds=[0, 1, 2]),
            r"ensemble: a has 2 seeds, the ensemble 3; give both as many",
        ),
        (entry(config=None, baseline="ease"), r"baseline is 'ease', expected popularity"),
        (
            entry(config="nowhere.yaml"),
            r"nowhere\.yaml cannot be read \(No such file or directory\)",
        ),
        (entry(config=3), r"models\[0\] \(a\)\.config is 3, expected keys with values"),
        (entry(config={"model": 3}), r"models\[0\] \(a\): model is 3, expected a section of keys"),
        (
            entry(overrides={"model.kinds": "vasp"}),
            r"models\[0\] \(a\): model\.kinds is not a key .* did you mean model\.kind\?",
        ),
        (entry(overrides={"data.batch_size": "many"}), r"models\[0\] \(a\): .*batch_size"),
        (
            entry(overrides={"loss.kind": "multinomial"}),
            r"models\[0\] \(a\): loss\.kind is 'multinomial', expected one of focal, cosine",
        ),
        ({"models": [entry()["models"][0]] * 2}, r"models\[1\]\.name 'a' is there twice"),
    ],
)
def test_mistakes_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_comparison(written(tmp_path, **changes))


def test_not_yaml(tmp_path):
    (tmp_path / "c.yaml").write_text("models: [")
    with pytest.raises(
        ValueError,
        match=r"c\.yaml, line 1 is not YAML .*expected the configuration of a comparison",
    ):
        read_comparison(tmp_path / "c.yaml")


def test_what_wins_over_what(tmp_path):
    inline = {
        "model": {"kind": "nease", "hidden": 3},
        "data": {"batch_size": 60, "shards": "other"},
        "run": {"dir": "x", "seed": 9},
    }
    models = [
        {
            "name": "a",
            "config": inline,
            "overrides": {"optimizer.beta1": 0.7, "data.batch_size": 70},
            "seeds": [4, 2],
        },
        {"name": "p", "baseline": "popularity"},
    ]
    path = written(
        tmp_path,
        models=models,
        overrides={"optimizer.beta1": 0.5, "optimizer.beta2": 0.5, "device": "cpu"},
    )
    comparison = read_comparison(path, {"data.batch_size": 80})
    first, p, second = comparison.runs(tmp_path / "out")
    assert [run.stem for run in (first, p, second)] == ["a-seed4", "p-seed0", "a-seed2"], (
        "first seeds first"
    )
    c = first.config
    assert (c.optimizer.beta1, c.optimizer.beta2, c.data.batch_size, c.model.hidden, c.device) == (
        0.7,
        0.5,
        80,
        3,
        "cpu",
    )
    assert (c.data.shards, c.run.dir, c.run.seed) == (
        "data",
        str(tmp_path / "out" / "runs" / "a-seed4"),
        4,
    )
    assert p.config is None and not p.members
    assert (
        read_comparison(path, {"shards": "elsewhere"}).runs("o")[0].config.data.shards
        == "elsewhere"
    )


def test_an_ensemble_goes_seed_by_seed_and_takes_the_only_run_of_a_closed_form(tmp_path):
    ease, other = (
        {"name": "e", "config": {"model": {"kind": "ease"}}},
        {**entry()["models"][0], "name": "o", "seeds": [5, 3]},
    )
    models = [ease, other, *and_ensemble({"a": 1, "e": 4, "o": 2})["models"]]
    runs = read_comparison(written(tmp_path, models=models)).runs(tmp_path)
    ensembles = [run for run in runs if run.members]
    assert [run.stem for run in ensembles] == ["b-seed0", "b-seed1"]
    assert [run.stem for run in ensembles[0].members] == ["a-seed0", "e-seed0", "o-seed5"]
    assert [run.stem for run in ensembles[1].members] == ["a-seed1", "e-seed0", "o-seed3"]
    assert ensembles[0].model.what == "product of a ^ 1, e ^ 4, o ^ 2"


def test_an_ensemble_of_names_alone_is_fitted(tmp_path):
    runs = read_comparison(written(tmp_path, **and_ensemble(["a"]))).runs(tmp_path)
    assert runs[-1].model.is_fitted
    assert runs[-1].model.what == "product of a, weights fitted on validation"
    assert [run.stem for run in runs[-1].members] == ["a-seed1"]


def test_weights_may_be_fitted_by_a_metric(tmp_path):
    models = and_ensemble(["a"])
    models["models"][-1]["fit"] = "ndcg@20"
    runs = read_comparison(written(tmp_path, **models)).runs(tmp_path)
    assert runs[-1].model.what == "product of a, weights fitted on validation by NDCG@20"
    for wrong, ensemble, message in [
        ("gini@5", ["a"], "fit is 'gini@5', expected one metric of ndcg"),
        (5, ["a"], "fit is 5, expected a metric"),
        ("ndcg@20", {"a": 1}, "expected it beside a list of models"),
    ]:
        models["models"][-1] |= {"fit": wrong, "ensemble": ensemble}
        with pytest.raises(ValueError, match=message):
            read_comparison(written(tmp_path, **models))


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("compare*.yaml")), ids=lambda p: p.name
)
def test_every_compare_file_under_configs_loads(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    comparison = read_comparison(path)
    assert len(comparison.models) > 2
    header = re.findall(r"^# [A-Z]\w+(?=:)", path.read_text(), re.M)
    assert header[:4] == [
        "# Purpose",
        "# Hardware",
        "# Time",
        "# Expected",
    ]

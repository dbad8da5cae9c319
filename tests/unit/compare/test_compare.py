"""The comparison: its arithmetic against plain numpy, its sentences, its configuration, and a whole
one end to end."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from dist_vasp.compare.jobs import peak_resident
from dist_vasp.compare.read import read_comparison
from dist_vasp.compare.statistics import (
    Cost,
    Scores,
    against_reference,
    estimate,
    paired,
    read_scores,
    seed_noise,
    verdict,
)
from tests.support.invoke import run_script
from tests.support.jobs import PATIENCE_S, environment
from tests.support.make_shards import write_folder
from tests.support.paths import ROOT

# --- arithmetic -----------------------------------------------------------------------------------


def scores(name: str, values, **more) -> Scores:
    """(seeds, users) of NDCG@100, the same for recall unless given."""
    columns = {"ndcg@100": values, "recall@20": values, "recall@50": values} | more
    columns = {column: np.atleast_2d(np.asarray(v, float)) for column, v in columns.items()}
    n_seeds, n_users = columns["ndcg@100"].shape
    return Scores(name, tuple(range(n_seeds)), np.arange(n_users, dtype=np.uint64), columns)


def test_paired_standard_error_against_numpy():
    rng = np.random.default_rng(0)
    hard = rng.random(200) / 2
    a, b = hard + rng.random((3, 200)) / 3, hard + rng.random((2, 200)) / 4
    unscored = rng.choice(200, 20, replace=False)
    a[:, unscored] = b[:, unscored] = np.nan
    d = paired(scores("a", a), scores("b", b), "ndcg@100")
    kept = np.setdiff1d(np.arange(200), unscored)
    differences = [
        sum(a[s, u] for s in range(3)) / 3 - sum(b[s, u] for s in range(2)) / 2 for u in kept
    ]
    mean = sum(differences) / 180
    assert d.n == 180
    assert d.mean == pytest.approx(mean, rel=1e-12)
    assert d.se == pytest.approx(
        math.sqrt(sum((x - mean) ** 2 for x in differences) / 179 / 180), rel=1e-12
    )
    assert d.ratio == pytest.approx(d.mean / d.se)
    single = [scores(n, v).estimate("ndcg@100").se for n, v in (("a", a), ("b", b))]
    assert d.se < math.hypot(*single), "pairing must gain where users are hard for both"


def test_spread_over_seeds():
    a = scores("a", [[0.1, 0.3], [0.2, 0.6], [0.0, 0.3]])  # metrics .2, .4, .15
    assert a.by_seed("ndcg@100") == pytest.approx([0.2, 0.4, 0.15])
    assert a.estimate("ndcg@100").mean == pytest.approx(0.25)
    assert a.seed_sd("ndcg@100") == pytest.approx(np.std([0.2, 0.4, 0.15], ddof=1))
    b = scores("b", [[0.1, 0.1], [0.3, 0.3]])
    assert seed_noise(a, b, "ndcg@100") == pytest.approx(math.sqrt(0.0175 / 3 + 0.02 / 2))
    one = scores("c", [0.1, 0.2])
    assert math.isnan(one.seed_sd("ndcg@100")) and math.isnan(seed_noise(one, one, "ndcg@100"))


def test_estimate_of_few():
    assert estimate(np.array([np.nan])).n == 0 and math.isnan(estimate(np.array([])).mean)
    one = estimate(np.array([0.5, np.nan]))
    assert one.mean == 0.5 and math.isnan(one.se) and not one.differs
    assert not estimate(np.zeros(5)).differs
    assert estimate(np.full(5, 0.1)).differs, "the same difference for every user"


def test_different_users_are_not_paired(tmp_path):
    a, b = scores("a", [0.1, 0.2]), scores("b", [0.1, 0.2])
    with pytest.raises(ValueError, match="a and b were evaluated on different users"):
        paired(a, Scores("b", b.seeds, b.keys + np.uint64(1), b.values), "ndcg@100")


# --- sentences ------------------------------------------------------------------------------------

USERS = np.linspace(0.2, 0.6, 101)  # mean .4
NOISE = np.tile([0.01, -0.01], 51)[:101]
COSTS = {"ours": Cost(20.0, 3e9), "ease": Cost(4.0, 1.5e9), "popularity": Cost()}


def test_verdict_when_the_reference_wins():
    models = [
        scores("popularity", USERS - 0.2 + NOISE),
        scores("ours", USERS),
        scores("ease", USERS - 0.1 + NOISE),
    ]
    assert verdict(models, "ours", COSTS) == (
        "**ours wins**: it is ahead of ease, the best of the others, by 0.0999 "
        "+- 0.0010 in NDCG@100 (0.4000 against 0.3001), "
        "99.9 standard errors of the paired difference. Recall@20 favours ours "
        "(+0.0999 +- 0.0010), Recall@50 favours ours "
        "(+0.0999 +- 0.0010). ours costs 5.00 times the training time (20.0 s "
        "against 4.0 s) and 2.00 times the memory (3.00 GB "
        "against 1.50 GB)."
    )
    assert against_reference(models, "ours") == (
        "Against the reference ours, by NDCG@100 at two standard errors: worse: popularity, ease."
    )


def test_verdict_when_the_reference_loses():
    models = [
        scores("ours", USERS, **{"recall@20": USERS + 0.3, "recall@50": USERS + 0.05 + 5 * NOISE}),
        scores("ease", USERS + 0.05 + NOISE),
        scores("other", USERS + 0.01 + NOISE),
    ]
    text = verdict(models, "ours", COSTS)
    assert text.startswith(
        "**ease wins**: it is ahead of the reference ours by 0.0501 +- 0.0010 in "
        "NDCG@100 (0.4501 against 0.4000), "
    )
    assert (
        "Recall@20 favours ours (-0.2499 +- 0.0010), Recall@50 shows no "
        "difference (-0.0004 +- 0.0040)." in text
    )
    assert text.endswith(
        "0.20 times the training time (4.0 s against 20.0 s) and 0.50 times the "
        "memory (1.50 GB against 3.00 GB)."
    )
    assert against_reference(models, "ours").endswith("better: ease, other.")


def test_verdict_of_a_tie():
    models = [
        scores("ours", USERS),
        scores("ease", USERS + 0.001 + NOISE),
        scores("popularity", USERS - 0.2),
    ]
    text = verdict(models, "ours", COSTS)
    assert text.startswith(
        "**No winner**: ease is ahead of the reference ours by 0.0011 +- 0.0010 "
        "in NDCG@100 (0.4011 against 0.4000), "
        "1.1 standard errors of the paired difference, which does not exceed "
        "two. Recall@20 shows no difference"
    )
    assert "wins" not in text
    assert against_reference(models, "ours").endswith("no different: ease; worse: popularity.")


def test_verdict_against_what_is_not_trained():
    ours, popularity = scores("ours", USERS), scores("popularity", USERS - 0.2 + NOISE)
    assert verdict([ours, popularity], "popularity", COSTS).endswith(
        "ours costs 20.0 s of training, where popularity needs none."
    )
    better = scores("popularity", USERS + 0.2 + NOISE)
    assert verdict([ours, better], "ours", COSTS).endswith(
        "popularity costs no training, where ours takes 20.0 s."
    )
    assert verdict([ours], "ours", COSTS) == "There is nothing to compare: ours alone has results."


def test_verdict_says_when_the_seeds_could_turn_it():
    unstable = scores(
        "ours", np.stack([USERS + 0.12, USERS - 0.08 + 2 * NOISE])
    )  # mean 0.02 ahead, seeds 0.2 apart
    stable = scores("ease", np.stack([USERS, USERS]))
    text = verdict([unstable, stable], "ours", COSTS)
    assert text.startswith("**ours wins**")
    assert (
        "But the choice of seeds moves that difference by 0.0999 (one standard "
        "error): more seeds could turn it." in text
    )
    steady = scores("ours", np.stack([USERS + 0.02, USERS + 0.02 + 2 * NOISE]))
    assert "choice of seeds" not in verdict([steady, stable], "ours", COSTS)


# --- configuration --------------------------------------------------------------------------------


def written(tmp_path: Path, **changes) -> Path:
    """A compare file; a change to None leaves the key out."""
    raw = {
        "shards": "data",
        "reference": "a",
        "seeds": [0, 1],
        "models": [{"name": "a", "config": {"model": {"kind": "nease"}}}],
    }
    raw = {key: value for key, value in {**raw, **changes}.items() if value is not None}
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


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


# --- end to end -----------------------------------------------------------------------------------

N_ITEMS = 60
TINY = {
    "model": {"kind": "nease", "hidden": 8, "latent": 4, "encoder_layers": 2, "decoder_layers": 2},
    "device": "cpu",
}
TINY |= {"data": {"batch_size": 16, "workers": 0}, "parallel": {"lanes": 4}}
TINY |= {"optimizer": {"schedule": [{"epochs": 3, "lr": 0.01}]}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    path, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    rows = [np.sort(rng.choice(N_ITEMS, rng.integers(4, 15), replace=False)) for _ in range(136)]
    held_out = [(row[1:], row[:1] if u % 4 else row[:0]) for u, row in enumerate(rows[96:])]
    write_folder(path, rows[:96], held_out[:10], held_out[10:], n_items=N_ITEMS)
    return path


def start(tmp_path: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        str(ROOT / "launch" / "compare.py"),
        "--config",
        str(tmp_path / "compare.yaml"),
        "--output",
        str(output),
    ]
    streams = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "start_new_session": True,
    }
    return subprocess.Popen([*command, *more], env=environment(), cwd=ROOT, **streams)


def finish(tmp_path: Path, output: Path, *more: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of compare.py."""
    arguments = ["--config", tmp_path / "compare.yaml", "--output", output, *more]
    done = run_script("compare", *arguments)
    return done.returncode, done.stdout, done.stderr


def dry_run(tmp_path: Path, output: Path, *more: str) -> str:
    """What `--dry_run` prints, in this process."""
    from launch.compare import main

    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert (
            main(
                [
                    "--config",
                    str(tmp_path / "compare.yaml"),
                    "--output",
                    str(output),
                    "--dry_run",
                    *more,
                ]
            )
            == 0
        )
    return out.getvalue()


@pytest.mark.slow
def test_a_whole_comparison(shards, tmp_path):
    models = [
        {"name": "popularity", "baseline": "popularity"},
        {"name": "nease", "config": TINY, "overrides": {"run.metrics": "mrr@4"}},
        {
            "name": "ease",
            "config": TINY,
            "overrides": {"model.kind": "ease", "model.ease_lambda": 5},
        },
        {"name": "both", "ensemble": {"nease": 1, "ease": 2}},
        {"name": "fitted", "ensemble": ["nease", "ease"], "fit": "ndcg@10"},
        {
            "name": "broken",
            "config": TINY,
            "overrides": {"parallel.interface": "nowhere0"},
            "seeds": [0],
        },
    ]
    of_file = {"shards": str(shards), "reference": "nease", "metrics": "hr@3,gini@5"}
    written(tmp_path, models=models, **of_file)
    output = tmp_path / "out"
    runs = output / "runs"

    out = dry_run(tmp_path, output)
    assert not output.exists()
    assert "9 runs of 6 models, 0 done, 9 to do; reference nease" in out

    # A failed run is named and the others go on.
    status, out, err = finish(tmp_path, output)
    assert status == 1, out + err
    assert err == "error: 1 run failed: broken-seed0\n"
    assert re.search(r"\[6/9\] broken-seed0: FAILED with status 2: .*nowhere0", out)
    assert re.search(r"\[7/9\] nease-seed1: done in \d+ s, test NDCG@100 0\.\d{4}", out)

    # The report tells what evaluate.py found.
    report, text = (
        json.loads((output / "report.json").read_text()),
        (output / "report.md").read_text(),
    )
    assert [m["name"] for m in report["models"]] == [
        "popularity",
        "nease",
        "ease",
        "both",
        "fitted",
    ]
    assert report["verdict"] in text and report["verdict"] in out
    assert "1 run failed" in text and "broken-seed0, status 2" in text
    page = (output / "report.html").read_text(encoding="ascii")
    for shown in ("broken-seed0", "HR@3", "Gini@5", "Paired difference", report["winner"]):
        assert shown in page, shown
    nease, popularity = report["models"][1], report["models"][0]
    tests = [json.loads((runs / f"nease-seed{k}.test.json").read_text())["test"] for k in (0, 1)]
    results = [json.loads((runs / f"nease-seed{k}" / "result.json").read_text()) for k in (0, 1)]
    for metric in ("ndcg@100", "recall@20", "recall@50"):
        found = nease["metrics"][metric]
        assert found["by_seed"] == pytest.approx([t[metric] for t in tests], rel=1e-12)
        assert found["by_seed"] == pytest.approx([r["test"][metric] for r in results], rel=1e-12)
        assert (
            found["mean"] == pytest.approx(np.mean(found["by_seed"]))
            and found["n_users"] == tests[0]["n_users"] == 23
        )  # 30, 7 of them without a target
        difference = popularity["metrics"][metric]["mean"] - found["mean"]
        assert popularity["difference"][metric]["mean"] == pytest.approx(difference)
    assert "difference" not in nease
    assert (
        nease["cost"]["peak_memory"] > 50e6
        and nease["cost"]["seconds_job"] > nease["cost"]["seconds_training"] > 0
    )
    assert nease["cost"]["users_per_second"] > 0 and nease["cost"]["parameters"] == N_ITEMS**2
    assert popularity["cost"]["seconds_training"] is None
    users = pq.read_table(output / "per_user.parquet")
    assert users.column_names[:4] == ["model", "seed", "key", "id"] and len(users) == 8 * 30

    # An ensemble is evaluated, and costs what its members cost.
    ease, both, fitted = report["models"][2:]
    assert both["cost"]["parameters"] == 2 * N_ITEMS**2 and both["cost"]["users_per_second"] is None
    assert both["cost"]["seconds_training"] == pytest.approx(
        sum(m["cost"]["seconds_training"] for m in (nease, ease))
    )
    assert (
        both["seeds"] == [0, 1]
        and both["trained"]
        and both["what"] == "product of ease ^ 2, nease ^ 1"
    )
    assert both["metrics"]["ndcg@100"]["by_seed"] != nease["metrics"]["ndcg@100"]["by_seed"]
    header = json.loads((runs / "both-seed1" / "ensemble.json").read_text())
    assert [(m["run"], m["weight"]) for m in header["members"]] == [
        ("../ease-seed0", 2.0),
        ("../nease-seed1", 1.0),
    ]
    assert fitted["what"] == "product of nease, ease, weights fitted on validation by NDCG@10"
    for seed in (0, 1):
        header = json.loads((runs / f"fitted-seed{seed}" / "ensemble.json").read_text())
        assert {m["run"] for m in header["members"]} <= {f"../nease-seed{seed}", "../ease-seed0"}
        log = (runs / f"fitted-seed{seed}.log").read_text()
        assert "validation users" in log

    # Metrics asked for by the file, or by a model, are those of every model.
    assert report["metrics_asked"] == ["hr@3", "gini@5", "mrr@4"]
    for name in ("hr@3", "mrr@4"):
        by_seed = [test[name] for test in tests]
        assert nease["metrics"][name]["by_seed"] == pytest.approx(by_seed, rel=1e-12)
        difference = popularity["metrics"][name]["mean"] - np.mean(by_seed)
        assert popularity["difference"][name]["mean"] == pytest.approx(difference)
    assert nease["gini@5"]["by_seed"] == [test["gini@5"] for test in tests]
    assert {"hr@3", "mrr@4", "mrr@4_tail"} <= set(users.column_names)
    assert "| model | HR@3 | Gini@5 | MRR@4 |" in text
    assert "| paired difference | HR@3 | MRR@4 |" in text

    for heading in (
        "## Metrics",
        "## Further metrics",
        "## Long tail",
        "## Cost",
        "## How this was made",
    ):
        assert heading in text

    # A finished run is not repeated; one that was cut short goes on where it stood.
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*.safetensors")}
    (runs / "nease-seed1" / "result.json").unlink()
    shutil.rmtree(runs / "nease-seed1" / "checkpoints" / "step-00000018")
    written(tmp_path, models=models[:4], **of_file)
    out = dry_run(tmp_path, output)
    assert re.search(r"both-seed0 .* done\n", out)
    assert re.search(r"nease-seed0 .* done\n", out) and re.search(
        r"nease-seed1 .* begun, resumes from step-00000012", out
    )
    status, out, err = finish(tmp_path, output)
    assert (status, err) == (0, ""), out + err
    assert (
        "4 of 6 runs are done already" in out and "[1/2] nease-seed1: resuming the training" in out
    )
    assert "[2/2] both-seed1: evaluating" in out
    assert "resumed from step 12" in (runs / "nease-seed1.log").read_text()
    after = {path: path.stat().st_mtime_ns for path in before if path.exists()}
    assert all(after[path] == before[path] for path in after if "seed0" in str(path))
    again = json.loads((output / "report.json").read_text())
    assert again["models"][1]["metrics"] == nease["metrics"] and not again["failures"]

    # Another metric is evaluated, but nothing is trained again.
    out = dry_run(tmp_path, output, "--metrics", "hr@3,map@7")
    assert "0 done, 6 to do" in out and out.count("trained, to be evaluated") == 3

    # Another configuration is not taken for the same run.
    out = dry_run(tmp_path, output, "--model.kind", "flvae")
    assert (
        "7 runs of 4 models, 1 done, 6 to do" in out
        and out.count("begun, resumes from step-00000018") == 2
    )


@pytest.mark.slow
def test_without_the_reference_there_is_no_report(shards, tmp_path):
    broken = {"name": "broken", "config": TINY, "overrides": {"parallel.interface": "nowhere0"}}
    written(tmp_path, shards=str(shards), reference="broken", models=[broken], seeds=[0])
    status, out, err = finish(tmp_path, tmp_path / "out")
    assert status == 1 and "FAILED with status 2" in out
    assert err.startswith(
        "error: 1 run failed: broken-seed0; no report: the reference broken has no finished run"
    )
    assert not (tmp_path / "out" / "report.md").exists()


def alive_in(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(folder) in argument for argument in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_is_passed_on_and_the_same_command_goes_on(shards, tmp_path, ranks):
    models = [{"name": "nease", "config": TINY}, {"name": "popularity", "baseline": "popularity"}]
    written(tmp_path, shards=str(shards), reference="nease", models=models, seeds=[0])
    output = tmp_path / "out"
    metrics, log = (
        output / "runs" / "nease-seed0" / "metrics.jsonl",
        output / "runs" / "nease-seed0.log",
    )
    endless = [
        "--ranks",
        str(ranks),
        "--optimizer.schedule",
        "[{epochs: 100000, lr: 0.001}]",
        "--run.evaluate_every_epochs",
        "0",
    ]
    process = start(tmp_path, output, *endless)
    deadline = time.monotonic() + PATIENCE_S
    while not metrics.is_file() or not metrics.read_text().count("\n") > 5:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (
        process.returncode == 130
        and "stopped on request; the same command resumes from here" in out
    ), out + err
    assert "stopped on request after step" in log.read_text()
    assert not alive_in(output) and not (output / "report.md").exists()
    step = int(re.findall(r"stopped on request after step (\d+)", log.read_text())[0])

    status, out, err = finish(tmp_path, output, *endless, "--run.max_steps", str(step + 3))
    assert status == 0, out + err
    assert f"resumed from step {step}" in log.read_text()
    job = json.loads((output / "runs" / "nease-seed0.job.json").read_text())
    assert len(job["peak_memory"]) == ranks and min(job["peak_memory"]) > 50e6


def test_command_line_mistakes(shards, tmp_path):
    from launch.compare import main

    config = written(tmp_path, shards=str(shards))
    base = ["--config", str(config), "--output", str(tmp_path / "out"), "--dry_run"]
    for more, message in (
        (["--ranks", "0"], "--ranks is 0, expected at least 1"),
        (["--ranks", "3", "--parallel.partitions", "2"], "3"),
        (["--model.hidden"], r"--model\.hidden has no value"),
        (["--model.hidden", "much"], r"models\[0\] \(a\): .*hidden"),
        (["--hidden", "3"], "--hidden is not an option"),
        (["--run.seed", "3"], r"the command line: run\.seed belongs to the comparison; set seeds"),
        (["--shards", str(tmp_path)], r"holds no manifest\.json"),
    ):
        with pytest.raises(ValueError, match=message):
            main([*base, *more])
    status, out, err = finish(tmp_path, tmp_path / "out", "--ranks", "0")
    assert (status, out, err) == (2, "", "error: --ranks is 0, expected at least 1\n")
    assert not (tmp_path / "out").exists()


def test_peak_memory_is_kept_after_it_was_given_back():
    code = "import numpy as np; a = np.ones(25_000_000); del a; print('x', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"x\n"
        assert peak_resident(process.pid) > 200e6 > psutil.Process(process.pid).memory_info().rss
        process.communicate(b"\n")
    assert peak_resident(process.pid) == 0


def test_files_that_do_not_belong_together(shards, tmp_path):
    import pyarrow as pa

    for name, keys in (("a", [1, 2]), ("b", [1, 3])):
        pq.write_table(
            pa.table({"key": pa.array(keys, pa.uint64()), "ndcg@100": [0.1, 0.2]}), tmp_path / name
        )
    (tmp_path / "c").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="are of different users"):
        read_scores("x", {0: tmp_path / "a", 1: tmp_path / "b"})
    with pytest.raises(ValueError, match=r"c cannot be read .*; remove it and start again"):
        read_scores("x", {0: tmp_path / "c"})

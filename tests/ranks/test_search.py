"""The search of a closed form's keys on validation: every combination, resumed where it stopped."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path

import pytest

from dist_vasp.commands import train as command
from dist_vasp.config.command_line import from_dict
from dist_vasp.config.schema import Config
from dist_vasp.ranking.load import load_model
from dist_vasp.report.gather import read_run
from dist_vasp.training.closed_form.fit import ClosedFormFit
from dist_vasp.training.closed_form.settings import GRID, largest, read_tried, walks_of
from dist_vasp.training.stop import StopRequest
from tests.oracles import closed_form as oracle
from tests.ranks.test_ease import arguments, figures, held_out, lines_of, train_matrix, write_shards
from tests.support.invoke import succeeds
from tests.support.make_shards import write_folder
from tests.support.partitioned import random_rows
from tests.unit.ranking.test_recommend import alone

DROPOUT, XI, LAMBDAS = (0.0, 0.5), (0.0, 0.1, 1.0), (400.0, 20.0, 100.0)
SEARCH = [
    *("--search.ease_dropout", json.dumps(DROPOUT)),
    *("--search.ease_xi", json.dumps(XI)),
    *("--search.ease_lambda", json.dumps(LAMBDAS)),
    *("--model.ease_item_exponent", "-0.2"),
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("search") / "shards")


class StopAfter(StopRequest):
    """A stop is requested the 75th time that a rank looks: in a later combination."""

    asked = 0

    @property
    def requested(self) -> bool:
        type(self).asked += 1
        return type(self).asked > 75

    @requested.setter
    def requested(self, value: bool) -> None: ...


def test_every_combination_is_tried_and_the_best_is_kept(shards, tmp_path, call, capsys):
    from launch.train import main

    call(main, *arguments(shards, tmp_path / "run", *SEARCH))
    out = capsys.readouterr().out
    assert (
        "6 combinations of ease_dropout, ease_xi, each with lambda by validation, at most 3" in out
    )
    lines, result = (
        lines_of(tmp_path / "run"),
        json.loads((tmp_path / "run/result.json").read_text()),
    )
    x, pairs, expected = train_matrix(), held_out(150, 1), {}
    settings = list(product(DROPOUT, XI, sorted(LAMBDAS, reverse=True)))
    for line in lines:
        keys = {name: line[f"ease_{name}"] for name in ("dropout", "xi", "lambda")}
        assert settings[line["step"] - 1] == tuple(keys.values())
        B = oracle.weights(x, keys | {"item_exponent": -0.2})
        expected[line["step"]] = figures(B, pairs)["ndcg@100"]
        # weights in float32 may swap two items that are as good as tied
        assert line["ndcg@100"] == pytest.approx(expected[line["step"]], abs=1e-4)
    assert {(line["ease_dropout"], line["ease_xi"]) for line in lines} == set(product(DROPOUT, XI))
    best = max(lines, key=lambda line: line["ndcg@100"])
    chosen = {name: best[name] for name in ("ease_dropout", "ease_xi", "ease_lambda")}
    assert {name: result[name] for name in chosen} == chosen
    assert result["checkpoint"] == f"step-{best['step']:08d}"
    header = load_model(tmp_path / "run", None, alone()).checkpoint.header
    assert {name: header.config["model"][name] for name in chosen} == chosen

    again = shutil.copytree(tmp_path / "run", tmp_path / "again", symlinks=True)
    with pytest.raises(
        ValueError, match=r"search\.ease_xi was \[0\.0, 0\.1, 1\.0\] and is now \[\]"
    ):
        call(main, *arguments(shards, again, *SEARCH[:2], *SEARCH[4:]))


def test_a_search_that_was_stopped_tries_no_setting_twice(shards, tmp_path, call, capsys):
    from launch.train import main

    call(main, *arguments(shards, tmp_path / "whole", *SEARCH))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "StopRequest", StopAfter)
        assert call(main, *arguments(shards, tmp_path / "cut", *SEARCH)) == 0
    before = lines_of(tmp_path / "cut")
    assert 3 < len(before) < len(lines_of(tmp_path / "whole"))
    capsys.readouterr()
    call(main, *arguments(shards, tmp_path / "cut", *SEARCH))
    assert "(resumed after lambda " in capsys.readouterr().out
    after = lines_of(tmp_path / "cut")
    assert after[: len(before)] == before, "none of them is tried again"
    whole, cut = (
        [{k: v for k, v in line.items() if k != "seconds"} for line in lines_of(tmp_path / name)]
        for name in ("whole", "cut")
    )
    assert cut == whole
    results = [json.loads((tmp_path / n / "result.json").read_text()) for n in ("whole", "cut")]
    for name in ("validation", "test", "checkpoint", "ease_dropout", "ease_xi", "ease_lambda"):
        assert results[0][name] == results[1][name]


class StopWhile(StopRequest):
    """A stop is requested as soon as the chosen setting is computed again."""

    is_chosen = False

    @property
    def requested(self) -> bool:
        return type(self).is_chosen

    @requested.setter
    def requested(self, value: bool) -> None: ...


def test_one_standard_error_takes_the_largest_lambda_that_is_as_good(
    shards, tmp_path, call, capsys, monkeypatch
):
    from launch.train import main

    rule = [
        *("--search.ease_lambda", "[3000, 1500, 800, 400, 200, 100, 20]"),
        *("--search.ease_xi", "[0, 1]", "--search.rule", "one_standard_error"),
    ]
    call(main, *arguments(shards, tmp_path / "run", *rule))
    assert "is within one standard error of the best, so it is computed again" in (
        capsys.readouterr().out
    )
    lines, result = (
        lines_of(tmp_path / "run"),
        json.loads((tmp_path / "run/result.json").read_text()),
    )
    best = max(lines, key=lambda line: line["ndcg@100"])
    least = best["ndcg@100"] - best["ndcg@100_se"]
    good = [
        line for line in lines if line["ease_xi"] == best["ease_xi"] and line["ndcg@100"] >= least
    ]
    chosen = max(good, key=lambda line: line["ease_lambda"])
    assert chosen["ease_lambda"] > best["ease_lambda"], "the data do not separate the two rules"
    assert (result["ease_lambda"], result["ease_xi"]) == (chosen["ease_lambda"], chosen["ease_xi"])
    assert result["checkpoint"] == f"step-{14 + chosen['step']:08d}"
    assert result["validation"]["ndcg@100"] == chosen["ndcg@100"]
    given = ["--model.ease_xi", str(best["ease_xi"])]
    given += ["--model.ease_lambda", str(chosen["ease_lambda"])]
    call(main, *arguments(shards, tmp_path / "given", *given))
    assert result["test"] == json.loads((tmp_path / "given/result.json").read_text())["test"]
    capsys.readouterr()
    call(main, *arguments(shards, tmp_path / "run", *rule))
    assert "it is evaluated again" in capsys.readouterr().out
    (tmp_path / "run/result.json").unlink()  # as if killed after the chosen one was saved
    call(main, *arguments(shards, tmp_path / "run", *rule))
    assert "computed again" not in capsys.readouterr().out
    assert json.loads((tmp_path / "run/result.json").read_text())["test"] == result["test"]

    def take(self, setting):
        StopWhile.is_chosen = True
        taking(self, setting)

    taking = ClosedFormFit._take
    with monkeypatch.context() as patch:
        patch.setattr(command, "StopRequest", StopWhile)
        patch.setattr(ClosedFormFit, "_take", take)
        assert call(main, *arguments(shards, tmp_path / "cut", *rule)) == 0
    assert not (tmp_path / "cut/result.json").exists()
    before = lines_of(tmp_path / "cut")
    call(main, *arguments(shards, tmp_path / "cut", *rule))
    assert lines_of(tmp_path / "cut") == before
    again = json.loads((tmp_path / "cut/result.json").read_text())
    for name in ("validation", "test", "checkpoint", "ease_lambda", "ease_xi"):
        assert again[name] == result[name]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_rule_with_the_default_lambdas(shards, tmp_path, ranks):
    rule = ["--search.rule", "one_standard_error", "--run.best_by", "recall@50"]
    out = succeeds("train", *arguments(shards, tmp_path / "run", *rule), ranks=ranks)
    lines, run = lines_of(tmp_path / "run"), tmp_path / "run"
    best = max(lines, key=lambda line: line["recall@50"])
    least = best["recall@50"] - best["recall@50_se"]
    chosen = max(line["ease_lambda"] for line in lines if line["recall@50"] >= least)
    assert chosen > best["ease_lambda"] and f"lambda {chosen:g} is within one standard" in out
    assert json.loads((run / "result.json").read_text())["ease_lambda"] == chosen
    loaded = load_model(run, None, alone())
    assert loaded.config.model.ease_lambda == chosen
    succeeds("report", run, "--out", tmp_path / "r.html", "--users", "0", "--samples", "0")
    text = " ".join((tmp_path / "r.html").read_text().split())
    assert "of run the largest lambda within one standard error of the best" in text


def test_the_largest_setting_is_planned():
    raw = {"model": {"kind": "puresvd"}, "search": {"svd_rank": [2, 900, 4]}}
    assert largest(from_dict(raw)).model.svd_rank == 900
    assert largest(Config()) == Config()


@pytest.mark.slow
def test_two_ranks_search_and_resume_as_one_does(shards, tmp_path):
    """Of a search that was stopped before its last evaluation, nothing is tried again."""
    for ranks in (1, 2):
        succeeds("train", *arguments(shards, tmp_path / str(ranks), *SEARCH), ranks=ranks)
    one, two = lines_of(tmp_path / "1"), lines_of(tmp_path / "2")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for line, other in zip(one, two, strict=True):
        assert line["ndcg@100"] == pytest.approx(other["ndcg@100"], abs=1e-4)
    result = tmp_path / "2" / "result.json"
    before = json.loads(result.read_text())
    result.unlink()
    out = succeeds("train", *arguments(shards, tmp_path / "2", *SEARCH), ranks=2)
    assert f"(resumed after lambda {two[-1]['ease_lambda']:g}," in out and "inverse" not in out
    assert lines_of(tmp_path / "2") == two
    after = json.loads(result.read_text())
    assert {k: after[k] for k in ("test", "ease_xi", "seconds_training")} == {
        k: before[k] for k in ("test", "ease_xi", "seconds_training")
    }


def test_settings_are_numbered_in_the_order_of_the_lists():
    search = {"ease_xi": [0.0, 0.1], "ease_user_exponent": [-0.5, 0.0]}
    walks = walks_of(from_dict({"model": {"kind": "ease"}, "search": search}))
    assert [str(walk[0]) for walk in walks] == [
        f"lambda 5120, user exponent {user:g}, xi {xi:g}"
        for user in (-0.5, 0.0)
        for xi in (0.0, 0.1)
    ]
    assert [c.step for walk in walks for c in walk] == list(range(1, 4 * len(GRID) + 1))
    (walk,) = walks_of(from_dict({"model": {"kind": "ease", "ease_lambda": 7.0}}))
    assert [c.values for c in walk] == [{"ease_lambda": 7.0}]


def test_lines_after_a_better_setting_that_was_not_saved_are_tried_again(tmp_path):
    """The run was killed between the line and the checkpoint."""
    values = {1: 0.2, 2: 0.3, 3: 0.25, 4: 0.4, 5: 0.1}
    lines = [
        json.dumps({"step": step, "split": "validation", "seconds": 1.0, "ndcg@100": value})
        for step, value in values.items()
    ]
    noise = ["{", json.dumps({"step": 3, "split": "test"}), json.dumps([1]), '{"step": 9']
    (tmp_path / "m.jsonl").write_text("\n".join([noise[0], *lines, *noise[1:]]))
    assert list(read_tried(tmp_path / "m.jsonl", "ndcg@100", 2, 0.3)) == [1, 2, 3]
    assert read_tried(tmp_path / "none.jsonl", "ndcg@100", 2, 0.3) == {}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"search": {"ease_xi": [0.1]}},
            r"search\.ease_xi is \[0\.1\], expected \[\] with model\.kind vasp",
        ),
        (
            {"model": {"kind": "ease"}, "search": {"ease_xi": [0.1, 2.0]}},
            r"search\.ease_xi: model\.ease_xi is 2\.0, expected 0 to 1",
        ),
        (
            {"model": {"kind": "ease"}, "search": {"ease_dropout": [0.1, 0.1]}},
            r"search\.ease_dropout is \[0\.1, 0\.1\], expected different values",
        ),
        (
            {"model": {"kind": "ease"}, "search": {"ease_lambda": [1.0, 0.0]}},
            r"search\.ease_lambda is \[1\.0, 0\.0\], expected positive values",
        ),
        (
            {
                "model": {"kind": "ease", "ease_lambda": 9.0},
                "search": {"rule": "one_standard_error"},
            },
            r"search\.rule is 'one_standard_error', expected best where no lambda is searched",
        ),
        (
            {
                "model": {"kind": "puresvd"},
                "search": {"rule": "one_standard_error", "svd_user_exponent": [0.0, -0.5]},
            },
            r"search\.rule is 'one_standard_error', expected best where no lambda is searched",
        ),
        (
            {
                "model": {"kind": "ease"},
                "search": {
                    f"ease_{name}": [k / 100 for k in range(50)] for name in ("xi", "dropout")
                }
                | {"ease_lambda": [1.0, 2.0, 3.0, 4.0, 5.0]},
            },
            r"search is '12,500 combinations', expected at most 10,000; shorten its lists",
        ),
    ],
)
def test_lists_that_cannot_be_searched_are_named(raw, message):
    with pytest.raises(ValueError, match=message):
        from_dict(raw)


def test_a_search_needs_validation_users(tmp_path, call):
    from launch.train import main

    write_folder(tmp_path / "none", random_rows(20, 60, 0), n_items=60)
    more = ["--model.ease_lambda", "9", "--search.ease_xi", "[0, 0.1]"]
    with pytest.raises(
        ValueError, match=r"search\.ease_xi is \[0\.0, 0\.1\], so it is to be chosen on validation"
    ):
        call(main, *arguments(tmp_path / "none", tmp_path / "run", *more))


@pytest.mark.slow
def test_the_report_lists_the_settings_and_draws_the_best_combination(shards, tmp_path, call):
    from launch.report import main as report
    from launch.train import main

    call(main, *arguments(shards, tmp_path / "run", *SEARCH))
    call(report, tmp_path / "run", "--out", tmp_path / "r.html", "--users", "0", "--samples", "0")
    text, lines = (tmp_path / "r.html").read_text(), lines_of(tmp_path / "run")
    assert f"{len(lines)} settings of the closed form were tried" in " ".join(text.split())
    table = text.partition("Settings of run")[2].partition("</table>")[0]
    assert table.count("<tr>") == 1 + min(len(lines), 20)
    assert '<th class="n">dropout</th>' in table and '<th class="n">xi</th>' in table
    best = max(lines, key=lambda line: line["ndcg@100"])
    first = table.partition("<tbody>")[2].partition("</tr>")[0]
    assert f"{best['ease_lambda']:g}</td>" in first and f"{best['ndcg@100']:.4f}" in first
    run = read_run(tmp_path / "run")
    drawn = [x for x, _, _ in run.evaluated("ndcg@100")]
    same = [x for x in lines if all(x[k] == best[k] for k in ("ease_dropout", "ease_xi"))]
    assert drawn == sorted(x["ease_lambda"] for x in same)

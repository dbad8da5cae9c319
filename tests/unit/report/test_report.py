"""The report of a run, in a real browser too: nothing leaves the page, no text becomes code, no
layout overflows."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from dist_vasp.config.schema import Config, ModelConfig, ParallelConfig
from dist_vasp.recommender import Recommender
from dist_vasp.report.gather import read_run, read_runs
from dist_vasp.report.lists import Wanted, decile_of, make_lists
from dist_vasp.report.svg import Line, lines, short, thin
from launch.ensemble import main as make_ensemble
from launch.report import main
from tests.support.browser import CHROMIUM, WHY_NOT, Browser
from tests.support.make_shards import write_folder
from tests.support.partitioned import SMALL
from tests.support.runs import write_run

N_ITEMS = 40
EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
TITLES = [
    EVIL
    if i % 3 == 0
    else f"The \N{LATIN SMALL LETTER E WITH ACUTE}tude no. {i} & a Very Long Title, Which Goes On"
    for i in range(N_ITEMS)
]


def _rows(n: int, seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [np.sort(random.choice(N_ITEMS, 12, replace=False)) for _ in range(n)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    heldout = [(row[:-4], row[-4:]) for row in _rows(24, 1)]
    write_folder(path, _rows(30, 0), heldout[:8], heldout[8:], n_items=N_ITEMS)
    return path


def _write(folder: Path, shards: Path, kind: str = "vasp", finished: bool = True) -> Path:
    write_run(folder, list(range(1000, 1000 + N_ITEMS)), kind, titles=TITLES)
    config = Config(model=ModelConfig(kind=kind, **SMALL), parallel=ParallelConfig(block_columns=5))
    raw = asdict(config)
    raw["data"]["shards"], raw["run"]["dir"] = str(shards), EVIL
    (folder / "config.yaml").write_text(json.dumps(raw))  # JSON is YAML
    written = []
    for step in range(1, 41):
        line = {
            "step": step,
            "epoch": (step - 1) // 10,
            "loss": 9 / step + 1,
            "focal": 9 / step,
            "kl": 1.0,
            "lr": 1e-3 if step < 25 else 1e-5,
        }
        line |= {
            "grad_norm": 2.0,
            "users_per_second": 100.0 + step,
            "step_seconds": 0.1,
            "data_wait": 0.01,
            "memory": 7e8,
            "bytes_moved": 2e6,
        }
        line |= {
            f"{path}_logit_{what}": 0.5
            for path in ("decoder", "latent", "nease")
            for what in ("mean", "std")
        }
        written.append(line)
        if step % 10 == 0:
            metrics = dict.fromkeys(("ndcg@100", "ndcg@20", "recall@20", "recall@50"), 0.01 * step)
            errors = {f"{name}_se": 0.01 for name in metrics}
            written.append(
                {
                    "step": step,
                    "epoch": step // 10 - 1,
                    "split": "validation",
                    **metrics,
                    **errors,
                    "coverage@100": 0.5,
                    "n_users": 8,
                }
            )
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in written) + "cut sho"
    )
    start = {
        "after_step": 0,
        "date": "2026-01-01T00:00:00+00:00",
        "device": EVIL,
        "versions": {"torch": "2"},
        "memory_bytes": 8e9,
    }
    (folder / "environment.json").write_text(json.dumps({"starts": [start]}))
    if finished:
        metrics = {k: v for k, v in written[-1].items() if k not in ("step", "epoch", "split")}
        result = {
            "validation": metrics,
            "test": metrics,
            "seconds_training": 4.0,
            "epochs": 4,
            "world_size": 1,
            "checkpoint": "best",
        }
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def _benchmark(folder: Path) -> None:
    rows = []
    for ranks in (1, 2, 4):
        row = {
            "mode": "weak",
            "ranks": ranks,
            "users_per_step": 64 * ranks,
            "users_per_second": 90.0 * ranks,
            "efficiency": 0.9,
        }
        rows.append(
            row
            | {
                "step_seconds": 0.7,
                "parts": {"output": 0.5, "trunk": 0.2},
                "bytes_moved": 1e6,
                "peak_memory": 1e9,
            }
        )
    (folder / "benchmark.json").write_text(
        json.dumps({"threads_per_rank": 1, "cores": 2, "rows": rows})
    )


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Path:
    folder = _write(tmp_path_factory.mktemp("runs") / "one", shards)
    _benchmark(folder)
    return folder


@pytest.fixture(scope="module")
def report(run) -> Path:
    main([str(run)])
    return run / "report.html"


class Tags(HTMLParser):
    """Every tag with its attributes; whether each that is opened is closed; the text."""

    VOID = ("meta", "br", "line", "rect", "circle", "path", "img", "link")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found, self.open, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_well_formed_and_holds_no_script_or_address(report):
    html = report.read_text(encoding="ascii")
    tags = Tags(html)
    assert not tags.open
    assert not {"script", "img", "link", "iframe", "object"} & {tag for tag, _ in tags.found}
    for tag, attributes in tags.found:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "href", "action", "data"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
    assert "http" not in re.sub(r'http-equiv="', "", html) and "url(" not in html
    assert EVIL in tags.text, "a title is shown as it is"
    for said in (
        "Learning curves",
        "Popularity",
        "Users",
        "Scaling",
        "Configuration",
        "Environment",
        "0.4000",
        "The paths' logits",
    ):
        assert said in tags.text, said


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)
def test_in_a_browser_in_light_and_dark_narrow_and_wide(report, run, shards, tmp_path_factory):
    several = tmp_path_factory.mktemp("several")
    other = _write(several / "other", shards, "nease", finished=False)
    main([str(run), str(other), "--out", str(several / "both.html")])
    questions = {
        "overflow": "document.documentElement.scrollWidth - window.innerWidth",
        "title": "document.title",
        "ground": "getComputedStyle(document.body).backgroundColor",
        "ink": "getComputedStyle(document.body).color",
        "drawings": "[...document.querySelectorAll('svg')].filter(s => "
        "s.getBoundingClientRect().width > 200).length",
        "clipped": "[...document.querySelectorAll('.tile,.card,.section,h1,h3')].filter(e "
        "=> e.scrollWidth > e.clientWidth + 1).length",
        "sticking_out": """[...document.querySelectorAll('svg text')].filter(t => {
            const a = t.getBoundingClientRect(), b = t.closest('svg').getBoundingClientRect();
            return a.left < b.left - 1 || a.right > b.right + 1
                || a.bottom > b.bottom + 1 || a.top < b.top - 1 }).length""",
        "controls": "document.querySelectorAll('script,img').length",
    }
    grounds = set()
    with Browser() as browser:
        for page in (report, several / "both.html"):
            for scheme in ("light", "dark"):
                for width in (360, 1400):
                    seen = browser.visit(page, width, scheme, questions)
                    assert seen.complaints == []
                    assert seen.requests == [page.resolve().as_uri()]
                    assert seen.values["overflow"] <= 0, (page, width)
                    assert (
                        "training report" in seen.values["title"]
                        and "owned" not in seen.values["title"]
                    )
                    assert seen.values["drawings"] >= 10 and seen.values["controls"] == 0
                    assert seen.values["clipped"] == 0 and seen.values["sticking_out"] == 0, (
                        page,
                        width,
                        seen.values,
                    )
                    assert _contrast(seen.values["ink"], seen.values["ground"]) > 7
                    assert seen.image.startswith(b"\x89PNG")
                    grounds.add((scheme, seen.values["ground"]))
    assert len(grounds) == 2, "light and dark differ, and each is one colour"


def _contrast(a: str, b: str) -> float:
    """WCAG 2 contrast of two css colours rgb(r, g, b)."""

    def luminance(colour: str) -> float:
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for c in (int(n) / 255 for n in re.findall(r"\d+", colour)[:3])
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def test_popularity_and_users_are_those_of_the_lists(run, shards):
    recommender = Recommender.load(run)
    wanted = Wanted(n_users=1000, n_samples=3, k=5)
    lists = make_lists(recommender, str(shards), wanted, lambda done, total: None)
    popularity, samples = lists.popularity, lists.samples
    heldout = _rows(24, 1)[8:]
    ids, _ = recommender.recommend([[1000 + i for i in row[:-4]] for row in heldout], 20)
    rows = ids - 1000
    assert popularity.recommended == pytest.approx(
        np.bincount(rows.ravel() // 4, minlength=10) / rows.size
    )
    assert popularity.held_out == pytest.approx(
        np.bincount(np.concatenate([row[-4:] for row in heldout]) // 4, minlength=10) / 64
    )
    assert popularity.coverage[20] == len(np.unique(rows)) / N_ITEMS and popularity.n_users == 16
    assert sum(popularity.trained) == pytest.approx(1)
    assert len(samples) == 3 and all(
        len(s.picks) == 5 and s.n_held_out == 4 and len(s.history) == 8 for s in samples
    )
    for sample in samples:
        row = next(row for row in heldout if [TITLES[i] for i in row[:-4]] == sample.history)
        assert [p.label for p in sample.picks if p.held_out] == [
            p.label for p in sample.picks if p.label in [TITLES[i] for i in row[-4:]]
        ] or EVIL in sample.history
        for pick in sample.picks:
            assert pick.why.p == pytest.approx(pick.score, rel=1e-5)
    assert decile_of(25).tolist().count(0) == 3 and decile_of(25)[-1] == 9


def test_a_run_without_data_or_end_is_reported_as_far_as_it_goes(shards, tmp_path, capsys):
    folder = _write(tmp_path / "run", shards, "flvae", finished=False)
    config = json.loads((folder / "config.yaml").read_text())
    config["data"]["shards"] = str(tmp_path / "gone")
    (folder / "config.yaml").write_text(json.dumps(config))
    main([str(folder), "--out", str(tmp_path / "page.html")])
    text = Tags((tmp_path / "page.html").read_text()).text
    assert (
        "has not come to its end" in text
        and "--shards DIR names it" in text
        and "1 lines of metrics.jsonl could not be read" in text
    )
    assert "page.html" in capsys.readouterr().out


def test_metrics_that_a_run_has_asked_for(shards, tmp_path):
    folder = _write(tmp_path / "run", shards)
    config = json.loads((folder / "config.yaml").read_text())
    config["run"] |= {"best_by": "map@10", "metrics": "hr@5"}
    (folder / "config.yaml").write_text(json.dumps(config))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[:-1]]
    for line in lines:
        if "split" in line:
            line |= {"map@10": 0.125, "hr@5": 0.25, EVIL: 1.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = json.loads((folder / "result.json").read_text())
    result["test"] |= {"map@10": 0.1357, "hr@5": 0.2468, "gini@5": 0.9753, EVIL: 1.0}
    (folder / "result.json").write_text(json.dumps(result))
    main([str(folder), "--users", "0", "--out", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    text = Tags(page).text
    for shown in ("MAP@10", "0.1357", "HR@5", "0.2468", "Gini@5", "0.9753"):
        assert shown in text
    assert "The best checkpoint by validation MAP@10" in text and EVIL not in page


@pytest.mark.slow
def test_an_ensemble_shows_its_members_and_says_what_is_not_known(run, shards, tmp_path):
    flvae = _write(tmp_path / "flvae", shards, "flvae")
    folder = tmp_path / "both"
    make_ensemble(
        ["--members", str(run), str(flvae), "--weights", "1", "2.5", "--output", str(folder)]
    )
    page = tmp_path / "page.html"
    main([str(folder), "--out", str(page)])
    text = Tags(page.read_text()).text
    assert "Where the lists go" in text and "User " in text
    assert "2 models as one ensemble" in text and "No evaluation of the ensemble itself" in text
    assert "Members" in text and "2.5" in text and text.count("0.4000") >= 8

    evaluation = {"test": {"ndcg@100": 0.4321, "ndcg@100_se": 0.0123, "n_users": 16}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    shutil.rmtree(flvae)
    main([str(folder), "--users", "0", "--out", str(page)])
    text = Tags(page.read_text()).text
    assert "No evaluation of the ensemble itself" not in text and "0.4321" in text
    assert "flvae is no folder" in text

    (folder / "ensemble.json").write_text('{"members": [{"run": 1}]}')
    with pytest.raises(ValueError, match=r"ensemble.json lists no members"):
        main([str(folder), "--users", "0", "--out", str(page)])


def test_mistakes_are_named(run, tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        main([str(tmp_path / "nothing")])
    with pytest.raises(ValueError, match=r"holds neither config.yaml nor metrics.jsonl"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="at most 6"):
        read_runs(["x"] * 7, [])
    write_folder(
        tmp_path / "other",
        _rows(30, 0),
        [],
        [(r[:4], r[4:]) for r in _rows(4, 2)],
        n_items=N_ITEMS,
        item_ids=range(N_ITEMS),
    )
    with pytest.raises(ValueError, match="is not the data that the model was trained on"):
        main([str(run), "--shards", str(tmp_path / "other"), "--out", str(tmp_path / "page.html")])
    (tmp_path / "b.json").write_text('{"rows": [{"ranks": 1}]}')
    with pytest.raises(ValueError, match=r"b\.json is no benchmark\.json"):
        main([str(run), "--benchmark", str(tmp_path / "b.json")])
    with pytest.raises(ValueError, match="does not exist; create it first"):
        main([str(run), "--out", str(tmp_path / "no" / "page.html")])
    assert not (tmp_path / "page.html").exists()


def test_drawings():
    assert lines([Line("nothing", [])], "x", short) is None
    assert len(thin([(i, i % 2) for i in range(1001)], 100)) == 100
    drawn = thin([(float(i), 1.0) for i in range(1000)], 10)
    assert [y for _, y, _ in drawn] == [1.0] * 10 and drawn[0][0] == pytest.approx(49.5)
    for values in ([0.0, 0.0], [1e-9, 5.0], [-3.0, 1e9], [5.0], [7.0, 7.0]):
        for log in (False, True):
            drawing = lines(
                [Line("a", list(enumerate(values, 1)), marks=True)], "x", short, log_y=log
            )
            text = str(drawing)
            assert "nan" not in text and "inf" not in text and "'class': 'tick'" in text
            dots = [shape.attributes for shape in drawing.shapes if shape.tag == "circle"]
            assert len(dots) == len(values)
            assert all(0 <= dot["cy"] <= 240 for dot in dots)
    assert [short(v) for v in (0, 0.05, 12, 12_000, 3e6, 1e-5)] == [
        "0",
        "0.05",
        "12",
        "12k",
        "3M",
        "1e-5",
    ]

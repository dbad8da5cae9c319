"""The page of a comparison: what it says is what report.json holds, and no text becomes code."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from dist_vasp.report.comparison import comparison_page
from dist_vasp.report.page import is_report
from tests.support.browser import CHROMIUM, WHY_NOT, Browser
from tests.unit.report.test_report import EVIL, Tags

COLUMNS = [
    f"{metric}{third}"
    for metric in ("ndcg@100", "recall@20", "recall@50", "hr@3")
    for third in ("", "_head", "_middle", "_tail")
]
COST = {
    "ranks": [1],
    "seconds_training": 4.0,
    "seconds_training_slowest": 5.0,
    "seconds_job": 9.0,
    "peak_memory": 2e9,
    "users_per_second": 1234.0,
    "parameters": 1_963_012,
    "epochs": 40.0,
}


def _model(name: str, mean: float, difference: float | None) -> dict[str, Any]:
    def every(value: float) -> dict[str, Any]:
        one = {"mean": value, "se": 0.01, "n_users": 23, "seed_sd": None, "by_seed": [value]}
        return dict.fromkeys(COLUMNS, one)

    found = {
        "name": name,
        "what": f"what {name} is",
        "trained": True,
        "seeds": [0],
        "source": "inline",
        "overrides": {"model.kind": EVIL},
        "metrics": every(mean),
        "coverage@100": {"mean": 0.5},
        "gini@5": {"mean": 0.75},
        "cost": COST,
    }
    return found if difference is None else found | {"difference": every(difference)}


FOUND: dict[str, Any] = {
    "verdict": f"**first wins**: it is ahead of {EVIL} by 0.1 +- 0.01.",
    "winner": "first",
    "against_reference": "better: first.",
    "reference": "second",
    "models": [
        _model("second", 0.3, None),
        _model("first", 0.4, 0.1),
        _model("a model with a very long name indeed", 0.31, 0.01),
    ],
    "metrics_asked": ["hr@3", "gini@5"],
    "best_by": "NDCG@100",
    "failures": [{"run": "broken-seed0", "status": 2, "reason": EVIL, "log": "a.log"}],
    "recall_denominator": "min",
    "data": {
        "shards": EVIL,
        "n_items": 40,
        "protocol": "liang",
        "splits": {"train": {"users": 30, "interactions": 360, "heldout": 0}}
        | {split: {"users": 23, "interactions": 99, "heldout": 9} for split in ("test",)},
        "thirds": {name: {"items": 9, "interactions": 3} for name in ("head", "middle", "tail")},
    },
    "made": {
        "command": "dist-vasp compare",
        "output": "out",
        "versions": {"torch": "2"},
        "python": "3.11",
        "cores": 2,
        "commit": "0123abc",
    },
}


def test_the_page_says_what_was_found_and_marks_the_best(tmp_path):
    html = comparison_page(FOUND, "2026-01-01")
    tags = Tags(html)
    assert not tags.open and "<script" not in html and "<img" not in html
    text = " ".join(tags.text.split())
    assert "first wins : it is ahead of" in text.replace("wins:", "wins :") and EVIL in tags.text
    for shown in ("broken-seed0", "0.4000", "+0.1000 \N{PLUS-MINUS SIGN} 0.0100", "1,963,012"):
        assert shown in text, shown
    for shown in ("HR@3", "Gini@5", "0.7500", "commit 0123abc", "reference", "no difference"):
        assert shown in text, shown
    best = [tag for tag, attributes in tags.found if attributes.get("class") == "best"]
    assert best == ["tr"] * 5, "the winner's row in every table of results"
    (tmp_path / "report.html").write_text(html)
    assert is_report(tmp_path / "report.html")


def test_a_comparison_of_one_model_has_no_winner_and_no_chart():
    found = copy.deepcopy(FOUND) | {"winner": "", "models": FOUND["models"][:1], "failures": []}
    tags = Tags(comparison_page(found, "2026-01-01"))
    assert not {"svg", "circle"} & {tag for tag, _ in tags.found} and not tags.open
    assert "Failed runs" not in tags.text
    assert not any(attributes.get("class") == "best" for _, attributes in tags.found)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)
def test_in_a_browser(tmp_path):
    page = tmp_path / "report.html"
    page.write_text(comparison_page(FOUND, "2026-01-01"))
    questions = {"overflow": "document.documentElement.scrollWidth - window.innerWidth"}
    with Browser() as browser:
        for scheme in ("light", "dark"):
            for width in (360, 1400):
                seen = browser.visit(page, width, scheme, questions)
                assert seen.complaints == [] and seen.requests == [page.resolve().as_uri()]
                assert seen.values["overflow"] <= 0, (scheme, width)

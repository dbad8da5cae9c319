"""The card of an export: what it says is what the run and the shards say; it is a part of the
export, and an export without one is still read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_vasp.checkpoint.json_header import header_sha256
from dist_vasp.ranking.model_card import MODEL_CARD, text
from dist_vasp.recommender import Recommender
from launch.ensemble import main as make_ensemble
from tests.unit.report.test_report import (
    N_ITEMS,
    _write,
    shards,  # noqa: F401 - a fixture
)


@pytest.fixture
def run(shards, tmp_path) -> Path:  # noqa: F811
    """A run whose header names its shards, as a training writes it."""
    folder = _write(tmp_path / "run", shards)
    path = folder / "checkpoints" / "best-00000001" / "checkpoint.json"
    header = json.loads(path.read_text())
    header["config"]["data"]["shards"] = str(shards)
    manifest = json.loads((shards / "manifest.json").read_text())
    header["vocabulary_sha256"] = manifest["vocabulary_sha256"]
    path.write_text(json.dumps(header | {"header_sha256": header_sha256(header)}))
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"checkpoint": "best-00000001"}))
    return folder


def test_a_card_has_counts_metrics_seed_and_software(run, tmp_path):
    Recommender.load(run).export(tmp_path / "model")
    card = (tmp_path / "model" / MODEL_CARD).read_text()
    for said in (
        "# Model card: vasp",
        f"{N_ITEMS} items with 780 training interactions",
        "train: 30 users, 360 interactions.",
        "test: 16 users, 128 interactions and 64 held out.",
        "| NDCG@100 | 0.4000 +- 0.0100 | 0.4000 +- 0.0100 |",
        "run.seed 0",
        "torch 2",
        "Checkpoint: best-00000001.",
        "## Limits",
    ):
        assert said in card, said
    listed = json.loads((tmp_path / "model" / "export.json").read_text())["files"]
    assert MODEL_CARD in listed
    assert "<script" not in card and str(tmp_path) not in card


def test_what_is_not_at_hand_is_said_to_be_unknown(run, tmp_path):
    for name in ("environment.json", "metrics.jsonl"):
        (run / name).unlink()
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"checkpoint": "another"}))
    path = run / "checkpoints" / "best-00000001" / "checkpoint.json"
    header = json.loads(path.read_text())
    header["config"]["data"]["shards"] = str(tmp_path / "gone")
    path.write_text(json.dumps(header | {"header_sha256": header_sha256(header)}))
    Recommender.load(run).export(tmp_path / "model")
    card = (tmp_path / "model" / MODEL_CARD).read_text()
    assert card.count("not known where this was exported") == 4, card
    assert "0.4000" not in card


def test_an_export_without_a_card_is_read_and_gets_one(run, tmp_path):
    Recommender.load(run).export(tmp_path / "model")
    (tmp_path / "model" / MODEL_CARD).unlink()
    path = tmp_path / "model" / "export.json"
    header = json.loads(path.read_text())
    del header["files"][MODEL_CARD]
    path.write_text(json.dumps(header | {"header_sha256": header_sha256(header)}))
    Recommender.load(tmp_path / "model").export(tmp_path / "again")
    card = (tmp_path / "again" / MODEL_CARD).read_text()
    assert "# Model card: vasp" in card and "Checkpoint: best-00000001." in card


@pytest.mark.slow
def test_an_ensemble_has_a_card_and_its_members_have_theirs(run, tmp_path):
    folder = tmp_path / "both"
    make_ensemble(["--members", str(run), str(run), "--weights", "1", "4", "--output", str(folder)])
    evaluation = {"test": {"ndcg@100": 0.4321, "ndcg@100_se": 0.0123, "n_users": 16}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    Recommender.load(folder).export(tmp_path / "model")
    card = (tmp_path / "model" / MODEL_CARD).read_text()
    assert "ensemble of 2 models" in card and "| member-01 | vasp | 4 |" in card
    assert "| NDCG@100 | 0.4321 +- 0.0123 |" in card
    assert (tmp_path / "model" / "member-00" / MODEL_CARD).is_file()
    assert Recommender.load(tmp_path / "model").n_items == N_ITEMS


def test_text_from_outside_is_no_markup():
    assert text("<b>|`x`\n[a](b)") == "&lt;b>\\|\\`x\\` \\[a\\](b)"

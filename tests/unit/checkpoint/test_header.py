"""The typed header: what is written is what is read, and nothing is used unchecked."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from dist_vasp.checkpoint.header import BestCheckpoint, Header, Position
from dist_vasp.checkpoint.json_header import header_sha256, read_header, write_header
from dist_vasp.data.positives import PositiveRule
from dist_vasp.ranking.export import ExportHeader
from tests.support.format1 import FIXTURES, KINDS

AXES = {"input.weight": 0, "output.nease.weight": 1, "output.nease.weight.exp_avg_sq": 1}
HEADER = Header(
    position=Position(1, 2, 7),
    config={"model": {"kind": "vasp"}},
    must_match={"model.kind": "vasp"},
    vocabulary_sha256="v",
    shards_sha256="s",
    data_sha256="d",
    shards_from_run="../shards",
    n_items=5,
    positives=PositiveRule(rating_column="rating", min_rating=4.0),
    layout={"world_size": 2},
    optimizer={"step": 7.0, "mu_product": 0.25},
    seconds_training=1.5,
    ease_lambda=40.0,
    best={"ndcg@100": 0.5, "ndcg@100_se": None},
    best_checkpoint=BestCheckpoint(4, "ab12"),
    attempt="ab12",
    evaluation_due=True,
    item_axis=AXES,
    files={"trunk.safetensors": "0" * 64, "items-00000-of-00001.safetensors": "1" * 64},
)
EXPORT = ExportHeader(
    source="best-00000004",
    validation={"ndcg@100": 0.5},
    n_items=5,
    vocabulary_sha256="v",
    config={},
    item_axis=AXES,
    files={"items.parquet": "0" * 64},
)


@pytest.mark.parametrize("header", [HEADER, EXPORT], ids=["checkpoint", "export"])
def test_what_is_written_is_read(tmp_path, header):
    write_header(tmp_path, header)
    found = read_header(type(header), tmp_path)
    assert found.header_sha256
    assert replace(found, header_sha256="") == header


@pytest.mark.parametrize("key", sorted({*HEADER.to_json()} - {"format_version"}))
def test_every_key_is_under_the_checksum(tmp_path, key):
    raw = json.loads(json.dumps(HEADER.to_json()))
    raw["config" if key == "header_sha256" else key] = {"another": "value"}
    (tmp_path / Header.FILE).write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"checkpoint\.json is damaged"):
        read_header(Header, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.pop("item_axis"), "the key 'item_axis' is missing"),
        (lambda raw: raw["item_axis"].update({"input.weight": 2}), "something else than 0 and 1"),
        (
            lambda raw: raw["item_axis"].update({"input.weight": True}),
            "something else than 0 and 1",
        ),
        (lambda raw: raw.update(item_axis=[0]), "another kind"),
        (lambda raw: raw.update(format_version=3), "format_version 3, this version reads 1 and 2"),
        (lambda raw: raw.update(ease_lambda="40"), "ease_lambda is not a number"),
        (lambda raw: raw.update(evaluation_due=1), "evaluation_due or attempt"),
        (
            lambda raw: raw["best_checkpoint"].update(attempt="../x"),
            "best_checkpoint is of another",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, message):
    raw = json.loads(json.dumps(HEADER.to_json()))
    change(raw)
    raw["header_sha256"] = header_sha256(raw)
    (tmp_path / Header.FILE).write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        read_header(Header, tmp_path)


def test_the_axis_is_what_the_header_says():
    assert [HEADER.axis_of(name) for name in AXES] == list(AXES.values())
    with pytest.raises(
        ValueError, match=r"item_axis of checkpoint\.json does not list a\.stranger"
    ):
        HEADER.axis_of("a.stranger")
    # A name decides nothing: another model may cut a matrix of this name along its rows.
    assert replace(HEADER, item_axis={"output.nease.weight": 0}).axis_of("output.nease.weight") == 0


@pytest.mark.parametrize("kind", KINDS)
def test_format_1_names_no_axis(kind):
    header = read_header(Header, next(FIXTURES.glob(f"{kind}/run/checkpoints/step-*")))
    assert header.item_axis is None
    for name in ("output.nease.weight", "output.nease.weight.start", "output.nease.weight.exp_avg"):
        assert header.axis_of(name) == 1
    for name in ("input.weight", "output.decoder.bias.exp_avg", "output.nease.weights"):
        assert header.axis_of(name) == 0

"""Exports: they answer bitwise as their run, hold what they say, and believe no header."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_vasp import Recommender
from dist_vasp.checkpoint.json_header import header_sha256
from dist_vasp.config.schema import ModelConfig
from dist_vasp.model.build import make_trunk
from dist_vasp.ranking.export import write_program
from dist_vasp.tensor_file import map_tensors, write_safetensors
from tests.support.recommender_runs import (
    HISTORY_ROWS,
    KINDS,
    N_ITEMS,
    NAMES,
    TITLES,
    K,
    a_run,
    ids_of,
)
from tests.support.runs import sha256_of_files


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("partitions", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_an_export_answers_bitwise_as_its_run(runs, tmp_path, kind, partitions):
    path, _ = a_run(runs, kind, partitions, titles=TITLES)
    r = Recommender.load(path)
    assert "37 items" in r.export(tmp_path / "model")
    moved = (tmp_path / "model").rename(tmp_path / "moved")
    other = Recommender.load(moved)
    ours, theirs = r.recommend(ids_of(HISTORY_ROWS), K), other.recommend(ids_of(HISTORY_ROWS), K)
    assert (
        ours.ids.tobytes() == theirs.ids.tobytes()
        and ours.scores.tobytes() == theirs.scores.tobytes()
    )
    assert r.explain([1000], 1003) == other.explain([1000], 1003)
    other.export(tmp_path / "again")
    assert sha256_of_files(tmp_path / "again") == sha256_of_files(moved), (
        "an export of an export is the same"
    )
    assert str(tmp_path) not in (moved / "export.json").read_text()
    expected = {
        "export.json",
        "items.parquet",
        "MODEL_CARD.md",
        *(f"items-{p:05d}-of-{partitions:05d}.safetensors" for p in range(partitions)),
    }
    assert {p.name for p in moved.iterdir()} == expected | (
        {"trunk.safetensors"} if kind != "nease" else set()
    )
    assert not list(tmp_path.glob(".*"))


def test_moments_stay_behind(runs, tmp_path):
    """A step checkpoint holds them; its export does not."""
    from safetensors import safe_open

    path, _ = a_run(runs, "vasp", 2)
    best = path / "checkpoints" / "best-00000001"
    step = Path(shutil.copytree(best, path / "checkpoints" / "step-00000001"))
    header = json.loads((step / "checkpoint.json").read_text())
    for name in header["files"]:
        tensors = map_tensors(best / name)
        moments = {}
        for key, tensor in tensors.items():
            stem, bracket, rest = key.partition("[")
            moments |= {
                f"{stem}.{m}{bracket}{rest}": torch.ones_like(tensor)
                for m in ("exp_avg", "exp_avg_sq")
            }
        (step / name).unlink()
        header["files"][name] = write_safetensors(step / name, tensors | moments)
    header["header_sha256"] = header_sha256(header)
    (step / "checkpoint.json").write_text(json.dumps(header))
    Recommender.load(path, "step-00000001").export(tmp_path / "from-step")
    Recommender.load(path).export(tmp_path / "from-best")
    from_step, from_best = (
        sha256_of_files(tmp_path / "from-step"),
        sha256_of_files(tmp_path / "from-best"),
    )
    assert from_step.pop("export.json") != from_best.pop("export.json"), (
        "they tell where they come from"
    )
    assert from_step.pop("MODEL_CARD.md") != from_best.pop("MODEL_CARD.md")
    assert from_step == from_best
    for file in (tmp_path / "from-step").glob("*.safetensors"):
        with safe_open(file, framework="numpy") as handle:
            assert not any("exp_avg" in key for key in handle.keys())  # noqa: SIM118


def test_the_trunk_as_a_program(runs, tmp_path):
    path, _ = a_run(runs, "vasp")
    r = Recommender.load(path)
    r.export(tmp_path / "model", trunk="torch_export")
    program = torch.export.load(tmp_path / "model" / "trunk.pt2").module()
    for n_rows in (1, 5):
        pre = torch.randn(n_rows, 6)
        with torch.no_grad():
            for found, expected in zip(program(pre), r.model.trunk(pre, None)[0], strict=True):
                torch.testing.assert_close(found, expected)
    loaded = Recommender.load(tmp_path / "model")
    assert np.array_equal(
        loaded.recommend(ids_of(HISTORY_ROWS), K).ids, r.recommend(ids_of(HISTORY_ROWS), K).ids
    )
    loaded.export(tmp_path / "again")
    assert not (tmp_path / "again" / "trunk.pt2").exists()
    with open(tmp_path / "model" / "trunk.pt2", "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"trunk\.pt2 has SHA-256"):
        Recommender.load(tmp_path / "model")
    nease = Recommender.load(a_run(runs, "nease")[0])
    with pytest.raises(ValueError, match="a model of kind nease has no trunk to export"):
        nease.export(tmp_path / "none", trunk="torch_export")
    with pytest.raises(ValueError, match="trunk is 'onnx', expected torch_export or None"):
        r.export(tmp_path / "none", trunk="onnx")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", ["multvae", "autorec", "puresvd"])
def test_other_trunks_as_programs(tmp_path, kind):
    trunk = make_trunk(ModelConfig(kind=kind, hidden=6, latent=3), 1)
    assert write_program(trunk, tmp_path / "trunk.pt2")  # it compares both


def test_an_export_holds_the_items_of_its_weights(runs, tmp_path, monkeypatch):
    path, _ = a_run(runs, "vasp")
    monkeypatch.chdir(path.parent)
    r = Recommender.load(path.name)
    monkeypatch.chdir(tmp_path)
    r.export("model")
    assert Recommender.load("model").items.ids.equals(r.items.ids)
    other, _ = a_run(runs, "vasp", ids=NAMES)
    shutil.copy(other / "items.parquet", path)
    with pytest.raises(
        ValueError, match=rf"{path}/items\.parquet lists .* it comes from another preparation"
    ):
        r.export("swapped")
    (path / "items.parquet").unlink()
    with pytest.raises(
        ValueError,
        match=r"items\.parquet cannot be read \(No such file or directory\).*load the model again",
    ):
        r.export("gone")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "arguments", [(None,), (7,), (b"export",), (["run"],), ("run", 7), ("x" * 5000,)]
)
def test_what_is_no_folder_is_a_value_error(arguments):
    with pytest.raises(ValueError, match=r"expected the path of a folder|is not a folder"):
        Recommender.load(*arguments)


def test_export_refuses(runs, tmp_path, monkeypatch):
    path, _ = a_run(runs, "vasp")
    r = Recommender.load(path)
    (tmp_path / "there").mkdir()
    with pytest.raises(
        ValueError, match=r"there exists; name another folder, or remove it yourself"
    ):
        r.export(tmp_path / "there")
    with pytest.raises(ValueError, match=r"the folder .*no does not exist; create it first"):
        r.export(tmp_path / "no" / "model")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(ValueError, match=r"has 0\.00 GB free but the export needs"):
        r.export(tmp_path / "model")
    monkeypatch.undo()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dist_vasp.ranking.export.write_safetensors", full)
    with pytest.raises(
        ValueError, match=r"model cannot be written \(No space left on device\); free some space"
    ):
        r.export(tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["there"], "nothing is left behind"


def test_damage_is_found(runs, tmp_path):
    path, _ = a_run(runs, "vasp", 2)
    Recommender.load(path).export(tmp_path / "model")
    for name in sorted(p.name for p in (tmp_path / "model").iterdir()):
        copy = Path(shutil.copytree(tmp_path / "model", tmp_path / "copy"))
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        message = (
            "is damaged|is not that"
            if name == "export.json"
            else rf"{name} has SHA-256 .*export\.json says .*export the run again"
        )
        with pytest.raises(ValueError, match=message):
            Recommender.load(copy)
        (copy / name).unlink()
        with pytest.raises(ValueError, match=r"cannot be read|holds no checkpoint"):
            Recommender.load(copy)
        shutil.rmtree(copy)
    header = json.loads((tmp_path / "model" / "export.json").read_text())
    (tmp_path / "model" / "export.json").write_text(json.dumps(header | {"format_version": 9}))
    with pytest.raises(
        ValueError, match="format_version 9, this version reads 1; use the version that wrote it"
    ):
        Recommender.load(tmp_path / "model")


def test_mapping_believes_no_header(runs, tmp_path):
    """With checksums off, or right: shapes, ranges and types are held against what the config
    says."""
    path, _ = a_run(runs, "vasp", 2)
    best = path / "checkpoints" / "best-00000001"
    items, trunk = best / "items-00001-of-00002.safetensors", best / "trunk.safetensors"

    def changed(file: Path, old: bytes, new: bytes, message: str) -> None:
        before = file.read_bytes()
        assert old in before and len(old) == len(new)
        file.write_bytes(before.replace(old, new))
        with pytest.raises(ValueError, match=message):
            Recommender.load(path, verify=False)
        file.write_bytes(before)

    changed(
        items,
        b"output.nease.weight[18:23]",
        b"output.nease.weight[18:22]",
        "does not hold output.nease.weight for all items 18 to 36 once",
    )
    changed(
        items,
        b"input.weight[18:37]",
        b"input.weight[18:36]",
        r"has no input\.weight\[18:37\] of shape \(19, 6\)",
    )
    changed(
        items,
        b"output.nease.weight[18:23]",
        b"output.nease.weight?18:23]",
        r"holds a tensor 'output\.nease\.weight\?18:23\]'",
    )
    changed(items, b"F32", b"I32", "is of dtype I32")
    changed(
        trunk,
        b"encoder.layers.0.weight",
        b"encoder.layers.9.weight",
        r"has no encoder\.layers\.0\.weight of shape \(6, 6\)",
    )
    before = trunk.read_bytes()
    trunk.write_bytes(before[:-5])
    with pytest.raises(ValueError, match=r"trunk\.safetensors cannot be read as safetensors"):
        Recommender.load(path, verify=False)
    trunk.write_bytes(before)
    assert Recommender.load(path, verify=False).n_items == N_ITEMS

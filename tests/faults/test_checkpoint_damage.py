"""Checkpoints whose checksums are right and whose content is not: refused with a reason, and before
anything large is made."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_vasp.checkpoint.header import TRUNK, Header, Position, items_file
from dist_vasp.checkpoint.json_header import header_sha256
from dist_vasp.checkpoint.read import open_checkpoint
from dist_vasp.checkpoint.weights import check_numbers
from dist_vasp.checkpoint.write import save
from dist_vasp.config.schema import Config, ModelConfig
from dist_vasp.data.hashing import keys_of_ids, sha256_of, vocabulary_sha256
from dist_vasp.model.build import make_trunk, measure_size, new_model
from dist_vasp.parallel.agree import AgreedError
from dist_vasp.parallel.comm import form_groups
from dist_vasp.parallel.partition import Layout
from dist_vasp.ranking.load import load_model
from tests.support.partitioned import SMALL

N_ITEMS = 23
MODEL = ModelConfig("vasp", **SMALL)
ITEMS = items_file(0, 1)
ALONE = form_groups(0, Layout(1, 1, 1), torch.device("cpu"))


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with one sound checkpoint."""
    keys = keys_of_ids(pa.array(range(N_ITEMS)))
    rows = list(range(N_ITEMS))
    pq.write_table(
        pa.table({"item": rows, "id": rows, "key": keys, "popularity": rows}),
        tmp_path / "items.parquet",
    )
    header = Header(
        position=Position(1, 2, 7),
        config=asdict(Config(model=MODEL)),
        must_match={},
        vocabulary_sha256=vocabulary_sha256(keys),
        shards_sha256="s",
        n_items=N_ITEMS,
        optimizer={"step": 7.0, "mu_product": 0.1},
    )
    trunk = make_trunk(MODEL, 0)
    assert trunk is not None
    tensors = {name: p.detach() for name, p in trunk.named_parameters()}
    pieces = new_model(Config(model=MODEL), N_ITEMS, ALONE).slices()
    save(tmp_path / "checkpoints" / "step-00000007", header, pieces, tensors, ALONE)
    assert load_model(tmp_path, None, ALONE).checkpoint.step == 7
    return tmp_path


def change_header(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = run / "checkpoints" / "step-00000007" / Header.FILE
    header = json.loads(path.read_text())
    change(header)
    header["header_sha256"] = header_sha256(header)
    path.write_text(json.dumps(header))


def change_tensors(run: Path, name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = run / "checkpoints" / "step-00000007" / name
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    change_header(run, lambda h: h["files"].update({name: sha256_of(path.read_bytes())}))


def test_the_number_of_parameters():
    flvae = ModelConfig(
        kind="flvae", hidden=7, latent=3, encoder_layers=1, decoder_layers=1, latent_head=False
    )
    for model in (MODEL, flvae, ModelConfig(kind="nease"), ModelConfig(kind="ease")):
        config, trunk = Config(model=model), make_trunk(model)
        slices = new_model(config, N_ITEMS, ALONE).slices()
        made = sum(piece.tensor.numel() for piece in slices)
        made += sum(p.numel() for p in trunk.parameters()) if trunk else 0
        assert measure_size(config, N_ITEMS).parameters == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["position"].update(step=-1), "three whole numbers"),
        (lambda h: h["position"].update(step=True), "three whole numbers"),
        (lambda h: h.update(n_items=2.5), "n_items is not a whole number"),
        (
            lambda h: h.update(n_items=2**47),
            f"lists {N_ITEMS} items of another vocabulary, expected {2**47}",
        ),
        (lambda h: h.update(files={"../../etc/passwd": "0"}), "no file of a checkpoint"),
        (
            lambda h: h.update(files={"items-00000-of-00001.safetensors": 3}),
            "no file of a checkpoint",
        ),
        (lambda h: h.update(files={}), "describes a model of"),
        (lambda h: h["files"].pop("trunk.safetensors"), r"describes a model of|lists no trunk"),
        (lambda h: h["optimizer"].update(step=-1.0), "optimizer is at step -1.0"),
        (lambda h: h["optimizer"].update(mu_product=1e9), "mu_product 1000000000.0"),
        (lambda h: h.update(best={"ndcg@100": "high"}), "best does not hold metrics"),
        (lambda h: h.update(config=[]), "config or must_match is not a table"),
        (lambda h: h.pop("must_match"), "must_match"),
        (lambda h: h["config"]["model"].update(hidden=10**9), "describes a model of"),
        (
            lambda h: h["config"]["model"].update(encoder_layers=10**12),
            "model.encoder_layers is 1000000000000, expected at most 1000",
        ),
        (lambda h: h["config"]["model"].update(encoder_layers=999), "describes a model of"),
    ],
)
def test_headers(run, change, message):
    change_header(run, change)
    with pytest.raises(ValueError, match=message):
        load_model(run, None, ALONE)


def test_a_header_of_deep_nesting(run):
    path = run / "checkpoints" / "step-00000007" / Header.FILE
    path.write_text('{"a":' * 100_000)
    with pytest.raises(ValueError, match="is damaged"):
        load_model(run, None, ALONE)


def duplicate(tensors: dict[str, torch.Tensor]) -> None:
    """Half of the items twice, the other half not at all: as many as there should be."""
    whole = tensors.pop(f"output.decoder.bias[0:{N_ITEMS}]")
    tensors["output.decoder.bias[0:12]"], tensors["output.decoder.bias[0:11]"] = (
        whole[:12].clone(),
        whole[:11].clone(),
    )


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (ITEMS, duplicate, r"does not hold output\.decoder\.bias for all items 0 to 22 once"),
        (
            ITEMS,
            lambda t: t.update({k: v.double() for k, v in t.items()}),
            "is of dtype F64, expected F32",
        ),
        (
            ITEMS,
            lambda t: t[f"output.decoder.bias[0:{N_ITEMS}]"].fill_(float("nan")),
            r"output\.decoder\.bias holds NaN or infinite",
        ),
        (
            ITEMS,
            lambda t: t[f"output.nease.weight[0:{N_ITEMS}]"][3].fill_(float("inf")),
            "holds NaN or infinite",
        ),
        (
            TRUNK,
            lambda t: t["mu.bias"][:1].fill_(-3e38),
            r"mu\.bias holds numbers from -3e\+38 to .*, beyond what fp32",
        ),
        (
            TRUNK,
            lambda t: t["mu.bias"][:1].fill_(float("-inf")),
            r"mu\.bias holds NaN or infinite",
        ),
        (
            TRUNK,
            lambda t: t.update({k: v.to(torch.int32) for k, v in t.items()}),
            "is of dtype I32",
        ),
        (
            TRUNK,
            lambda t: t.pop("mu.bias"),
            r"has no mu\.bias of shape|describes a model of",
        ),
    ],
)
def test_tensors(run, name, change, message):
    change_tensors(run, name, change)
    with pytest.raises(AgreedError, match=message):
        load_model(run, None, ALONE)


def test_second_moments_are_not_negative(run):
    opened = open_checkpoint(run / "checkpoints" / "step-00000007")
    check_numbers(opened, [("a.exp_avg", torch.tensor([-1.0])), ("b", torch.zeros(0))])
    with pytest.raises(ValueError, match=r"a\.exp_avg_sq holds negative numbers"):
        check_numbers(opened, [("a.exp_avg_sq", torch.tensor([1.0, -1.0]))])

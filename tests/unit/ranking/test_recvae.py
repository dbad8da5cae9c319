"""A trained recvae in use: lists are the oracle's, and an export leaves the old encoder out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open

from dist_vasp import Recommender
from dist_vasp.checkpoint.read import open_checkpoint
from dist_vasp.config.command_line import from_dict
from dist_vasp.data.manifest import Manifest
from dist_vasp.parallel.comm import form_groups
from dist_vasp.parallel.partition import Layout
from dist_vasp.training.train import train
from tests.oracles.dense import dense_rows
from tests.oracles.recvae import DenseRecVae
from tests.oracles.rounding import bounded_scores, each_within, same_list
from tests.support.make_shards import write_folder
from tests.support.partitioned import random_rows

N_ITEMS, LAYERS, K = 23, 3, 5
CONFIG = {
    "data": {"batch_size": 10, "input_dropout": 0.5, "workers": 0},
    "model": {"kind": "recvae", "hidden": 6, "latent": 3, "encoder_layers": LAYERS},
    "loss": {"kind": "multinomial", "kl_weight": 0.005},
    "optimizer": {"name": "adam", "schedule": [{"epochs": 6, "lr": 0.01}]},
    "parallel": {"lanes": 2},
    "run": {"evaluate_every_epochs": 2},
    "device": "cpu",
}


def _train(folder, run_dir, max_steps: int, init_from: str | None = None):
    config = {**CONFIG, "data": CONFIG["data"] | {"shards": str(folder / "shards")}}
    config["run"] = CONFIG["run"] | {"dir": str(run_dir), "max_steps": max_steps}
    ranks = form_groups(0, Layout(1, 1, 1), torch.device("cpu"))
    return train(from_dict(config), ranks, init_from)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of six epochs: three of the encoder, one of the decoder, two of the encoder."""
    folder = tmp_path_factory.mktemp("recvae")
    rows = [np.array(row) for row in random_rows(40, N_ITEMS, 1)]
    held_out = [(np.arange(3), np.array([4])), (np.array([1, 5]), np.array([2, 7]))]
    write_folder(folder / "shards", rows, held_out, held_out, n_items=N_ITEMS)
    assert _train(folder, folder / "run", 0)["epochs"] == 6
    return folder / "run"


def _stored(folder, names) -> dict[str, torch.Tensor]:
    """Every tensor of the files of a folder of one partition, without the ranges of items."""
    tensors = {}
    for name in names:
        with safe_open(folder / name, framework="pt") as file:
            prefix = "trunk." if name.startswith("trunk") else ""
            tensors |= {prefix + key.split("[")[0]: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return tensors


def test_lists_of_a_checkpoint_and_its_export_are_the_oracles(run, tmp_path):
    step = sorted((run / "checkpoints").glob("step-*"))[-1]
    files = [f for f in open_checkpoint(step).header.files if f.endswith(".safetensors")]
    stored = _stored(step, files)
    old = {name for name in stored if name.endswith(".old")}
    assert {"input.weight.old", "trunk.mu.weight.old"} <= old
    assert not torch.equal(stored["input.weight.old"], stored["input.weight"])
    wanted = {n: t for n, t in stored.items() if ".exp_avg" not in n and n not in old}

    Recommender.load(run, step.name).export(tmp_path / "export", trunk="torch_export")
    exported = _stored(tmp_path / "export", files)
    assert exported.keys() == wanted.keys()
    assert all(torch.equal(exported[name], wanted[name]) for name in wanted)

    dense = DenseRecVae({name: t.double() for name, t in wanted.items()}, LAYERS)
    rows = random_rows(4, N_ITEMS, 7)
    x = dense_rows(rows, N_ITEMS, torch.float64)
    exact, bounds = bounded_scores(lambda: dense.log_p(x).detach().exp())
    ids = Manifest.load(run.parent / "shards").n_items
    assert ids == N_ITEMS
    for folder, checkpoint in ((run, step.name), (tmp_path / "export", None)):
        r = Recommender.load(folder, checkpoint)
        known = np.asarray(r.items.ids)
        found = r.recommend([known[row] for row in rows], K)
        row_of = {item: row for row, item in enumerate(known.tolist())}
        for u, row in enumerate(rows):
            allowed = [i for i in range(N_ITEMS) if i not in row]
            expected = sorted(allowed, key=lambda i: (-exact[u, i], i))[:K]
            listed = [row_of[item] for item in found.ids[u].tolist()]
            same_list(listed, expected, exact[u], bounds[u], f"user {u}")
            each_within(found.scores[u], exact[u, listed], bounds[u, listed], f"p of user {u}")


def test_the_prior_of_a_run_that_starts_from_another_is_its_start(run, tmp_path):
    _train(run.parent, tmp_path / "next", 1, str(run))
    best, first = run / "checkpoints" / "best", tmp_path / "next/checkpoints/step-00000001"
    files = [f for f in open_checkpoint(first).header.files if f.endswith(".safetensors")]
    start, after = _stored(best, files), _stored(first, files)
    old = [name for name in after if name.endswith(".old")]
    assert old
    assert all(torch.equal(after[name], start[name.removesuffix(".old")]) for name in old)
    assert not torch.equal(after["input.weight"], start["input.weight"])
    assert torch.equal(after["output.decoder.weight"], start["output.decoder.weight"])

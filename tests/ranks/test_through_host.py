"""A matrix on the host that a GPU computes from copies of its panels: here the CPU is that GPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dist_vasp.config.schema import Config, DataConfig, ModelConfig, RunConfig
from dist_vasp.data.manifest import Manifest
from dist_vasp.model import ease
from dist_vasp.model.ease import add_dense_gram, add_to_diagonal, invert, to_weights
from dist_vasp.ranking.evaluate import to_item_rows
from dist_vasp.ranking.load import load_model
from dist_vasp.training.closed_form import setup as closed_form_setup
from dist_vasp.training.closed_form import through_host
from dist_vasp.training.train import train
from tests.ranks.test_ease import LAMBDA, columns_of
from tests.support.make_shards import write_folder
from tests.support.partitioned import csr, random_rows
from tests.unit.ranking.test_recommend import alone

CPU = ease.Gpu(torch.device("cpu"), 8 * 10 * 37 * 8)  # ten dense users of 37 items


@pytest.mark.parametrize("width", [4, 64])
def test_copies_of_panels_give_the_same_matrix(monkeypatch, width):
    """As where a GPU is smaller than the matrix; here the CPU computes the copies."""
    n_items, rows = 37, random_rows(150, 37, 1, empty=(0, 149))
    monkeypatch.setattr(ease, "DENSE_BYTES", 10 * n_items * 8)
    x = to_item_rows(csr(rows), len(rows), n_items, torch.device("cpu"))
    weight_U = (1 + x.lengths.double()) ** -0.5
    found = []
    for gpu in (None, CPU):
        A = columns_of(alone(), n_items, width, torch.float64)
        A.gpu = gpu
        add_dense_gram(A, x, weight_U)
        add_to_diagonal(A, LAMBDA)
        invert(A)
        to_weights(A)
        found.append(torch.cat(A.columns, dim=1).numpy())
    np.testing.assert_array_equal(found[1], found[0])


def test_columns_at_once_fit_the_gpu():
    gpu = ease.Gpu(torch.device("cuda"), 80 * 10**9)
    assert [gpu.sweep_columns(n) for n in (1000, 150_000, 10**6)] == [4096, 4096, 512]


def test_a_gpu_that_is_too_small_computes_the_matrix_of_the_host(tmp_path, monkeypatch, capsys):
    write_folder(tmp_path / "data", random_rows(60, 30, 0), [([0, 1], [2, 3])], n_items=30)
    manifest = Manifest.load(tmp_path / "data")
    model = ModelConfig(kind="ease", ease_lambda=LAMBDA)
    data = DataConfig(shards=str(tmp_path / "data"))
    config = Config(model=model, data=data, device="cpu")
    gpu, free = torch.device("cuda", 0), [10**12]
    on_gpu = replace(alone(), device=gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 10**12))
    assert through_host.place(config, manifest, on_gpu) == (on_gpu, None)
    free[0] = 1000
    ranks, computes = through_host.place(config, manifest, on_gpu)
    assert (ranks.device.type, computes) == ("cpu", ease.Gpu(gpu, 1000))
    some = replace(config, model=replace(model, neighbours=3))
    assert through_host.place(some, manifest, on_gpu) == (on_gpu, None)
    memory = type("Memory", (), {"available": 100})
    with monkeypatch.context() as here:
        here.setattr(through_host.psutil, "virtual_memory", lambda: memory)
        with pytest.raises(ValueError, match=r"takes 0.0 GB, but .* start a rank on each"):
            through_host.place(config, manifest, on_gpu)

    found = []
    for name, gpu in (("plain", None), ("host", CPU)):
        monkeypatch.setattr(closed_form_setup, "place", lambda c, m, ranks, g=gpu: (ranks, g))
        run = replace(config, run=RunConfig(dir=str(tmp_path / name)))
        assert train(run, alone()) is not None
        found.append(load_model(tmp_path / name, None, alone()).model.model.matrices[0])
    plain, host = (torch.cat([p.tensor for p in path.slices()], dim=1) for path in found)
    assert (
        capsys.readouterr().out.count("the matrix is on the host, for lack of memory on cpu") == 1
    )
    torch.testing.assert_close(host, plain, rtol=1e-5, atol=1e-6)

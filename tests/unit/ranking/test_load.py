"""A loaded model scores in the precision that its training evaluated in."""

from __future__ import annotations

import pytest
import torch

from dist_vasp.config.schema import Config, ModelConfig, ParallelConfig
from dist_vasp.data.rows import Rows
from dist_vasp.kernels.interface import PLAIN
from dist_vasp.kernels.precision import BF16, FP32
from dist_vasp.ranking import load
from dist_vasp.ranking.evaluate import to_item_rows, top_items
from dist_vasp.ranking.load import load_model, scoring_arithmetic
from tests.oracles.dense import dense_rows
from tests.support.interpreter import interpreted
from tests.support.partitioned import csr
from tests.support.runs import write_run
from tests.unit.ranking.test_recommend import alone

N_ITEMS = 13
CPU = torch.device("cpu")


def scores(folder, rows: Rows) -> torch.Tensor:
    model = load_model(folder, None, alone()).model
    x = to_item_rows(rows, rows.n_rows, N_ITEMS, CPU)
    return torch.cat([block for _, block in model.scores(x)], dim=1)


@pytest.mark.parametrize("kind", ["vasp", "nease", "flvae"])
def test_scores_in_bf16_are_those_of_the_weights(tmp_path, kind):
    """To the rounding of bf16, and in float32, so that few items tie."""
    histories = [[0, 3, 7], [1], [2, 4, 5, 12], []]
    rows = csr(histories)
    found = {}
    for precision in ("fp32", "bf16"):
        oracle = write_run(tmp_path / precision, list(range(N_ITEMS)), kind, precision=precision)
        found[precision] = scores(tmp_path / precision, rows)
    exact = oracle.log_p(dense_rows(histories, N_ITEMS, torch.float64))
    size = exact.abs().clamp(min=1)
    assert found["bf16"].dtype == torch.float32
    assert ((found["fp32"] - exact).abs() <= 1e-5 * size).all()
    assert ((found["bf16"] - exact).abs() <= 0.1 * size).all()
    assert not torch.equal(found["bf16"], found["fp32"])


def test_the_arithmetic_of_a_run():
    def of(kind: str, precision: str):
        return scoring_arithmetic(
            Config(model=ModelConfig(kind=kind), parallel=ParallelConfig(precision=precision)), CPU
        )

    assert of("vasp", "bf16").precision == BF16
    assert of("vasp", "auto").precision == FP32
    assert of("ease", "bf16").precision == FP32, "the closed form keeps float32"
    assert of("vasp", "bf16").kernels is PLAIN


@interpreted
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["vasp", "ease"])
def test_scores_with_the_kernels_of_a_gpu(tmp_path, monkeypatch, kind, precision):
    """In Triton's interpreter: weights are read into padded memory, and padding is never listed."""
    pytest.importorskip("triton", reason="triton is not installed; pip install -e '.[dev]'")
    from dist_vasp.kernels.cuda import TritonKernels

    rows = csr([[0, 3, 7], [1], [2, 4, 5, 12], []])
    write_run(tmp_path, list(range(N_ITEMS)), kind, columns=0, precision=precision)
    plain = scores(tmp_path, rows)
    monkeypatch.setattr(load, "kernels_for_scores", lambda *_: TritonKernels())
    found = scores(tmp_path, rows)
    assert found.shape == (4, N_ITEMS) and found.dtype == torch.float32
    error = 1e-5 if precision == "fp32" or kind == "ease" else 0.1
    assert ((found - plain).abs() <= error * plain.abs().clamp(min=1)).all()
    model = load_model(tmp_path, None, alone()).model
    _, ids = top_items(model.scores, rows, N_ITEMS + 3, N_ITEMS, alone())
    assert ids.max() < N_ITEMS and (ids[3] >= 0).sum() == N_ITEMS

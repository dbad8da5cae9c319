"""The measurements of benchmarks/gpu.sh, rehearsed on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.slow


def test_every_line_of_the_gpu_benchmark_is_measured(tmp_path):
    found = tmp_path / "gpu.json"
    done = subprocess.run(
        ["benchmarks/gpu.sh", "--small", "--json", str(found)],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = json.loads(found.read_text())["lines"]
    assert {line["name"] for line in lines} == {"data", "G1", "G2", "G3", "G4", "G5", "G6"}
    assert [line for line in lines if "failed" in line["found"]] == []


def test_a_step_beside_plain_torch(tmp_path):
    """Both sides take the same batches; their losses are alike from the second step on."""
    found = tmp_path / "step.json"
    tiny = ["--items", "200", "--users", "300", "--interactions", "4000", "--steps", "2"]
    tiny += ["--model.hidden", "16", "--model.latent", "8", "--data.batch_size", "64"]
    command = [sys.executable, "-m", "benchmarks.step", "--config", "configs/demo.yaml", *tiny]
    command += ["--against", "plain", "--device", "cpu", "--threads", "1", "--json", str(found)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    sides = json.loads(found.read_text())["sides"]
    assert list(sides) == ["ours", "plain"]
    assert sides["plain"]["losses"] == pytest.approx(sides["ours"]["losses"], rel=0.2)
    assert sides["ours"]["peak_gb"] > 0 and sides["plain"]["times_ours"] > 0

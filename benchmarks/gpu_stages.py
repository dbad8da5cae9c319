"""Single measurements of benchmarks/gpu.py, each a process of its own that prints one JSON line.

python -m benchmarks.gpu_stages first_step FOLDER CONFIG SHARDS DEVICE [--key value ...]
python -m benchmarks.gpu_stages inverse N_ITEMS DEVICE
python -m benchmarks.gpu_stages evaluate CONFIG SHARDS DEVICE [--key value ...]
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from dist_vasp.config import command_line as configs
from dist_vasp.data.manifest import Manifest
from dist_vasp.model.build import make_trunk, new_model
from dist_vasp.model.ease import SymmetricColumns, invert, sweep_columns
from dist_vasp.parallel.start import init_ranks
from dist_vasp.ranking.evaluate import evaluate
from dist_vasp.ranking.load import scoring_arithmetic
from dist_vasp.ranking.scoring import TrainedModel

LONGEST = 120.0


def first_step(folder: str, config: str, shards: str, device: str, *options: str) -> dict:
    """Seconds from the start of launch/train.py to the first line of metrics.jsonl.

    Kernels are cached in FOLDER/kernels, so a second call finds them.
    """
    kernels = Path(folder) / "kernels"
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(kernels / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(kernels / "inductor"),
    }
    run_dir = Path(folder) / f"run-{time.time_ns()}"
    command = [sys.executable, "launch/train.py", "--config", config, "--device", device]
    command += ["--data.shards", shards, "--run.dir", str(run_dir), *options]
    start = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=sys.stderr, start_new_session=True)
    try:
        metrics = run_dir / "metrics.jsonl"
        while not (metrics.is_file() and "step_seconds" in metrics.read_text()):
            if process.poll() is not None:
                raise RuntimeError(f"train.py ended with status {process.returncode}")
            if time.monotonic() - start > LONGEST:
                raise RuntimeError(f"no step within {LONGEST:.0f} s")
            time.sleep(0.05)
        return {"seconds": time.monotonic() - start}
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its loaders, too
        process.wait()


def inverse(n_items: str, device: str) -> dict:
    """Seconds of the closed form's inverse of a positive definite matrix in float32."""
    ranks = init_ranks(device=device)
    n = int(n_items)
    width = sweep_columns(ranks.device)
    blocks = ranks.partition_of_items(n).blocks(width)
    columns = [torch.rand((n, hi - lo), device=ranks.device) for lo, hi in blocks]
    for (lo, hi), column in zip(blocks, columns, strict=True):
        square = column[lo:hi]
        square.copy_((square + square.T) / 2)
        torch.diagonal(square).add_(2 * n)  # only one of two mirrored blocks is read
    seconds = []
    for _ in range(2):
        copy = [column.clone() for column in columns]
        _wait(ranks.device)
        start = time.perf_counter()
        invert(SymmetricColumns(copy, n, ranks, width))
        _wait(ranks.device)
        seconds.append(time.perf_counter() - start)
        finite = bool(copy[0].isfinite().all())
        del copy
    return {"seconds": seconds[-1], "first": seconds[0], "finite": finite}


def evaluation(config_file: str, shards: str, device: str, *options: str) -> dict:
    """Users per second that `evaluate` ranks, lists of 100, with the initial weights."""
    arguments = ["--config", config_file, "--data.shards", shards, "--device", device, *options]
    config, _ = configs.parse(configs.make_parser("gpu_stages", ""), arguments)
    ranks = init_ranks(device=config.device)
    manifest = Manifest.load(shards)
    arithmetic = scoring_arithmetic(config, ranks.device)
    model = new_model(config, manifest.n_items, ranks, arithmetic)
    model.initialise(0)
    model.refresh()
    trunk = make_trunk(config.model, 0, arithmetic)
    if trunk is not None:
        trunk.to(ranks.device).eval().requires_grad_(False)
    scorer, seconds = TrainedModel(model, trunk).scores, []
    for _ in range(2):
        start = time.perf_counter()
        found = evaluate(scorer, shards, "test", ranks)
        seconds.append(time.perf_counter() - start)
    assert found is not None
    return {"users_per_second": manifest.splits["test"].users / seconds[-1], "seconds": seconds}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    stages = {"first_step": first_step, "inverse": inverse, "evaluate": evaluation}
    print(json.dumps(stages[sys.argv[1]](*sys.argv[2:])), flush=True)

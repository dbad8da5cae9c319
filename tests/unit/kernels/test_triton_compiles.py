"""Every Triton kernel compiles for an H100 without spilling registers. No GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support.paths import PYTHONPATH, ROOT

pytest.importorskip("triton", reason="triton is not installed; pip install -e '.[dev]'")


@pytest.mark.slow
def test_every_kernel_compiles_for_an_h100(tmp_path):
    """In a process of its own: triton decides at its import whether it compiles or interprets."""
    from triton.backends.nvidia.compiler import get_ptxas_version

    try:
        get_ptxas_version(90)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        pytest.skip(f"triton's ptxas does not start here: {error}")
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.compile_triton"],
        cwd=ROOT,
        env=os.environ
        | {
            "TRITON_INTERPRET": "0",
            "TRITON_DUMP_PTXAS_LOG": "1",
            "TRITON_CACHE_DIR": str(tmp_path),
            "PYTHONPATH": PYTHONPATH,
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 36, done.stdout
    assert {kernel["kernel"]: kernel["spilled"] for kernel in kernels if kernel["spilled"]} == {}
    assert all(kernel["ptx"] for kernel in kernels)

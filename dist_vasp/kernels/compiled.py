"""Compile chains of elementwise operations into one kernel each, with torch.compile.

The loss of a block and the optimizer's update are such chains. Uncompiled, every operation reads
and writes memory; compiled, every number is read and written once. Where compiling takes longer
than it saves, or there is no compiler, the same functions run uncompiled. The results agree to
rounding.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

import torch

from dist_vasp.kernels.interface import F, Kernels

FUSED_CHUNK = 1 << 22  # what a compiled call costs, some 75 us, is little beside it


class Compiled(Kernels):
    """Plain torch, with chains of elementwise operations compiled."""

    chunk: ClassVar[int] = FUSED_CHUNK
    gradient_rows: ClassVar[int] = 8192

    def fuse(self, function: F) -> F:
        """Return the function, compiled at its first call for tensors of every size."""
        return torch.compile(function, dynamic=True, fullgraph=True)  # type: ignore[return-value]


COMPILED = Compiled()


def try_to_compile(device: torch.device) -> str:
    """Set the compiler up and compile a small function for a device. Returns why that failed, or
    ""."""
    _configure()
    try:
        _try(device)
    except Exception as error:  # toolchains raise many types
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ""


def _configure() -> None:
    """Compile in this process, and keep compiled code where only this user can write.

    Compiled code is loaded without a check.
    """
    import torch._functorch.config
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1
    torch._inductor.config.fx_graph_cache = False  # it would unpickle its files
    torch._functorch.config.enable_autograd_cache = False
    cache = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dist_vasp" / "kernels"
    )
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))


def _try(device: torch.device) -> None:
    """Compile and run a small function."""
    x = torch.arange(64.0, device=device)
    assert torch.equal(COMPILED.fuse(lambda t: t * 2 + 1)(x), x * 2 + 1)

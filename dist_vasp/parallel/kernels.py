"""Compile chains of elementwise operations into one kernel each, with torch.compile.

The loss of a block and the optimizer's update are such chains. Uncompiled, every operation reads
and writes memory; compiled, every number is read and written once. Where compiling takes longer
than it saves, or there is no compiler, the same functions run uncompiled. The results agree to
rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable)
Fuse = Callable[[F], F]

# Item weights of a rank. With fewer, a run takes less time than compiling (5 to 15 s) would save.
WORTH_COMPILING = 4_000_000


def plain(function: F) -> F:
    """Return the function as it is."""
    return function


def kernels(wanted: str, n_weights: int) -> tuple[Fuse, str]:
    """Return how to fuse a function under `parallel.compile`, and a remark for the user or "".

    `n_weights`: item weights of this rank. ValueError where `always` is set and compiling fails.
    """
    if wanted == "never" or (wanted == "auto" and n_weights < WORTH_COMPILING):
        return plain, ""
    _configure()
    try:
        _try()
    except Exception as error:  # toolchains raise many types
        why = str(error).strip().splitlines() or [type(error).__name__]
        if wanted == "always":
            raise ValueError(
                f"parallel.compile is always, but torch.compile does not work here ({why[0]}); "
                "install a C++ compiler (g++) or set it to auto"
            ) from None
        remark = (
            f"not compiled, and slower for it: torch.compile does not work here ({why[0]}); "
            "install a C++ compiler (g++)"
        )
        return plain, remark
    return fused, ""


def fused(function: F) -> F:
    """Return the function, compiled at its first call for tensors of every size."""
    return torch.compile(function, dynamic=True, fullgraph=True)  # type: ignore[return-value]


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


def _try() -> None:
    """Compile and run a small function."""
    x = torch.arange(64.0)
    assert torch.equal(fused(lambda t: t * 2 + 1)(x), x * 2 + 1)

"""Chains of elementwise operations compiled into one kernel each, by torch.compile: the loss of a
block, the optimizer's update.

Operation by operation, a chain reads and writes memory (or cache) once for each; compiled, every
number passes once through the registers. The same functions run uncompiled where compiling does not
pay or there is no compiler: the results agree to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable)
Fuse = Callable[[F], F]

WORTH_COMPILING = (
    4_000_000  # item weights of a rank; below, a run is over before compiling (5 to 15 s) has paid
)


def plain(function: F) -> F:
    """Leave the function as it is."""
    return function


def kernels(wanted: str, n_weights: int) -> tuple[Fuse, str]:
    """How to fuse a function under `parallel.compile`, on a rank with `n_weights` item weights.

    Also returns a remark for the user, empty if all is as wanted. Raises ValueError where `always`
    cannot be had.
    """
    if wanted == "never" or (wanted == "auto" and n_weights < WORTH_COMPILING):
        return plain, ""
    _configure()
    try:
        _try()
    except Exception as error:  # whatever a toolchain may come up with
        why = str(error).strip().splitlines() or [type(error).__name__]
        if wanted == "always":
            raise ValueError(
                f"parallel.compile is always, but torch.compile does not work here ({why[0]}); "
                "install a C++ compiler (g++) or set it to auto"
            ) from None
        return (
            plain,
            (
                f"not compiled, and slower for it: torch.compile does not work here ({why[0]}); "
                "install a C++ compiler (g++)"
            ),
        )
    return fused, ""


def fused(function: F) -> F:
    """Compile at the first call, for tensors of every size."""
    return torch.compile(function, dynamic=True, fullgraph=True)  # type: ignore[return-value]


def _configure() -> None:
    """Compile in this process, and keep compiled code where nobody else can write: it would be
    loaded without a question."""
    import torch._functorch.config
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1
    torch._inductor.config.fx_graph_cache = False  # would unpickle what it finds
    torch._functorch.config.enable_autograd_cache = False
    cache = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dist_vasp" / "kernels"
    )
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))


def _try() -> None:
    """Compile and run something small."""
    x = torch.arange(64.0)
    assert torch.equal(fused(lambda t: t * 2 + 1)(x), x * 2 + 1)

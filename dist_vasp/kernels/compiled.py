"""Compile chains of elementwise operations into one kernel each, with torch.compile.

The loss of a block and the optimizer's update are such chains. Uncompiled, every operation reads
and writes memory; compiled, every number is read and written once. Where compiling takes longer
than it saves, or there is no compiler, the same functions run uncompiled. The results agree to
rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar

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


def fuse_on_gpu(function: F) -> F:
    """Return a function that is compiled at its first call, where it is for a GPU and compiling
    works. That takes 10 seconds and more, and few models need it."""
    chosen: list[F] = []

    @wraps(function)
    def call(*args: Any) -> Any:
        if not chosen:
            device = _device_of(args)
            plain = device.type != "cuda" or try_to_compile(device)
            chosen.append(function if plain else COMPILED.fuse(function))
        return chosen[0](*args)

    return call  # type: ignore[return-value]


def _device_of(values: Iterable[Any]) -> torch.device:
    """The device of the first tensor."""
    for value in values:
        if isinstance(value, torch.Tensor):
            return value.device
        if isinstance(value, list | tuple) and value:
            return _device_of(value)
    raise TypeError("there is no tensor")  # pragma: no cover


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

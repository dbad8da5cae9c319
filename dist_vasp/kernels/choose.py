"""Which kernels a run computes with."""

from __future__ import annotations

import torch

from dist_vasp.kernels.compiled import COMPILED, try_to_compile
from dist_vasp.kernels.interface import PLAIN, Kernels

# Item weights of a rank. With fewer, a run on a CPU takes less time than compiling (5 to 15 s)
# would save.
WORTH_COMPILING = 4_000_000


def choose_kernels(wanted: str, n_weights: int, device: torch.device) -> tuple[Kernels, str]:
    """Return the kernels for `parallel.compile` on a device, and a remark for the user or "".

    n_weights: item weights of this rank. ValueError where `always` is set and compiling fails.
    """
    if wanted == "never":
        return PLAIN, ""
    if device.type == "cuda":
        return _for_gpu(wanted)
    if wanted == "auto" and n_weights < WORTH_COMPILING:
        return PLAIN, ""
    why = try_to_compile(device)
    return (PLAIN, _refuse(why, wanted)) if why else (COMPILED, "")


def _refuse(why: str, wanted: str) -> str:
    """The remark that nothing is compiled; ValueError where that was demanded."""
    remedy = "install a C++ compiler (g++)"
    if wanted == "always":
        raise ValueError(
            f"parallel.compile is always, but torch.compile does not work here ({why}); "
            f"{remedy} or set it to auto"
        )
    return f"not compiled, and slower for it: torch.compile does not work here ({why}); {remedy}"


def kernels_for_scores(wanted: str, device: torch.device) -> Kernels:
    """Return the kernels of a model that is not trained: nothing of it is compiled."""
    if wanted == "never" or device.type != "cuda":
        return PLAIN
    try:
        from dist_vasp.kernels.cuda import TritonKernels
    except ImportError:
        return PLAIN
    return TritonKernels()


def _for_gpu(wanted: str) -> tuple[Kernels, str]:
    try:
        from dist_vasp.kernels.cuda import TritonKernels
    except ImportError as error:
        if wanted == "always":
            raise ValueError(
                f"parallel.compile is always, but triton cannot be imported ({error}); "
                "install torch's CUDA build, which brings it, or set it to auto"
            ) from None
        return PLAIN, (
            f"without the GPU kernels, and slower for it: triton cannot be imported ({error}); "
            "install torch's CUDA build, which brings it"
        )
    return TritonKernels(), ""

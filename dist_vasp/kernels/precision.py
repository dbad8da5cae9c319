"""In which precision matrix products are computed (DESIGN.md, section 9).

    fp32   products, sums and updates in IEEE float32
    tf32   inputs of a product rounded to 10 bits of mantissa, sums in float32
    bf16   products in bfloat16 with float32 sums; logits, their gradients and activations bfloat16

Weights, moments, sums of the loss and norms are float32 in each of them. No switch of torch stays
changed: `scope` sets it for its body and puts it back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Precision:
    """One value of `parallel.precision`, but auto."""

    name: str = "fp32"

    @property
    def dtype(self) -> torch.dtype | None:
        """What the inputs of a product are cast to, None for the dtype that they have."""
        return torch.bfloat16 if self.name == "bf16" else None

    def cast(self, values: Tensor) -> Tensor:
        """`values` as the input of a product."""
        return values if self.dtype is None else values.to(self.dtype)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Compute the float32 products of the body in TF32 where this precision allows it.

        TF32 exists on GPUs alone.
        """
        if self.name != "tf32":
            yield
            return
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


FP32, TF32, BF16 = (Precision(name) for name in ("fp32", "tf32", "bf16"))
_BY_NAME = {precision.name: precision for precision in (FP32, TF32, BF16)}


def choose_precision(wanted: str, device: torch.device) -> Precision:
    """What `parallel.precision` means on a device.

    auto is bf16 on a GPU that has it, else fp32. tf32 is fp32 without a GPU.
    """
    if wanted == "tf32" and device.type != "cuda":
        return FP32
    if wanted != "auto":
        return _BY_NAME[wanted]
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return BF16 if has_bf16 else FP32

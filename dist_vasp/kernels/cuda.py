"""The kernels of a GPU: Triton where plain torch would store what it could use at once.

Imported on a GPU alone, because triton comes with torch's CUDA build.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from dist_vasp.kernels import cuda_latent, cuda_residual, triton_rows
from dist_vasp.kernels import triton_kernels as jit
from dist_vasp.kernels.compiled import fuse_on_gpu
from dist_vasp.kernels.interface import Bags, F, Kernels, Norm, Weights

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
_SUM = {"UNROLL": 8, "BLOCK": 1024, "num_warps": 4}  # 8 numbers per thread
_SUM_NARROW = {"UNROLL": 128, "BLOCK": 1, "num_warps": 4}  # one column: a thread for each row
_ROW_UNROLL, _ROW_BLOCK, _ROW_BLOCK_OF_WARP = 4, 4096, 512
_UPDATE_BLOCK = 2048
_FOCAL_BLOCK = 1024


class TritonKernels(Kernels):
    """Triton, and plain torch where nothing would be stored in vain."""

    align: ClassVar[int] = 128  # a product with an odd dimension runs at a sixth of the rate
    gradient_rows: ClassVar[int] = 8192
    updates_alone: ClassVar[bool] = True
    adds_bias: ClassVar[bool] = True
    seconds_to_compile: ClassVar[float] = 10.0  # where none is in Triton's cache

    def __init__(self) -> None:
        self._addressed: dict[tuple[int, ...], Tensor] = {}
        self._placed: dict[tuple[int, ...], tuple[Tensor, ...]] = {}
        self._tables: RecordedTables | None = None

    def fuse(self, function: F) -> F:
        return fuse_on_gpu(function)

    def sum_rows(
        self, table: Tensor, ids: Tensor, indptr: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        n, n_columns = len(indptr) - 1, table.shape[1]
        out = table.new_empty((n, n_columns), dtype=dtype)
        shape = _SUM_NARROW if n_columns == 1 else _SUM
        if n and n_columns:
            jit.sum_rows[(n, triton.cdiv(n_columns, shape["BLOCK"]))](
                ids, indptr, table, out, n_columns, table.stride(0), out.stride(0), **shape
            )
        return out

    def product(self, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        if a.device.type != "cuda" or a.dtype == dtype:
            return super().product(a, b, dtype)
        return torch.mm(a, b, out_dtype=dtype)

    def ones(
        self, positions: tuple[Tensor, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        on_gpu = positions[0].device.type == "cuda"
        padded = (shape[0], self.padded(shape[1] + 1))  # one column for no item
        ones = super().ones(positions, padded, torch.bfloat16 if on_gpu else dtype)  # exactly
        ones[:, shape[1] :].zero_()
        return ones

    def gram(self, ones_GC: Tensor) -> Tensor:
        if ones_GC.device.type != "cuda":
            return super().gram(ones_GC)
        return torch.mm(ones_GC, ones_GC.T, out_dtype=torch.float32)

    def residual(
        self, h_BH: Tensor, bias_H: Tensor | None, sum_BH: Tensor | None, norm: Norm
    ) -> tuple[Tensor, Tensor]:
        if not cuda_residual.fits(h_BH):
            return super().residual(h_BH, bias_H, sum_BH, norm)
        return cuda_residual.residual(h_BH, bias_H, sum_BH, norm)

    def latent_code(
        self, mu_BL: Tensor, logvar_BL: Tensor, noise_BL: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        if noise_BL is None or not cuda_latent.fits(mu_BL, dtype):
            return super().latent_code(mu_BL, logvar_BL, noise_BL, dtype)
        return cuda_latent.latent_code(mu_BL, logvar_BL, noise_BL)

    def update_sum(
        self, grad: Tensor, bags: Bags, diagonal: int | None, of: Weights, by: Tensor
    ) -> Tensor:
        ids, indptr = bags
        n, n_columns = len(indptr) - 1, of.weights.shape[1]
        grid = (n, triton.cdiv(n_columns, _SUM["BLOCK"]))
        norms = torch.empty(grid, dtype=torch.float32, device=grad.device)
        second = of.weights if of.second is None else of.second
        denominators = of.weights if of.denominators is None else of.denominators
        jit.update_sum[grid](
            ids, indptr, grad, of.weights, of.first, second, denominators,
            of.weights if of.copy is None else of.copy, norms,
            n_columns, grad.stride(0), of.weights.stride(0),
            *(0 if size == 1 else 1 for size in denominators.shape),
            diagonal or 0, by,
            HAS_V=of.second is not None, HAS_COPY=of.copy is not None,
            HAS_DIAGONAL=diagonal is not None, **_SUM,
        )  # fmt: skip
        return norms.sum()

    def update_rows(self, grad: Tensor, bags: Bags | None, of: Weights, by: Tensor) -> Tensor:
        assert of.second is not None
        grad, n_columns = grad.contiguous(), of.weights.shape[1]
        ids, indptr = (grad, grad) if bags is None else bags
        n = len(grad) if bags is None else len(indptr) - 1
        norms = torch.empty(n, dtype=torch.float32, device=grad.device)
        triton_rows.update_rows[(n,)](
            ids, indptr, grad, of.weights, of.first, of.second,
            of.weights if of.copy is None else of.copy, norms,
            n_columns, grad.stride(0), of.weights.stride(0), by,
            SUMS=bags is not None, HAS_COPY=of.copy is not None, **row_shape(n_columns),
        )  # fmt: skip
        return norms.sum()

    def update_many(self, parts: list[tuple[Tensor, Weights]], by: Tensor) -> Tensor:
        norms = [
            self._update_alike([part for part in parts if _kind(part) == kind], by)
            for kind in dict.fromkeys(_kind(part) for part in parts)
        ]
        return torch.cat(norms).sum()

    def _update_alike(self, parts: list[tuple[Tensor, Weights]], by: Tensor) -> Tensor:
        """`update_many` of gradients of one type and copies of one type: the norm of each block."""
        grad, of = parts[0]
        columns: list[list[Tensor | None]] = [
            [grad.contiguous() for grad, _ in parts],
            [of.weights for _, of in parts],
            [of.first for _, of in parts],
            [of.second for _, of in parts],
            [of.copy for _, of in parts],
        ]
        part, offset, size = self._places(tuple(of.weights.numel() for _, of in parts), grad.device)
        tables = [self._addresses(column, grad.device) for column in columns]
        norms = torch.empty(len(part), dtype=torch.float32, device=grad.device)
        copy = of.weights if of.copy is None else of.copy
        jit.update_many[(len(part),)](
            part, offset, size, *tables, norms, by,
            GRAD=_TYPES[grad.dtype], COPY=_TYPES[copy.dtype],
            HAS_COPY=of.copy is not None, BLOCK=_UPDATE_BLOCK, num_warps=8,
        )  # fmt: skip
        return norms

    def focal(
        self, logits: list[Tensor], is_one: Tensor, weight_G: Tensor, alpha: float, gamma: float
    ) -> tuple[Tensor, list[Tensor]]:
        (n_rows, n_items), dtype = logits[0].shape, logits[0].dtype
        n_padded = self.padded(n_items)
        row, column = logits[0].stride()
        if row < n_padded or column != 1 or len({logit.stride() for logit in logits}) > 1:
            logits = [pad(logit, (0, n_padded - n_items)) for logit in logits]
        if is_one.shape[1] < n_padded:
            is_one = pad(is_one, (0, n_padded - is_one.shape[1]))
        grads = list(logits[0].new_empty((len(logits), n_rows, n_padded)).unbind())
        device = weight_G.device
        loss = torch.empty(n_rows, dtype=torch.float32, device=device)
        addresses = self._addresses(logits, device), self._addresses(grads, device)
        jit.focal[(n_rows,)](
            addresses[0], is_one.view(torch.uint8), weight_G, addresses[1], loss,
            n_items, n_padded, logits[0].stride(0), is_one.stride(0), n_padded,
            alpha, gamma, -math.log(torch.finfo(torch.float32).eps / 4),
            PATHS=len(logits), GAMMA=gamma if gamma in (0, 2) else -1, TYPE=_TYPES[dtype],
            BLOCK=_FOCAL_BLOCK, num_warps=8,
        )  # fmt: skip
        return weight_G @ loss, grads

    def _addresses(self, tensors: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """The addresses of tensors on a device, made once for each list of addresses."""
        key = tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)
        if _is_recording(device):
            assert self._tables is not None, "a step runs before it is recorded"
            return self._tables.reserve(key)
        if self._tables is None:
            self._tables = RecordedTables(device)
        if key not in self._addressed:
            if len(self._addressed) >= _MOST_TABLES:
                self._addressed.clear()
            self._addressed[key] = _on_device(key, device)
        return self._addressed[key]

    def end_recording(self) -> None:
        if self._tables is not None:
            self._tables.write()

    def _places(self, sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
        """For each block of numbers of tensors: its tensor, its first number; and all sizes. Made
        once for each list of sizes."""
        if sizes not in self._placed:
            blocks = [np.arange(0, n, _UPDATE_BLOCK) for n in sizes]
            part = np.repeat(np.arange(len(sizes)), [len(of_one) for of_one in blocks])
            columns = (part, np.concatenate(blocks), np.array(sizes))
            self._placed[sizes] = tuple(_on_device(column, device) for column in columns)
        return self._placed[sizes]


def row_shape(n_columns: int) -> dict[str, int]:
    """How `update_rows` divides rows of so many columns."""
    block = min(triton.next_power_of_2(n_columns), _ROW_BLOCK)
    warps = max(1, block // _ROW_BLOCK_OF_WARP)
    more = n_columns > block
    return {"HAS_MORE": more, "UNROLL": _ROW_UNROLL, "BLOCK": block, "num_warps": warps}


class RecordedTables:
    """The tables of addresses that recorded steps read.

    They lie in memory that was there before: what a step allocates while it is recorded, an earlier
    kernel of the same step may overwrite in each replay.
    """

    _SIZE = 1 << 17  # numbers, enough for some hundred recorded steps

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.zeros(self._SIZE, dtype=torch.int64, device=device)
        self._used = 0
        self._waiting: list[tuple[Tensor, tuple[int, ...]]] = []

    def reserve(self, key: tuple[int, ...]) -> Tensor:
        """A place for a table; RuntimeError where all are taken."""
        start = self._used
        self._used += -(-len(key) // 2) * 2  # the next one starts at a multiple of 16 bytes, too
        if self._used > self._SIZE:
            raise RuntimeError("too many steps have been recorded")
        table = self._memory[start : start + len(key)]
        self._waiting.append((table, key))
        return table

    def write(self) -> None:
        """Fill the tables that were reserved since the last call."""
        for table, key in self._waiting:
            table.copy_(torch.tensor(key))
        self._waiting.clear()


def _is_recording(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _on_device(values: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
    """Integers on a device. Pinned memory lets the copy go on without waiting for a GPU."""
    table = torch.as_tensor(np.asarray(values, dtype=np.int64))
    return (table.pin_memory() if device.type == "cuda" else table).to(device, non_blocking=True)


_MOST_TABLES = 256


def _kind(part: tuple[Tensor, Weights]) -> tuple[torch.dtype, torch.dtype | None]:
    grad, of = part
    return grad.dtype, None if of.copy is None else of.copy.dtype

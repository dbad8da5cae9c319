"""The trunk of several ranks under DeepSpeed ZeRO: build it, step it, take its state out whole and
put it back. The only importer of deepspeed.

What each stage partitions over the world: 0 nothing, 1 moments, 2 moments and gradients, 3
parameters too. The state that leaves here is whole and plain, so a checkpoint knows nothing of the
stage it was written at.

Sources: Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054); DeepSpeed 0.19.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dist_vasp.config.schema import Config
from dist_vasp.kernels.interface import Kernels
from dist_vasp.model.trunk import Trunk
from dist_vasp.parallel.comm import Ranks
from dist_vasp.training.step.optimizer import MOMENTS, InPlaceAdam

MAX_BUCKET = 500_000_000  # elements


class ZeroTrunk:
    """A Trunk and its optimizer at `parallel.zero_stage`; call it as the trunk itself."""

    def __init__(self, trunk: Trunk, config: Config, ranks: Ranks, kernels: Kernels) -> None:
        deepspeed = _import_deepspeed(ranks.device)
        self.stage, self.ranks = config.parallel.zero_stage, ranks
        self.n_parameters = sum(p.numel() for p in trunk.parameters())
        self.optimizer = InPlaceAdam(trunk.parameters(), config.optimizer, kernels=kernels)
        accumulation = config.optimizer.accumulation
        bucket = min(self.n_parameters + self.n_parameters % 2, MAX_BUCKET)  # it wants an even size
        self._engine, *_ = deepspeed.initialize(
            model=trunk.to(ranks.device),
            optimizer=self.optimizer,
            config={
                # rows are counted by our own loss; DeepSpeed only needs a consistent triple
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": accumulation,
                "train_batch_size": accumulation * ranks.world_size,
                "gradient_clipping": 0.0,
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {
                    "stage": self.stage,
                    # its buckets default to 500M elements, whatever the size of the module
                    "reduce_bucket_size": bucket,
                    "allgather_bucket_size": bucket,
                    "overlap_comm": ranks.device.type == "cuda",
                },
                "steps_per_print": 2**31 - 1,
                # its timer would wait for the device twice a step
                "timers": {"throughput": {"enabled": False, "synchronized": False}},
            },
            dist_init_required=False,
        )
        self._squared_norm: Tensor | None = None

    def __call__(
        self, pre_BH: Tensor, noise_BL: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        with self.ranks.clock("trunk"):
            return self._engine(pre_BH, noise_BL)

    @property
    def module(self) -> Trunk:
        """The bare module. Its parameters are whole at stages 0 to 2."""
        return self._engine.module

    def backward(self, scalar: Tensor) -> None:
        """Run autograd from `scalar`; DeepSpeed averages the gradients over the world."""
        with self.ranks.clock("trunk"):
            self._engine.backward(scalar, scale_wrt_gas=False)
        self._squared_norm = None

    def refresh(self) -> None:
        """There are no copies to make anew."""

    def begin_step(self) -> None:
        """The optimizer counts its step when DeepSpeed calls it."""

    def step(self) -> None:
        """End a micro-batch; the last one of a step updates the parameters."""
        if self._engine.is_gradient_accumulation_boundary():
            self.squared_norm()
        with self.ranks.clock("optimizer"):
            self._engine.step()

    def close(self) -> None:
        """Take DeepSpeed's hooks off the parameters: they hold engine, optimizer and moments."""
        self._engine.destroy()

    def squared_norm(self) -> Tensor:
        """Of the whole trunk's gradient, after the last backward of a step: a float64 scalar on the
        device. All ranks call it together."""
        if self._squared_norm is None:
            self._squared_norm = self._measured_norm()
        return self._squared_norm

    def _measured_norm(self) -> Tensor:
        zero = self._engine.optimizer
        if self.stage == 0:
            norms = [
                torch.linalg.vector_norm(p.grad)
                for p in self.module.parameters()
                if p.grad is not None
            ]
            return torch.linalg.vector_norm(torch.stack(norms)).double() ** 2
        norm = (
            zero.scaled_global_norm()
            if self.stage < 3
            else torch.linalg.vector_norm(torch.stack(zero._get_norm_groups()))
        )
        norm = torch.as_tensor(norm, dtype=torch.float64, device=self.ranks.device)
        # DeepSpeed says -1 for a gradient that is not finite.
        return torch.where(norm >= 0, norm**2, torch.nan)

    @contextmanager
    def evaluating(self) -> Iterator[ZeroTrunk]:
        self._engine.eval()
        try:
            yield self
        finally:
            self._engine.train()

    # --- state ------------------------------------------------------------------------------------

    def ensure_state(self) -> list[dict]:
        """The optimizer's state of everything this rank updates, created empty before the first
        step."""
        zero = self._engine.optimizer
        if self.stage == 3:
            return [self.optimizer.ensure_state(p) for p in zero.fp32_partitioned_groups_flat]
        states = [
            self.optimizer.ensure_state(p)
            for group in self.optimizer.param_groups
            for p in group["params"]
        ]
        if self.stage:
            # lets DeepSpeed's getters and setters see the moments
            zero._lazy_init_hp_params_optimizer_state()
        return states

    def tensors(self, moments: bool) -> dict[str, Tensor]:
        """Every parameter whole in fp32 and, if asked, its moments (`NAME.exp_avg`, ...); all ranks
        call it together."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self.ensure_state()
        found = {}
        for name, p in self.module.named_parameters():
            found[name] = p.detach() if self.stage == 0 else safe_get_full_fp32_param(p)
            for moment in MOMENTS if moments else ():
                state = (
                    self.optimizer.state[p][moment]
                    if self.stage == 0
                    else safe_get_full_optimizer_state(p, moment)
                )
                found[f"{name}.{moment}"] = state
        return found

    def shapes(self, moments: bool) -> dict[str, tuple[int, ...]]:
        """Return the whole shape of every tensor that `tensors(moments)` gives."""
        found = {}
        parameters: list[tuple[str, Any]] = list(self.module.named_parameters())
        for name, p in parameters:
            shape = tuple(p.ds_shape) if self.stage == 3 else tuple(p.shape)
            found[name] = shape
            for moment in MOMENTS if moments else ():
                found[f"{name}.{moment}"] = shape
        return found

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors(moments=True)` gave at any stage."""
        self.ensure_state()
        for name, p in self.module.named_parameters():
            self._set(p, tensors[name].to(self.ranks.device), None)
            for moment in MOMENTS:
                self._set(p, tensors[f"{name}.{moment}"].to(self.ranks.device), moment)

    def _set(self, p: Any, value: Tensor, moment: str | None) -> None:
        """Write one whole tensor into wherever the stage keeps it: the master copy or moment, and
        the module's own copy."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if moment is None and (self.stage < 3 or p.data.numel() == p.ds_numel):
            p.data.copy_(value)  # what the next forward uses
        if self.stage == 0 and moment:
            self.optimizer.state[p][moment].copy_(value)
        elif self.stage in (1, 2):
            if moment:
                safe_set_full_optimizer_state(p, value, moment)
            else:
                safe_set_full_fp32_param(p, value)
        elif self.stage == 3:
            # the full setters fail where the length does not divide by the world: cut this rank's
            # piece ourselves
            length = p.ds_tensor.numel()
            padded = torch.nn.functional.pad(
                value.flatten(), (0, length * self.ranks.world_size - value.numel())
            )
            piece = padded.narrow(0, length * self.ranks.rank, length)
            if moment:
                safe_set_local_optimizer_state(p, piece, moment)
            else:
                p.ds_tensor.data.copy_(piece)
                safe_set_local_fp32_param(p, piece)


def watch_traffic(count: Callable[[str, int], None]) -> None:
    """From now on tell `count(collective, bytes)` what this rank puts on the wire for the trunk
    (over a ring, as comm counts)."""
    from deepspeed.comm import comm

    size = comm.get_world_size()  # the engine knows no smaller group

    def watch(name: str, times: int) -> None:
        original = getattr(comm.cdb, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            whole = max(
                (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), key=Tensor.numel
            )
            count(name, times * (size - 1) * whole.numel() * whole.element_size() // size)
            return original(*args, **kwargs)

        setattr(comm.cdb, name, counted)

    # how often a message passes each link of the ring
    collectives = {
        "all_reduce": 2,
        "reduce": 1,
        "broadcast": 1,
        "all_gather_into_tensor": 1,
        "reduce_scatter_tensor": 1,
    }
    for name, times in collectives.items():
        watch(name, times)


def _import_deepspeed(device: torch.device) -> Any:
    """deepspeed, quiet, and on the CPU without compiling an op that only serves inference."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # it asks for what a launcher would have set
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    ops = getattr(getattr(deepspeed, "ops", None), "__compatible_ops__", None)
    if isinstance(ops, dict) and "deepspeed_shm_comm" in ops:
        ops["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False
        )
    return deepspeed

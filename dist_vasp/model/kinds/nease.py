"""Neural EASE: one linear layer with a zero diagonal (arXiv 2102.05774, section 3.2).

    NEASE(x) = sigmoid(W x),  diag(W) = 0, no bias

Trained alone, x predicts x: the zero diagonal prevents the identity. W may start from the closed
form B (`model.init_from_ease`), scaled and shifted so that sigmoid(W x + offset) does not saturate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dist_vasp.model.kind import Kind
from dist_vasp.model.links import Product
from dist_vasp.model.neighbours import item_to_item
from dist_vasp.model.partitioned import Parts
from dist_vasp.model.paths import ItemToItem, Training
from dist_vasp.model.slices import Storage
from dist_vasp.require import require, require_finite

if TYPE_CHECKING:
    from dist_vasp.config.schema import Config

START = "model.init_from_ease"
CLOSED_FORM = "closed_form"  # the value of model.init_from_ease that names no run


@dataclass(frozen=True)
class NeaseKeys:
    """The items x items layer: its inputs, its start and its part in training."""

    neighbours: int = 0
    """Inputs that W, or the B of ease, keeps for each output item: those that most users have
    together with it, by cosine; 0: all items."""
    init_from_ease: str = ""
    """Start NEASE's W from the closed form: closed_form computes it (ease_lambda), else the run.dir
    of an ease run; empty: Glorot."""
    nease_scale: float = 1.0
    """With init_from_ease: W starts as this many times B."""
    nease_offset: float = 0.0
    """Added to W x before the sigmoid: with B's small scores some -8 keeps sigmoid(W x + offset)
    from saturating."""
    nease: Literal["trained", "frozen", "apart"] = "trained"
    """W beside FLVAE: trained; frozen at its start; or apart: frozen, the loss is FLVAE's alone,
    and the paths meet in the scores."""

    def check(self) -> None:
        """Raise ValueError for values that no W can start with."""
        scale, offset = self.nease_scale, self.nease_offset
        require_finite("model.neighbours", self.neighbours)
        require_finite("model.nease_scale", scale)
        require(
            math.isfinite(offset),
            "model.nease_offset",
            offset,
            "a finite number",
            "the default is 0",
        )


@dataclass(frozen=True)
class NeaseRates:
    """The part of W in the optimizer's section."""

    nease_lr: float = 1.0
    """Learning rate of NEASE's W, as a multiple of the schedule's."""
    nease_decay: float = 0.0
    """With init_from_ease: W is drawn to its start by this times its learning rate a step; takes
    one more copy of W."""

    def check(self) -> None:
        """Raise ValueError for values that are no rates."""
        require_finite("optimizer.nease_lr", self.nease_lr)
        require_finite("optimizer.nease_decay", self.nease_decay)


def nease_path(config: Config, storage: Storage) -> ItemToItem:
    """W x + offset."""
    model, rates = config.model, config.optimizer
    training = Training(
        trained=model.nease == "trained",
        in_loss=model.nease != "apart",
        rate=rates.nease_lr,
        decay=rates.nease_decay,
    )
    return item_to_item(storage, model.neighbours, "nease", training, model.nease_offset)


def check_start(config: Config, may_freeze: bool) -> None:
    """Raise ValueError where the keys of W's start do not fit together."""
    m, rates = config.model, config.optimizer
    started = bool(m.init_from_ease)
    computed = m.init_from_ease == CLOSED_FORM
    require(
        not computed or m.ease_lambda > 0,
        "model.ease_lambda",
        m.ease_lambda,
        f"more than 0 with {START} {CLOSED_FORM}",
        "set it; a run of model.kind ease finds a good one on validation",
    )
    needs_start = {
        "model.nease_scale": (m.nease_scale, 1.0),
        "optimizer.nease_decay": (rates.nease_decay, 0.0),
    }
    for key, (value, default) in needs_start.items():
        require(
            started or value == default,
            key,
            value,
            f"{default:g} without {START}",
            f"set {START} too",
        )
    require(
        m.nease == "trained" or (started and may_freeze),
        "model.nease",
        m.nease,
        f"trained, unless model.kind is vasp or wide_deep, and {START} is set",
        "set both, or leave it out",
    )
    require(
        m.nease == "trained" or not rates.nease_decay,
        "optimizer.nease_decay",
        rates.nease_decay,
        f"0 with model.nease {m.nease}",
        "leave it out",
    )


def refuse_start(config: Config, kind: str) -> None:
    """Raise ValueError where a model without W is told how W starts."""
    start, neighbours = config.model.init_from_ease, config.model.neighbours
    without = f"0 with model.kind {kind}, which has no items x items layer"
    require(not neighbours, "model.neighbours", neighbours, without, "leave it out")
    require(not start, START, start, f"nothing with model.kind {kind}", "leave it out")
    check_start(config, may_freeze=False)


class Nease(Kind):
    name = "nease"
    losses = ("focal", "cosine", "mse", "bce")
    halves = False

    def check(self, config: Config) -> None:
        check_start(config, may_freeze=False)

    def parts(self, config: Config, storage: Storage) -> Parts:
        return Parts(storage, None, (nease_path(config, storage),), Product())

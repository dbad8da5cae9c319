"""The kinds of model, a line each, and the keys that they add to the configuration."""

from __future__ import annotations

from dataclasses import dataclass

from dist_vasp.model.kind import Kind
from dist_vasp.model.kinds.autorec import AutoRec, AutoRecKeys
from dist_vasp.model.kinds.ease import Ease, EaseKeys
from dist_vasp.model.kinds.flvae import Flvae, FlvaeKeys
from dist_vasp.model.kinds.multvae import MultVae
from dist_vasp.model.kinds.nease import Nease, NeaseKeys, NeaseRates
from dist_vasp.model.kinds.puresvd import PureSvd, PureSvdKeys
from dist_vasp.model.kinds.recvae import RecVae, RecVaeKeys
from dist_vasp.model.kinds.vasp import Vasp
from dist_vasp.model.kinds.wide_deep import WideDeep

_ALL: tuple[Kind, ...] = (
    Vasp(),  # FLVAE AND NEASE: the product of their probabilities
    WideDeep(),  # FLVAE OR NEASE: one sigmoid of the sum of their logits
    Flvae(),  # deep variational autoencoder
    MultVae(),  # shallow variational autoencoder, softmax over the items
    RecVae(),  # the same with a composite prior, encoder and decoder trained in turn
    AutoRec(),  # autoencoder of one hidden layer, squared error
    Nease(),  # one items x items layer, trained
    Ease(),  # one items x items layer, closed form
    PureSvd(),  # truncated singular value decomposition
)
KINDS = {kind.name: kind for kind in _ALL}


@dataclass(frozen=True)
class CheckedKeys:
    """Keys that the kinds add to a section; each kind's class checks its own."""

    def check_keys(self) -> None:
        """Raise ValueError for values that no kind can use."""
        for keys in type(self).__mro__:
            if "check" in vars(keys):
                vars(keys)["check"](self)


@dataclass(frozen=True)
class ModelKeys(PureSvdKeys, RecVaeKeys, AutoRecKeys, NeaseKeys, EaseKeys, FlvaeKeys):
    """The keys of `model` that the kinds add."""


@dataclass(frozen=True)
class OptimizerKeys(NeaseRates):
    """The keys of `optimizer` that the kinds add."""


def kind_of(name: str) -> Kind:
    """The kind that `model.kind` names."""
    return KINDS[name]

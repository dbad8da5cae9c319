"""FLVAE, a deep variational autoencoder with focal loss (arXiv 2102.05774, section 3.1).

    e = encoder(W1 x)      mu = Wm e + bm,  logvar = Wv e + bv,  z = mu + exp(logvar/2) * eps
    d = decoder(z)         FLVAE(x) = sigmoid(R d + r) * sigmoid(Q z + q)

The second head Q is from the authors' code; `model.latent_head: false` drops it. With
`loss.kind: multinomial`, the sum of the heads goes through a softmax, which makes it a Mult-VAE of
the same shape (Liang et al. 2018).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from dist_vasp.kernels.interface import Arithmetic
from dist_vasp.model.input_side import InputSide
from dist_vasp.model.kind import Kind
from dist_vasp.model.kinds.nease import refuse_start
from dist_vasp.model.links import Link, Product, Softmax
from dist_vasp.model.partitioned import Parts
from dist_vasp.model.paths import DenseHead
from dist_vasp.model.slices import Storage
from dist_vasp.model.trunk import ResidualTrunk, Trunk
from dist_vasp.require import require

if TYPE_CHECKING:
    from dist_vasp.config.schema import Config, ModelConfig

D, Z = 0, 1  # the trunk's outputs
MOST_LAYERS = 1000


@dataclass(frozen=True)
class FlvaeKeys:
    """The residual trunk and its heads."""

    hidden: int = 4096
    """Width H of the trunk."""
    latent: int = 2048
    """Width L of the latent code."""
    encoder_layers: int = 7
    """Layers of the encoder, the partitioned input layer counted."""
    decoder_layers: int = 5
    """Layers of the decoder, the output heads not counted."""
    latent_head: bool = True
    """A second output head Q on the latent code, as in the authors' code."""

    def check(self) -> None:
        """Raise ValueError for sizes that no trunk can have."""
        for key in ("hidden", "latent", "encoder_layers", "decoder_layers"):
            value = getattr(self, key)
            require(value >= 1, f"model.{key}", value, "at least 1", "raise it")
        for key in ("hidden", "latent"):
            value = getattr(self, key)
            require(value < 1 << 31, f"model.{key}", value, "less than 2^31", "lower it")
        for key in ("encoder_layers", "decoder_layers"):
            value = getattr(self, key)
            require(
                value <= MOST_LAYERS, f"model.{key}", value, f"at most {MOST_LAYERS}", "lower it"
            )


SIZE_KEYS = tuple(field.name for field in fields(FlvaeKeys))


def residual_trunk(model: ModelConfig, arithmetic: Arithmetic) -> ResidualTrunk:
    """Encoder, latent code and decoder."""
    sizes = (model.hidden, model.latent, model.encoder_layers, model.decoder_layers)
    return ResidualTrunk(*sizes, arithmetic)


def flvae_heads(model: ModelConfig, storage: Storage) -> list[DenseHead]:
    """R d + r and, with `model.latent_head`, Q z + q."""
    heads = [DenseHead("decoder", D, model.hidden, storage)]
    if model.latent_head:
        heads.append(DenseHead("latent", Z, model.latent, storage))
    return heads


class Flvae(Kind):
    name = "flvae"
    losses = ("focal", "multinomial")
    size_keys = SIZE_KEYS

    def check(self, config: Config) -> None:
        refuse_start(config, self.name)

    def trunk(self, model: ModelConfig, arithmetic: Arithmetic) -> Trunk:
        return residual_trunk(model, arithmetic)

    def parts(self, config: Config, storage: Storage) -> Parts:
        model = config.model
        link: Link = Softmax() if config.loss.kind == "multinomial" else Product()
        heads = flvae_heads(model, storage)
        return Parts(storage, InputSide(storage, model.hidden), tuple(heads), link)

"""The sizes of a small model, as options of the command line."""

from __future__ import annotations


def sizes(hidden: int = 8, latent: int = 4, encoder: int = 2, decoder: int = 2) -> list[str]:
    """The options of `model` that make a trunk of these widths and numbers of layers."""
    keys = {
        "hidden": hidden,
        "latent": latent,
        "encoder_layers": encoder,
        "decoder_layers": decoder,
    }
    return [word for key, value in keys.items() for word in (f"--model.{key}", str(value))]

"""The residual trunk against its formulas written out, in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dist_vasp.config.schema import ModelConfig
from dist_vasp.kernels.interface import Arithmetic
from dist_vasp.kernels.latent import kl_divergence
from dist_vasp.model.build import make_trunk
from dist_vasp.model.trunk import ResidualTrunk

B, H, L = 5, 8, 3


def swish(a: Tensor) -> Tensor:
    return a / (1 + torch.exp(-a))


def normalised(a: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    centred = a - a.mean(dim=1, keepdim=True)
    variance = (centred**2).mean(dim=1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-3) * p[f"{name}.weight"] + p[f"{name}.bias"]


def stack(p: dict[str, Tensor], name: str, first: Tensor, n_layers: int) -> Tensor:
    outputs = [normalised(swish(first), p, f"{name}.norms.0")]
    for k in range(1, n_layers):
        a = outputs[-1] @ p[f"{name}.layers.{k - 1}.weight"].T + p[f"{name}.layers.{k - 1}.bias"]
        outputs.append(normalised(swish(a + sum(outputs)), p, f"{name}.norms.{k}"))
    return outputs[-1]


def formulas(
    trunk: ResidualTrunk, pre: Tensor, noise: Tensor | None, n_encoder: int, n_decoder: int
) -> tuple[Tensor, Tensor, Tensor]:
    p = dict(trunk.named_parameters())
    e = stack(p, "encoder", pre + p["input_bias"], n_encoder)
    mu = e @ p["mu.weight"].T + p["mu.bias"]
    logvar = e @ p["logvar.weight"].T + p["logvar.bias"]
    z = mu if noise is None else mu + torch.exp(logvar / 2) * noise
    d = stack(p, "decoder", z @ p["from_latent.weight"].T + p["from_latent.bias"], n_decoder)
    # KL(N(mu, s^2) || N(0, 1)) = -log s + (s^2 + mu^2 - 1) / 2
    s = torch.exp(logvar / 2)
    return d, z, (-torch.log(s) + (s**2 + mu**2 - 1) / 2).mean(dim=1)


def initialised(trunk: ResidualTrunk, seed: int) -> ResidualTrunk:
    trunk.initialise(seed)
    return trunk


def flat(outputs: tuple[tuple[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """d, z and the penalty of each row."""
    (d, z), penalty = outputs
    return d, z, penalty


def randomised(n_encoder: int, n_decoder: int) -> ResidualTrunk:
    """Biases and norms start at zero and one: random ones make the comparison sharper."""
    trunk = initialised(ResidualTrunk(H, L, n_encoder, n_decoder, Arithmetic(torch.float64)), 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in trunk.parameters():
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return trunk


@pytest.mark.parametrize(("n_encoder", "n_decoder"), [(7, 5), (1, 1), (2, 3)])
@pytest.mark.parametrize("with_noise", [False, True])
def test_forward_and_gradients_equal_the_formulas(n_encoder, n_decoder, with_noise):
    trunk = randomised(n_encoder, n_decoder)
    generator = torch.Generator().manual_seed(3)
    pre, noise = (
        torch.randn(B, width, generator=generator, dtype=torch.float64) for width in (H, L)
    )
    pre.requires_grad_()
    before = pre.detach().clone()
    found = flat(trunk(pre, noise if with_noise else None))
    expected = formulas(trunk, pre, noise if with_noise else None, n_encoder, n_decoder)
    for name, a, b in zip("dzk", found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13, msg=name)
    assert torch.equal(pre, before)
    leaves = [pre, *trunk.parameters()]
    gradients = [
        torch.autograd.grad(sum((o * o).sum() for o in out), leaves) for out in (found, expected)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_without_noise_z_is_mu():
    trunk = randomised(3, 2)
    pre = torch.randn(B, H, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (_, z), kl = trunk(pre)
    assert torch.equal(z, trunk.mu(trunk.encoder(pre + trunk.input_bias)))
    noisy = flat(trunk(pre, torch.zeros(B, L, dtype=torch.float64)))
    assert torch.equal(noisy[1], z)
    assert torch.equal(noisy[2], kl)


def test_rows_do_not_meet():
    trunk = randomised(3, 2)
    generator = torch.Generator().manual_seed(4)
    pre, noise = (
        torch.randn(B, width, generator=generator, dtype=torch.float64) for width in (H, L)
    )
    whole = flat(trunk(pre, noise))
    for b in range(B):
        for a, part in zip(whole, flat(trunk(pre[b : b + 1], noise[b : b + 1])), strict=True):
            torch.testing.assert_close(a[b : b + 1], part, rtol=1e-12, atol=1e-14)


def test_kl_divergence():
    zeros = torch.zeros(2, 4)
    assert torch.equal(kl_divergence(zeros, zeros), torch.zeros(2))
    torch.testing.assert_close(
        kl_divergence(torch.full((1, 4), 2.0), zeros[:1]), torch.tensor([2.0])
    )
    normal = torch.distributions.Normal
    mu, logvar = torch.randn(
        2, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    expected = torch.distributions.kl_divergence(
        normal(mu, torch.exp(logvar / 2)), normal(torch.zeros_like(mu), 1.0)
    ).mean(1)
    torch.testing.assert_close(kl_divergence(mu, logvar), expected)


def test_initialisation_is_glorot_and_the_same_in_every_dtype():
    single, double = (
        initialised(ResidualTrunk(40, 24, 4, 3, Arithmetic(dtype)), 9)
        for dtype in (torch.float32, torch.float64)
    )
    other = initialised(ResidualTrunk(40, 24, 4, 3), 10)
    for (name, p), q, r in zip(
        single.named_parameters(), double.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(p.double(), q), name
        if p.dim() == 2:
            bound = (6 / (p.shape[0] + p.shape[1])) ** 0.5
            assert p.abs().max() <= bound
            assert p.abs().max() > 0.95 * bound
            assert abs(float(p.detach().std()) / (bound / 3**0.5) - 1) < 0.1, name
            assert not torch.equal(p, r)
        else:
            assert (p == (1 if "norms" in name and name.endswith("weight") else 0)).all(), name
    shapes = {name: tuple(p.shape) for name, p in single.named_parameters()}
    assert shapes["input_bias"] == (40,)
    assert shapes["mu.weight"] == shapes["logvar.weight"] == (24, 40)
    assert shapes["from_latent.weight"] == (40, 24)
    assert (
        sum(name.startswith("encoder.layers") and name.endswith("weight") for name in shapes) == 3
    )
    assert (
        sum(name.startswith("decoder.layers") and name.endswith("weight") for name in shapes) == 2
    )


def test_make_trunk_follows_the_configuration():
    assert make_trunk(ModelConfig(kind="nease"), 0) is None
    config = ModelConfig(kind="flvae", hidden=H, latent=L, encoder_layers=2, decoder_layers=3)
    trunk, again, other = make_trunk(config, 3), make_trunk(config, 3), make_trunk(config, 4)
    assert trunk is not None and again is not None and other is not None
    assert len(trunk.encoder.norms) == 2 and len(trunk.decoder.norms) == 3
    for a, b in zip(trunk.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(trunk.mu.weight, other.mu.weight)

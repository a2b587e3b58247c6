"""A VAE of two networks with linear maps starts at probabilistic PCA, and learns what is beyond."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from pyro_vae.models.vae import VAE
from pyro_vae.parts.factors import unbounded_scale
from pyro_vae.parts.likelihoods import Gaussian
from pyro_vae.parts.networks import MLP, Viewed
from pyro_vae.parts.posteriors import DiagonalNormal
from pyro_vae.parts.standardized import Standardized


@torch.no_grad()
def start_at_ppca(vae: VAE, x: Tensor) -> VAE:
    r"""Set the linear maps of a VAE to probabilistic PCA of rows (n, d), in closed form.

    In standard units :math:`x = W z + \epsilon,\ \epsilon \sim N(0, s^2 I)`, and
    :math:`q(z|x) = N(M^{-1} W^T x,\ s^2 M^{-1})` with the diagonal :math:`M = W^T W + s^2 I` is the
    exact posterior. So the bound starts at log p(x) of probabilistic PCA.

    Arguments:
        vae: a VAE of ``VAE.mlp(linear=True)`` with the likelihood `Standardized` of a `Gaussian`
            whose scale is predicted or learned, and a `DiagonalNormal` posterior.
        x: the training rows, without missing entries.

    Returns the VAE.
    Tipping & Bishop, Probabilistic principal component analysis, 1999.
    """
    family = cast(Standardized, vae.decoder.family)
    gaussian, posterior = (
        cast(Gaussian, family.likelihood),
        cast(DiagonalNormal, vae.encoder.family),
    )
    (latent_dim,), (d,) = vae.encoder.shape, vae.decoder.shape
    low, high = gaussian.bounds
    rows = (x.double() - family.center) / family.spread
    weights, noise = _ppca(rows, latent_dim, 2 * low)
    noise = min(noise, high / 2)
    m = weights.square().sum(0) + noise**2  # the diagonal of M
    decoder, encoder = _map(vae.decoder.network), _map(vae.encoder.network)
    decoder.weight[:d] = weights
    encoder.weight[:latent_dim] = (weights / m).T
    scales = (noise / m.sqrt()).clamp(2 * posterior.low, posterior.high / 2)
    encoder.bias[latent_dim:] = torch.tensor(
        [unbounded_scale(scale, posterior.low, posterior.high) for scale in scales.tolist()]
    )
    raw = unbounded_scale(noise, low, high)
    if gaussian.learned:
        cast(Any, gaussian).raw_scale.fill_(raw)
    else:
        decoder.bias[d:] = raw
    return vae


def _ppca(rows: Tensor, latent_dim: int, least: float) -> tuple[Tensor, float]:
    """The weights W (d, latent_dim) and the noise s of the maximum likelihood.

    There are at most d - 1 components; other columns of W are 0.
    """
    d = rows.shape[1]
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    values, vectors = values.flip(0), vectors.flip(1)
    q = min(latent_dim, d - 1)
    noise = max(max(values[q:].mean().item(), 0.0) ** 0.5, least)
    weights = rows.new_zeros(d, latent_dim)
    weights[:, :q] = vectors[:, :q] * (values[:q] - noise**2).clamp(min=0).sqrt()
    return weights, noise


def _map(network: nn.Module) -> nn.Linear:
    """The linear map of a network, set to 0."""
    inner = network.network if isinstance(network, Viewed) else network
    found = cast(MLP, inner).shortcut
    nn.init.zeros_(found.weight)
    nn.init.zeros_(found.bias)
    return found

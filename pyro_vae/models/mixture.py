"""The mixture variational autoencoder: a discrete component, and a latent vector given it."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae.models.vae import VAE
from pyro_vae.parts.factors import Factor
from pyro_vae.parts.networks import Shape
from pyro_vae.parts.priors import GaussianMixture


class MixtureVAE(PyroModule):
    r"""Clusters: :math:`k \sim p(k),\ z \sim N(m_k, \mathrm{diag}(s_k^2)),\ x \sim p(x|z)`.

    The guide is :math:`q(z|x)`; the component k is summed out in the model, and its posterior is
    the exact :math:`p(k|z)`. The bound is that of `VAE` with a `GaussianMixture` for a prior; here
    k is a site, with a KL of its own, which every tool sees. Jiang et al., VaDE, 2017
    (https://arxiv.org/abs/1611.05148), with p(k | z) at each draw of z.

    Arguments:
        encoder: a factor that returns q(z | x).
        decoder: a factor that returns p(x | z).
        prior: a module that returns a mixture of normals.

    >>> import torch, pyro_vae as pv
    >>> vae = MixtureVAE.mlp((4,), components=3, latent_dim=2)
    >>> pv.predict(vae, torch.ones(5, 4)).shape
    torch.Size([5, 3])
    """

    def __init__(self, encoder: Factor, decoder: Factor, prior: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder, self.prior = encoder, decoder, prior

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            mixture = self.prior()
            normals = mixture.component_distribution.base_dist
            k = pyro.sample("k", mixture.mixture_distribution, infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(normals.loc[k], normals.scale[k]).to_event(1))
            pyro.sample("x", self.decoder(z), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.encoder(x))

    def template(self, n: int) -> tuple[Tensor]:
        """A batch of n rows of the right shapes; its values mean nothing."""
        return (torch.zeros(n, *self.decoder.shape),)

    @classmethod
    def mlp(cls, data_shape: Shape, components: int = 10, **parts: Any) -> "MixtureVAE":
        """One of multilayer perceptrons; ``parts`` are the other arguments of `VAE.mlp`."""
        return cls._of(VAE.mlp(data_shape, prior=_mixture(components), **parts))

    @classmethod
    def conv(cls, data_shape: Shape, components: int = 10, **parts: Any) -> "MixtureVAE":
        """One of convolutions, for images; ``parts`` are the other arguments of `VAE.conv`."""
        return cls._of(VAE.conv(data_shape, prior=_mixture(components), **parts))

    @classmethod
    def _of(cls, vae: VAE) -> "MixtureVAE":
        return cls(vae.encoder, vae.decoder, vae.prior)


def _mixture(components: int) -> Any:
    return lambda latent_dim: GaussianMixture(latent_dim, components)

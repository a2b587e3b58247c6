"""The mixture variational autoencoder: a latent vector given a discrete component."""

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
    r"""A mixture VAE, which finds clusters: each datum has a component k and a latent vector z.

    :math:`k \sim p(k),\ z \sim N(m_k, \mathrm{diag}(s_k^2)),\ x \sim p(x|z)`, with the guide
    :math:`q(z|x)`. The model sums out k, and the posterior of k is the exact :math:`p(k|z)`. The
    bound equals the bound of `VAE` with the prior `GaussianMixture`. The difference is that k is a
    site, with its own KL, which every tool sees. Jiang et al., VaDE, 2017
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
        """A batch of n rows of the right shapes; the values have no meaning."""
        return (torch.zeros(n, *self.decoder.shape),)

    @classmethod
    def mlp(cls, data_shape: Shape, components: int = 10, **parts: Any) -> "MixtureVAE":
        """A mixture VAE of multilayer perceptrons.

        Arguments:
            data_shape: the shape of one datum.
            components: the number of components.
            parts: the other arguments of `VAE.mlp`.
        """
        return cls._of(VAE.mlp(data_shape, prior=_mixture(components), **parts))

    @classmethod
    def conv(cls, data_shape: Shape, components: int = 10, **parts: Any) -> "MixtureVAE":
        """A mixture VAE of convolutions, for images.

        Arguments:
            data_shape: the shape of one image, (channels, height, width).
            components: the number of components.
            parts: the other arguments of `VAE.conv`.
        """
        return cls._of(VAE.conv(data_shape, prior=_mixture(components), **parts))

    @classmethod
    def _of(cls, vae: VAE) -> "MixtureVAE":
        return cls(vae.encoder, vae.decoder, vae.prior)


def _mixture(components: int) -> Any:
    return lambda latent_dim: GaussianMixture(latent_dim, components)

"""Priors over latents: modules that return p(z | context)."""

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae.errors import UsageError
from pyro_vae.factors import bounded_scale
from pyro_vae.flows import Bijection, CouplingLayer, Flow, Spline, stack


class StandardNormal(PyroModule):
    r"""The prior :math:`p(z) = N(z; 0, I)`, whatever the context.

    >>> StandardNormal(3)().event_shape
    torch.Size([3])
    """

    zero: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.register_buffer("zero", torch.zeros(latent_dim), persistent=False)

    def forward(self, *context: Tensor) -> dist.TorchDistribution:
        return dist.Normal(self.zero, torch.ones_like(self.zero), validate_args=False).to_event(1)


class GaussianMixture(PyroModule):
    r"""A mixture of normals that is learnt with the rest, the component summed out.

    :math:`p(z) = \sum_c \pi_c \prod_j N(z_j; m_{cj}, s_{cj}^2)`, whatever the context.

    Arguments:
        latent_dim: the dimension of z.
        components: how many normals; they start at draws of a standard normal with scale 1.
        low, high: bounds of every :math:`s_{cj}` (see `pyro_vae.factors.bounded_scale`).

    Its KL from a posterior has no closed form and is estimated at the draw.
    Dilokthanakul et al., 2016 (https://arxiv.org/abs/1611.02648), without the discrete site.

    >>> GaussianMixture(3, 5)().event_shape
    torch.Size([3])
    """

    def __init__(
        self, latent_dim: int, components: int = 10, low: float = 1e-2, high: float = 1e2
    ) -> None:
        super().__init__()
        if components < 1:
            raise UsageError(f"components must be 1 or more, {components} came")
        self.latent_dim, self.components, self.low, self.high = latent_dim, components, low, high
        self.logits = nn.Parameter(torch.zeros(components))
        self.means = nn.Parameter(torch.randn(components, latent_dim))
        self.raw_scales = nn.Parameter(torch.zeros(components, latent_dim))

    def forward(self, *context: Tensor) -> dist.TorchDistribution:
        scales = bounded_scale(self.raw_scales, self.low, self.high)
        normals = dist.Normal(self.means, scales, validate_args=False).to_event(1)
        weights = dist.Categorical(logits=self.logits, validate_args=False)
        return dist.MixtureSameFamily(weights, normals, validate_args=False)


class FlowPrior(PyroModule):
    r"""A standard normal bent by invertible layers, learnt with the rest, whatever the context.

    :math:`z = f(\epsilon),\ \epsilon \sim N(0, I)`; it starts as the standard normal.

    Arguments:
        latent_dim: the dimension of z.
        layer: `pyro_vae.CouplingLayer`, which is drawn from and scored in one pass, or
            `pyro_vae.AutoregressiveLayer`, which takes ``latent_dim`` passes to be scored.
        bijection: what a layer does to each coordinate: `pyro_vae.Spline` by default.
        layers: how many.
        hidden: widths of the network of each layer.

    Its KL from a posterior has no closed form and is estimated at the draw.
    Chen et al., Variational Lossy Autoencoder, 2017 (https://arxiv.org/abs/1611.02731).

    >>> FlowPrior(3)().log_prob(torch.zeros(3)).shape
    torch.Size([])
    """

    zero: Tensor

    def __init__(
        self,
        latent_dim: int,
        layer: type[nn.Module] = CouplingLayer,
        bijection: Bijection | None = None,
        layers: int = 4,
        hidden: Sequence[int] = (64,),
    ) -> None:
        super().__init__()
        self.latent_dim, self.layer, self.layers, self.hidden = (
            latent_dim,
            layer,
            layers,
            tuple(hidden),
        )
        self.bijection = bijection or Spline()
        self.flow = stack(layer, layers, latent_dim, 0, hidden, self.bijection)
        self.register_buffer("zero", torch.zeros(latent_dim), persistent=False)

    def forward(self, *context: Tensor) -> dist.TorchDistribution:
        return Flow(self.zero, torch.ones_like(self.zero), self.zero[:0], self.flow)

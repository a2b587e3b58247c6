"""Priors over latents: modules that return p(z | context)."""

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor


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

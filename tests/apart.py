"""A pair whose data have a distribution of your choice."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn


class Apart(nn.Module):
    """Entries that do not depend on the latent, so that their distribution is known."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def template(self, n):
        return (torch.zeros(n, 2),)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            fn = self.fn.expand((*z.shape, 2)).mask(~x.isnan()).to_event(1)
            pyro.sample("x", fn, obs=x.nan_to_num(0.0))

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))

"""A linear-Gaussian pair with a global, a group and a local latent, and its exact posterior.

w ~ N(0, 1),  u_g ~ N(w, 1),  z_i ~ N(u_g(i), 1),  x_i ~ N(z_i, s)
"""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

NOISE = 1.5


class Nested(nn.Module):
    """The guide is q(w) prod_g q(u_g) prod_i q(z_i | x_i, u), with the exact q(z | x, u).

    Arguments:
        groups: the number of groups.
        stretch: the factor of the standard deviation of q(z | x, u).
    """

    def __init__(self, groups=2, stretch=1.0):
        super().__init__()
        self.groups, self.stretch = groups, stretch
        self.loc = nn.Parameter(torch.zeros(1 + groups).double())
        self.log_scale = nn.Parameter(torch.zeros(1 + groups).double())

    def model(self, x, g):
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("groups", self.groups, dim=-1):
            u = pyro.sample("u", dist.Normal(w, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(u[..., g], 1.0))
            pyro.sample("x", dist.Normal(z[..., None], NOISE).to_event(1), obs=x)

    def guide(self, x, g):
        scale = self.log_scale.exp()
        pyro.sample("w", dist.Normal(self.loc[0], scale[0]))
        with pyro.plate("groups", self.groups, dim=-1):
            u = pyro.sample("u", dist.Normal(self.loc[1:], scale[1:]))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(*self.local(x, u[..., g])))

    def local(self, x, u):
        """The exact mean of z given x and u, and its standard deviation times ``stretch``."""
        share = 1 / (1 + NOISE**2)
        return share * x[:, 0] + (1 - share) * u, self.stretch * (1 - share) ** 0.5

    def template(self, n):
        return torch.zeros(n, 1).double(), torch.arange(n) % self.groups

    def exact(self, x, g):
        """The mean and the covariance of (w, u_1, ...) given x, and log p(x) of all data."""
        noise = 1 + NOISE**2
        prior = torch.ones(1 + self.groups, 1 + self.groups).double()
        prior[1:, 1:] += torch.eye(self.groups).double()
        design = nn.functional.one_hot(g + 1, 1 + self.groups).double()
        covariance = torch.linalg.inv(torch.linalg.inv(prior) + design.T @ design / noise)
        mean = covariance @ design.T @ x[:, 0] / noise
        marginal = design @ prior @ design.T + noise * torch.eye(len(x)).double()
        normal = torch.distributions.MultivariateNormal(torch.zeros(len(x)).double(), marginal)
        return mean, covariance, normal.log_prob(x[:, 0])

    def set(self, x, g, shift=0.0, stretch=1.0):
        """Give the guide the exact marginals, shifted and stretched by posterior sds."""
        mean, covariance, _ = self.exact(x, g)
        scale = covariance.diagonal().sqrt()
        with torch.no_grad():
            self.loc.copy_(mean + shift * scale)
            self.log_scale.copy_((stretch * scale).log())
        return self


class Amortized(Nested):
    """The guide draws w and u from their exact posterior, computed from the rows (amortized).

    Arguments:
        spread: the factor of their standard deviations.
    """

    def __init__(self, groups=2, spread=1.0):
        super().__init__(groups)
        self.spread = spread

    def guide(self, x, g):
        mean, covariance, _ = self.exact(x, g)
        root = torch.linalg.cholesky(covariance) * self.spread
        w = pyro.sample("w", dist.Normal(mean[0], root[0, 0]))
        off = (w - mean[0]) / root[0, 0]
        precision = torch.linalg.inv(covariance[1:, 1:] - root[1:, :1] @ root[1:, :1].T)
        scale = self.spread * precision.diagonal().rsqrt()  # given w, groups are independent
        with pyro.plate("groups", self.groups, dim=-1):
            u = pyro.sample("u", dist.Normal(mean[1:] + root[1:, 0] * off, scale))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(*self.local(x, u[..., g])))


def data(n=12, groups=2, seed=0):
    """Rows x (n, 1) of the model with w = 1, and their groups g (n,)."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.arange(n) % groups
    u = 1 + torch.randn(groups, generator=generator).double()
    noise = torch.randn(n, generator=generator).double() * (1 + NOISE**2) ** 0.5
    return (u[g] + noise)[:, None], g


class Means(nn.Module):
    """w ~ N(0, 1) for each column and x_i ~ N(w, 2), with the exact guide of these data."""

    def __init__(self, x):
        super().__init__()
        self.register_buffer("scale", torch.tensor((1 + len(x) / 4) ** -0.5))
        self.register_buffer("loc", self.scale**2 * x.sum(0) / 4)

    def model(self, x):
        w = pyro.sample("w", dist.Normal(torch.zeros_like(self.loc), 1.0).to_event(1))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(w, 2.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.sample("w", dist.Normal(self.loc, self.scale).to_event(1))


def drawn(means, n=40):
    return torch.tensor(means) + 2 * torch.randn(n, len(means))

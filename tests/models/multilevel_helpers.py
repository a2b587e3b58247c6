"""Linear-Gaussian random effects as a MultilevelVAE: log p of a group and posteriors are known.

u ~ N(0, I),  z_i | u ~ N(W u + b, s^2 I),  x_i | z_i ~ N(A z_i + a, t^2 I)
"""

import pyro.distributions as dist
import torch
from torch import nn

import pyro_vae as pv

S, T = 0.7, 0.5


def linear(weight, bias):
    network = pv.MLP(weight.shape[1], (), weight.shape[0]).double()
    network.layers[0].weight.data, network.layers[0].bias.data = weight.clone(), bias.clone()
    return network


class ExactGroup(nn.Module):
    """q(u | group): the exact posterior, its standard deviations times ``spread``."""

    def __init__(self, effects, spread):
        super().__init__()
        self.effects, self.spread = [effects], spread  # in a list: not a part of the pair

    def forward(self, x, counts):
        mean, covariance = self.effects[0].posterior_u(x, counts)
        return dist.MultivariateNormal(mean, self.spread**2 * covariance)


class ExactMember(nn.Module):
    """q(z | x, u): the exact posterior, its standard deviations times ``spread``."""

    def __init__(self, effects, spread):
        super().__init__()
        self.effects, self.spread = [effects], spread

    def forward(self, x, u):
        e = self.effects[0]
        precision = torch.eye(len(e.W)).double() / S**2 + e.A.T @ e.A / T**2
        mean = (u @ e.W.T + e.b) / S**2 + (x - e.a) @ e.A / T**2
        covariance = torch.linalg.inv(precision)
        return dist.MultivariateNormal(mean @ covariance, self.spread**2 * covariance)


class Effects:
    """Known parameters, and what follows from them in closed form."""

    def __init__(self, group_dim=2, latent_dim=2, data_dim=3):
        generator = torch.Generator().manual_seed(4)

        def draw(*shape):
            return torch.randn(*shape, generator=generator).double()

        self.W, self.b = draw(latent_dim, group_dim), draw(latent_dim)
        self.A, self.a = draw(data_dim, latent_dim), draw(data_dim)
        self.B = self.A @ self.W  # the mean of x_i is B u + c, its covariance given u is C
        self.c = self.A @ self.b + self.a
        self.C = S**2 * self.A @ self.A.T + T**2 * torch.eye(data_dim).double()

    def pair(self, spread=1.0, members=5):
        """The pair with these parameters; its guide is exact if ``spread`` is 1."""
        decoder = pv.Factor(linear(self.A, self.a), pv.Gaussian(T), (len(self.A),))
        transition = pv.Factor(linear(self.W, self.b), pv.Gaussian(S), (len(self.W),))
        encoder, group_encoder = ExactMember(self, spread), ExactGroup(self, spread)
        prior = pv.StandardNormal(self.W.shape[1])
        pair = pv.MultilevelVAE(encoder, decoder, transition, group_encoder, prior, members)
        return pair.double()

    def posterior_u(self, x, counts):
        """The mean (groups, D) and the covariance (groups, D, D) of u given a group."""
        n = counts.sum(-1).double()[:, None, None]
        weighted = torch.linalg.solve(self.C, self.B)  # C^-1 B
        precision = torch.eye(self.W.shape[1]).double() + n * (self.B.T @ weighted)
        covariance = torch.linalg.inv(precision)
        total = torch.where(counts[..., None], x - self.c, 0.0).sum(-2)
        return (covariance @ (total @ weighted)[..., None])[..., 0], covariance

    def log_p(self, rows):
        """log p(x) of one group of rows (n, d): a normal of n * d dimensions."""
        n = len(rows)
        between = torch.kron(torch.ones(n, n).double(), self.B @ self.B.T)
        covariance = between + torch.kron(torch.eye(n).double(), self.C)
        return dist.MultivariateNormal(self.c.repeat(n), covariance).log_prob(rows.flatten())

    def groups(self, sizes, seed=0):
        """Draws of groups of these sizes, as rows in random order, with their ids."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator).double()

        ids = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        ids = ids[torch.randperm(len(ids), generator=generator)]
        u = draw(len(sizes), self.W.shape[1])[ids]
        z = u @ self.W.T + self.b + S * draw(len(ids), len(self.W))
        return z @ self.A.T + self.a + T * draw(len(ids), len(self.A)), ids

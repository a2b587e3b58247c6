"""What the tests of the objectives share."""

from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import nn
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae.pairs.rng import seeded


class LinearGaussian(nn.Module):
    """z ~ N(0, I), x | z ~ N(W z + b, s^2 I), and a guide N(A x + c, diag t^2) that is not exact.

    The likelihood does not depend on the last unit of z.
    """

    def __init__(self, latent_dim=3, data_dim=4):
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        weight = torch.randn(data_dim, latent_dim, generator=draw, dtype=torch.float64)
        weight[:, -1] = 0
        self.weight, self.noise = nn.Parameter(weight), 0.8
        self.bias = nn.Parameter(torch.randn(data_dim, generator=draw, dtype=torch.float64))
        slope = 0.2 * torch.randn(latent_dim, data_dim, generator=draw, dtype=torch.float64)
        self.slope = nn.Parameter(slope)
        self.offset = nn.Parameter(torch.full((latent_dim,), 0.1, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.linspace(-0.5, 0.1, latent_dim, dtype=torch.float64))

    def prior(self):
        return dist.Normal(torch.zeros_like(self.offset), 1.0).to_event(1)

    def decoder(self, z):
        return dist.Normal(z @ self.weight.T + self.bias, self.noise).to_event(1)

    def encoder(self, x):
        return dist.Normal(x @ self.slope.T + self.offset, self.log_scale.exp()).to_event(1)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.decoder(z), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.encoder(x))

    def log_likelihood(self, x):
        """The exact log p(x) of each datum."""
        noise = self.noise**2 * torch.eye(len(self.bias), dtype=torch.float64)
        covariance = self.weight @ self.weight.T + noise
        return dist.MultivariateNormal(self.bias, covariance).log_prob(x)

    def expectations(self, x):
        """The exact E_q[log p(x|z)] and KL of each datum."""
        q = self.encoder(x)
        spread = (self.weight.square() * self.log_scale.exp().square()).sum()
        reconstruction = self.decoder(q.mean).log_prob(x) - spread / (2 * self.noise**2)
        return reconstruction, kl_divergence(q.base_dist, self.prior().base_dist).sum(-1)

    def make_exact(self):
        """Give W orthogonal columns, so that the posterior is diagonal, and make it the guide."""
        with torch.no_grad():
            columns = torch.linalg.qr(self.weight[:, :-1]).Q
            self.weight[:, :-1] = columns * torch.tensor([1.5, 0.7], dtype=torch.float64)
            precision = 1 + self.weight.square().sum(0) / self.noise**2
            self.slope.copy_(self.weight.T / self.noise**2 / precision[:, None])
            self.offset.copy_(-self.slope @ self.bias)
            self.log_scale.copy_(-precision.log() / 2)


class Plated(nn.Module):
    """A local latent z, and below it one w for each of the three items of a datum."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(self.loc), 1.0))
            with pyro.plate("items", 3, dim=-2):
                w = pyro.sample("w", dist.Normal(z, 1.0))
                pyro.sample("x", dist.Normal(w, 1.0), obs=x.T)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(self.loc, 1.3))
            with pyro.plate("items", 3, dim=-2):
                pyro.sample("w", dist.Normal(self.loc + z, 0.7))


def mlp():
    """A small Bernoulli VAE and data for it."""
    with seeded(3):
        pair = pv.VAE.mlp((2, 3), latent_dim=2, hidden=(8,)).double()
        return pair, torch.rand(5, 2, 3, dtype=torch.float64).round()


def linear(n=6):
    """The linear-Gaussian pair and data drawn from it."""
    pair = LinearGaussian()
    with seeded(4), torch.no_grad():
        return pair, pair.decoder(pair.prior().sample((n,))).sample()


def plated():
    with seeded(5):
        return Plated(), torch.randn(5, 3, dtype=torch.float64)


PAIRS = {"mlp": mlp, "linear": linear}


def around(handler, pair):
    """A pair of programs: model and guide inside a handler."""
    return SimpleNamespace(model=handler(pair.model), guide=handler(pair.guide))


def run(pair, x, objective, seed=0):
    """The loss of an objective under a seed, as a tensor."""
    with seeded(seed):
        return objective.differentiable_loss(pair.model, pair.guide, x)


def watched(pair, x, objective, names=("z",), seed=0):
    """The loss under a seed, and every set of draws of these latents that was made for it."""
    seen = []

    def guide(*batch):
        with poutine.trace() as tracer:
            pair.guide(*batch)
        seen.append([tracer.trace.nodes[name]["value"] for name in names])

    return run(SimpleNamespace(model=pair.model, guide=guide), x, objective, seed), seen


def by_hand(pair, x, z):
    """log p(x|z) and log q(z|x) - log p(z), of shape (..., batch), from the factors alone."""
    log_ratio = pair.encoder(x).log_prob(z) - pair.prior().log_prob(z)
    return pair.decoder(z).log_prob(x), log_ratio


def closed_kl(pair, x):
    """The KL of each unit, of shape (batch, latent_dim)."""
    return kl_divergence(pair.encoder(x).base_dist, pair.prior().base_dist)


def gradients(loss, parameters):
    return torch.autograd.grad(
        loss, list(parameters), retain_graph=True, allow_unused=True, materialize_grads=True
    )


def assert_same(found, expected, pair):
    """Assert that two losses agree, and their gradients for every parameter."""
    torch.testing.assert_close(found, expected)
    assert any(bool((slope != 0).any()) for slope in gradients(found, pair.parameters()))
    torch.testing.assert_close(
        gradients(found, pair.parameters()), gradients(expected, pair.parameters())
    )


def discrete_latent():
    """A coin for each datum."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            coin = pyro.sample("coin", dist.Bernoulli(0.5))
            pyro.sample(
                "x", dist.Normal(coin[..., None].expand(*coin.shape, 4), 1.0).to_event(1), obs=x
            )

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("coin", dist.Bernoulli(0.4))

    return SimpleNamespace(model=model, guide=guide)

"""Pairs with masks, and rows for them, for the tests of masks."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import nn

from pyro_vae.models.exact import linear_gaussian

WIDTH, LATENT = 6, 2


def holes(n, share=0.4, seed=0):
    """Rows of the linear-Gaussian pair and which of their entries are seen; the first row whole,
    the last without any."""
    pair, generator = linear_gaussian(), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    x = pair.marginal().sample((n,)).detach()
    seen = torch.rand(n, WIDTH, generator=generator) > share
    seen[0], seen[-1] = True, False
    return torch.where(seen, x, torch.zeros(())), seen


class Holes(nn.Module):
    """x | z ~ N(W z + b, s^2 I) of which some entries are seen; its guide is exact, widened."""

    def __init__(self, spread=1.2):
        super().__init__()
        self.exact, self.spread = linear_gaussian(), spread

    def posterior(self, x, seen):
        """The mean and covariance of each row's z given what is seen."""
        w, s = self.exact.weight, self.exact.noise
        precision = torch.einsum("nj,ja,jb->nab", seen.double(), w, w) / s**2
        covariance = torch.linalg.inv(precision + torch.eye(LATENT).double())
        off = torch.where(seen, x - self.exact.bias, 0.0)
        return torch.einsum("nab,jb,nj->na", covariance, w, off) / s**2, covariance

    def log_p(self, x, seen):
        """log p of what is seen of each row, (n,)."""
        whole, found = self.exact.marginal(), []
        for row, m in zip(x, seen, strict=True):
            part = dist.MultivariateNormal(whole.loc[m], whole.covariance_matrix[m][:, m])
            found.append(part.log_prob(row[m]) if m.any() else torch.zeros(()).double())
        return torch.stack(found).detach()

    def likelihood(self, z):
        return dist.Normal(z @ self.exact.weight.T + self.exact.bias, self.exact.noise)

    def prior(self, x):
        return dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1)

    def model(self, x, seen):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior(x))
            pyro.sample("x", self.likelihood(z).mask(seen).to_event(1), obs=x)

    def guide(self, x, seen):
        loc, covariance = self.posterior(x, seen)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(loc, self.spread**2 * covariance))

    def template(self, n):
        return torch.zeros(n, WIDTH).double(), torch.ones(n, WIDTH, dtype=torch.bool)


class Imputed(nn.Module):
    """z ~ N(0, 1), x | z ~ N(z, 1), seen in some rows, by obs_mask; the guide has the rest."""

    def __init__(self, masked=True):
        super().__init__()
        self.masked, self.shift = masked, nn.Parameter(torch.zeros(()).double())

    def model(self, x, seen):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + self.shift, 1.0), obs=x, obs_mask=seen)

    def guide(self, x, seen):
        with pyro.plate("data", len(x), dim=-1):
            q = dist.Normal(0.5 * x * seen, torch.where(seen, 0.5**0.5, 1.0))
            z = pyro.sample("z", q)
            self.impute(z, seen)

    def impute(self, z, seen):
        with poutine.mask(mask=~seen if self.masked else True):
            pyro.sample("x_unobserved", dist.Normal(z + self.shift + 0.3, 1.1))

    def log_p(self, x, seen):
        return torch.where(seen, dist.Normal(0.0, 2**0.5).log_prob(x), 0.0)

    def template(self, n):
        return torch.zeros(n).double(), torch.ones(n, dtype=torch.bool)


def imputed_rows(n=40):
    torch.manual_seed(3)
    seen = torch.rand(n) > 0.4
    seen[:3] = True  # the first rows do not give it away
    return torch.randn(n).double() * 2**0.5 * seen, seen


class Latent(nn.Module):
    """Two latents z ~ N(0, 1), each seen through its own x ~ N(z, 1), and any masks around z."""

    def __init__(self, model_mask=None, guide_mask=None, x_masked=True, events=False):
        super().__init__()
        self.masks, self.x_masked, self.events = (model_mask, guide_mask), x_masked, events
        self.shift = nn.Parameter(torch.zeros(()).double())

    def latent(self, which, fn, live):
        """z under its mask: as an event of elements that are masked, or as a masked row."""
        mask = self.masks[which]
        if mask is None:
            return pyro.sample("z", fn.to_event(1))
        mask = mask(live)
        if self.events:
            return pyro.sample("z", fn.mask(mask).to_event(1))
        with poutine.mask(mask=mask):
            return pyro.sample("z", fn.to_event(1))

    def model(self, x, live):
        with pyro.plate("data", len(x), dim=-1):
            z = self.latent(0, dist.Normal(torch.zeros_like(x), 1.0), live)
            q = dist.Normal(z + self.shift, 1.0)
            pyro.sample("x", q.mask(live if self.x_masked else True).to_event(1), obs=x)

    def guide(self, x, live):
        with pyro.plate("data", len(x), dim=-1):
            self.latent(1, dist.Normal(0.5 * x + 0.2, 0.8).expand(x.shape), live)

    def log_p(self, x, live):
        return (dist.Normal(0.0, 2**0.5).log_prob(x) * live).sum(-1)

    def kl(self, live):
        """The KL of each unit, where the mean of x is 0."""
        return live.double()

    def template(self, n):
        return torch.zeros(n, 2).double(), torch.ones(n, 2, dtype=torch.bool)


def ragged(n=30):
    """Two steps for most rows, one for some, the last without any."""
    torch.manual_seed(5)
    live = torch.tensor([[True, True], [True, False]])[torch.arange(n) % 3 // 2]
    live[-1] = False
    return torch.randn(n, 2).double() * 2**0.5, live


def same(live):
    return live

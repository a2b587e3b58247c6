"""The linear-Gaussian pair on rows with missing entries, whose posterior is known."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.models.exact import linear_gaussian
from pyro_vae.parts.missing import PartlyObserved

WIDTH, LATENT = 6, 2


class Holes(nn.Module):
    """The linear-Gaussian pair on rows with NaN; its guide is exact, widened."""

    def __init__(self, spread=1.2):
        super().__init__()
        self.exact, self.spread = linear_gaussian(), spread

    def model(self, x: Tensor) -> None:
        exact = self.exact
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            fn = dist.Normal(z @ exact.weight.T + exact.bias, exact.noise)
            pyro.sample("x", PartlyObserved(fn).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        w, s, seen = self.exact.weight, self.exact.noise, ~x.isnan()
        precision = torch.einsum("nj,ja,jb->nab", seen.double(), w, w) / s**2
        covariance = torch.linalg.inv(precision + torch.eye(LATENT).double())
        off = torch.where(seen, x - self.exact.bias, 0.0)
        loc = torch.einsum("nab,jb,nj->na", covariance, w, off) / s**2
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(loc, self.spread**2 * covariance))

    def template(self, n):
        return (torch.zeros(n, WIDTH).double(),)

    def marginal(self):
        whole = self.exact.marginal()
        return whole.loc.detach(), whole.covariance_matrix.detach()

    def missing(self, row):
        """The exact mean and covariance of the missing entries of a row given the others."""
        loc, covariance = self.marginal()
        m = ~row.isnan()
        gain = covariance[~m][:, m] @ torch.linalg.inv(covariance[m][:, m])
        rest = covariance[~m][:, ~m] - gain @ covariance[m][:, ~m]
        return loc[~m] + gain @ (row[m] - loc[m]), rest

    def log_p(self, row):
        """The exact log p of the observed entries of a row."""
        loc, covariance = self.marginal()
        m = ~row.isnan()
        return dist.MultivariateNormal(loc[m], covariance[m][:, m]).log_prob(row[m])


def rows(n=12, share=0.4):
    torch.manual_seed(0)
    x = Holes().exact.marginal().sample((n,)).detach()
    holes = torch.rand(n, WIDTH) < share
    holes[0], holes[1:, 0], holes[1:, 1] = False, False, True
    return torch.where(holes, torch.nan, x)


class Enumerated(nn.Module):
    """Two classes, summed out, and a missing entry."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            y = pyro.sample("y", dist.Bernoulli(x.new_full((len(x),), 0.3)))
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            fn = dist.Normal((y + z)[..., None].expand(*(y + z).shape, 2), 1.0)
            pyro.sample("x", fn.mask(~x.isnan()).to_event(1), obs=x.nan_to_num())

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            fn = dist.Bernoulli(x.new_full((len(x),), 0.4))
            pyro.sample("y", fn, infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))

"""Weights of draws where the guide enumerates a class on which another latent depends."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_vae as pv


class Classes(nn.Module):
    """y ~ Bernoulli(0.4), z ~ N(3y, 1), x_j ~ N(z, 1); the guide of y knows nothing."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            y = pyro.sample("y", dist.Bernoulli(x.new_tensor(0.4)))
            z = pyro.sample("z", dist.Normal(3 * y, 1.0))
            fn = dist.Normal(z[..., None] + x.new_zeros(2), 1.0).mask(~x.isnan())
            pyro.sample("x", fn.to_event(1), obs=x.nan_to_num(0.0))

    def guide(self, x):
        known = ~x.isnan()
        precision = 1 + known.sum(-1)
        with pyro.plate("data", len(x), dim=-1):
            marked = {"enumerate": "parallel"}
            y = pyro.sample("y", dist.Bernoulli(x.new_tensor(0.5)), infer=marked)
            mean = (3 * y + x.nan_to_num(0.0).sum(-1)) / precision
            pyro.sample("z", dist.Normal(mean, 1.2 * precision**-0.5))

    def log_p(self, x, y):
        """log p(x, y) by class, with z integrated out."""
        n = x.shape[1]
        covariance = torch.eye(n).double() + torch.ones(n, n).double()
        center = torch.full((n,), 3.0 * y).double()
        prior = torch.tensor((0.6, 0.4)[y]).log()
        return dist.MultivariateNormal(center, covariance).log_prob(x) + prior

    def log_marginal(self, x):
        return torch.logaddexp(self.log_p(x, 0), self.log_p(x, 1))


def data(n=20):
    return 2 * torch.randn(n, 2, generator=torch.Generator().manual_seed(0)).double() + 1


def test_score_is_log_p_of_rows_and_entries():
    pair, x = Classes(), data()
    found = pv.score(pair, x, num_samples=16_000)
    assert (found.log_likelihood - pair.log_marginal(x)).abs().max() < 0.15
    others = torch.stack([pair.log_marginal(x[:, [1]]), pair.log_marginal(x[:, [0]])], 1)
    off = (found.by_entry - (pair.log_marginal(x)[:, None] - others)).abs()
    assert off[found.entry_pareto_k < 0.5].max() < 0.2
    assert off[found.entry_pareto_k < 0.7].mean() < 0.03


def test_an_entry_is_imputed_by_its_conditional_mean():
    pair, x = Classes(), data()
    held = x.clone()
    held[:, 1] = torch.nan
    known = x[:, [0]]
    share = (pair.log_p(known, 1) - pair.log_marginal(known)).exp()
    want = (x[:, 0] + 3 * share) / 2
    filled = pv.impute(pair, held, num_samples=4000)
    assert (filled.mean[:, 1] - want).abs().max() < 0.15

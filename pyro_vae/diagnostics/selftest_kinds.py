"""Checks of `selftest` for other kinds of latents: constrained, heavy-tailed, and mixed ones."""

from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.diagnostics.local_calibration import local_calibration
from pyro_vae.diagnostics.selftest_checks import EXACT, Check, check_of
from pyro_vae.inference.annealing import anneal
from pyro_vae.inference.encoding import predict
from pyro_vae.inference.importance import log_likelihood
from pyro_vae.inference.scoring import score


class GammaCounts(nn.Module):
    """A rate z ~ Gamma(4, 2) and counts x ~ Poisson(z), whose posterior is Gamma(4 + x, 3).

    The guide has half of the concentration and of the rate: the right mean, and twice the variance.
    """

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Gamma(x.new_tensor(4.0), 2.0))
            pyro.sample("x", dist.Poisson(z), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Gamma((4 + x) / 2, 1.5))

    @staticmethod
    def log_p(x: Tensor) -> Tensor:
        """The density of a gamma-Poisson mixture."""
        return dist.GammaPoisson(torch.tensor(4.0).to(x), torch.tensor(2.0).to(x)).log_prob(x)


class HeavyTail(nn.Module):
    """A correlated Student-t latent with 5 degrees of freedom, whose posterior is its prior.

    The guide has 3 degrees of freedom, or is a narrow normal: then its weights have no variance.
    """

    factor: Tensor

    def __init__(self, normal: bool) -> None:
        super().__init__()
        self.normal = normal
        factor = torch.tensor([[1.0, 0.0], [0.8, 0.6]], dtype=torch.float64)
        self.register_buffer("factor", factor)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            loc = x.new_zeros(2)
            pyro.sample("z", dist.MultivariateStudentT(x.new_tensor(5.0), loc, self.factor))
            pyro.sample("x", dist.Normal(x.new_zeros(()), 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        loc, three = x.new_zeros(len(x), 2), x.new_tensor(3.0)
        q = dist.MultivariateStudentT(three, loc, self.factor)
        if self.normal:
            q = dist.MultivariateNormal(loc, scale_tril=0.4 * self.factor)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", q)


class ClassAndPlace(nn.Module):
    """A class y, a place z given y, and two values given z; the guide sums y out.

    The guide of y is even, and that of z is 1.2 times as wide as the posterior.
    """

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            y = pyro.sample("y", dist.Bernoulli(x.new_tensor(0.4)))
            z = pyro.sample("z", dist.Normal(3 * y, 1.0))
            pyro.sample("x", dist.Normal(z[..., None] + x.new_zeros(2), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            even = dist.Bernoulli(x.new_tensor(0.5))
            y = pyro.sample("y", even, infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal((3 * y + x.sum(-1)) / 3, 1.2 / 3**0.5))

    @staticmethod
    def log_p(x: Tensor) -> Tensor:
        """log p(x), a mixture of two normals."""
        covariance = torch.eye(2).to(x) + 1
        parts = [
            dist.MultivariateNormal(torch.full((2,), 3.0 * y).to(x), covariance).log_prob(x)
            + torch.tensor((0.6, 0.4)[y]).log()
            for y in (0, 1)
        ]
        return torch.logaddexp(*parts)


_ANNEALED: dict[str, Any] = {
    "num_temperatures": 20,
    "num_chains": 50,
    "leapfrog_steps": 3,
    "engine": "eager",
    "progress": False,
}


def constrained_checks() -> Iterator[Check]:
    x = torch.arange(8, dtype=torch.float64)
    pair, log_p = GammaCounts(), GammaCounts.log_p(x)
    found = log_likelihood(pair, x, num_samples=5000)
    errors = 5 * found.standard_errors
    yield check_of("log p(x), a positive latent", found.per_datum, log_p, errors)
    annealed = anneal(pair, x, **_ANNEALED)
    errors = 5 * annealed.standard_errors
    yield check_of("annealing, a positive latent", annealed.per_datum, log_p, errors)
    local = local_calibration(pair, x, num_samples=4000, progress=False)
    errors = 5 * local.log_scale_errors
    truth = torch.tensor(0.5).log() / -2
    yield check_of("scale of the guide, a positive latent", local.log_scale, truth, errors)
    yield check_of(
        "shift of the guide, a positive latent", local.shift, 0.0, 5 * local.shift_errors
    )


def heavy_tail_checks() -> Iterator[Check]:
    x = torch.linspace(-1, 1, 3, dtype=torch.float64)
    log_p = dist.Normal(0.0, 1.0).log_prob(x)
    found = log_likelihood(HeavyTail(False), x, num_samples=5000)
    yield check_of("log p(x), a heavy tail", found.per_datum, log_p, 5 * found.standard_errors)
    unsafe = log_likelihood(HeavyTail(True), x, num_samples=5000)
    over = (unsafe.pareto_k > unsafe.k_threshold).double()
    yield check_of("a normal guide of a heavy tail is named", over, 1.0, EXACT)
    annealed = anneal(HeavyTail(False), x, **_ANNEALED)
    slack = 5 * annealed.standard_errors
    yield check_of("annealing, a heavy tail", annealed.per_datum, log_p, slack)


def mixed_checks() -> Iterator[Check]:
    x = 2 * torch.randn(20, 2, dtype=torch.float64) + 1
    pair, log_p = ClassAndPlace(), ClassAndPlace.log_p(x)
    found = log_likelihood(pair, x, num_samples=4000)
    yield check_of(
        "log p(x), a class and a place", found.per_datum, log_p, 5 * found.standard_errors
    )
    scored = score(pair, x, num_samples=4000).log_likelihood
    yield check_of("log p(x) of score, a class and a place", scored.mean(), log_p.mean(), 0.05)
    yield check_of("probabilities of a class of the guide", predict(pair, x, site="y"), 0.5, EXACT)

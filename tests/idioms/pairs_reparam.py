"""Idioms with reparametrized effects of groups: the effects become deterministic."""

import pyro
import pyro.distributions as dist
import torch
from idiom import NO_LOCAL, SHARED, Idiom, integral
from pairs_global import Grouped, grouped
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from torch import Tensor
from torch.nn.functional import softplus


class Noncentered(Grouped):
    """A standardized effect of each group."""

    mean, spread = 0.5, 1.5

    def model(self, x: Tensor, group: Tensor) -> None:
        standard = pyro.poutine.reparam(config={"u": LocScaleReparam(0.0)})
        with standard, pyro.plate("groups", self.groups):
            u = pyro.sample("u", dist.Normal(self.mean, self.spread))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(u[..., group], 1.0), obs=x)

    def guide(self, x: Tensor, group: Tensor) -> None:
        pyro.module("pair", self)
        with pyro.plate("groups", self.groups):
            pyro.sample("u_decentered", dist.Normal(self.loc, softplus(self.raw)))

    def log_p(self, x: Tensor, group: Tensor) -> Tensor:
        loc = self.mean + self.spread * self.loc
        scale = (1 + (self.spread * softplus(self.raw)).square()).sqrt()
        return dist.Normal(loc[group], scale[group]).log_prob(x)


class Transformed(Grouped):
    """A positive effect of each group; the latent is the base of its distribution."""

    def model(self, x: Tensor, group: Tensor) -> None:
        by_base = pyro.poutine.reparam(config={"u": TransformReparam()})
        with pyro.plate("groups", self.groups), by_base:
            u = pyro.sample("u", dist.LogNormal(0.5, 0.4))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(u[..., group], 1.0), obs=x)

    def guide(self, x: Tensor, group: Tensor) -> None:
        pyro.module("pair", self)
        with pyro.plate("groups", self.groups):
            pyro.sample("u_base", dist.Normal(self.loc, softplus(self.raw)))

    def log_p(self, x: Tensor, group: Tensor) -> Tensor:
        line = torch.linspace(-12, 12, 2401).to(x)
        q = dist.Normal(self.loc, softplus(self.raw)).log_prob(line[:, None])
        return integral(q[:, group] + dist.Normal(line.exp()[:, None], 1.0).log_prob(x), 0.01)


REFUSED = NO_LOCAL | SHARED
IDIOMS = [
    Idiom("`LocScaleReparam` of effects of groups", Noncentered, grouped, refuses=REFUSED),
    Idiom("`TransformReparam` of effects of groups", Transformed, grouped, refuses=REFUSED),
]

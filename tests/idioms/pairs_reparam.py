"""Idioms with reparametrized effects of groups: the effects become deterministic."""

from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from idiom import NO_LOCAL, SHARED, Idiom, integral
from pairs_global import Grouped, grouped
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from torch import Tensor
from torch.nn.functional import softplus


class Reparametrized(Grouped):
    """An effect of each group, which Pyro computes from another latent."""

    effect: ClassVar[dist.TorchDistribution]
    reparam: ClassVar[Any]
    latent: ClassVar[str]

    def model(self, x: Tensor, group: Tensor) -> None:
        changed = pyro.poutine.reparam(config={"u": self.reparam})
        with changed, pyro.plate("groups", self.groups):
            u = pyro.sample("u", self.effect)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(u[..., group], 1.0), obs=x)

    def guide(self, x: Tensor, group: Tensor) -> None:
        pyro.module("pair", self)
        with pyro.plate("groups", self.groups):
            pyro.sample(self.latent, dist.Normal(self.loc, softplus(self.raw)))


class Noncentered(Reparametrized):
    """A standardized effect of each group."""

    effect, reparam, latent = dist.Normal(0.5, 1.5), LocScaleReparam(0.0), "u_decentered"

    def log_p(self, x: Tensor, group: Tensor) -> Tensor:
        loc, scale = 0.5 + 1.5 * self.loc, (1 + (1.5 * softplus(self.raw)).square()).sqrt()
        return dist.Normal(loc[group], scale[group]).log_prob(x)


class Transformed(Reparametrized):
    """A positive effect of each group; the latent is the base of its distribution."""

    effect, reparam, latent = dist.LogNormal(0.5, 0.4), TransformReparam(), "u_base"

    def log_p(self, x: Tensor, group: Tensor) -> Tensor:
        line = torch.linspace(-12, 12, 2401).to(x)
        q = dist.Normal(self.loc, softplus(self.raw)).log_prob(line[:, None])
        return integral(q[:, group] + dist.Normal(line.exp()[:, None], 1.0).log_prob(x), 0.01)


REFUSED = NO_LOCAL | SHARED
IDIOMS = [
    Idiom("`LocScaleReparam` of effects of groups", Noncentered, grouped, refuses=REFUSED),
    Idiom("`TransformReparam` of effects of groups", Transformed, grouped, refuses=REFUSED),
]

"""Idioms with latents of all data or of groups: AutoGuides, PyroSample, plates of groups."""

from collections.abc import Callable
from functools import partial
from math import pi

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from idiom import (
    NO_LOCAL,
    SHARED,
    Batch,
    Idiom,
    Refusal,
    everywhere,
    integral,
    rows,
)
from pairs_local import LINE, STEP
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoDiscreteParallel,
    AutoGuideList,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
    AutoStructured,
)
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.nn.functional import softplus

DESIGN = torch.tensor([[1.0, 0.5], [0.3, -1.0]])


def hermite(number: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Points and log weights of an expectation under a standard normal."""
    points, weights = np.polynomial.hermite_e.hermegauss(number)
    logs = np.log(weights) - 0.5 * np.log(2 * pi)
    return torch.from_numpy(points).to(x), torch.from_numpy(logs).to(x)


class Linear(nn.Module):
    """x is N(A w, I), with two global coefficients w under an AutoGuide of this class."""

    auto: Callable[..., nn.Module] = AutoDiagonalNormal

    def __init__(self) -> None:
        super().__init__()
        self.guide = type(self).auto(self.model)

    def model(self, x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w @ DESIGN.to(x), 1.0).to_event(1), obs=x)

    def template(self, n: int) -> Batch:
        return (torch.zeros(n, 2),)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance of q(w)."""
        q = self.guide.get_posterior()
        covariance = getattr(q, "covariance_matrix", None)
        return q.mean, q.variance.diag_embed() if covariance is None else covariance

    def log_p(self, x: Tensor) -> Tensor:
        mean, covariance = self.moments()
        design = DESIGN.to(x)
        spread = design.mT @ covariance @ design + torch.eye(2, dtype=x.dtype)
        return dist.MultivariateNormal(mean @ design, spread).log_prob(x)


class Correlated(Linear):
    auto = AutoMultivariateNormal


class LowRank(Linear):
    auto = AutoLowRankMultivariateNormal


class Means(Linear):
    auto = AutoNormal

    def moments(self) -> tuple[Tensor, Tensor]:
        return self.guide.locs.w, self.guide.scales.w.square().diag_embed()


class Point(Linear):
    auto = AutoDelta

    def moments(self) -> tuple[Tensor, Tensor]:
        point = self.guide.median()["w"]
        return point, torch.zeros(2, 2).to(point)


class Laplace(Point):
    """The guide is a point until the user calls ``laplace_approximation``."""

    auto = AutoLaplaceApproximation

    def moments(self) -> tuple[Tensor, Tensor]:
        return self.guide.loc, torch.zeros(2, 2).to(self.guide.loc)


class Structured(Linear):
    """``AutoStructured`` with a full covariance of w."""

    @staticmethod
    def auto(model: Callable[..., None]) -> nn.Module:
        return AutoStructured(model, conditionals="mvn", dependencies="linear")

    def moments(self) -> tuple[Tensor, Tensor]:
        locs, scales, trils = (
            getattr(self.guide, name).w for name in ("locs", "scales", "scale_trils")
        )
        factor = scales[:, None] * trils
        return locs, factor @ factor.mT


class Flow(Linear):
    """q(w) is a flow; its expectation is a sum over points of the noise."""

    auto = AutoIAFNormal

    def log_p(self, x: Tensor) -> Tensor:
        points, logs = hermite(24, x)
        noise, weights = torch.cartesian_prod(points, points), torch.cartesian_prod(logs, logs)
        w = noise
        for transform in self.guide.get_posterior().transforms:
            w = transform(w)
        each = dist.Normal((w @ DESIGN.to(x))[:, None], 1.0).log_prob(x).sum(-1)
        return (weights.sum(-1)[:, None] + each).logsumexp(0)


class Coupled(Flow):
    @staticmethod
    def auto(model: Callable[..., None]) -> nn.Module:
        make = partial(dist.transforms.iterated, 1, dist.transforms.affine_coupling)
        return AutoNormalizingFlow(model, make)


class Listed(nn.Module):
    """``AutoGuideList``: a point for one latent, a normal for the other."""

    def __init__(self) -> None:
        super().__init__()
        self.guide = AutoGuideList(self.model)
        self.guide.append(AutoDelta(pyro.poutine.block(self.model, expose=["scale"])))
        self.guide.append(AutoNormal(pyro.poutine.block(self.model, expose=["w"])))

    def model(self, x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(x.new_tensor(0.0), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, scale).to_event(1), obs=x)

    def template(self, n: int) -> Batch:
        return (torch.zeros(n, 2),)

    def log_p(self, x: Tensor) -> Tensor:
        point, normal = self.guide[0], self.guide[1]
        spread = (normal.scales.w.square() + point.scale.square()).sqrt()
        return dist.Normal(normal.locs.w, spread).log_prob(x).sum(-1)


class Discrete(nn.Module):
    """``AutoDiscreteParallel``: the model has a global choice of two means."""

    def __init__(self) -> None:
        super().__init__()
        self.guide = AutoDiscreteParallel(self.model)

    def model(self, x: Tensor) -> None:
        k = pyro.sample("k", dist.Categorical(x.new_tensor([0.5, 0.5])))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(k.to(x) - 0.5, 1.0), obs=x)

    def template(self, n: int) -> Batch:
        return (torch.zeros(n),)

    def log_p(self, x: Tensor) -> Tensor:
        (probs,) = self.guide.parameters()
        each = dist.Normal(torch.tensor([[-0.5], [0.5]]), 1.0).log_prob(x)
        return (probs.log_softmax(-1)[:, None] + each).logsumexp(0)


class Local(nn.Module):
    """An AutoGuide of a local latent: a parameter for each row of the data."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(1, 3)
        self.guide = AutoNormal(self.model)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.decoder(z[..., None]), 1.0).to_event(1), obs=x)

    def template(self, n: int) -> Batch:
        return (torch.zeros(n, 3),)

    def log_p(self, x: Tensor) -> Tensor:
        z = LINE.to(x)
        each = dist.Normal(self.decoder(z[:, None, None]), 1.0).log_prob(x).sum(-1)
        return integral(dist.Normal(0.0, 1.0).log_prob(z)[:, None] + each, STEP)


class Network(PyroModule):
    """A Bayesian regression: the weights of a layer are ``PyroSample``s."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1, bias=False)
        self.linear.weight = PyroSample(lambda _: dist.Normal(torch.zeros(1, 2), 1.0).to_event(2))
        self.guide = AutoDiagonalNormal(self.model)

    def model(self, y: Tensor, inputs: Tensor) -> None:
        loc = self.linear(inputs)[..., 0]
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, 0.5), obs=y)

    def template(self, n: int) -> Batch:
        return torch.zeros(n), torch.zeros(n, 2)

    def log_p(self, y: Tensor, inputs: Tensor) -> Tensor:
        q = self.guide.get_posterior()
        spread = (inputs.square() @ q.variance + 0.25).sqrt()
        return dist.Normal(inputs @ q.mean, spread).log_prob(y)


class Schools(nn.Module):
    """Eight schools: local effects, and a global mean and spread of them."""

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.raw = nn.Parameter(torch.tensor([0.3, -0.5])), nn.Parameter(torch.zeros(2))
        self.line, self.own = nn.Parameter(torch.tensor([0.2, 0.4])), nn.Parameter(torch.zeros(()))

    def model(self, y: Tensor, error: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(y.new_tensor(0.0), 2.0))
        spread = pyro.sample("spread", dist.LogNormal(y.new_tensor(-0.5), 0.5))
        with pyro.plate("schools", len(y)):
            effect = pyro.sample("effect", dist.Normal(mean, spread))
            pyro.sample("y", dist.Normal(effect, error), obs=y)

    def guide(self, y: Tensor, error: Tensor) -> None:
        pyro.module("pair", self)
        scale = softplus(self.raw - 1)
        pyro.sample("mean", dist.Normal(self.loc[0], scale[0]))
        pyro.sample("spread", dist.LogNormal(self.loc[1], scale[1]))
        with pyro.plate("schools", len(y)):
            loc = self.line[0] + self.line[1] * y
            pyro.sample("effect", dist.Normal(loc, softplus(self.own).expand(y.shape)))

    def template(self, n: int) -> Batch:
        return torch.zeros(n), torch.ones(n)

    def log_p(self, y: Tensor, error: Tensor) -> Tensor:
        points, logs = hermite(40, y)
        scale = softplus(self.raw - 1)
        spread = (self.loc[1] + scale[1] * points).exp()[:, None]
        total = (spread.square() + scale[0].square() + error.square()).sqrt()
        return (logs[:, None] + dist.Normal(self.loc[0], total).log_prob(y)).logsumexp(0)


class Schooled(nn.Module):
    """Eight schools as in Pyro's example: one AutoGuide of everything, local effects too."""

    def __init__(self) -> None:
        super().__init__()
        self.guide = AutoNormal(self.model)

    model, template = Schools.model, Schools.template


class Family(nn.Module):
    """A sparse gamma DEF: gamma latents in two layers and a gamma weight, with counts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.line = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, 2))

    def model(self, x: Tensor) -> None:
        w = pyro.sample("w", dist.Gamma(self.weight.new_tensor(3.0), 3.0))
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Gamma(self.weight.new_tensor(1.5), 1.0))
            bottom = pyro.sample("bottom", dist.Gamma(1.5, 1.5 / (0.2 + w * top)))
            pyro.sample("x", dist.Poisson(0.1 + bottom), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("pair", self)
        shape, rate = 6 * self.weight.exp()
        pyro.sample("w", dist.Gamma(shape, rate))
        near = (x + 1).log()
        with pyro.plate("data", len(x)):
            first, second = self.line.exp()
            pyro.sample("top", dist.Gamma(1.5 * first[0] + 0 * x, first[1]))
            pyro.sample("bottom", dist.Gamma(1.5 * second[0] + near, 1.5 * second[1]))

    def template(self, n: int) -> Batch:
        return (torch.zeros(n),)

    def log_p(self, x: Tensor) -> Tensor:
        shape, rate = 6 * self.weight.exp()
        logs = torch.linspace(-9, 4.5, 181, dtype=self.weight.dtype)
        grid, step = logs.exp(), (logs[1] - logs[0]).item()
        few = torch.linspace(-3.5, 2.5, 61, dtype=self.weight.dtype)
        q = dist.Gamma(shape, rate).log_prob(few.exp()) + few + torch.tensor(0.1).log()
        top = dist.Gamma(1.5, 1.0).log_prob(grid) + logs
        rates = 1.5 / (0.2 + few.exp()[:, None] * grid)
        bottom = dist.Gamma(1.5, rates[..., None]).log_prob(grid) + logs
        of_bottom = integral(top[:, None, None] + bottom.movedim(1, 0), step)
        of_bottom = (q[:, None] + of_bottom).logsumexp(0)
        each = dist.Poisson(0.1 + grid[:, None]).log_prob(x)
        return integral(of_bottom[:, None] + each, step)


class Grouped(nn.Module):
    """An effect of each group, in a plate of groups; each row knows its group."""

    groups = 4

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.raw = nn.Parameter(rows(self.groups)), nn.Parameter(torch.zeros(4))

    def model(self, x: Tensor, group: Tensor) -> None:
        with pyro.plate("groups", self.groups):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(u[..., group], 1.0), obs=x)

    def guide(self, x: Tensor, group: Tensor) -> None:
        pyro.module("pair", self)
        with pyro.plate("groups", self.groups):
            pyro.sample("u", dist.Normal(self.loc, softplus(self.raw)))

    def template(self, n: int) -> Batch:
        return torch.zeros(n), torch.zeros(n, dtype=torch.long)

    def log_p(self, x: Tensor, group: Tensor) -> Tensor:
        spread = (1 + softplus(self.raw).square()).sqrt()
        return dist.Normal(self.loc[group], spread[group]).log_prob(x)


class Nested(Grouped):
    """The same with a local latent around the effect of the group."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.4))

    def model(self, x: Tensor, group: Tensor) -> None:
        with pyro.plate("groups", self.groups):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(u[..., group], 0.6))
            pyro.sample("x", dist.Normal(z, 0.8), obs=x)

    def guide(self, x: Tensor, group: Tensor) -> None:
        super().guide(x, group)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.slope * x, 0.8))


class Districts(nn.Module):
    """Schools in districts under one AutoGuide; local latents depend on its draws."""

    schools, district = 4, (0, 0, 1, 1)

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.4))
        shared = poutine.block(self.model, expose=["d", "u"])
        self.shared = AutoMultivariateNormal(shared, init_scale=0.5)

    def model(self, x: Tensor, group: Tensor) -> None:
        with pyro.plate("districts", 2, dim=-1):
            d = pyro.sample("d", dist.Normal(0.0, 1.0))
        with pyro.plate("schools", self.schools, dim=-1):
            u = pyro.sample("u", dist.Normal(d[..., list(self.district)], 1.0))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(u[..., group], 0.6))
            pyro.sample("x", dist.Normal(z, 0.8), obs=x)

    def guide(self, x: Tensor, group: Tensor) -> None:
        pyro.module("pair", self)
        own = self.shared(x, group)["u"][..., group]
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(own + self.slope * (x - own), 0.8))

    def template(self, n: int) -> Batch:
        return torch.zeros(n), torch.zeros(n, dtype=torch.long)

    def log_p(self, x: Tensor, group: Tensor) -> Tensor:
        joint = self.shared.get_posterior()
        mean, variance = joint.mean[2:], joint.covariance_matrix.diagonal()[2:]
        return dist.Normal(mean[group], (1 + variance[group]).sqrt()).log_prob(x)


class Subsampled(nn.Module):
    """``plate("data", N, subsample_size=B)``: the rows are a part of N data."""

    number = 48

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.raw = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.slope = nn.Parameter(torch.tensor(0.3))

    def plate(self, x: Tensor) -> pyro.plate:
        return pyro.plate("data", self.number, subsample_size=len(x))

    def model(self, x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_tensor(0.0), 1.0))
        with self.plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(w + z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("pair", self)
        w = pyro.sample("w", dist.Normal(self.loc, softplus(self.raw - 1)))
        with self.plate(x):
            pyro.sample("z", dist.Normal(self.slope * (x - w), 0.9))

    def template(self, n: int) -> Batch:
        return (torch.zeros(n),)

    def log_p(self, x: Tensor) -> Tensor:
        return dist.Normal(self.loc, (2 + softplus(self.raw - 1).square()).sqrt()).log_prob(x)


def two() -> Batch:
    return (0.7 + rows(24, 2),)


def one() -> Batch:
    return (rows(24),)


def three() -> Batch:
    return (rows(24, 3),)


def schools() -> Batch:
    return rows(8), 0.5 + rows(8, seed=2).abs()


def grouped() -> Batch:
    return rows(24), torch.arange(24) % 4


def poisson() -> Batch:
    return (torch.randint(0, 5, (24,), generator=torch.Generator().manual_seed(8)).to(rows(1)),)


def enum() -> TraceEnum_ELBO:
    return TraceEnum_ELBO(max_plate_nesting=1)


BY_ROW = Refusal(
    "the guide has a parameter with a row for each datum",
    "the guide has a parameter with a row for each datum; use an encoder, or row numbers (above)",
)


STILL = Refusal(
    "is discrete and shared by all data, so NUTS can neither move it nor sum it out",
    "a discrete latent is shared by all data",
)

NO_INVERSE = Refusal(
    "through a map without a known inverse", "the density of the guide is known only at its draws"
)


def auto(kind: type, name: str = "", **refuses: Refusal) -> Idiom:
    name = f"`{name or kind.auto.__name__}` of global latents"
    return Idiom(name, kind, two, refuses=NO_LOCAL | SHARED | refuses)


IDIOMS = [
    auto(Point),
    auto(Means),
    auto(Linear),
    auto(Correlated),
    auto(LowRank),
    auto(Flow),
    auto(Coupled, "AutoNormalizingFlow"),
    auto(Laplace),
    auto(Structured, "AutoStructured", nuts=NO_INVERSE),
    Idiom("`AutoGuideList`", Listed, two, refuses=NO_LOCAL | SHARED),
    Idiom(
        "`AutoDiscreteParallel` of a global latent",
        Discrete,
        one,
        enum,
        refuses=NO_LOCAL | SHARED | {"nuts": STILL},
    ),
    Idiom("`AutoNormal` of a local latent", Local, three, refuses=everywhere(BY_ROW)),
    Idiom(
        "Bayesian network with `PyroSample`",
        Network,
        lambda: (rows(24), rows(24, 2, seed=2)),
        refuses=NO_LOCAL | SHARED,
    ),
    Idiom("Eight schools with a guide that reads each row", Schools, schools, refuses=SHARED),
    Idiom(
        "Eight schools with one AutoGuide of all latents",
        Schooled,
        schools,
        refuses=everywhere(BY_ROW),
    ),
    Idiom("Sparse gamma DEF: gamma latents, counts", Family, poisson, refuses=SHARED),
    Idiom(
        "Latents in a plate of groups, indexed by each row's group",
        Grouped,
        grouped,
        refuses=NO_LOCAL | SHARED,
    ),
    Idiom("The same with local latents", Nested, grouped, refuses=SHARED),
    Idiom(
        "Schools in districts: a group latent that depends on another one",
        Districts,
        grouped,
        refuses=SHARED,
    ),
    Idiom(
        '`plate("data", N, subsample_size=B)`',
        Subsampled,
        one,
        share=0.5,
        needs="B is the number of rows of the minibatch",
        refuses=SHARED,
    ),
]

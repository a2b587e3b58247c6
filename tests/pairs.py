"""Pairs that the contract tests run: ours, and users' own in each style that Pyro allows."""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn
from torch.distributions import constraints

import pyro_vae as pv


class PlainAttributes(nn.Module):
    """Networks as plain attributes: stock SVI would not see their parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 4)
        self.decoder = nn.Linear(2, 6)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            loc, scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(scale)).to_event(1))

    def template(self, n: int) -> tuple[Tensor, ...]:
        return (torch.zeros(n, 6),)


class Registered(PlainAttributes):
    """``pyro.module`` in model and guide, as Pyro's tutorials do."""

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        super().model(x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        super().guide(x)


class Params(PyroModule):
    """``PyroParam`` for constrained parameters, and ``pyro.param`` for others; two latents."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = PyroModule[nn.Linear](3, 6)
        self.width = PyroParam(torch.full((2,), 0.7), constraints.positive)
        self.encoder = nn.Linear(6, 2)

    def model(self, x: Tensor) -> None:
        spread = pyro.param("spread", torch.tensor(1.2), constraint=constraints.positive)
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(x.new_zeros(2), spread).to_event(1))
            b = pyro.sample("b", dist.Normal(a[..., :1].sum(-1), 1.0))
            loc = self.decoder(torch.cat([a, b[..., None]], -1))
            pyro.sample("x", dist.Normal(loc, 0.8).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        shift = pyro.param("offsets.shift", lambda: torch.zeros(2, dtype=x.dtype))
        with pyro.plate("data", len(x), dim=-1):
            loc = self.encoder(x) + shift
            a = pyro.sample("a", dist.Normal(loc, self.width).to_event(1))
            pyro.sample("b", dist.Normal(a[..., 0] * 0.5, 0.9))

    def template(self, n: int) -> tuple[Tensor, ...]:
        return (torch.zeros(n, 6),)


class Bags(nn.Module):
    """Two discrete latents, one summed out in the guide, one in the model, which x depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 4 + 3)
        self.decoder = nn.Linear(2 + 3 + 2, 6)
        self.switch = nn.Linear(2, 2)

    def model(self, x: Tensor) -> None:
        marked = {"enumerate": "parallel"}
        with pyro.plate("data", len(x), dim=-1):
            y = pyro.sample("y", dist.OneHotCategorical(x.new_ones(3) / 3))
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            k = pyro.sample("k", dist.Bernoulli(logits=self.switch(z)[..., 0]), infer=marked)
            m = pyro.sample(
                "m", dist.Categorical(logits=torch.stack([k, 1 - 2 * k], -1)), infer=marked
            )
            parts = [z, y, k[..., None], m.to(x.dtype)[..., None]]
            shape = torch.broadcast_shapes(*[part.shape[:-1] for part in parts])
            wide = torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], -1)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(wide)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        loc, scale, logits = self.encoder(x).split((2, 2, 3), -1)
        with pyro.plate("data", len(x), dim=-1):
            fn = dist.OneHotCategorical(logits=logits)
            y = pyro.sample("y", fn, infer={"enumerate": "parallel"})
            loc = loc + y[..., :2]
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(scale)).to_event(1))

    def template(self, n: int) -> tuple[Tensor, ...]:
        return (torch.zeros(n, 6),)


class _Uncertain(PyroModule):
    """The weights of a linear map as ``PyroSample``."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("zero", torch.zeros(2, 6))
        self.weight = PyroSample(lambda own: dist.Normal(own.zero, 1.0).to_event(2))

    def forward(self) -> Tensor:
        return self.weight


class Weights(PyroModule):
    """Weights with a mean-field guide, which z's sees; the model takes a plate of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 4)
        self.decoder = _Uncertain()
        self.loc = nn.Parameter(torch.randn(2, 6))
        self.scale = PyroParam(torch.full((2, 6), 0.2), constraints.positive)

    def model(self, x: Tensor) -> None:
        weight = self.decoder()
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            logits = (z[..., None, :] @ weight)[..., 0, :]
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        weight = pyro.sample("decoder.weight", dist.Normal(self.loc, self.scale).to_event(2))
        loc, scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x), dim=-1):
            shift = 0.1 * weight.mean(-1)
            pyro.sample("z", dist.Normal(loc + shift, nn.functional.softplus(scale)).to_event(1))

    def template(self, n: int) -> tuple[Tensor, ...]:
        return (torch.zeros(n, 6),)


def _vae(**keywords: object) -> pv.VAE:
    return pv.VAE.mlp((6,), latent_dim=2, hidden=(5,), activation=nn.Tanh, **keywords)


def _flow(kind: type, bijection: nn.Module, **keywords: object) -> nn.Module:
    """A small flow over two latents that is not the identity it starts as."""
    flow = kind(2, bijection=bijection, layers=1, hidden=(4,), **keywords)
    for parameter in flow.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return flow


DISCRETE = {
    "bernoulli": (pv.Bernoulli, 2),
    "categorical": (lambda: pv.Categorical(5), 5),
    "categorical-2": (lambda: pv.Categorical(2), 2),
    "discretized-logistic": (lambda: pv.DiscretizedLogistic(5), 5),
    "discretized-logistic-2": (lambda: pv.DiscretizedLogistic(2), 2),
    "logistic-mixture": (lambda: pv.DiscretizedLogistic(5, components=3), 5),
    "logistic-mixture-2": (lambda: pv.DiscretizedLogistic(2, components=2), 2),
}

CONTINUOUS = {
    "continuous-bernoulli": pv.ContinuousBernoulli,
    "gaussian": pv.Gaussian,
    "gaussian-bounded": lambda: pv.Gaussian(bounds=(0.1, 2.0)),
    "gaussian-fixed": lambda: pv.Gaussian(scale=0.3),
    "gaussian-learned": lambda: pv.Gaussian(scale=0.3, learned=True).double(),
}

FAMILIES = {name: make for name, (make, _) in DISCRETE.items() if name[-2:] != "-2"} | CONTINUOUS

# Held against independent references in test_counts.py; what holds for every family, here.
EVERY = FAMILIES | {
    "tokens": lambda: pv.Categorical(5, tokens=True),
    "student-t": pv.StudentT,
    "student-t-learned": lambda: pv.StudentT(3.0, learned=True).double(),
    "poisson": pv.Poisson,
    "negative-binomial": pv.NegativeBinomial,
    "zero-inflated": lambda: pv.NegativeBinomial(zero_inflated=True),
}

LIKELIHOODS = {
    "gaussian-predicted": lambda: _vae(likelihood=pv.Gaussian()),
    "gaussian-learned": lambda: _vae(likelihood=pv.Gaussian(0.5, learned=True)),
    "gaussian-fixed": lambda: _vae(likelihood=pv.Gaussian(0.5)),
    "student-t": lambda: _vae(likelihood=pv.StudentT(learned=True)),
    "continuous-bernoulli": lambda: _vae(likelihood=pv.ContinuousBernoulli),
    "categorical": lambda: _vae(likelihood=pv.Categorical(2)),
    "tokens": lambda: _vae(likelihood=pv.Categorical(2, tokens=True)),
    "discretized-logistic": lambda: _vae(likelihood=pv.DiscretizedLogistic(2)),
    "logistic-mixture": lambda: _vae(likelihood=pv.DiscretizedLogistic(2, components=2)),
    "poisson": lambda: _vae(likelihood=pv.Poisson),
    "negative-binomial-library": lambda: _vae(
        likelihood=pv.NegativeBinomial(zero_inflated=True, library_size=True),
        context_shapes=[(1,)],
    ),
}


def _vamp(pair: nn.Module, encoder: nn.Module) -> nn.Module:
    pair.prior = pv.VampPrior(encoder, (6,), components=3)
    return pair


def _levels(**keywords: object) -> pv.HierarchicalVAE:
    return pv.HierarchicalVAE.mlp((6,), **{"latent_dim": (2, 2), "hidden": (4,)} | keywords)


OURS = {
    "bernoulli": lambda: _vae(),
    **LIKELIHOODS,
    "full-rank": lambda: _vae(posterior=pv.FullRankNormal),
    "low-rank": lambda: _vae(posterior=pv.LowRankNormal(1)),
    "flows": lambda: _vae(
        posterior=_flow(pv.FlowPosterior, pv.Affine(), context_dim=2),
        prior=_flow(pv.FlowPrior, pv.Spline(3)),
    ),
    "mixture-prior": lambda: _vae(prior=lambda dim: pv.GaussianMixture(dim, 3)),
    "vamp-prior": lambda: _vamp(pair := _vae(), pair.encoder),
    "hierarchical": lambda: _vamp(pair := _levels(activation=nn.GLU), pair.inference.top()),
    "bottom-up": lambda: _levels(latent_dim=(3, 2, 1), top_down=False, markov=True),
    "conditional-prior": lambda: _vae(
        context_shapes=[(3,)], prior=pv.Factor(pv.MLP([3], (4,), 4), pv.DiagonalNormal(), (2,))
    ),
    "conditional": lambda: _vae(context_shapes=[(3,)]),
    "convolutional": lambda: pv.VAE.conv(
        (1, 2, 3), 2, channels=(3,), hidden=(4,), context_shapes=[(1, 3, 2)], blocks=1
    ),
    "text": lambda: pv.VAE.recurrent((3,), 2, 2, hidden=3, embedding_dim=2, word_dropout=0.3),
    "deep-markov": lambda: pv.DeepMarkovModel.usual(3, 2, latent_dim=2, hidden=4, ragged=True),
    "multilevel": lambda: pv.MultilevelVAE.mlp(
        (2,), 2, 1, hidden=(4,), likelihood=pv.Bernoulli, members=3, activation=nn.Tanh
    ),
    "semi-supervised": lambda: pv.SemiSupervisedVAE.mlp(
        (6,), 3, latent_dim=2, hidden=(5,), activation=nn.Tanh, classification_weight=0.7
    ),
    "mixture": lambda: pv.MixtureVAE.mlp((6,), 3, latent_dim=2, hidden=(5,), activation=nn.Tanh),
}
UNORDERED = {"text", "tokens"}
"""Pairs whose data are names, not quantities: in place of a mean they give what is likely."""

SHAPES = {"convolutional": (1, 2, 3), "text": (3,), "deep-markov": (3, 2), "multilevel": (3, 2)}

USERS = {"plain": PlainAttributes, "registered": Registered, "params": Params, "bags": Bags}
ALL = OURS | USERS
GLOBAL = {
    "bayesian": lambda: pv.BayesianDecoder(_vae()),
    "bayesian-conditional": lambda: pv.BayesianDecoder(_vae(context_shapes=[(3,)])),
    "bayesian-mixture": lambda: pv.BayesianDecoder(OURS["mixture"]()),
    "weights": Weights,
}
"""Pairs with latents outside the data plate, which not every tool takes."""
ENUMERATED = ("semi-supervised", "mixture", "bags")
"""Pairs with latents that are summed out."""


def make(name: str, seed: int = 0) -> nn.Module:
    """A pair of this name in float64, its first parameters always the same."""
    torch.manual_seed(seed)
    return (ALL | GLOBAL)[name]().double()


def rows(name: str, n: int = 40, seed: int = 1) -> tuple[Tensor, ...]:
    """A batch for the pair of this name: binary data, which every likelihood here can score."""
    generator = torch.Generator().manual_seed(seed)
    shape = SHAPES.get(name, (6,))
    x = torch.rand(n, *shape, generator=generator).round().double()
    if name == "convolutional":  # the context is the image, lying on its side
        return x, x.mT.contiguous()
    if name.endswith("library"):
        return x, (1 + x.sum(-1, keepdim=True)).log()
    if name in ("deep-markov", "multilevel"):
        return x, torch.randint(1, 4, (n,), generator=generator)
    if name == "semi-supervised":
        return x, torch.randint(-1, 3, (n,), generator=generator)
    if "conditional" not in name:
        return (x,)
    return x, torch.eye(3)[torch.randint(3, (n,), generator=generator)].double()


class Counts(nn.Module):
    """Three counts of each datum, in a plate of their own, each of a rate of its own: p(x) is a
    negative binomial."""

    def __init__(self):
        super().__init__()
        self.shape = nn.Parameter(torch.tensor(2.0).double())

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("parts", 3, dim=-2):
            rate = pyro.sample("rate", dist.Gamma(self.shape, 0.5))
            pyro.sample("x", dist.Poisson(rate), obs=x.T)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("parts", 3, dim=-2):
            pyro.sample("rate", dist.LogNormal((x.T + 0.5).log() - 0.2, 0.6))

    def truth(self, x):
        fn = dist.NegativeBinomial(self.shape.detach(), probs=torch.tensor(1 / 1.5).double())
        return fn.log_prob(x).sum(1)


class Fault(nn.Module):
    """A pair with a latent that no vector of a datum holds."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.ones(()).double())

    def model(self, x):
        if self.kind == "global":
            pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            if self.kind == "discrete":
                z = z + pyro.sample("k", dist.Bernoulli(x.new_full((), 0.3)))
            pyro.sample("x", dist.Normal((self.weight * z)[..., None], 1.0).to_event(1), obs=x)

    def guide(self, x):
        if self.kind == "global":
            pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x), dim=-1):
            if self.kind == "auxiliary":
                fn, marked = dist.Normal(x.new_zeros(()), 1.0), {"is_auxiliary": True}
                pyro.sample("u", fn, infer=marked)
            if self.kind == "discrete":
                pyro.sample("k", dist.Bernoulli(x.new_full((), 0.3)))
            pyro.sample("z", dist.Normal(x.new_full((), 0.5), 1.0))

    def template(self, n):
        return (torch.zeros(n, 1).double(),)


FAULTS = {
    "global": "latent site 'w' is not local",
    "discrete": "latent site 'k' is discrete, so it must be enumerated",
    "auxiliary": "site 'u' of the guide is missing from the model",
}


class TwoModes(nn.Module):
    """x ~ N(z^2, 0.1): the posterior of z has two modes, far apart, of which the guide has one."""

    def __init__(self, noise=0.1):
        super().__init__()
        self.noise = nn.Parameter(torch.tensor(noise).double())

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 3.0))
            pyro.sample("x", dist.Normal(z[..., None] ** 2, self.noise).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x[:, 0].clamp(min=0.01).sqrt(), 0.1))

    def template(self, n):
        return (torch.zeros(n, 1).double(),)

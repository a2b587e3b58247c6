"""What the tests of the engine share."""

import random

import numpy as np
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pairs import GLOBAL, make, rows
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.scope import registered, scope
from pyro_vae.training.check import require
from pyro_vae.training.engine import Engine, Step
from pyro_vae.training.optimizer import Optimizer

OBJECTIVES = {
    "elbo": Trace_ELBO,
    "particles": lambda: Trace_ELBO(num_particles=3),
    "vectorized": lambda: Trace_ELBO(3, vectorize_particles=True, max_plate_nesting=1),
    "analytic": TraceMeanField_ELBO,
    "importance-weighted": lambda: pv.ImportanceWeightedELBO(4),
    "free-bits": lambda: pv.FreeBitsELBO(0.3),
    "sticking": pv.StickingTheLandingELBO,
    "doubly": lambda: pv.ImportanceWeightedELBO(4, gradient=pv.Gradient.DOUBLY_REPARAMETRIZED),
    "total-correlation": lambda: pv.TotalCorrelationELBO(19, 3.0, 0.5),
    "enumerated": pv.EnumeratedELBO,
    "enumerated-particles": lambda: pv.EnumeratedELBO(3),
    "enumerated-vectorized": lambda: pv.EnumeratedELBO(3, vectorize_particles=True),
}


class Normalized(nn.Module):
    """Batch normalization and dropout: buffers that change, and an effect of the mode."""

    def __init__(self):
        super().__init__()
        layers = (nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 4))
        self.encoder, self.decoder = nn.Sequential(*layers), nn.Linear(2, 6)
        self.center = torch.full((6,), 0.5, dtype=torch.float64)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            loc, raw = self.encoder(x - self.center).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw)).to_event(1))


class Tied(nn.Module):
    """A weight in two places, a frozen parameter, and a parameter without effect."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 2), nn.Linear(2, 6)
        self.copied = nn.Linear(6, 2)
        self.copied.weight = self.encoder.weight
        self.encoder.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.7).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            loc = self.encoder(x) + self.copied(x).tanh()
            pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))


class Discrete(nn.Module):
    """A latent that is not reparametrized, for the score-function terms of Trace_ELBO."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 3), nn.Linear(3, 6)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((3,), 0.4)).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.7).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))


MORE = {"normalized": Normalized, "tied": Tied, "discrete": Discrete}


def pair_of(name):
    if name not in MORE:
        return make(name)
    with seeded(0):
        return MORE[name]().double()


NUM_DATA = 25
"""The number of data that the engines receive."""


class Run:
    """A pair and its SVI; stock Pyro if ``engine`` is None."""

    def __init__(self, name, objective="elbo", engine=None, beta=0.7, **options):
        self.pair = pair = pair_of(name)
        self.batches = [rows(name, 12), rows(name, 7, seed=2)]
        objective = OBJECTIVES[objective]()
        require(pair, self.batches[0], objective)
        self.num_data = NUM_DATA if name in GLOBAL else None
        options |= {"num_data": self.num_data}
        self.engine = Engine(pair, objective, engine or "eager", declare=False, **options)
        self.engine.beta = beta
        self.parameters = {k: p for k, p in pair.named_parameters() if p.requires_grad}
        self.optimizer = Optimizer(torch.optim.Adam, self.parameters, 1e-2)
        model = registered(pair, pair.model)
        if engine is None:
            weight = self.weight = pv.KLWeight(beta)
            self.svi = SVI(weight(model), weight(pair.guide), self.optimizer, objective)
        else:
            self.svi = Step(model, pair.guide, self.optimizer, self.engine)

    def step(self, number, mode=True):
        """Return the loss and the gradients of one step, under its own seed."""
        kept = {}
        self.pair.train(mode)
        hooks = [
            p.register_post_accumulate_grad_hook(lambda p, k=k: kept.__setitem__(k, p.grad.clone()))
            for k, p in self.parameters.items()
            if p.requires_grad
        ]
        batch = self.batches[number % 3 == 2]
        if self.num_data and hasattr(self, "weight"):
            self.weight.global_weight = len(batch[0]) / self.num_data
        with scope(self.pair), seeded(number):
            loss = float(self.svi.step(*batch))
        for hook in hooks:
            hook.remove()
        grads = kept or {k: p.grad for k, p in self.parameters.items() if p.grad is not None}
        return loss, grads

    def state(self):
        return {k: v.clone() for k, v in self.pair.state_dict().items()}


def assert_same(a, b, tolerance=1e-8):
    (loss, grads), (other, others) = a, b
    assert loss == pytest.approx(other, rel=tolerance)
    for name, gradient in grads.items():
        close = max(tolerance, 1e-6) if gradient.dtype == torch.float32 else tolerance
        torch.testing.assert_close(others[name], gradient, rtol=close, atol=close)
    assert all(name in grads for name in others)


def assert_state(a, b, tolerance=1e-8):
    for name, value in a.state().items():
        torch.testing.assert_close(b.state()[name], value, rtol=tolerance, atol=tolerance, msg=name)


class Noisy(nn.Module):
    """Several kinds of values that a graph would freeze."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.calls, self.seen = kind, 0, []
        self.encoder, self.decoder = nn.Linear(6, 2), nn.Linear(2, 6)
        self.own = random.Random(0)

    def shift(self, x):
        if self.kind == "python":
            return random.random()
        if self.kind == "numpy":
            return float(np.random.rand())
        if self.kind == "own generator":
            return self.own.random()
        if self.kind == "branch":
            return 1.0 if x.sum() > 3 else 0.0
        if self.kind == "number":
            return x.mean().item()
        if self.kind == "array":
            return float(x.numpy().mean())
        if self.kind == "counter":
            self.calls += 1
            return 1.0 / self.calls
        if self.kind == "list":
            self.seen.append(x)
        if self.kind == "shape":
            return float(len(x[x[:, 0] > 0.5]))
        return 0.0

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.encoder(x) + self.shift(x), 1.0).to_event(1))

"""Gradients that lie in memory in another order than their parameter, in every engine.

``autograd.grad`` returns them as they are, and the fused kernels of torch read memory in order.
"""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.pairs.rng import seeded

USES = {
    "transposed": lambda w: w.t(),
    "permuted": lambda w: w.reshape(3, 2, 3).permute(2, 0, 1).reshape(3, 6),
    "flipped": lambda w: w.flip(0).t(),
    "sum": lambda w: w.sum() + w.t().cos(),
    "row": lambda w: w[:1].expand(6, 3).t() + w.t().sin(),
    "diagonal": lambda w: w.t() * w.diagonal()[:, None],
    "columns": lambda w: torch.stack([w[:, j] for j in range(3)]),
    "einsum": lambda w: torch.einsum("ij,kj->jk", torch.ones(2, 3), w),
}
"""Functions of a parameter of shape (6, 3), with values of shape (3, 6)."""


class Pair(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.weight, self.encoder = nn.Parameter(torch.randn(6, 3)), nn.Linear(6, 6)
        self.use = use

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            loc = (self.use(self.weight).exp() * z[:, :, None]).sum(1)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw) + 0.1).to_event(1))


OPTIMIZERS = {
    "Adam": torch.optim.Adam,
    "AdamW": functools.partial(torch.optim.AdamW, weight_decay=0.1),
    "SGD": functools.partial(torch.optim.SGD, momentum=0.9),
    "RMSprop": torch.optim.RMSprop,
}


def trained(use, engine, optimizer="Adam", clip_norm=None):
    with seeded(0):
        x, pair = torch.randn(48, 6), Pair(USES[use])
    options = {"batch_size": 16, "learning_rate": 0.01, "progress": False, "clip_norm": clip_norm}
    pv.fit(pair, x, epochs=3, engine=engine, optimizer=OPTIMIZERS[optimizer], **options)
    return list(pair.parameters())


def assert_close(found, wanted):
    for p, q in zip(found, wanted, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use", USES)
def test_a_traced_step_is_that_of_the_eager_engine(use):
    assert_close(trained(use, "traced"), trained(use, "eager"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_with_each_optimizer(optimizer):
    ends = [trained("sum", engine, optimizer, 5.0) for engine in ("traced", "eager")]
    assert_close(*ends)


@pytest.mark.parametrize("use", ["transposed", pytest.param("sum", marks=pytest.mark.thorough)])
def test_a_compiled_step_is_that_of_the_eager_engine(use):
    assert_close(trained(use, "compiled"), trained(use, "eager"))

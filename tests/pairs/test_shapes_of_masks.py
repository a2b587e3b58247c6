"""A mask or a scale that would count each row several times is refused, as stock Pyro does."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_vae as pv

N = 12


class Weighed(nn.Module):
    """A mask or a scale around the site of x or around all sites."""

    def __init__(self, around, inner=False):
        super().__init__()
        self.around, self.inner = around, inner
        self.slope = nn.Parameter(torch.tensor(0.3))

    def model(self, x, weight):
        with pyro.plate("data", len(x), dim=-1), self.outer(weight):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            with self.around(weight):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x, weight):
        with pyro.plate("data", len(x), dim=-1), self.outer(weight):
            pyro.sample("z", dist.Normal(self.slope * x, 1.0))

    def outer(self, weight):
        return poutine.scale(scale=1.0) if self.inner else self.around(weight)


def masked(weight):
    return poutine.mask(mask=weight > 0.5)


def scaled(weight):
    return poutine.scale(scale=weight)


def rows(*shape):
    x = torch.randn(N, generator=torch.Generator().manual_seed(1))
    weight = torch.rand(shape, generator=torch.Generator().manual_seed(2)) + 0.3
    return x, weight


PAIRS = [(around, inner) for around in (masked, scaled) for inner in (True, False)]


@pytest.mark.parametrize(("around", "inner"), PAIRS)
def test_a_column_is_not_the_shape_of_the_plate(around, inner):
    pair, batch = Weighed(around, inner), rows(N, 1)
    with pytest.raises(ValueError, match="invalid log_prob shape"), pyro.validation_enabled():
        Trace_ELBO().loss(pair.model, pair.guide, *batch)
    what = "mask" if around is masked else "scale"
    says = rf"the {what} of site '[xz]' in the model has shape \(\d+, 1\), which does not broadcast"
    assert len(pv.check(pair, *batch).errors) == 1
    for run in (
        lambda: pv.fit(pair, *batch, epochs=1, engine="eager", progress=False),
        lambda: pv.log_likelihood(pair, *batch, num_samples=5),
        lambda: pv.evaluate(pair, *batch, num_samples=5),
        lambda: pv.encode(pair, *batch),
    ):
        with pytest.raises(pv.UsageError, match=says):
            run()


@pytest.mark.parametrize(("around", "inner"), PAIRS)
def test_the_shape_of_the_plate_is_served(around, inner):
    assert pv.check(Weighed(around, inner), *rows(N)).errors == ()


class Constant(Weighed):
    """The same weight for all rows, made by the programs."""

    def __init__(self, around, inner, weight):
        super().__init__(around, inner)
        self.weight = weight

    def model(self, x):
        super().model(x, self.weight)

    def guide(self, x):
        super().guide(x, self.weight)


@pytest.mark.parametrize("shape", [(1, 1), (1,), ()])
@pytest.mark.parametrize(("around", "inner"), PAIRS)
def test_a_weight_of_one_number(around, inner, shape):
    x = rows(N)[0]
    assert pv.check(Constant(around, inner, torch.full(shape, 0.7)), x).errors == ()

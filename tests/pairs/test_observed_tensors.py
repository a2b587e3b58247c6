"""Which tensor of the batch a site observes, if the pair computes other values from it."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_vae as pv
from pyro_vae.pairs import data_plate


class Hurdle(nn.Module):
    """Whether x is positive, at a site of its own; then log x, given that it is positive."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("any", dist.Bernoulli(logits=z), obs=(x > 0).to(x))
            with poutine.mask(mask=x > 0):
                pyro.sample("x", dist.Poisson(z.exp()), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.slope * x, 1.0))

    def template(self, n):
        return (torch.ones(n),)


@pytest.mark.parametrize("x", [[0.0, 1.0, 1.0, 0.0], [3.0, 0.0, 2.0, 4.0]])
def test_a_value_that_happens_to_equal_x_is_not_x(x):
    pair, x = Hurdle(), torch.tensor(x)
    assert pv.reconstruct(pair, x).shape == (4,)
    assert data_plate.known(pair).observes == {"x": 0}
    assert data_plate.known(pair).x == "x"


def test_simulation_is_refused_whatever_the_template_holds():
    with pytest.raises(pv.UsageError, match="at site 'any' cannot be written into a batch"):
        pv.calibration(Hurdle(), num_simulations=100, num_draws=19, progress=False)


class Steps(nn.Module):
    """A site for each of two steps."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            for t in range(2):
                pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=x[:, t])

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.mean(1), 1.0))


def test_the_refusal_of_several_sites_names_no_argument_that_a_tool_lacks():
    pair, x = Steps(), torch.randn(8, 2)
    for run in (pv.score, pv.impute, pv.loo_pit, pv.reconstruct):
        with pytest.raises(pv.UsageError, match="tools with an argument 'site'") as said:
            run(pair, x)
        assert "(x0, x1)" in str(said.value)
    assert pv.reconstruct(pair, x, site="x1").shape == (8,)

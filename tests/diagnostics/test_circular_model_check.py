"""Angles in model_check: the same points of the circle have the same residuals."""

from math import pi

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.diagnostics import verdict


class Angles(nn.Module):
    """z ~ N(0, 1) and four angles around 3 + z / 2; the guide is a normal of the exact moments."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.VonMises((3 + z / 2).expand(-1, 4), 8.0).to_event(1), obs=x)

    def guide(self, x):
        grid = torch.linspace(-5, 5, 201)
        fit = dist.VonMises(3 + grid / 2, 8.0).log_prob(x[..., None]).sum(1)
        p = (fit - grid.square() / 2).softmax(-1)
        mean = p @ grid
        deviation = (p @ grid.square() - mean.square()).sqrt()
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(mean[:, None], deviation[:, None]).to_event(1))

    def template(self, n):
        return (torch.zeros(n, 4),)


@pytest.mark.parametrize("turns", [0, 1])
def test_angles_on_another_turn_have_the_same_residuals(turns):
    torch.manual_seed(0)
    z = torch.randn(300, 1)
    x = dist.VonMises((3 + z / 2).expand(-1, 4), 8.0).sample()  # from -pi to pi
    x = torch.remainder(x, 2 * pi) + (turns - 1) * 2 * pi  # 0 to 2 pi, or a turn before
    found = pv.model_check(Angles(), x, num_samples=50, progress=False)
    assert verdict.blamed({"model_check": found}) == []
    assert found.regression.value == pytest.approx(0, abs=0.1)
    assert found.scale.value == pytest.approx(0, abs=0.15)

"""NUTS on angles: draws stay on the circle, and are those of the posterior."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.inference.joint import Joint
from pyro_vae.pairs.scope import using


class Angle(nn.Module):
    """An angle z that is seen with noise, or linearly if ``linear`` is true."""

    def __init__(self, linear: bool, units: int) -> None:
        super().__init__()
        self.linear, self.units, self.loc = linear, units, nn.Parameter(torch.tensor(0.5))

    def prior(self) -> dist.Distribution:
        fn = dist.VonMises(0.0, 0.5)
        return fn.expand([self.units]).to_event(1) if self.units else fn

    def likelihood(self, z: Tensor) -> dist.Distribution:
        fn = dist.Normal(z, 0.7) if self.linear else dist.VonMises(z, 6.0)
        return fn.to_event(1) if self.units else fn

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            fn = dist.VonMises(x + 0 * self.loc, 4.0)
            pyro.sample("z", fn.to_event(1) if self.units else fn)


def posterior_means(x: float) -> Tensor:
    """The means of cos z and sin z, by a sum over the circle."""
    pair = Angle(linear=False, units=0)
    z = torch.linspace(-torch.pi, torch.pi, 2001)[:-1]
    weights = (pair.prior().log_prob(z) + pair.likelihood(z).log_prob(torch.tensor(x))).softmax(0)
    return torch.stack([weights @ z.cos(), weights @ z.sin()])


def test_draws_stay_on_the_circle_and_have_the_right_means():
    x = torch.full((1, 2), 2.9)  # many draws are beyond pi
    options = {"num_draws": 40, "warmup": 30, "num_chains": 2, "engine": "traced"}
    found = pv.nuts(Angle(linear=False, units=2), x, progress=False, **options)
    z = found.draws["z"].flatten()
    assert z.abs().max() <= torch.pi
    means = torch.stack([z.cos().mean(), z.sin().mean()])
    assert torch.allclose(means, posterior_means(2.9), atol=0.15)


@pytest.mark.parametrize("units", [0, 3])
def test_the_density_is_the_same_after_a_turn(units):
    pair, x = Angle(linear=True, units=units), rows(4, units)
    joint = Joint(pair, (x[:2],))
    z = torch.randn(5, 4, max(1, units), generator=torch.Generator().manual_seed(0))
    with using(pair, 0):
        density, turned = joint.log_joint(z, x), joint.log_joint(z + 2 * torch.pi, x)
    assert torch.allclose(density, turned, atol=1e-3)
    # Closed form, for angles that are on the circle already.
    inside = (z.abs() < torch.pi).all(-1)
    value = z if units else z[..., 0]
    direct = pair.prior().log_prob(value) + pair.likelihood(value).log_prob(x)
    assert torch.allclose(density[inside], direct[inside], atol=1e-4)


def rows(number: int, units: int) -> Tensor:
    shape = (number, units) if units else (number,)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))

"""A wrong mean of an element is the decoder's fault, although it also makes residuals larger."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian

import pyro_vae as pv
from pyro_vae.diagnostics import verdict

WEIGHT = torch.tensor([[0.9, 0.0], [-0.6, 0.0], [0.45, 0.0], [0.0, 0.9], [0.0, -0.5], [0.0, 0.4]])
NOISE = 0.35


def checked(change, noise=NOISE, n=400):
    """The exact pair of a model with this noise, on data of the noise 0.35 and a changed mean."""
    torch.manual_seed(0)
    z = torch.randn(n, 2).double()
    loc = z @ WEIGHT.T.double()
    change(loc, z)
    x = loc + NOISE * torch.randn(n, 6)
    pair = LinearGaussian(WEIGHT.double(), noise)
    found = pv.model_check(pair, x, num_samples=50, progress=False)
    return found, [blame.part for blame in verdict.blamed({"model_check": found})]


def nothing(loc, z):
    pass


def offset(loc, z):
    loc[:, 5] += 0.5


def square(loc, z):
    loc[:, 1] = -0.6 * z[:, 0].square()


def interaction(loc, z):
    loc[:, 2] += 0.4 * z[:, 0] * z[:, 1]


@pytest.mark.parametrize("change", [offset, square, interaction])
def test_a_wrong_mean_of_one_element_is_charged_to_the_decoder_first(change):
    found, parts = checked(change)
    assert parts[0] == "decoder"
    assert found.regression.deviations > 5


def test_an_offset_has_its_size_and_leaves_the_scale():
    found, parts = checked(offset)
    # z takes up a part of the offset d: the residual keeps s^2 (W W' + s^2 I)^-1 d, in units of s.
    covariance = (WEIGHT @ WEIGHT.T + NOISE**2 * torch.eye(6)).double()
    rest = NOISE * torch.linalg.solve(covariance, torch.tensor([0, 0, 0, 0, 0, 0.5]).double())
    assert found.regression.value == pytest.approx(0.5 * rest.square().sum().item(), rel=0.2)
    assert abs(found.scale.value) < 0.1
    assert parts == ["decoder"]


@pytest.mark.parametrize(("noise", "side"), [(2 * NOISE, "wide"), (NOISE / 2, "narrow")])
def test_a_wrong_noise_is_charged_to_the_scale_first(noise, side):
    found, parts = checked(nothing, noise)
    assert parts[0] == "likelihood scale"
    assert (found.scale.value < 0) == (side == "wide")
    assert abs(found.regression.value) < 0.3 * found.scale_nats


def test_the_exact_pair_has_no_fault():
    assert checked(nothing)[1] == []


def test_an_element_that_is_almost_sure_does_not_hide_the_others():
    """One more element has residuals near 0, and rarely a large one, as background pixels have."""

    class WithBackground(LinearGaussian):
        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                loc = torch.cat([z @ self.weight.T, x.new_zeros(len(x), 1)], 1)
                scale = torch.tensor([*[NOISE] * 6, 1e-4]).double()
                pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)

        def guide(self, x):
            super().guide(x[:, :6])

        def template(self, n):
            return (torch.zeros(n, 7).double(),)

    torch.manual_seed(0)
    z = torch.randn(400, 2).double()
    x = z @ WEIGHT.T.double() + NOISE * torch.randn(400, 6)
    x[:, 5] += 0.5
    background = torch.zeros(400, 1).double()
    background[:2] = 1.0  # 10,000 deviations
    pair = WithBackground(WEIGHT.double(), NOISE)
    found = pv.model_check(pair, torch.cat([x, background], 1), num_samples=50, progress=False)
    assert found.regression.deviations > 5
    assert found.regression.value == pytest.approx(0.9, abs=0.3)

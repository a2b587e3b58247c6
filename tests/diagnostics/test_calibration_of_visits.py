"""Calibration of latents in a plate inside the datum."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv


class Visits(nn.Module):
    """Three visits of each patient; the guide is exact if ``own`` is true."""

    def __init__(self, own: bool = True) -> None:
        super().__init__()
        self.own, self.slope = own, nn.Parameter(torch.tensor(0.5))

    def model(self, x: Tensor) -> None:
        with pyro.plate("patients", len(x), dim=-1), pyro.plate("visits", 3, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.mT)

    def guide(self, x: Tensor) -> None:
        seen = x if self.own else x.flip(0)  # flipped: each patient gets the visits of another
        with pyro.plate("patients", len(x), dim=-1), pyro.plate("visits", 3, dim=-2):
            pyro.sample("z", dist.Normal(self.slope * seen.mT, 0.5**0.5))

    def template(self, n: int) -> tuple[Tensor]:
        return (torch.zeros(n, 3),)


@pytest.mark.parametrize("own", [True, False])
def test_the_visits_of_each_patient_are_ranked(own):
    options = {"num_simulations": 200, "num_draws": 19, "level": 0.001, "progress": False}
    total = {"total": lambda z, x: z["z"].sum(1) - x.sum(1)}
    found = pv.calibration(Visits(own), test_quantities=total, **options)
    assert found.names == ("z[0]", "z[1]", "z[2]", "log p(x, z)", "log p(x | z)", "total")
    assert found.calibrated == own

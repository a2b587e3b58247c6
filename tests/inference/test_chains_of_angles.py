"""What chains say about an angle does not depend on where the circle is cut."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.inference.chains import Posterior, compared

MEASURES = ("r_hat", "effective_sample_size", "shift", "scale_ratio", "disagreement")


def wrapped(z: Tensor) -> Tensor:
    return (z + torch.pi) % (2 * torch.pi) - torch.pi


def judged(turn: float, apart: float = 0.0) -> Posterior:
    """Two data with two angles and a number each, turned around the circle.

    The second chain of the first angle is ``apart`` from the first chain.
    """
    generator = torch.Generator().manual_seed(0)
    draws = 0.3 * torch.randn(2, 200, 2, 3, generator=generator, dtype=torch.float64)
    guide = 0.1 + 0.4 * torch.randn(400, 2, 3, generator=generator, dtype=torch.float64)
    draws[1, :, :, 0] += apart
    of = {"angle": wrapped(draws[..., :2] + turn), "number": draws[..., 2:]}
    by = {"angle": wrapped(guide[..., :2] + turn), "number": guide[..., 2:]}
    return compared(of, by, torch.zeros(2), {"angle"})


@pytest.mark.parametrize("turn", [1.5, torch.pi, -2.9])
def test_a_turn_changes_no_measure(turn):
    there, here = judged(turn), judged(0.0)
    for name in MEASURES:
        torch.testing.assert_close(getattr(there, name), getattr(here, name))
    torch.testing.assert_close(there.moments.correlation, here.moments.correlation)
    off = wrapped(there.centers["angle"] - here.centers["angle"] - turn)
    assert off.abs().max() < 1e-6
    assert there.draws["angle"].abs().max() <= torch.pi
    # By hand, at turn 0, where the posterior is far from the cut.
    direct = here.draws["angle"].flatten(0, 1)
    torch.testing.assert_close(here.moments.mean[:, :2], direct.mean(0))
    torch.testing.assert_close(here.moments.standard_deviation[:, :2], direct.std(0))


@pytest.mark.parametrize("turn", [0.0, torch.pi])
@pytest.mark.parametrize("apart", [1.5, torch.pi])
def test_chains_in_different_directions_do_not_agree(turn, apart):
    found = judged(turn, apart)
    assert (found.r_hat[:, 0] > 1.2).all()
    assert (found.r_hat[:, 1] < 1.05).all()


def test_a_number_is_not_judged_as_an_angle():
    """Chains of a number at both ends of [-pi, pi] do not agree."""
    ends = torch.tensor([-3.0, 3.0])[:, None, None, None] + 0.05 * torch.randn(2, 100, 1, 1)
    found = compared({"z": ends}, {"z": ends.flatten(0, 1)}, torch.zeros(1))
    assert found.r_hat.item() > 1.5
    assert found.centers == {}


class Compass(nn.Module):
    """A direction that all data share or that each datum has, seen with noise."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.shared, self.loc = shared, nn.Parameter(torch.tensor(3.1))

    def model(self, x: Tensor) -> None:
        if self.shared:
            z = pyro.sample("z", dist.VonMises(0.0, 0.5))
        with pyro.plate("data", len(x)):
            if not self.shared:
                z = pyro.sample("z", dist.VonMises(0.0, 0.5))
            pyro.sample("x", dist.VonMises(z, 5.0), obs=x)

    def guide(self, x: Tensor) -> None:
        if self.shared:
            pyro.sample("z", dist.VonMises(self.loc, 25.0))
        else:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.VonMises(x + 0 * self.loc, 5.0))


@pytest.mark.parametrize("shared", [True, False])
def test_nuts_judges_a_direction_near_pi(shared):
    x = torch.tensor([3.1, -3.1, 3.0, -3.0, 3.14])
    options = {"num_draws": 30, "warmup": 20, "num_chains": 2, "engine": "eager"}
    found = pv.nuts(Compass(shared), x if shared else x[:1], progress=False, **options)
    judged = found.shared if shared else found
    assert set(judged.centers) == {"z"}
    assert wrapped(judged.moments.mean - torch.pi).abs().max() < 0.4
    assert judged.moments.standard_deviation.max() < 1.0
    assert 0.4 < judged.scale_ratio.item() < 2.5
    assert judged.shift.abs().item() < 1.5

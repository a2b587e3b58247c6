"""Collapse alarms where masks hide latents, and where a KL is negative."""

from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from masks_helpers import Latent, same
from torch import nn

import pyro_vae as pv
from pyro_vae.training.collapse import CollapseAlarm, is_negative, units
from pyro_vae.training.history import Epoch


def epochs(kl):
    return [Epoch(i + 1, 0, 0, 0, {"z": k}, None, 1.0, 0, 0, 0) for i, k in enumerate(kl)]


def alarm(kl, draws, are_kl=True):
    """The alarm for a site of three units after epochs of this KL, and what it said."""
    found = CollapseAlarm({"z": 3}, 20, 100, draws, are_kl)
    heard = [epoch.epoch for epoch in epochs(kl) if found.heard(epoch)]
    return found, heard


def test_a_negative_kl_is_an_inconsistency_and_no_collapse():
    found, heard = alarm([-0.1] * 20, 1000)
    assert (found.collapsed, found.inconsistent, heard) == ((), ("z",), [5])
    assert found.words("z").startswith("the KL of latent site 'z' has been negative for 20 epochs")
    assert "model and guide disagree" in found.words("z")
    # What Monte Carlo error explains is a collapse; a term that is not a KL may be negative.
    found, heard = alarm([-0.007] * 20, 1000)
    assert (found.collapsed, found.inconsistent, heard) == (("z",), (), [10])
    assert "has collapsed" in found.words("z")
    found, heard = alarm([-0.1] * 20, 1000, are_kl=False)
    assert (found.collapsed, found.inconsistent, heard) == ((), (), [])


def test_the_error_of_a_collapsed_kl_is_within_what_is_allowed():
    """Of q = N(m, 1) and p = N(0, 1), for the worst m: estimates are N(k, 2k) with k = m^2 / 2."""
    n, generator = 100, torch.Generator().manual_seed(0)
    k = 8 / n
    means = k + (2 * k / n) ** 0.5 * torch.randn(100_000, generator=generator)
    share = sum(is_negative(value, n) for value in means.tolist()) / 100_000
    assert 0 < share < 1e-4  # four standard errors, on one side: 3e-5
    assert is_negative(-8.1 / n, n)


class Factored(nn.Module):
    """The guide's density of z is 1/e of one that integrates to 1: the KL is -1 too low."""

    def __init__(self, off):
        super().__init__()
        self.off, self.loc = off, nn.Parameter(torch.zeros(()).double())

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(self.loc, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", Unnormalized(x.new_zeros(len(x)), 1.0, self.off))


class Unnormalized(dist.Normal):
    arg_constraints: ClassVar = {}

    def __init__(self, loc, scale, off):
        self.off = off
        super().__init__(loc, scale, validate_args=False)

    def expand(self, shape, _instance=None):
        return Unnormalized(self.loc.expand(shape), 1.0, self.off)

    def log_prob(self, value):
        return super().log_prob(value) - self.off


@pytest.mark.sample(1)
@pytest.mark.parametrize("off", [0.0, 1.0])
def test_fit_and_diagnose_tell_the_two_apart(off):
    x = torch.randn(60, generator=torch.Generator().manual_seed(0)).double()
    settings = {"epochs": 20, "batch_size": 10, "engine": "eager", "progress": False}
    words = "has been negative for .* model and guide disagree" if off else "has collapsed"
    with pytest.warns(UserWarning, match=words):
        history = pv.fit(Factored(off), x, **settings)
    assert history.inconsistent == (("z",) if off else ())
    assert history.collapsed == (() if off else ("z",))
    summary = pv.diagnose(Factored(off), x, budget=3, progress=False).summary
    assert ("model and guide disagree" in summary) == bool(off)
    assert ("'z' has collapsed" in summary) == (not off)


def test_padding_is_not_a_collapse():
    """A latent that counts for one row in fifty has little KL per example, and is used."""
    live = (torch.arange(500) % 50 == 0)[:, None] & torch.ones(2, dtype=torch.bool)
    pair = Latent(same, same, events=True)
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)).double() * 2**0.5
    assert units(pair, (x, live)) == {"z": 0.04}
    result = pv.evaluate(pair, x, live, num_samples=1)
    assert result.kl_by_site["z"] < 0.02  # the threshold without the mask
    found = CollapseAlarm(units(pair, (x, live)), 20, 100, 500)
    assert not any(found.heard(epoch) for epoch in epochs([result.kl_by_site["z"]] * 20))

"""A guide that covers one of two modes: weights never show it, so another tool must look."""

from math import log

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from verdict_helpers import annealed, checked, gaps, moments, ranks, weights

import pyro_vae as pv
from pyro_vae.diagnostics import signs, verdict
from pyro_vae.diagnostics.global_studies import limited
from pyro_vae.diagnostics.study import Finding
from pyro_vae.pairs.rng import seeded

NOISE = 0.2


class OneMode(nn.Module):
    """x ~ N(|z|, 0.2), z ~ N(3 s, 1) with a random sign s: two modes, of which the guide has one.

    The guide is the exact posterior of the positive mode.
    """

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            halves = dist.Categorical(x.new_ones(len(x), 2) / 2)
            modes = dist.Normal(x.new_tensor([3.0, -3.0]).expand(len(x), 2), 0.5)
            z = pyro.sample("z", dist.MixtureSameFamily(halves, modes))
            pyro.sample("x", dist.Normal(z.abs(), NOISE), obs=x)

    def guide(self, x):
        precision = 1 / 0.5**2 + 1 / NOISE**2
        mean = (3.0 / 0.5**2 + x / NOISE**2) / precision
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(mean, precision**-0.5))


@pytest.fixture(scope="module")
def found():
    """What tools find that see only draws of the guide, beside the exact log p(x)."""
    with seeded(0):
        x = 3.0 + (0.5**2 + NOISE**2) ** 0.5 * torch.randn(60)
    pair, exact = OneMode(), dist.Normal(3.0, (0.5**2 + NOISE**2) ** 0.5).log_prob(x)
    return {
        "pair": pair,
        "x": x,
        "exact": exact.mean().item(),
        "log_likelihood": pv.log_likelihood(pair, x, num_samples=100),
        "local_calibration": pv.local_calibration(pair, x, num_samples=50, progress=False),
    }


def kinds(**results):
    _, said = verdict.findings(results, torch.arange(100))
    return {finding.about: finding.kind for finding in said}


def test_log_p_of_one_mode_is_not_trusted(found):
    weighed = found["log_likelihood"]
    assert not weighed.unreliable.any()
    assert found["exact"] - weighed.value == pytest.approx(log(2), abs=1e-3)
    tools = {name: found[name] for name in ("log_likelihood", "local_calibration")}
    assert kinds(**tools) == {"guide": "unchecked", "log p(x)": "unchecked", "ELBO": "unchecked"}


def test_annealing_that_agrees_does_not_help_since_it_starts_at_the_guide(found):
    lengths = {"num_temperatures": 40, "num_chains": 8, "engine": "eager", "progress": False}
    same = pv.anneal(found["pair"], found["x"][:6], **lengths)
    tools = {"log_likelihood": found["log_likelihood"], "annealing": same}
    assert same.value - tools["log_likelihood"].per_datum[:6].mean() == pytest.approx(0, abs=1e-3)
    assert kinds(**tools)["log p(x)"] == "unchecked"


def test_true_values_of_own_data_show_the_other_mode(found):
    """Half of them are in the mode that the guide misses."""
    pair = found["pair"]
    pair.template = lambda n: (torch.zeros(n),)
    checked_by = {
        "model_check": pv.model_check(pair, found["x"], num_samples=50, progress=False),
        "calibration": pv.calibration(pair, num_simulations=100, num_draws=19, progress=False),
    }
    for name, result in checked_by.items():
        tools = {"log_likelihood": found["log_likelihood"], name: result}
        assert "log p(x)" not in {
            about for about, kind in kinds(**tools).items() if kind == "trust"
        }
    tools = {"log_likelihood": found["log_likelihood"], **checked_by}
    assert verdict.blamed(tools)[0].part == "family"
    assert kinds(**tools)["log p(x)"] == "doubt"


@pytest.mark.parametrize(
    ("results", "looked"),
    [
        ({}, False),
        ({"model_check": checked()}, True),
        ({"model_check": checked(bridged=99)}, False),
        ({"model_check": checked(bridged=100)}, True),
        ({"calibration": ranks()}, True),
        ({"calibration": ranks(mean=0.3)}, False),  # it may be off because of the missing mass
        ({"calibration": ranks(mean=0.3), "model_check": checked()}, True),
        ({"annealing": annealed()}, False),
        ({"local_calibration": moments(), "gaps": gaps()}, False),
    ],
)
def test_which_results_have_looked_for_missing_mass(results, looked):
    results = {"log_likelihood": weights(error=0.0), **results}
    assert verdict.looked_for_mass(results) == looked
    assert kinds(**results)["log p(x)"] == ("trust" if looked else "unchecked")


def test_annealing_that_is_higher_takes_the_trust_although_the_guide_is_off_in_other_ways():
    results = {
        "log_likelihood": weights(gap=0.2, error=0.01),
        "annealing": annealed(0.5, 0.01),
        "local_calibration": moments(shift=0.5),
        "model_check": checked(),
    }
    assert signs.missing_mass(results) is None
    assert kinds(**results) == {
        "encoder": "fault",
        "model": "trust",
        "log p(x)": "doubt",
        "ELBO": "doubt",
    }
    _, said = verdict.findings(results, torch.arange(100))
    (words,) = (f.words for f in said if f.about == "log p(x)")
    assert words.endswith(
        "it is too low, since annealing gives a higher value (by 0.50 ± 0.01 nats, 20 data)"
    )


def test_a_finding_that_rests_on_unchecked_latents_keeps_what_it_is_about():
    one = Finding("trust", "log p(x) = 1", "log p(x)")
    (said,) = limited([one], [Finding("unchecked", "the guide of 'w': not run")], ["w"], ["z"])
    assert (said.kind, said.about) == ("unchecked", "log p(x)")

"""Data that a pair draws with labels of some rows: known labels are drawn, missing ones stay."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_vae as pv
from pyro_vae.diagnostics import verdict
from pyro_vae.pairs import data_plate
from pyro_vae.pairs.data_plate_search import find_places
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.simulation import simulate

CENTERS = torch.tensor([[1.5, 0.0, 0.5], [-1.0, 1.0, 0.0], [0.0, -1.0, -1.0]])
SLOPES = torch.tensor([[0.8, -0.5, 0.6]])
NOISE = 0.7


class Labeled(nn.Module):
    """y uniform, z ~ N(0, 1), x ~ N(z * SLOPES + center of y, NOISE^2), and a label of some rows.

    The guide is the exact posterior. Without a label, q(y | x) is it to the power ``power``.
    """

    def __init__(self, power=1.0):
        super().__init__()
        self.power = power

    def model(self, x, labels):
        with pyro.plate("data", len(x), dim=-1):
            y = pyro.sample("y", dist.Categorical(torch.ones(3)))
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ SLOPES + CENTERS[y], NOISE).to_event(1), obs=x)
            with poutine.mask(mask=labels >= 0):
                one = torch.eye(3)[y]
                pyro.sample("label", dist.Categorical(logits=one.log()), obs=labels.clamp(min=0))

    def guide(self, x, labels):
        known = torch.eye(3)[labels.clamp(min=0)].log()
        logits = torch.where(labels[:, None] >= 0, known, self.power * self.log_joint(x))
        scale = (1 + SLOPES.square().sum() / NOISE**2) ** -0.5
        with pyro.plate("data", len(x), dim=-1):
            guess = dist.Categorical(logits=logits, validate_args=False)
            y = pyro.sample("y", guess, infer={"enumerate": "parallel"})
            mean = scale**2 * (x - CENTERS[y]) @ SLOPES.T / NOISE**2
            pyro.sample("z", dist.Normal(mean, scale).to_event(1))

    def template(self, n):
        return torch.zeros(n, 3), torch.full((n,), -1)

    def log_joint(self, x):
        """log p(x, y), (n, 3)."""
        covariance = SLOPES.T @ SLOPES + NOISE**2 * torch.eye(3)
        density = torch.distributions.MultivariateNormal(CENTERS, covariance)
        return density.log_prob(x[:, None]) - math.log(3)


def drawn(n, share=0.3):
    """Rows of the model; the labels come first, as in most files."""
    with seeded(0):
        y = torch.randint(3, (n,))
        x = torch.randn(n, 1) @ SLOPES + CENTERS[y] + NOISE * torch.randn(n, 3)
    return x, torch.where(torch.arange(n) < share * n, y, -1)


@pytest.mark.parametrize("first", [[0, 1, 2], [-1, -1, -1], [2, -1, 0]])
def test_known_labels_are_drawn_and_missing_ones_stay_missing(first):
    """The first rows tell which tensor a site observes. If they have labels, all rows seemed to."""
    pair = Labeled()
    labels = torch.tensor(first + [0, -1] * 2000)
    with using(pair, 0):
        find_places(pair, (torch.zeros(len(labels), 3), labels))
        assert data_plate.known(pair) is not None
        (x, own), values = simulate(pair, len(labels), (labels,))
    known = labels >= 0
    assert torch.equal(own >= 0, known)
    assert torch.equal(own[known], values["y"][known])
    assert not torch.equal(own, labels)
    shares = torch.bincount(own[known], minlength=3) / known.sum()
    assert torch.allclose(shares, torch.full((3,), 1 / 3), atol=0.05)
    assert torch.allclose(x[own == 1].mean(0), CENTERS[1], atol=0.2)


def test_an_exact_pair_with_some_labels_is_checked_and_trusted():
    pair, (x, labels) = Labeled(), drawn(600)
    found = pv.calibration(pair, labels, num_simulations=300, num_draws=29, progress=False)
    assert found.failures == {}
    told = pv.model_check(pair, x, labels, num_samples=50, progress=False)
    assert told.marginal_p > 0.001
    assert not told.own_unreliable.any()
    assert told.missed.value == pytest.approx(0, abs=1e-4)
    log_joint = pair.log_joint(x).double()
    exact = torch.where(
        labels >= 0,
        log_joint.gather(1, labels.clamp(min=0)[:, None])[:, 0],
        log_joint.logsumexp(1),
    )
    torch.testing.assert_close(told.log_likelihood, exact, atol=1e-4, rtol=0)


def test_a_classifier_that_is_too_unsure_is_rejected():
    _, labels = drawn(600)
    found = pv.calibration(Labeled(0.1), labels, num_simulations=300, num_draws=29, progress=False)
    assert "log p(x, z)" in found.failures  # the ranks of y alone are even, as its values are alike


class Computed(Labeled):
    """A label that is a function of the context cannot be written into a batch."""

    def model(self, x, labels):
        super().model(x, 2 - labels)


def test_a_label_that_the_model_computes_is_refused():
    labels = torch.tensor([0, 1, 2, 0])
    with pytest.raises(pv.UsageError, match="at site 'label' cannot be written into a batch"):
        pv.calibration(Computed(), labels, num_simulations=100, num_draws=19, progress=False)


@pytest.mark.parametrize(("weights", "fault"), [([1.0, 1.0, 1.0], False), ([8.0, 1.0, 1.0], True)])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_classes_of_other_frequencies_are_a_fault_of_the_prior(weights, fault, share):
    """The class y is the only code that shows them: z does not depend on it."""
    with seeded(0):
        y = torch.tensor(weights).multinomial(600, True)
        x = torch.randn(600, 1) @ SLOPES + CENTERS[y] + NOISE * torch.randn(600, 3)
    labels = torch.where(torch.arange(600) < share * 600, y, -1)
    found = pv.model_check(Labeled(), x, labels, num_samples=50, progress=False)
    parts = [blame.part for blame in verdict.blamed({"model_check": found})]
    assert parts[:1] == (["prior"] if fault else [])
    assert (found.codes["y"].nats > 0.1) is fault

"""Simulation-based checks on rows with missing entries: the masks are those of real rows."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.models.exact import linear_gaussian
from pyro_vae.parts.missing import PartlyObserved

WIDTH, LATENT = 6, 2


class Holes(nn.Module):
    """The linear-Gaussian pair on rows with NaN. Its guide is exact, or takes NaN for 0."""

    def __init__(self, zeros=False):
        super().__init__()
        self.exact, self.zeros = linear_gaussian(), zeros

    def model(self, x, *context):
        exact = self.exact
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            fn = dist.Normal(z @ exact.weight.T + exact.bias, exact.noise)
            pyro.sample("x", PartlyObserved(fn).to_event(1), obs=x)

    def guide(self, x, *context):
        w, s = self.exact.weight, self.exact.noise
        seen = torch.ones_like(x, dtype=torch.bool) if self.zeros else ~x.isnan()
        precision = torch.einsum("nj,ja,jb->nab", seen.double(), w, w) / s**2
        covariance = torch.linalg.inv(precision + torch.eye(LATENT).double())
        off = torch.where(seen, x.nan_to_num() - self.exact.bias, 0.0)
        loc = torch.einsum("nab,jb,nj->na", covariance, w, off) / s**2
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(loc, covariance))

    def template(self, n):
        return (torch.zeros(n, WIDTH).double(),)


class Counted(Holes):
    """The context is the number of missing entries of its row."""

    def guide(self, x, number):
        assert torch.equal(x.isnan().sum(1), number)
        super().guide(x)

    def template(self, n):
        return (*super().template(n), torch.zeros(n, dtype=torch.long))


def missing(n=50, share=0.4):
    return torch.rand(n, WIDTH, generator=torch.Generator().manual_seed(0)) < share


def checked(pair, holes, *context, **more):
    settings = {"num_simulations": 1000, "num_draws": 39, "progress": False}
    return pv.calibration(pair, *context, missing=holes, **settings | more)


def test_the_exact_guide_of_partly_observed_rows_passes():
    found = checked(Holes(), missing())
    assert found.calibrated
    assert found.left_out == {}
    assert bool((found.score_means.abs() < 4 * found.score_mean_errors).all())


def test_a_guide_that_takes_missing_entries_for_zero_is_found_only_on_rows_that_miss_some():
    pair = Holes(zeros=True)
    assert pv.calibration(pair, num_simulations=1000, num_draws=39, progress=False).calibrated
    assert checked(pair, missing() & False).calibrated
    found = checked(pair, missing())
    assert not found.calibrated
    assert bool((found.score_deviations[:2] > 1.3).all())  # it believes the zeros: too narrow


def test_nothing_observed_leaves_the_prior():
    """The guide of an empty row is N(0, I), so that ranks of z are uniform, and p(x | z) is 1."""
    found = checked(
        Holes(), missing() | True, test_quantities={"nan": lambda z, x: x.isnan().sum(1)}
    )
    assert found.calibrated
    spread = found.ranks[:, found.names.index("log p(x | z)")].double()
    assert spread.std().item() == pytest.approx(40 / 12**0.5, rel=0.1)  # ties are broken at random


def test_the_holes_are_those_of_the_row_that_gives_the_context():
    holes = missing()
    found = checked(Counted(), holes, holes.sum(1), num_simulations=200)
    assert len(found.ranks) == 200


def test_tarp_has_holes_too():
    settings = {"missing": missing(), "num_simulations": 1000, "num_draws": 39}
    assert pv.tarp(Holes(), **settings).calibrated
    assert pv.tarp(Holes(zeros=True), **settings).words == "draws are too narrow"


def test_the_classifier_learns_from_rows_with_the_holes_of_the_data():
    x = torch.where(missing(30), torch.nan, linear_gaussian().marginal().sample((30,)).detach())
    settings = {"num_simulations": 300, "num_draws": 20, "num_null": 19, "progress": False}
    assert pv.local_c2st(Holes(), x, **settings).overall_p_value > 0.05
    assert pv.local_c2st(Holes(zeros=True), x, **settings).overall_p_value == 0.05


@pytest.mark.parametrize(
    ("pair", "holes", "words"),
    [
        (Holes(), missing()[:, :4], r"missing must be booleans of shape \(n, 6\)"),
        (Holes(), missing().double(), "got torch.float64 of shape"),
        (Holes(), missing()[:0], r"need at least 1 row, got 0"),
        (linear_gaussian(), missing(), "missing needs a likelihood that leaves out"),
    ],
)
def test_holes_that_do_not_fit_are_refused(pair, holes, words):
    with pytest.raises(pv.UsageError, match=words):
        checked(pair, holes)
    with pytest.raises(pv.UsageError, match=words):
        pv.tarp(pair, missing=holes)


def test_context_and_holes_are_of_the_same_rows():
    with pytest.raises(pv.UsageError, match="the context and missing have 40, 50 rows"):
        checked(Counted(), missing(), torch.zeros(40, dtype=torch.long))

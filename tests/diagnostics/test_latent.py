"""The KL split and disentanglement scores, compared with closed forms and hand calculations."""

from math import log

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import make, rows
from torch import nn
from torch.quasirandom import SobolEngine

import pyro_vae as pv
from pyro_vae.data.shapes import FACTORS, POSITIONS, draw
from pyro_vae.diagnostics import disentanglement
from pyro_vae.pairs.rng import seeded


class Gaussian(nn.Module):
    """x ~ N(0, S), q(z|x) = N(A x + c, T) and p(z) = N(0, I), so every part of the KL is known."""

    def __init__(self, full_rank=False):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([[0.9, 0.3], [-0.9, 0.4], [0.8, 0.5]]).double())
        self.offset = torch.tensor([0.9, -0.8, 0.7]).double()
        noise = torch.tensor([0.6, 0.8, 0.5]).double()
        self.factor = noise.diag()
        if full_rank:
            self.factor[2, 0] = 0.4
        self.full_rank = full_rank
        self.spread = torch.tensor([[1.0, 0.0], [0.7, 0.9]]).double()

    def data(self, n):
        """Rows that cover the normal distribution evenly (Sobol sequence)."""
        uniform = SobolEngine(2, scramble=True, seed=0).draw(n, dtype=torch.float64)
        return torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9)) @ self.spread.T

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.slope, 1.0).to_event(1), obs=x)

    def guide(self, x):
        loc = x @ self.slope.T + self.offset
        with pyro.plate("data", len(x), dim=-1):
            if self.full_rank:
                pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=self.factor))
            else:
                pyro.sample("z", dist.Normal(loc, self.factor.diagonal()).to_event(1))

    def closed(self):
        """Mutual information, aggregate KL, total correlation, KL by unit, information by unit."""
        noise = self.factor @ self.factor.T
        both = self.slope.detach() @ self.spread
        covariance = both @ both.T + noise
        variance, log_det = covariance.diagonal(), torch.logdet(covariance)
        correlation = 0.5 * (variance.log().sum() - log_det)
        by_unit = 0.5 * (variance + self.offset.square() - 1 - variance.log())
        information = 0.5 * (variance / noise.diagonal()).log()
        return (
            0.5 * (log_det - torch.logdet(noise)),
            correlation + by_unit.sum(),
            correlation,
            by_unit,
            information,
        )


def test_parts_of_the_kl_are_their_gaussian_closed_forms():
    """Compare within 2 %; the error of the draws is about half a percent."""
    pair = Gaussian()
    parts = pv.kl_parts(pair, pair.data(500), num_samples=120)["z"]
    information, aggregate, correlation, by_unit, by_unit_information = pair.closed()
    found = {
        "information": (parts.mutual_information.value, information),
        "aggregate": (parts.aggregate_kl.value, aggregate),
        "correlation": (parts.total_correlation.value, correlation),
        "kl": (parts.kl.value, information + aggregate),
        **{f"kl {j}": (parts.unit_kl[j].item(), by_unit[j]) for j in range(3)},
        **{
            f"information {j}": (parts.unit_information[j].item(), by_unit_information[j])
            for j in range(3)
        },
    }
    for name, (value, closed) in found.items():
        assert value == pytest.approx(float(closed), rel=0.02), name
    upper = parts.mutual_information_upper.value
    assert parts.mutual_information.value < upper < 1.03 * information
    assert parts.num_examples == 500


def test_the_parts_add_up():
    pair = Gaussian()
    parts = pv.kl_parts(pair, pair.data(600), num_samples=2)["z"]
    assert parts.kl.value == pytest.approx(
        parts.mutual_information.value + parts.aggregate_kl.value
    )
    assert parts.aggregate_kl.value == pytest.approx(
        parts.total_correlation.value + parts.unit_kl.sum().item()
    )
    lines = str(parts).splitlines()
    assert len(lines) == 6
    assert lines[1].startswith("mutual information")


def test_the_standard_error_is_that_of_data_and_draws():
    pair = Gaussian()
    found = []
    for seed in range(30):
        with seeded(seed):
            x = torch.randn(200, 2, dtype=torch.float64) @ pair.spread.T
        found.append(pv.kl_parts(pair, x, seed=seed)["z"].kl)
    values, errors = torch.tensor(found).T
    assert 0.6 < values.std() / errors.mean() < 1.5


def test_few_data_bound_the_information_from_both_sides():
    """Poole et al., 2019: bounds in the mean over data sets; 20 rows, 1.6 nats of information."""
    pair = Gaussian()
    information = pair.closed()[0].item()
    lower, upper = [], []
    for seed in range(40):
        with seeded(seed):
            x = torch.randn(20, 2, dtype=torch.float64) @ pair.spread.T
        parts = pv.kl_parts(pair, x, num_samples=5, seed=seed)["z"]
        lower.append(parts.mutual_information.value)
        upper.append(parts.mutual_information_upper.value)
    assert np.mean(lower) < information - 2 * np.std(lower) / 40**0.5
    assert np.mean(upper) > information + 2 * np.std(upper) / 40**0.5
    assert max(lower) < log(20)


class Apart(nn.Module):
    """A posterior whose mean is so many times x, with nothing of x in the model."""

    def __init__(self, apart):
        super().__init__()
        self.apart = nn.Parameter(torch.tensor(apart).double())

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(x.new_zeros(1), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.apart * x, 0.5).to_event(1))


@pytest.mark.parametrize("n", [2, 3, 7])
def test_bounds_of_the_information_at_both_ends(n):
    """Posteriors that are all one have no information by either bound, exactly; those that never
    meet have log n by the lower one, and by the upper one the mean distance of two in nats."""
    x = torch.arange(n).double()[:, None]
    none = pv.kl_parts(Apart(0.0), x)["z"]
    assert none.mutual_information.value == pytest.approx(0, abs=1e-12)
    assert none.mutual_information_upper.value == pytest.approx(0, abs=1e-12)
    assert none.unit_information.tolist() == pytest.approx([0], abs=1e-12)
    all_ = pv.kl_parts(Apart(100.0), x)["z"]
    assert all_.mutual_information.value == pytest.approx(log(n))
    assert all_.unit_information.tolist() == pytest.approx([log(n)])


def test_the_upper_bound_of_the_information_by_hand():
    """Of two data the others' mean is the other one: the bound is the mean KL of the two."""
    x = torch.tensor([[0.0], [1.0]]).double()
    found = pv.kl_parts(Apart(2.0), x, num_samples=500)["z"]
    apart = 2.0**2 / (2 * 0.5**2)
    draws = 500 * 2
    error = (2 * apart / draws) ** 0.5  # the log ratio is normal, of variance twice its mean
    assert found.mutual_information_upper.value == pytest.approx(apart, abs=5 * error)


def test_a_posterior_of_dependent_units_has_information_alone():
    pair = Gaussian(full_rank=True)
    parts = pv.kl_parts(pair, pair.data(500), num_samples=60)["z"]
    information, aggregate, *_ = pair.closed()
    assert parts.mutual_information.value == pytest.approx(information.item(), rel=0.02)
    assert parts.aggregate_kl.value == pytest.approx(aggregate.item(), abs=0.04)
    assert parts.total_correlation is parts.unit_kl is parts.unit_information is None
    assert "total correlation" not in str(parts)


def test_a_prior_of_dependent_units_leaves_the_kl_by_unit_out():
    batch = rows("mixture-prior", 30)
    parts = pv.kl_parts(make("mixture-prior"), *batch)["z"]
    assert parts.unit_kl is None
    assert parts.total_correlation is not None
    assert parts.unit_information.shape == (2,)


@pytest.mark.parametrize("name", ["flows", "conditional", "text"])
def test_other_pairs_work(name):
    batch = rows(name, 30)
    parts = pv.kl_parts(make(name), *batch)["z"]
    assert parts.kl.value == pytest.approx(
        parts.mutual_information.value + parts.aggregate_kl.value
    )
    assert -1e-6 < parts.mutual_information.value < log(30)


def test_chunks_make_no_difference(monkeypatch):
    pair = make("bernoulli")
    (x,) = rows("bernoulli", 25)
    whole = pv.kl_parts(pair, x)["z"]
    draws = []
    monkeypatch.setattr("pyro_vae.diagnostics.information.SCORED_ROWS", 10)
    for seed in range(40):
        draws.append(pv.kl_parts(pair, x, seed=seed)["z"])
    for name in ("kl", "mutual_information", "mutual_information_upper", "aggregate_kl"):
        values = torch.tensor([getattr(parts, name).value for parts in draws])
        assert abs(getattr(whole, name).value - values.mean()) < 5 * values.std()
    assert draws[0].num_examples == 25


def test_a_latent_that_depends_on_another_is_named_and_left_out():
    pair, batch = make("params"), rows("params", 20)
    pv.check(pair, batch)
    with pytest.warns(
        UserWarning, match="does not split the KL of 'b': it depends on the draw of another"
    ):
        assert list(pv.kl_parts(pair, *batch)) == ["a"]


@pytest.mark.parametrize(
    ("options", "n", "words"),
    [
        ({"num_samples": 0}, 9, "num_samples must be at least 1, got 0"),
        ({}, 1, "at least 2 rows of data, got 1"),
    ],
)
def test_kl_parts_refuse(options, n, words):
    with pytest.raises(pv.UsageError, match=words):
        pv.kl_parts(make("bernoulli"), *rows("bernoulli", n), **options)


GRID = torch.cartesian_prod(*(torch.arange(k) for k in (3, 4, 5, 6, 7)))


def test_a_code_that_is_the_factors_scores_1():
    """Permuted and rescaled codes, with additional useless units."""
    code = GRID[:, [3, 0, 4, 2, 1]].double() * torch.tensor([2.0, -0.1, 5, 1, -3]) + 7
    scores = pv.disentanglement_scores(torch.cat([code, torch.full((len(code), 2), 0.3)], 1), GRID)
    assert scores == pytest.approx((1.0,) * 6, abs=0.01)


def test_noise_scores_nearly_nothing():
    with seeded(0):
        scores = pv.disentanglement_scores(torch.randn(len(GRID), 8), GRID)
    assert max(scores[:4]) < 0.03
    assert -0.1 < scores.informativeness < 0.03
    assert 1 / 5 - 0.05 < scores.factor_vae < 1 / 5 + 0.08


def test_scores_of_a_rotated_code_fall():
    """Two factors rotated by an eighth: each unit has the same information about both."""
    grid = torch.cartesian_prod(torch.arange(9), torch.arange(9))
    turn = torch.tensor([[1.0, -1.0], [1.0, 1.0]]) / 2**0.5
    turned = pv.disentanglement_scores(grid.float() @ turn, grid)
    assert max(turned[:4]) < 0.05
    assert turned.informativeness > 0.7


def test_scores_by_hand():
    """A factor with four values: one unit knows it, one knows its half, one knows nothing."""
    factors = torch.cartesian_prod(torch.arange(4), torch.arange(2), torch.arange(50))[:, :1]
    factor = factors[:, 0]
    whole, half, other = factor, factor // 2, torch.arange(400) % 2
    codes = torch.stack([half, whole, other], 1).double()
    z, v = disentanglement._checked(codes, factors)
    assert disentanglement._mig(z, v) == pytest.approx((2 - 1) / 2)  # the factor has 2 bits
    assert disentanglement._sap(z, v) == pytest.approx(1 - 0.8)  # 0.5^2 / (1.25 * 0.25)


def test_purities_by_hand():
    """The definitions of Eastwood & Williams, with three units and two factors."""
    importances = np.array([[0.6, 0.0], [0.4, 0.4], [0.0, 0.6]])
    found, complete = disentanglement._purities(importances)
    assert found == pytest.approx(0.3 * 1 + 0.4 * 0 + 0.3 * 1)
    entropy = -(0.6 * log(0.6) + 0.4 * log(0.4)) / log(3)
    assert complete == pytest.approx(1 - entropy)


def test_informativeness_by_hand():
    """A unit that tells which half a factor of four values is in leaves a variance of 0.25 of
    1.25: the error of the forests is a root mean square, so 1 - sqrt(0.2) is left."""
    factors = torch.cartesian_prod(torch.arange(4), torch.arange(500))[:, :1]
    codes = torch.stack([factors[:, 0] // 2, torch.zeros(2000)], 1).double()
    scores = pv.disentanglement_scores(codes, factors)
    assert scores.informativeness == pytest.approx(1 - 0.2**0.5, abs=0.02)


def test_factor_vae_by_hand():
    """One unit knows two of three factors, so the majority vote is right half the time."""
    grid = torch.cartesian_prod(torch.arange(4), torch.arange(4), torch.arange(4))
    noise = torch.randn(64, generator=torch.Generator().manual_seed(0))
    codes = torch.stack([grid[:, 0], noise], 1)
    score = disentanglement._factor_vae(*disentanglement._checked(codes, grid), 0)
    # Factor 0 fixes the first unit. For the other factors, chance decides which unit varies less.
    assert 1 / 3 + 0.1 < score < 2 / 3 + 0.08


@pytest.mark.parametrize(
    ("codes", "factors", "words"),
    [
        (
            torch.zeros(5, 3),
            torch.zeros(4, 2).long(),
            r"shape \(n, factors\), got \(5, 3\) and \(4, 2\)",
        ),
        (torch.zeros(5), torch.zeros(5, 2).long(), r"got \(5,\) and"),
        (torch.zeros(5, 3), torch.rand(5, 2), "factors must be integers, got torch.float32"),
        (torch.rand(5, 3), torch.eye(5).long(), "in at least 6 rows, got 5"),
        (torch.rand(6, 3), torch.zeros(6, 2).long(), "factor 0 must have at least 2 values"),
        (torch.zeros(6, 3), torch.eye(6).long(), "of which at least one varies"),
        (torch.rand(6, 1), torch.eye(6).long(), "codes must have at least 2 units"),
        (torch.full((6, 2), torch.nan), torch.eye(6).long(), "codes must be finite"),
    ],
)
def test_scores_refuse(codes, factors, words):
    with pytest.raises(pv.UsageError, match=words) as caught:
        pv.disentanglement_scores(codes, factors)
    assert "\n" not in str(caught.value)


def test_shapes_are_all_combinations_each_once():
    images, factors = draw()
    assert len(images.flatten(1).unique(dim=0)) == len(images) == 3 * 4 * 6 * 8 * 8
    assert len(factors.unique(dim=0)) == len(factors)
    assert images.unique().tolist() == [0, 255]
    assert len(FACTORS) == factors.shape[1]


def test_shapes_are_where_and_as_large_as_their_factors_say():
    images, factors = draw()
    mass = (images[:, 0] > 0).double()
    pixels = torch.arange(32) + 0.5
    across = (mass.sum(1) * pixels).sum(1) / mass.sum((1, 2))
    down = (mass.sum(2) * pixels).sum(1) / mass.sum((1, 2))
    round_ = factors[:, 0] < 2  # the center of mass of a heart differs from its position
    assert (across - POSITIONS[factors[:, 3]])[round_].abs().max() < 0.3
    assert (down - POSITIONS[factors[:, 4]])[round_].abs().max() < 0.3
    area = mass.sum((1, 2)).reshape(3, 4, -1).mean(2)
    assert (area[:, 1:] > area[:, :-1] + 10).all()


def test_shapes_as_a_data_set():
    data = pv.load_data("shapes")
    again = pv.load_data("shapes")
    assert data.shape == (1, 32, 32)
    assert data.num_classes == 3
    for split in ("train", "validation", "test"):
        part = getattr(data, split)
        assert len(part.x) == len(part.labels) == len(part.factors)
        assert torch.equal(part.labels, part.factors[:, 0])
        assert torch.equal(part.x, getattr(again, split).x)
    images, factors = draw()
    place = {tuple(row): i for i, row in enumerate(factors.tolist())}
    for image, row in zip(data.test.x[:50], data.test.factors[:50].tolist(), strict=True):
        assert torch.equal(image, images[place[tuple(row)]])


def test_a_prior_that_is_not_one_for_all_data_is_not_split():
    with seeded(0):
        mixture = pv.MixtureVAE.mlp((6,), components=3, latent_dim=2, hidden=(5,))
        factor = pv.Factor(pv.MLP(3, (4,), 4), pv.DiagonalNormal(), (2,))
        conditional = pv.VAE.mlp((6,), 2, (5,), prior=factor, context_shapes=[(3,)])
    x, context = torch.rand(40, 6).round(), torch.eye(3)[torch.arange(40) % 3]
    for pair, batch in ((mixture, (x,)), (conditional, (x, context))):
        with pytest.raises(pv.UsageError, match="'z' has a prior that differs between data"):
            pv.kl_parts(pair, *batch)


def test_units_cannot_mix_one_factor_with_others():
    codes = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    found = pv.disentanglement_scores(codes, torch.arange(60)[:, None] % 4)
    assert found.disentanglement == 1

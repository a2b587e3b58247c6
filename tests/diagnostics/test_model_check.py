"""`model_check`: faults of the model are found, and faults of the guide are not charged to it."""

from math import log

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian, linear_gaussian
from torch import nn

import pyro_vae as pv
from pyro_vae.diagnostics import signs
from pyro_vae.diagnostics.two_samples import (
    clipped,
    correlation_statistic,
    difference,
    explained,
    scale_statistics,
    separation,
    some_columns,
)
from pyro_vae.pairs.rng import seeded
from pyro_vae.parts.distributions import LevelLogistic

N = 400


def data(pair, n=N, seed=1):
    with seeded(seed):
        return pair.marginal().sample((n,)).detach()


def found(pair, x, *context, **settings):
    return pv.model_check(pair, x, *context, num_samples=50, progress=False, **settings)


def parts(result):
    return {sign.kind for sign in signs.model_signs({"model_check": result})}


# Two samples


def test_a_classifier_sees_a_shift_and_bounds_the_kl():
    torch.manual_seed(0)
    first, second = torch.randn(1000, 2) + torch.tensor([1.0, 0.0]), torch.randn(1000, 2)
    one = separation(first, second)
    # The best score is the first column: AUC = Phi(1 / sqrt 2), and the KL is 1/2.
    assert one.auc == pytest.approx(0.760, abs=0.03)
    assert 0.3 < one.nats < 0.55
    assert one.deviations > 15
    same = separation(torch.randn(1000, 2), second)
    assert abs(same.deviations) < 4
    assert same.nats < 0.02


def test_a_classifier_sees_two_modes_with_the_moments_of_one():
    torch.manual_seed(0)
    signs_of = torch.where(torch.rand(1000, 1) < 0.5, 1.0, -1.0)
    first = 0.3 * torch.randn(1000, 1) + (1 - 0.09) ** 0.5 * signs_of
    assert separation(first, torch.randn(1000, 1)).deviations > 10


def test_scales_of_residuals_by_hand():
    residuals = torch.tensor([[1.0, 1.0], [2.0, 2.0], [torch.nan, 1.0]]).double()
    whole, rows, columns = scale_statistics(residuals)

    def excess(c):
        return c - 1 - torch.tensor(c).log().item()

    assert whole.item() == pytest.approx(torch.tensor(11 / 5).log().item())
    assert rows.item() == pytest.approx(0.5 * (2 * excess(1.0) + 2 * excess(4.0) + excess(1.0)) / 3)
    by_column = (excess(2.5) * 2 / 3 + excess(2.0)) / 2
    assert columns.item() == pytest.approx(by_column)


def test_correlated_residuals_have_their_closed_form():
    torch.manual_seed(0)
    e = torch.randn(20_000, 2).double()
    correlated = torch.stack([e[:, 0], 0.6 * e[:, 0] + 0.8 * e[:, 1]], 1)
    wanted = -0.5 * torch.tensor(1 - 0.36).log().item()
    assert correlation_statistic(correlated).item() == pytest.approx(wanted, rel=0.05)
    assert correlation_statistic(3 * correlated + 1).item() == pytest.approx(wanted, rel=0.05)
    assert correlation_statistic(e).item() < 1e-3


Z = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize(
    ("effect", "nats"),
    [
        (torch.zeros(20_000), 0.0),
        (torch.full((20_000,), 0.7), 0.5 * 0.49),
        (2 * Z[:, 0], 0.5 * 4),
        (Z[:, 0].square() - Z[:, 1].square(), 0.5 * 4),
        (Z[:, 0] * Z[:, 1], 0.5),
    ],
    ids=["nothing", "a constant", "a line", "squares", "a product"],
)
@pytest.mark.parametrize("holes", [False, True])
def test_what_codes_explain_is_half_of_its_mean_square(effect, nats, holes):
    """A mean that is off by a(z) costs E[a(z)^2] / 2 nats, and the rest keeps its scale."""
    torch.manual_seed(1)
    residuals = 1.5 * torch.randn(20_000, 2).double()
    residuals[:, 0] += effect
    if holes:
        residuals[:10_000, 0], nats = torch.nan, nats / 2
    gain, left = explained(Z, residuals)
    assert gain.item() == pytest.approx(nats, rel=0.1, abs=0.02)
    assert left.square().nanmean(0).tolist() == pytest.approx([2.25, 2.25], rel=0.03)
    assert torch.equal(left.isnan(), residuals.isnan())


@pytest.mark.parametrize("causes", [0, 3, 40])
def test_regression_on_noise_gains_nothing_on_average(causes):
    """Also with more terms than a quarter of the rows, which are then left out."""
    torch.manual_seed(0)
    both = [explained(torch.randn(100, causes), 2 * torch.randn(100, 5)) for _ in range(200)]
    gains = torch.stack([gain for gain, _ in both])
    assert abs(gains.mean()) < 4 * gains.std() / 200**0.5
    left = torch.stack([left.square().mean() for _, left in both])
    assert left.mean().item() == pytest.approx(4, rel=0.02)


def test_residuals_are_clipped_at_ten_robust_deviations_of_both_samples():
    torch.manual_seed(0)
    first, second = torch.randn(2, 5000, 3).double()
    first[:, 1] *= 100  # a scale that is far off stays
    second[:, 2] = 0.0
    second[0, 2], first[0, 2], first[1, 2] = 1000.0, -12.0, torch.nan
    one, other = clipped(first, second)
    assert torch.equal(one[:, :2], first[:, :2])
    assert torch.equal(other[:, :2], second[:, :2])
    assert (other[0, 2], one[0, 2]) == (10, -10)
    assert one[1, 2].isnan()
    nothing = torch.full((50, 1), torch.nan)
    assert clipped(nothing, nothing)[0].isnan().all()


def test_a_difference_is_standard_normal_under_equal_distributions():
    torch.manual_seed(0)
    off = []
    for seed in range(30):
        rows = torch.randn(200, 3).double()
        off += [d.deviations for d in difference(scale_statistics, rows[:100], rows[100:], seed)]
    off = torch.tensor(off)
    assert abs(off.mean()) < 0.4
    assert 0.75 < off.std() < 1.3


def test_at_most_thirty_columns_are_compared():
    assert some_columns(5).tolist() == [0, 1, 2, 3, 4]
    assert len(set(some_columns(784).tolist())) == 30


# The model is charged with its own faults


@pytest.mark.parametrize("spread", [1.0, 0.6, 1.5])
def test_a_guide_that_is_off_everywhere_is_not_charged_to_the_model(spread):
    pair = LinearGaussian(linear_gaussian().weight.detach(), 0.5, spread=spread)
    result = found(pair, data(pair))
    assert not parts(result)
    assert result.marginal_p > 1e-3
    assert len(result.log_likelihood) == len(result.own_log_likelihood) == N


def test_log_p_is_that_of_the_data():
    pair = linear_gaussian()
    x = data(pair)
    torch.testing.assert_close(found(pair, x).log_likelihood, pair.marginal().log_prob(x).double())


def test_noise_that_is_too_large_is_the_scale_of_the_likelihood():
    weight = linear_gaussian().weight.detach()
    wide = LinearGaussian(weight, 1.0)
    x = data(LinearGaussian(weight, 0.5))
    result = found(wide, x)
    assert signs.model_signs({"model_check": result})[0].kind == "likelihood scale"
    assert result.scale.value < -0.5
    assert result.scale_nats > 0.3
    assert result.num_elements == x.shape[1]


def test_codes_beside_the_prior_are_the_priors():
    pair = LinearGaussian(5 * linear_gaussian().weight.detach(), 0.5)
    with seeded(2):
        z = 3 * torch.randn(N, 2).double()
        x = (z @ pair.weight.detach().T) + 0.5 * torch.randn(N, 6).double()
    result = found(pair, x)
    sizes = {s.kind: s.nats for s in signs.model_signs({"model_check": result})}
    assert max(sizes, key=sizes.get) == "prior"
    # KL of N(0, 9 I) and N(0, I) in two dimensions is 8 - log 9 = 5.8: a bound is below.
    assert 1 < sizes["prior"] < 5.8


class Guided(nn.Module):
    """The linear-Gaussian pair, whose guide is off by three posterior scales for marked rows."""

    def __init__(self, marked):
        super().__init__()
        self.pair, self.marked = linear_gaussian(), marked[:, 0]

    def model(self, x):
        return self.pair.model(x)

    def guide(self, x):
        loc, scale = self.pair.posterior(x)
        off = torch.isin(x[:, 0], self.marked)[:, None] * 3.0
        with pyro.plate("data", len(x), dim=-1):
            covariance = scale.expand(len(x), 2, 2)
            pyro.sample("z", dist.MultivariateNormal(loc + 0.5 * off, covariance))

    def template(self, n):
        return self.pair.template(n)


def test_rows_where_only_the_guide_is_wrong_are_left_out():
    x = data(linear_gaussian())
    result = found(Guided(x[:60]), x)
    assert result.left_out
    assert result.unreliable[:60].sum() > 30
    assert not result.unreliable[60:].any()
    assert not parts(result)


class OneMode(nn.Module):
    """x = |z| + noise, and a guide that knows only positive z."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(3 * z.abs(), 0.3).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x * 3 / (9 + 0.09), 0.1).to_event(1))

    def template(self, n):
        return (torch.zeros(n, 1),)


def test_a_mode_that_the_guide_misses_is_half_of_the_posterior():
    with seeded(1):
        x = 3 * torch.randn(N, 1).abs() + 0.3 * torch.randn(N, 1)
    result = found(OneMode(), x)
    assert signs.missing_mass({"model_check": result}).kind == "mass"
    missed = result.missed
    assert missed.value == pytest.approx(log(2), abs=4 * missed.standard_error)
    assert missed.standard_error < 0.1
    exact = found(linear_gaussian(), data(linear_gaussian()))
    assert exact.missed[:3] == pytest.approx((0, 0, 0), abs=1e-5)


# Any pair


def test_missing_entries_are_missing_on_both_sides():
    pair = pv.VAE.mlp((3,), latent_dim=1, hidden=(), likelihood=pv.Missing(pv.Gaussian))
    x = torch.randn(80, 3)
    x[::2, 1] = torch.nan
    result = found(pair, x)
    assert result.num_elements == pytest.approx(2.5)
    assert result.own_log_likelihood.isfinite().all()


def test_zeros_and_ones_have_no_scale():
    vae = pv.VAE.mlp((4,), latent_dim=1, hidden=())
    result = found(vae, torch.randint(2, (60, 4)).float())
    assert result.scale is result.row_scale is result.column_scale is None
    assert result.scale_nats == 0
    assert result.dependence is not None
    assert "scale" not in str(result)


class Levels(nn.Module):
    """256 levels around 0.5 + z / 20, with this scale of a logistic distribution."""

    def __init__(self, scale):
        super().__init__()
        self.scale = torch.tensor(scale)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            levels = LevelLogistic((0.5 + z / 20).expand(*z.shape[:-1], 6), self.scale)
            pyro.sample("x", levels.to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))

    def template(self, n):
        return (torch.zeros(n, 6),)


def test_a_likelihood_without_a_variance_has_residuals_from_draws():
    narrow = pv.sample(Levels(0.02), N, seed=3)
    assert not parts(found(Levels(0.02), narrow))
    result = found(Levels(0.04), narrow)
    assert result.scale.value < -0.7
    assert "likelihood scale" in parts(result)


def test_what_it_refuses():
    pair = linear_gaussian()
    with pytest.raises(pv.UsageError, match="at least 50 rows of data, got 49"):
        found(pair, data(pair, 49))
    with pytest.raises(pv.UsageError, match="num_samples must be at least 21"):
        pv.model_check(pair, data(pair), num_samples=20)

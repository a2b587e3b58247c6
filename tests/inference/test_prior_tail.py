"""Global and group latents in the tail of their prior: p-values and names."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from global_pairs import Means, drawn
from scipy import stats
from torch import nn

import pyro_vae as pv
from pyro_vae.inference.prior_tail import CONFLICT, SINGLE, PriorTails, in_tail, prior_tails
from pyro_vae.pairs.scope import using

QUIET = {"progress": False}


def exact_tail(pair):
    """E[2 Phi(-|w|)] for w ~ N(loc, scale^2), by quadrature."""
    z = torch.linspace(-8, 8, 4001).double()
    w = pair.loc[:, None] + pair.scale * z
    density = torch.distributions.Normal(0.0, 1.0).log_prob(z).exp()
    return (torch.erfc(w.abs() / 2**0.5) * density).sum(1) / density.sum()


def test_the_mean_tail_is_the_integral_over_the_posterior():
    x = drawn([0.0, 1.5, -2.5])
    pair = Means(x)
    found = pv.global_weights(pair, x, num_draws=200, **QUIET).prior_tails
    assert found.elements == ("w[0]", "w[1]", "w[2]")
    assert found.tails.shape == (200, 3)
    exact = exact_tail(pair)
    error = found.tails.std(0) / 200**0.5
    assert bool(((found.tails.mean(0) - exact).abs() < 4 * error).all())
    assert found.p_values == pytest.approx((6 * found.tails.mean(0)).clamp(max=1))


@pytest.mark.thorough
def test_one_posterior_draw_of_data_from_the_model_has_a_uniform_tail():
    tails, rejected = [], 0
    for _ in range(300):
        w = torch.randn(1)
        x = drawn(w.tolist(), 5)
        draw = torch.distributions.Normal(Means(x).loc, Means(x).scale).sample((50,))
        pair = Means(x)
        with using(pair, 0):
            found = prior_tails(pair, (x,), {"w": draw})
        tails.append(found.tails[0, 0].item())
        rejected += found.p_values[0].item() < 0.05
    assert stats.kstest(tails, "uniform").pvalue > 1e-3
    assert rejected <= 0.05 * 300 + 3 * (0.05 * 0.95 * 300) ** 0.5


def test_weights_and_nuts_name_the_element_that_conflicts_with_its_prior():
    x = drawn([0.3, 7.0])
    pair = Means(x)
    by_weights = pv.global_weights(pair, x, num_draws=100, **QUIET)
    by_nuts = pv.nuts(pair, x, num_draws=100, warmup=100, num_chains=2, **QUIET)
    for found in (by_weights, by_nuts):
        assert list(found.prior_tails.conflicts) == ["w[1]"]
        assert "the posterior of 'w[1]' lies in the tail of the prior" in str(found)
        assert list(found.as_dict()["in_tail_of_prior"]) == ["w[1]"]
    right = drawn([0.3, -1.0])
    found = pv.global_weights(Means(right), right, num_draws=100, **QUIET)
    assert found.prior_tails.conflicts == {}
    assert "no part of the posterior lies in the tail of the prior" in str(found)


def test_weights_that_are_not_reliable_say_nothing_of_the_prior():
    x = drawn([0.3, 7.0])
    pair = Means(x)
    pair.loc += 20 * pair.scale
    found = pv.global_weights(pair, x, num_draws=100, **QUIET)
    assert not found.reliable
    assert found.prior_tails is None
    assert found.as_dict()["in_tail_of_prior"] is None
    assert "tail of the prior" not in str(found)


class Groups(nn.Module):
    """tau ~ HalfNormal(1), u_g ~ N(0, tau) for each group, with rows masked out in ``absent``."""

    def __init__(self, absent=()):
        super().__init__()
        self.known = torch.ones(6, dtype=torch.bool)
        self.known[list(absent)] = False

    def model(self, x):
        tau = pyro.sample("tau", dist.HalfNormal(x.new_tensor(1.0)))
        with pyro.plate("groups", 6, dim=-1), pyro.poutine.mask(mask=self.known):
            u = pyro.sample("u", dist.Normal(x.new_zeros(6, 2), tau).to_event(1))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(u.mean().expand(len(x), 1), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.sample("tau", dist.LogNormal(x.new_zeros(()), 0.1))
        with pyro.plate("groups", 6, dim=-1), pyro.poutine.mask(mask=self.known):
            pyro.sample("u", dist.Normal(x.new_zeros(6, 2), 1.0).to_event(1))


@pytest.mark.parametrize("absent", [False, True])
def test_a_group_far_from_the_others_is_named_but_not_if_it_is_padding(absent):
    """Given tau, the tail of u is 2 Phi(-|u| / tau)."""
    pair, x = Groups([3] if absent else []), torch.zeros(4, 1)
    u = torch.zeros(100, 6, 2)
    u[:, 3, 1] = 3.0
    draws = {"tau": torch.full((100,), 0.5), "u": u}
    with using(pair, 0):
        found = prior_tails(pair, (x,), draws)
    assert found.elements[0] == "tau"
    assert found.elements[1:3] == ("u[0, 0]", "u[0, 1]")
    assert len(found.elements) == 13
    assert list(found.conflicts) == ([] if absent else ["u[3, 1]"])
    at_tau = torch.erfc(torch.tensor(0.5 / 2**0.5)).item()  # HalfNormal(1) at 0.5
    assert found.tails[:, 0].mean().item() == pytest.approx(at_tau, abs=0.006)
    if absent:
        assert bool((found.tails[:, [7, 8]] == 1).all())


class Prior(nn.Module):
    """One global latent with any prior, and a guide that nobody reads."""

    def __init__(self, prior):
        super().__init__()
        self.prior = prior

    def model(self, x):
        pyro.sample("w", self.prior)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.sample("w", self.prior)


def tails_at(prior, value, draws=50):
    pair, x = Prior(prior), torch.zeros(3, 1)
    with using(pair, 0):
        return prior_tails(pair, (x,), {"w": value.expand(draws, *value.shape)})


@pytest.mark.parametrize(
    ("prior", "value", "exact", "elements"),
    [
        (dist.Exponential(1.0), torch.tensor(2.0), 0.1353, ("w",)),
        (dist.HalfCauchy(torch.tensor(1.0)), torch.tensor(1.0), 0.5, ("w",)),
        (dist.Poisson(torch.tensor(1.0)), torch.tensor(2.0), 0.2642, ("w",)),
        # -2 log p is a chi-square of the squared Mahalanobis distance, here 2, with 2 freedoms.
        (
            dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
            torch.ones(2),
            0.3679,
            ("w",),
        ),
        # Density 6 v (1 - v) of Beta(2, 2): P(v <= 0.1 or v >= 0.9) = 2 (3 0.01 - 2 0.001).
        (dist.Dirichlet(torch.tensor([2.0, 2.0])), torch.tensor([0.1, 0.9]), 0.056, ("w",)),
        (dist.Normal(torch.zeros(2), 1.0), torch.tensor([1.0, 1.0]), 0.3173, ("w[0]", "w[1]")),
        (
            dist.Normal(torch.zeros(2, 1), 1.0).to_event(2),
            torch.tensor([[1.0], [1.0]]),
            0.3173,
            ("w[0, 0]", "w[1, 0]"),
        ),
    ],
)
def test_tails_of_other_priors(prior, value, exact, elements):
    found = tails_at(prior, value)
    assert found.elements == elements
    error = (exact * (1 - exact) / 50_000) ** 0.5
    assert found.tails.mean(0) == pytest.approx([exact] * len(elements), abs=4 * error)


@pytest.mark.parametrize(
    ("prior", "law"),
    [
        (dist.Normal(1.0, 2.0), stats.norm(1, 2)),
        (dist.Cauchy(1.0, 2.0), stats.cauchy(1, 2)),
        (dist.Laplace(1.0, 2.0), stats.laplace(1, 2)),
        (dist.HalfNormal(2.0), stats.halfnorm(0, 2)),
        (dist.HalfCauchy(2.0), stats.halfcauchy(0, 2)),
        (dist.Exponential(0.5), stats.expon(0, 2)),
    ],
)
def test_closed_forms_are_those_of_scipy_far_out(prior, law):
    """The tail of a density that falls from ``loc``: both sides of it, or one."""
    both = prior.support is dist.constraints.real
    for z in (0.1, 1.0, 5.0, 12.0):
        exact = 2 * law.sf(1 + 2 * z) if both else law.sf(2 * z)
        for value in (1 + 2 * z, 1 - 2 * z) if both else (2 * z,):
            found = tails_at(prior, torch.tensor(value).double(), 2)
            assert found.tails[0].item() == pytest.approx(exact, rel=1e-5)
            assert found.prior_draws.item() == float("inf")


@pytest.mark.thorough
def test_elements_too_many_for_the_draws_are_said_to_be_unchecked():
    few, many = (
        tails_at(dist.Gamma(torch.full((n,), 2.0), 1.0), torch.full((n,), 60.0), 200)
        for n in (99, 101)
    )
    assert len(few.conflicts) == 99
    assert few.unchecked == ()
    assert many.conflicts == {}
    assert many.unchecked == many.elements
    assert str(many) == (
        "prior and posterior are not compared for 'w[0]', 'w[1]', 'w[2]' and 98 more: too many "
        "for the draws"
    )
    closed = tails_at(dist.Normal(torch.zeros(3000), 1.0), torch.full((3000,), 7.0), 2)
    assert len(closed.conflicts) == 3000


def test_a_large_site_is_compared_as_a_whole():
    """Squares of N standard normals have the mean N and the variance 2 N."""
    prior = dist.Normal(torch.zeros(SINGLE + 1), 1.0).to_event(1)
    found = tails_at(prior, torch.full((SINGLE + 1,), 1.1))
    assert found.elements == ("w",)
    exact = stats.chi2.sf((SINGLE + 1) * 1.1**2, SINGLE + 1)
    assert found.tails.mean().item() == pytest.approx(exact, abs=3e-4)
    assert found.prior_draws.item() == 1000
    large = tails_at(dist.Normal(torch.zeros(2**15), 1.0).to_event(1), torch.zeros(2**15), 2)
    assert large.prior_draws.item() == 2**20 // 2**15


def chain(**lengths):
    step = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    return dist.GaussianHMM(step, torch.eye(1), step, torch.eye(1), step, **lengths)


@pytest.mark.parametrize(
    ("prior", "value", "why"),
    [
        (dist.ImproperUniform(dist.constraints.real, (), ()), torch.zeros(()), "ImproperUniform"),
        (dist.Empirical(torch.arange(3.0), torch.zeros(3)), torch.ones(()), "Empirical"),
        (chain(), torch.zeros(4, 1), "GaussianHMM"),
        # A draw below exp(-104) rounds to 0, where LogNormal has no density.
        (dist.LogNormal(torch.tensor(0.0), 50.0), torch.ones(()), "LogNormal"),
        (dist.HalfCauchy(1.0).to_event(0).mask(torch.tensor(True)), torch.ones(()), None),
        (chain(duration=4), torch.zeros(4, 1), None),
    ],
)
def test_a_prior_that_cannot_be_compared_is_said(prior, value, why):
    found = tails_at(prior, value)
    if why is None:
        assert (found.elements, found.not_checked) == (("w",), {})
        return
    reason = f"the density of draws of {why} cannot be computed"
    assert (found.elements, found.not_checked, found.conflicts) == ((), {"w": reason}, {})
    assert str(found) == f"prior and posterior are not compared for 'w': {reason}"


class Summed(nn.Module):
    """w ~ N(0, 1) and s ~ N(0, 1), with a factor that moves w to 10, and the guide there.

    The factor is outside of the data plate, or each row has its part of it.
    """

    def __init__(self, in_rows):
        super().__init__()
        self.in_rows = in_rows

    def model(self, x):
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("s", dist.Normal(x.new_zeros(()), 1.0))
        moving = -50 * (w - 10) ** 2
        if not self.in_rows:
            pyro.factor("moving", moving)
        with pyro.plate("data", len(x), dim=-1):
            if self.in_rows:
                pyro.factor("moving", (moving / len(x)).expand(len(x)))
            pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.sample("w", dist.Normal(x.new_tensor(1000 / 101), 101**-0.5))
        pyro.sample("s", dist.Normal(x.new_zeros(()), 1.0))


def test_a_factor_of_the_prior_leaves_nothing_to_compare():
    """The prior of w is then not the distribution of its site. A factor of rows is of the data."""
    x = torch.zeros(4, 1)
    found = pv.global_weights(Summed(False), x, num_draws=100, **QUIET)
    assert found.reliable
    assert found.as_dict()["in_tail_of_prior"] == {}
    reason = "the pyro.factor 'moving' may be a part of the prior"
    assert found.as_dict()["not_compared_with_prior"] == {"w": reason, "s": reason}
    assert str(found).endswith(f"prior and posterior are not compared for 'w' and 's': {reason}")
    of_rows = pv.global_weights(Summed(True), x, num_draws=100, **QUIET)
    assert list(of_rows.prior_tails.conflicts) == ["w"]
    assert of_rows.as_dict()["not_compared_with_prior"] == {}


def test_a_site_that_is_not_drawn_each_time_is_said():
    class Branch(Prior):
        def model(self, x):
            if pyro.sample("w", self.prior) > 0:
                pyro.sample("more", dist.Normal(0.0, 1.0))

    draws = {"w": torch.tensor([1.0, -1.0]), "more": torch.zeros(2)}
    pair = Branch(dist.Normal(0.0, 1.0))
    with using(pair, 0):
        found = prior_tails(pair, (torch.zeros(3, 1),), draws)
    assert found.elements == ("w",)
    assert found.left_out == {"more": "the model does not draw it each time"}


def test_rounding_does_not_order_equal_densities():
    """LKJ(1) is flat; a binomial of probability 1/2 has the same mass at 2 and at 8 of 10."""
    for size in (3, 8):
        flat = dist.LKJ(size, torch.tensor(1.0))
        draws = flat.sample((1000,))
        lowest = draws[flat.log_prob(draws).argmin()]
        assert bool((tails_at(flat, lowest, 5).tails == 1).all())
    for value in (2.0, 8.0):
        found = tails_at(dist.Binomial(10, torch.tensor(0.5)), torch.tensor(value), 50)
        exact = 2 * stats.binom.cdf(2, 10, 0.5)
        assert found.tails.mean().item() == pytest.approx(exact, abs=0.006)


def test_draws_that_overflow_have_equal_densities():
    """An infinite value has the density 0; all infinite values are equally far out."""
    found = tails_at(dist.LogNormal(torch.tensor(80.0), 30.0), torch.tensor(torch.inf))
    exact = stats.norm.sf((math.log(torch.finfo(torch.float32).max) - 80) / 30)
    assert found.tails.mean().item() == pytest.approx(exact, abs=0.009)


def test_values_without_density_are_in_the_tail():
    quiet = dist.Uniform(torch.tensor(0.0), 1.0, validate_args=False)
    found = tails_at(quiet, torch.tensor(2.0))
    assert list(found.conflicts) == ["w"]


def test_a_subclass_with_its_own_density_has_no_closed_form_of_its_parent():
    class Truncated(dist.Normal):
        """N(0, 1) above 2."""

        support = dist.constraints.greater_than(2.0)

        def log_prob(self, value):
            return super().log_prob(value) - stats.norm.logsf(2)

        def sample(self, shape=()):
            left = torch.rand(shape) * stats.norm.sf(2)
            return torch.tensor(stats.norm.isf(left)).float()

    found = tails_at(Truncated(torch.tensor(0.0), 1.0), torch.tensor(3.5))
    exact = stats.norm.sf(3.5) / stats.norm.sf(2)
    assert found.tails.mean().item() == pytest.approx(exact, abs=4 * (exact / 50_000) ** 0.5)


def test_the_warnings_of_draws_of_the_prior_are_not_those_of_the_user():
    """Wishart warns of singular draws, which it draws again; a warning is an error here."""
    found = tails_at(dist.Wishart(torch.tensor(2.5), torch.eye(2)), torch.eye(2))
    assert found.elements == ("w",)


def made(p, number=4):
    """Results whose elements have these uncorrected mean tails."""
    tails = torch.full((100, number), 0.5).double()
    tails[:, 0] = p
    return PriorTails(
        tuple(f"w[{i}]" for i in range(number)), tails, torch.full((number,), 1000.0).double()
    )


def test_p_values_are_twice_the_mean_for_each_of_the_elements():
    for number in (1, 4):
        over, under = (made(size * CONFLICT / (2 * number), number) for size in (1.01, 0.9))
        assert over.conflicts == {}
        assert list(under.conflicts) == ["w[0]"]
        assert under.conflicts["w[0]"] == pytest.approx(
            0.9 * CONFLICT + 2 * number / 100_000, rel=1e-9
        )


def test_words_of_many_elements():
    told = in_tail({f"w[{i}]": 1e-5 * (i + 1) for i in range(5)})
    assert told == (
        "the posterior of 'w[0]', 'w[1]', 'w[2]' and 2 more lies in the tail of the prior (p 1e-05)"
    )

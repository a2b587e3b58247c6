"""Gradients only through the draws, and the parts of the KL, against closed forms and means."""

import itertools
from math import log
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae.pairs.rng import seeded
from pyro_vae.training.bounds import log_aggregate

DREG, STL = pv.Gradient.DOUBLY_REPARAMETRIZED, pv.Gradient.STICKING_THE_LANDING


class TwoLevels(nn.Module):
    """x | z1 ~ N(z1, 0.5^2), z1 | z2 ~ N(a z2, 0.6^2), z2 ~ N(0, 1); the guide draws z2 first.

    ``shared`` is in the model and in the guide.
    """

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.8, dtype=torch.float64))
        self.shared = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
        self.top = nn.Parameter(torch.tensor([0.3, 0.2, -0.4], dtype=torch.float64))
        self.low = nn.Parameter(torch.tensor([0.4, 0.3, 0.1, -0.6], dtype=torch.float64))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros_like(x), 1.0))
            z1 = pyro.sample("z1", dist.Normal(self.a * z2, 0.6))
            pyro.sample("x", dist.Normal(z1 + self.shared, 0.5), obs=x)

    def guide(self, x):
        (slope, shift, scale), (a, b, c, d) = self.top, self.low
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", dist.Normal(slope * x + shift, scale.exp()))
            pyro.sample("z1", dist.Normal(a * x + b * z2 + c + self.shared, (d + 0.1 * z2).exp()))


class OneLevel(nn.Module):
    """A full-rank posterior of a normal vector, from a small network with dropout."""

    def __init__(self):
        super().__init__()
        with seeded(1):
            self.encoder = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.3)).double()
            self.decoder = nn.Linear(2, 3).double()

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.7).to_event(1), obs=x)

    def guide(self, x):
        raw = self.encoder(x)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", pv.FullRankNormal()(raw, (2,)))


class Flow(OneLevel):
    """An inverse autoregressive flow. Its density at a given draw needs the inverse."""

    def __init__(self, transform=lambda: transforms.affine_autoregressive(2, [4])):
        super().__init__()
        with seeded(3):
            self.transform = transform()
        self.float()

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            base = dist.Normal(self.encoder(x)[:, :2], 0.6).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [self.transform]))


PAIRS = {
    "two levels": (TwoLevels, torch.float64),
    "full rank": (OneLevel, torch.float64),
    "flow": (Flow, torch.float32),
}
ROWS = 300


def pair_and_data(name):
    """The pair, and four data that are repeated, which gives many draws for each."""
    kind, dtype = PAIRS[name]
    with seeded(2):
        x = torch.randn(4 if name == "two levels" else (4, 3), dtype=dtype)
        return kind(), x.repeat_interleave(ROWS, 0)


def around(handler, pair):
    return SimpleNamespace(
        model=handler(pair.model), guide=handler(pair.guide), parameters=pair.parameters
    )


def run(pair, x, objective, seed=0):
    with seeded(seed):
        return objective.differentiable_loss(pair.model, pair.guide, x)


def gradient(pair, x, objective, seed=0):
    """The gradient of one loss for all parameters, as a vector."""
    parameters = list(pair.parameters())
    found = torch.autograd.grad(
        run(pair, x, objective, seed), parameters, materialize_grads=True, allow_unused=True
    )
    return torch.cat([part.flatten() for part in found])


def gradients(pair, x, objective, seeds):
    return torch.stack([gradient(pair, x, objective, seed) for seed in range(seeds)])


BOUNDS = {
    "elbo": (Trace_ELBO(), pv.StickingTheLandingELBO()),
    "elbo of two": (
        Trace_ELBO(2, vectorize_particles=True, max_plate_nesting=1),
        pv.StickingTheLandingELBO(2, vectorize_particles=True, max_plate_nesting=1),
    ),
    "one sample": (pv.ImportanceWeightedELBO(1), pv.ImportanceWeightedELBO(1, gradient=STL)),
    "three samples": (pv.ImportanceWeightedELBO(3), pv.ImportanceWeightedELBO(3, gradient=DREG)),
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("beta", [1.0, 0.4])
@pytest.mark.parametrize("bound", ["elbo", "three samples"])
@pytest.mark.parametrize("name", PAIRS)
def test_gradients_through_the_draws_have_the_mean_of_the_total_ones(name, bound, beta):
    """Paired by seed, over 40 times 300 draws of each datum; five standard errors."""
    pair, x = pair_and_data(name)
    weighted = around(pv.KLWeight(beta), pair)
    total, path = (gradients(weighted, x, objective, 40) for objective in BOUNDS[bound])
    error = (total - path).std(0) / 40**0.5
    assert ((total - path).mean(0).abs() < 5 * error + 1e-4).all()
    assert (error > 1e-3).sum() >= 3  # the estimators differ
    assert (total.mean(0).abs() > 20 * error).sum() >= 3  # and the test would detect a wrong factor


def test_sticking_the_landing_with_several_weights_is_biased():
    """The score has mean 0 only if it is not weighted, as the docstring says."""
    pair, x = pair_and_data("two levels")
    sticking = pv.ImportanceWeightedELBO(3, gradient=STL)
    total, path = (
        gradients(pair, x, objective, 40) for objective in (pv.ImportanceWeightedELBO(3), sticking)
    )
    error = (total - path).std(0) / 40**0.5
    assert ((total - path).mean(0).abs() > 8 * error).any()


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("name", PAIRS)
def test_the_value_is_that_of_the_bound(name, bound):
    pair, x = pair_and_data(name)
    total, path = BOUNDS[bound]
    torch.testing.assert_close(run(pair, x, path), run(pair, x, total), rtol=1e-5, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(run(pair, x, path), run(pair, x, total), rtol=1e-5, atol=1e-3)


class ExactTwoLevels(TwoLevels):
    """A scale of z1 that does not depend on z2, so the guide can be exact, and is."""

    def __init__(self):
        super().__init__()
        a, variance, precision = 0.8, 0.8**2 + 0.36 + 0.25, 1 / 0.36 + 1 / 0.25
        top = [a / variance, 0.0, 0.5 * log(1 - a**2 / variance)]
        low = [1 / 0.25 / precision, a / 0.36 / precision, 0.0, -0.5 * log(precision)]
        with torch.no_grad():
            self.shared.zero_()
            self.top.copy_(torch.tensor(top))
            self.low.copy_(torch.tensor(low))

    def guide(self, x):
        (slope, shift, scale), (a, b, c, d) = self.top, self.low
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", dist.Normal(slope * x + shift, scale.exp()))
            pyro.sample("z1", dist.Normal(a * x + b * z2 + c, d.exp()))


@pytest.mark.parametrize("bound", BOUNDS)
def test_an_exact_guide_gets_no_gradient_at_all(bound):
    """For each draw, not only in the mean. The model still has a gradient."""
    pair, x = ExactTwoLevels(), torch.linspace(-1, 2, 7).double()
    total, path = (gradient(pair, x, objective) for objective in BOUNDS[bound])
    assert path[2:].abs().max() < 1e-6  # float32 rounds the scales
    assert total[2:].abs().max() > 0.1
    assert path[:2].abs().min() > 0.1


@pytest.mark.thorough
def test_signal_to_noise_by_number_of_samples():
    """Rainforth et al., 2018: it falls as 1/sqrt(K); Tucker et al., 2019: it grows as sqrt(K)."""
    pair, x = TwoLevels(), torch.tensor([0.7], dtype=torch.float64)
    ratios = {}
    for kind in (pv.Gradient.TOTAL, DREG):
        for k in (4, 64):
            objective = pv.ImportanceWeightedELBO(k, gradient=kind)
            found = gradients(pair, x, objective, 150)[:, 2:]
            ratios[kind, k] = (found.mean(0).abs() / found.std(0)).square().mean().sqrt()
    assert ratios[DREG, 64] > 2 * ratios[DREG, 4]
    assert ratios[pv.Gradient.TOTAL, 64] < 0.7 * ratios[pv.Gradient.TOTAL, 4]


def test_gradients_that_are_not_to_be_had_are_refused():
    with pytest.raises(
        pv.UsageError, match=r"gradient must be a member of pyro_vae\.Gradient, got 'dreg'"
    ):
        pv.ImportanceWeightedELBO(3, gradient="dreg")
    flow, x = Flow(lambda: transforms.planar(2)), torch.zeros(4, 3)
    with pytest.raises(
        pv.UsageError, match="density at given draws, which is not available"
    ) as caught:
        run(flow, x, pv.StickingTheLandingELBO())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("program", ["model", "guide"])
@pytest.mark.parametrize("kind", [KeyError, NotImplementedError])
def test_a_fault_of_the_programs_is_not_reported_as_a_missing_density(program, kind):
    pair, x = TwoLevels(), torch.zeros(4).double()

    def fail(x):
        raise kind("of their own")

    setattr(pair, program, fail)
    with pytest.raises(kind, match="of their own"):
        run(pair, x, pv.StickingTheLandingELBO())


class Linear(nn.Module):
    """z ~ N(0, I), x | z normal; the guide is N(A x + c, diag t^2), and x ~ N(0, S)."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([[0.6, 0.4], [-0.7, 0.3], [0.2, 0.1]]).double())
        self.offset = nn.Parameter(torch.tensor([0.3, -0.2, 0.1]).double())
        self.scale = nn.Parameter(torch.tensor([0.7, 0.9, 0.6]).double())
        self.spread = torch.tensor([[1.0, 0.0], [0.8, 0.7]]).double()

    def data(self, n, seed=0):
        with seeded(seed):
            return torch.randn(n, 2, dtype=torch.float64) @ self.spread.T

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.slope, 1.0).to_event(1), obs=x)

    def guide(self, x):
        loc = x @ self.slope.T + self.offset
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, self.scale).to_event(1))

    def closed(self):
        """Mutual information, total correlation, KL of each unit's aggregate, in nats."""
        noise = self.scale.square()
        covariance = self.slope @ self.spread @ self.spread.T @ self.slope.T + noise.diag()
        variance, log_det = covariance.diagonal(), torch.linalg.slogdet(covariance).logabsdet
        information = 0.5 * (log_det - noise.log().sum())
        correlation = 0.5 * (variance.log().sum() - log_det)
        by_unit = 0.5 * (variance + self.offset.square() - 1 - variance.log()).sum()
        return torch.stack([information, correlation, by_unit])


WEIGHTS = {"mutual_information": 0.0, "total_correlation": 0.0, "dimension_kl": 0.0}


def parts(pair, x, num_data, seed=0):
    """The three parts of the KL, per example. Each loss weighs only one of them."""
    base = run(pair, x, pv.TotalCorrelationELBO(num_data, **WEIGHTS), seed)
    found = [
        run(pair, x, pv.TotalCorrelationELBO(num_data, **(WEIGHTS | {name: 1.0})), seed) - base
        for name in WEIGHTS
    ]
    return torch.stack(found) / len(x)


def test_parts_of_the_kl_are_their_closed_forms():
    """With all data in one minibatch: within 2 % of the KL, over four draws of 1,000 codes."""
    pair = Linear()
    x = pair.data(1000)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov(correction=0))).T
    x = x @ pair.spread.T  # the mean and covariance of the closed form, exactly
    with torch.no_grad():
        found = torch.stack([parts(pair, x, 1000, seed) for seed in range(4)]).mean(0)
        closed = pair.closed()
    assert ((found - closed).abs() < 0.02 * closed.sum()).all()
    assert found.sum().item() == pytest.approx(closed.sum().item(), rel=0.02)
    assert (closed > 0.1).all()


def test_weights_of_1_give_the_elbo_and_its_gradient():
    pair = Linear()
    x, ones = pair.data(30), dict.fromkeys(WEIGHTS, 1.0)
    for beta in (1.0, 0.3):
        weighted = around(pv.KLWeight(beta), pair)
        objective = pv.TotalCorrelationELBO(100, **ones)
        torch.testing.assert_close(run(weighted, x, objective), run(weighted, x, Trace_ELBO()))
        torch.testing.assert_close(
            gradient(weighted, x, objective), gradient(weighted, x, Trace_ELBO())
        )


def test_total_correlation_bound_by_hand():
    pair = Linear()
    x, n = pair.data(5), 50
    with seeded(0), torch.no_grad():
        q = dist.Normal(x @ pair.slope.T + pair.offset, pair.scale)
        z = q.sample()
    expected = -dist.Normal(z @ pair.slope, 1.0).log_prob(x).sum()
    for i in range(5):
        each = torch.stack([dist.Normal(q.loc[j], q.scale[j]).log_prob(z[i]) for j in range(5)])
        shares = torch.full((5,), (n - 1) / n / 4).double()
        shares[i] = 1 / n
        joint = (shares * each.sum(1).exp()).sum().log()
        units = (shares[:, None] * each.exp()).sum(0).log().sum()
        prior = dist.Normal(0.0, 1.0).log_prob(z[i]).sum()
        expected += 0.5 * (each[i].sum() - joint) + 4 * (joint - units) + 2 * (units - prior)
    found = run(pair, x, pv.TotalCorrelationELBO(n, 4.0, 0.5, 2.0))
    torch.testing.assert_close(found, expected)


def test_the_aggregate_of_a_minibatch_is_unbiased():
    """Its mean over all minibatches of 3 of 6 data, with datum 0, equals the value for all data."""
    pair = Linear()
    x = pair.data(6)
    q = dist.Normal(x @ pair.slope.T + pair.offset, pair.scale).to_event(1)
    z = q.sample()[:1]
    exact = q.log_prob(z).exp().mean()

    def estimate(rows):
        objective = pv.TotalCorrelationELBO(6)
        some = dist.Normal(q.base_dist.loc[rows], q.base_dist.scale[rows]).to_event(1)
        shares = objective._log_shares(z.new_zeros(len(rows)))[:1]
        return log_aggregate(some, z, shares)[0].exp()

    minibatches = [[0, *others] for others in itertools.combinations(range(1, 6), 2)]
    found = torch.stack([estimate(rows) for rows in minibatches]).mean()
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(estimate(list(range(6)))[0], exact)


def refused_pairs():
    vae = {"latent_dim": 2, "hidden": (4,)}
    x = torch.zeros(5, 3)
    return {
        "exactly one latent site with a prior, got z2, z1": (TwoLevels(), torch.zeros(5).double()),
        "posterior of 'z' has dependent ones": (
            pv.VAE.mlp((3,), posterior=pv.FullRankNormal, **vae),
            x,
        ),
        "prior of 'z' has dependent ones": (
            pv.VAE.mlp((3,), prior=lambda dim: pv.GaussianMixture(dim, 3), **vae),
            x,
        ),
    }


@pytest.mark.parametrize("words", refused_pairs())
def test_total_correlation_refuses(words):
    pair, x = refused_pairs()[words]
    with pytest.raises(pv.UsageError, match=words) as caught:
        run(pair, x, pv.TotalCorrelationELBO(10))
    assert "\n" not in str(caught.value)


def test_total_correlation_needs_data():
    with pytest.raises(pv.UsageError, match="num_data must be at least 2, got 1"):
        pv.TotalCorrelationELBO(1)


@pytest.mark.parametrize("gradient", list(pv.Gradient))
@pytest.mark.parametrize("k", [1, 3])
def test_a_scale_of_the_minibatch_scales_every_gradient(gradient, k):
    """As of a plate that takes a minibatch for a part: one draw, 2.5 times the slope."""
    pair, x = TwoLevels(), torch.tensor([0.3, -1.0]).double()
    found = []
    for scale in (1.0, 2.5):
        pair.zero_grad()
        objective = pv.ImportanceWeightedELBO(k, gradient=gradient)
        scaled = pyro.poutine.scale(scale=scale)
        with seeded(0):
            objective.differentiable_loss(scaled(pair.model), scaled(pair.guide), x).backward()
        found.append(torch.cat([p.grad.flatten() for p in pair.parameters()]))
    torch.testing.assert_close(found[1], 2.5 * found[0])
    assert found[0].abs().min() > 0

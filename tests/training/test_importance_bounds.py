"""The importance-weighted bound."""

from math import log, sqrt
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from objectives_helpers import (
    PAIRS,
    around,
    assert_same,
    by_hand,
    discrete_latent,
    gradients,
    linear,
    plated,
    run,
    watched,
)
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger

import pyro_vae as pv
from pyro_vae.pairs.rng import seeded


@pytest.mark.parametrize("name", PAIRS)
def test_one_importance_sample_gives_the_elbo(name):
    pair, x = PAIRS[name]()
    found = run(pair, x, pv.ImportanceWeightedELBO(1))
    assert_same(found, run(pair, x, Trace_ELBO()), pair)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("k", [2, 5])
def test_importance_weighted_bound_by_hand(name, k):
    pair, x = PAIRS[name]()
    loss, [[z]] = watched(pair, x, pv.ImportanceWeightedELBO(k))
    assert z.shape[:2] == (k, len(x))
    log_weights = []
    for i in range(k):
        reconstruction, log_ratio = by_hand(pair, x, z[i])
        log_weights.append(reconstruction - log_ratio)
    bound = torch.stack(log_weights).logsumexp(0) - log(k)
    assert_same(loss, -bound.sum(), pair)


@pytest.mark.parametrize("k", [1, 4])
def test_importance_weighted_bound_by_hand_under_two_plates(k):
    """The latent of a datum counts once, for any number of items in the datum."""
    pair, x = plated()
    objective = pv.ImportanceWeightedELBO(k, max_plate_nesting=2)
    loss, [[z, w]] = watched(pair, x, objective, ("z", "w"))
    z, w = z.reshape(k, 1, 5), w.reshape(k, 3, 5)
    local = dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(pair.loc, 1.3).log_prob(z)
    item = dist.Normal(w, 1.0).log_prob(x.T) + dist.Normal(z, 1.0).log_prob(w)
    item = item - dist.Normal(pair.loc + z, 0.7).log_prob(w)
    bound = (local.sum(1) + item.sum(1)).logsumexp(0) - log(k)
    assert_same(loss, -bound.sum(), pair)


@pytest.mark.parametrize("k", [1, 5])
def test_importance_weighted_bound_scales_with_the_plate(k):
    """A scale of a minibatch scales the bound of each datum, not its importance weights."""
    pair, x = linear()
    objective = pv.ImportanceWeightedELBO(k)
    found = run(around(poutine.scale(scale=2.5), pair), x, objective)
    assert_same(found, 2.5 * run(pair, x, objective), pair)


@pytest.mark.parametrize("beta", [0.0, 0.5, torch.tensor(2.0)])
@pytest.mark.parametrize("outermost", ["weight", "scale"])
def test_importance_weights_take_a_weighed_kl_and_a_common_scale(beta, outermost):
    pair, x = linear()
    inner, outer = poutine.scale(scale=4.0), pv.KLWeight(beta)
    if outermost == "scale":
        inner, outer = outer, inner
    weighted = around(outer, around(inner, pair))
    loss, [[z]] = watched(weighted, x, pv.ImportanceWeightedELBO(3))
    log_weights = []
    for draw in z:
        reconstruction, log_ratio = by_hand(pair, x, draw)
        log_weights.append(reconstruction - beta * log_ratio)
    bound = torch.stack(log_weights).logsumexp(0) - log(3)
    assert_same(loss, -4 * bound.sum(), pair)


class ScaleOf(Messenger):
    """Scales only one site."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def _pyro_sample(self, msg):
        if msg["name"] == self.name:
            msg["scale"] = msg["scale"] * 0.5


@pytest.mark.parametrize("site", ["x", "z"])
@pytest.mark.parametrize("gradient", pv.Gradient)
def test_importance_weights_refuse_a_site_of_a_scale_of_its_own(site, gradient):
    pair, x = linear()
    objective = pv.ImportanceWeightedELBO(3, gradient=gradient)
    tempered = around(ScaleOf(site), around(pv.KLWeight(0.7), pair))
    with pytest.raises(pv.UsageError, match="'z' and site 'x' have different scales") as caught:
        run(tempered, x, objective)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("k", [1, 7])
def test_importance_weighted_bound_of_an_exact_guide_is_log_p(k):
    pair, x = linear()
    pair.make_exact()
    loss = run(pair, x, pv.ImportanceWeightedELBO(k))
    assert loss.item() == pytest.approx(-pair.log_likelihood(x).sum().item(), abs=1e-9)


def test_importance_weighted_bound_grows_towards_log_p():
    """Over 60 seeds of 60 rows each. Every comparison has a margin of four standard errors."""
    pair, x = linear()
    rows, found = x.repeat(10, 1), {}
    for k in (1, 5, 50, 2000):
        objective, seeds = pv.ImportanceWeightedELBO(k), 60 if k < 2000 else 5
        with torch.no_grad():
            bounds = torch.stack([-run(pair, rows, objective, seed) for seed in range(seeds)])
        bounds = bounds / len(rows)
        found[k] = bounds.mean().item(), bounds.std().item() / sqrt(seeds)
    exact = pair.log_likelihood(x).mean().item()
    reconstruction, kl = pair.expectations(x)
    elbo = (reconstruction - kl).mean().item()
    assert abs(found[1][0] - elbo) < 4 * found[1][1]
    for fewer, more in ((1, 5), (5, 50)):
        margin = 4 * sqrt(found[fewer][1] ** 2 + found[more][1] ** 2)
        assert found[more][0] - found[fewer][0] > margin
    for value, error in found.values():
        assert value < exact + 4 * error
    assert exact - found[2000][0] < 0.02 + 4 * found[2000][1]


@pytest.mark.parametrize("objective", [pv.ImportanceWeightedELBO(3), pv.FreeBitsELBO(0.2)])
def test_loss_and_gradients_are_those_of_the_differentiable_loss(objective):
    pair, x = linear()
    expected = run(pair, x, objective)
    slopes = gradients(expected, pair.parameters())
    with seeded(0):
        assert objective.loss(pair.model, pair.guide, x) == pytest.approx(expected.item())
    assert all(parameter.grad is None for parameter in pair.parameters())
    with seeded(0):
        value = objective.loss_and_grads(pair.model, pair.guide, x)
    assert value == pytest.approx(expected.item())
    torch.testing.assert_close([parameter.grad for parameter in pair.parameters()], list(slopes))


def global_latent():
    """A scale that all data share, outside the plate."""

    def model(x):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample(
                "x", dist.Normal(shift[..., None].expand(*shift.shape, 4), 1.0).to_event(1), obs=x
            )

    return SimpleNamespace(model=model, guide=lambda x: pyro.sample("shift", dist.Normal(0.1, 1.0)))


def global_observation():
    """Local latents, and data observed all at once."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0).expand(x.shape).to_event(2), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.1, 1.0))

    return SimpleNamespace(model=model, guide=guide)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (global_latent, "'shift' is outside the data plate"),
        (global_observation, "'x' is outside the data plate"),
        (discrete_latent, "'coin' is not reparametrized"),
    ],
)
def test_importance_weighted_bound_refuses(make, message, k):
    pair, x = make(), torch.zeros(5, 4)
    with pytest.raises(pv.UsageError, match=message) as caught:
        pv.ImportanceWeightedELBO(k).loss(pair.model, pair.guide, x)
    assert "\n" not in str(caught.value)

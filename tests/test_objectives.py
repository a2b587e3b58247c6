"""Objectives, schedules and what is recorded, against sums by hand and closed forms."""

from itertools import pairwise
from math import log, sqrt
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import PlainAttributes, rows
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from torch import nn
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae.objectives import Parts, recorded
from pyro_vae.rng import seeded


class LinearGaussian(nn.Module):
    """z ~ N(0, I), x | z ~ N(W z + b, s^2 I), and a guide N(A x + c, diag t^2) that is not exact.

    The likelihood does not depend on the last unit of z.
    """

    def __init__(self, latent_dim=3, data_dim=4):
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        weight = torch.randn(data_dim, latent_dim, generator=draw, dtype=torch.float64)
        weight[:, -1] = 0
        self.weight, self.noise = nn.Parameter(weight), 0.8
        self.bias = nn.Parameter(torch.randn(data_dim, generator=draw, dtype=torch.float64))
        slope = 0.2 * torch.randn(latent_dim, data_dim, generator=draw, dtype=torch.float64)
        self.slope = nn.Parameter(slope)
        self.offset = nn.Parameter(torch.full((latent_dim,), 0.1, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.linspace(-0.5, 0.1, latent_dim, dtype=torch.float64))

    def prior(self):
        return dist.Normal(torch.zeros_like(self.offset), 1.0).to_event(1)

    def decoder(self, z):
        return dist.Normal(z @ self.weight.T + self.bias, self.noise).to_event(1)

    def encoder(self, x):
        return dist.Normal(x @ self.slope.T + self.offset, self.log_scale.exp()).to_event(1)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.decoder(z), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.encoder(x))

    def log_likelihood(self, x):
        """The exact log p(x) of each datum."""
        noise = self.noise**2 * torch.eye(len(self.bias), dtype=torch.float64)
        covariance = self.weight @ self.weight.T + noise
        return dist.MultivariateNormal(self.bias, covariance).log_prob(x)

    def expectations(self, x):
        """The exact E_q[log p(x|z)] and KL of each datum."""
        q = self.encoder(x)
        spread = (self.weight.square() * self.log_scale.exp().square()).sum()
        reconstruction = self.decoder(q.mean).log_prob(x) - spread / (2 * self.noise**2)
        return reconstruction, kl_divergence(q.base_dist, self.prior().base_dist).sum(-1)

    def make_exact(self):
        """Give W orthogonal columns, so that the posterior is diagonal, and make it the guide."""
        with torch.no_grad():
            columns = torch.linalg.qr(self.weight[:, :-1]).Q
            self.weight[:, :-1] = columns * torch.tensor([1.5, 0.7], dtype=torch.float64)
            precision = 1 + self.weight.square().sum(0) / self.noise**2
            self.slope.copy_(self.weight.T / self.noise**2 / precision[:, None])
            self.offset.copy_(-self.slope @ self.bias)
            self.log_scale.copy_(-precision.log() / 2)


class Plated(nn.Module):
    """A local latent z, and under it one w for each of the three items of a datum."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(self.loc), 1.0))
            with pyro.plate("items", 3, dim=-2):
                w = pyro.sample("w", dist.Normal(z, 1.0))
                pyro.sample("x", dist.Normal(w, 1.0), obs=x.T)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(self.loc, 1.3))
            with pyro.plate("items", 3, dim=-2):
                pyro.sample("w", dist.Normal(self.loc + z, 0.7))


def mlp():
    """A small Bernoulli VAE and data for it."""
    with seeded(3):
        pair = pv.VAE.mlp((2, 3), latent_dim=2, hidden=(8,)).double()
        return pair, torch.rand(5, 2, 3, dtype=torch.float64).round()


def linear(n=6):
    """The linear-Gaussian pair and data drawn from it."""
    pair = LinearGaussian()
    with seeded(4), torch.no_grad():
        return pair, pair.decoder(pair.prior().sample((n,))).sample()


def plated():
    with seeded(5):
        return Plated(), torch.randn(5, 3, dtype=torch.float64)


PAIRS = {"mlp": mlp, "linear": linear}


def around(handler, pair):
    """A pair of programs: model and guide inside a handler."""
    return SimpleNamespace(model=handler(pair.model), guide=handler(pair.guide))


def run(pair, x, objective, seed=0):
    """The loss of an objective under a seed, as a tensor."""
    with seeded(seed):
        return objective.differentiable_loss(pair.model, pair.guide, x)


def watched(pair, x, objective, names=("z",), seed=0):
    """The loss under a seed, and every set of draws of these latents that was made for it."""
    seen = []

    def guide(*batch):
        with poutine.trace() as tracer:
            pair.guide(*batch)
        seen.append([tracer.trace.nodes[name]["value"] for name in names])

    return run(SimpleNamespace(model=pair.model, guide=guide), x, objective, seed), seen


def by_hand(pair, x, z):
    """log p(x|z) and log q(z|x) - log p(z), of shape (..., batch), from the factors alone."""
    log_ratio = pair.encoder(x).log_prob(z) - pair.prior().log_prob(z)
    return pair.decoder(z).log_prob(x), log_ratio


def closed_kl(pair, x):
    """The KL of each unit, of shape (batch, latent_dim)."""
    return kl_divergence(pair.encoder(x).base_dist, pair.prior().base_dist)


def gradients(loss, parameters):
    return torch.autograd.grad(
        loss, list(parameters), retain_graph=True, allow_unused=True, materialize_grads=True
    )


def assert_same(found, expected, pair):
    """Two losses agree, and so do their gradients by every parameter."""
    torch.testing.assert_close(found, expected)
    assert any(bool((slope != 0).any()) for slope in gradients(found, pair.parameters()))
    torch.testing.assert_close(
        gradients(found, pair.parameters()), gradients(expected, pair.parameters())
    )


BETAS = [0, 0.5, 1.0, 2.5, torch.tensor(0.3), torch.tensor(0.0)]


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("beta", BETAS)
def test_kl_weight_scales_the_kl_alone(name, beta):
    pair, x = PAIRS[name]()
    loss, [[z]] = watched(around(pv.KLWeight(beta), pair), x, Trace_ELBO())
    reconstruction, log_ratio = by_hand(pair, x, z)
    assert_same(loss, -(reconstruction - beta * log_ratio).sum(), pair)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("beta", BETAS)
def test_kl_weight_scales_the_closed_kl_alone(name, beta):
    pair, x = PAIRS[name]()
    loss, [[z]] = watched(around(pv.KLWeight(beta), pair), x, TraceMeanField_ELBO())
    reconstruction, _ = by_hand(pair, x, z)
    assert_same(loss, -(reconstruction - beta * closed_kl(pair, x).sum(1)).sum(), pair)


def test_kl_weight_can_change_between_steps_and_meets_every_latent():
    pair, x = plated()
    weight = pv.KLWeight()
    weighted = around(weight, pair)
    losses = []
    for beta in (1.0, 0.0, 3.0):
        weight.weight = beta
        losses.append(run(weighted, x, Trace_ELBO()))
    full, reconstruction, heavy = losses
    assert_same(heavy, reconstruction + 3 * (full - reconstruction), pair)
    assert_same(full, run(pair, x, Trace_ELBO()), pair)


@pytest.mark.parametrize("outermost", ["weight", "scale"])
def test_kl_weight_joins_other_scales(outermost):
    pair, x = linear()
    weight, scale = pv.KLWeight(0.5), poutine.scale(scale=4.0)
    inner, outer = (scale, weight) if outermost == "weight" else (weight, scale)
    weighted = around(outer, around(inner, pair))
    loss, [[z]] = watched(weighted, x, Trace_ELBO())
    reconstruction, log_ratio = by_hand(pair, x, z)
    assert_same(loss, -4 * (reconstruction - 0.5 * log_ratio).sum(), pair)


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
    """The latent of a datum is weighed once, however many items the datum has."""
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
    """A minibatch that stands for more data scales the bound of each datum, not its weights."""
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
    """Scales one site alone."""

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
    with pytest.raises(pv.UsageError, match="'z' is scaled otherwise than site 'x'") as caught:
        run(tempered, x, objective)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("k", [1, 7])
def test_importance_weighted_bound_of_an_exact_guide_is_log_p(k):
    pair, x = linear()
    pair.make_exact()
    loss = run(pair, x, pv.ImportanceWeightedELBO(k))
    assert loss.item() == pytest.approx(-pair.log_likelihood(x).sum().item(), abs=1e-9)


def test_importance_weighted_bound_grows_towards_log_p():
    """Over 60 seeds of 60 rows each; every comparison leaves four standard errors."""
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
    """A scale shared by all data, outside the plate."""

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


def discrete_latent():
    """A coin for each datum."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            coin = pyro.sample("coin", dist.Bernoulli(0.5))
            pyro.sample(
                "x", dist.Normal(coin[..., None].expand(*coin.shape, 4), 1.0).to_event(1), obs=x
            )

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("coin", dist.Bernoulli(0.4))

    return SimpleNamespace(model=model, guide=guide)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (global_latent, "'shift' is outside the data plate"),
        (global_observation, "'x' is outside the data plate"),
        (discrete_latent, "'coin' is not reparametrised"),
    ],
)
def test_importance_weighted_bound_refuses(make, message, k):
    pair, x = make(), torch.zeros(5, 4)
    with pytest.raises(pv.UsageError, match=message) as caught:
        pv.ImportanceWeightedELBO(k).loss(pair.model, pair.guide, x)
    assert "\n" not in str(caught.value)


def test_free_bits_refuse_a_discrete_latent():
    pair, x = discrete_latent(), torch.zeros(5, 4)
    with pytest.raises(pv.UsageError, match="'coin' is not reparametrised") as caught:
        pv.FreeBitsELBO(0.1).loss(pair.model, pair.guide, x)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [mlp, linear, plated])
def test_no_free_bits_give_the_elbo_with_its_closed_kl(make):
    pair, x = make()
    found = run(pair, x, pv.FreeBitsELBO(0.0))
    assert_same(found, run(pair, x, TraceMeanField_ELBO()), pair)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("floor", [0.02, 0.3, 3.0])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_free_bits_by_hand(name, floor, beta):
    pair, x = PAIRS[name]()
    loss, [[z]] = watched(around(pv.KLWeight(beta), pair), x, pv.FreeBitsELBO(floor))
    reconstruction, _ = by_hand(pair, x, z)
    kl = closed_kl(pair, x).mean(0).clamp(min=floor)
    assert_same(loss, -(reconstruction.sum() - beta * len(x) * kl.sum()), pair)


def test_the_middle_floor_is_between_units():
    """The test before has units above its floor, below it, and on both sides."""
    pair, x = linear()
    kl = closed_kl(pair, x).mean(0)
    assert 0.02 < float(kl.detach().min()) < 0.3 < float(kl.detach().max()) < 3.0


@pytest.mark.parametrize("name", PAIRS)
def test_free_bits_are_never_above_the_elbo(name):
    pair, x = PAIRS[name]()
    bounds = [-run(pair, x, TraceMeanField_ELBO()).item()]
    for floor in (0.0, 0.01, 0.05, 0.2, 1.0, 5.0):
        bounds.append(-run(pair, x, pv.FreeBitsELBO(floor)).item())
    assert all(lower <= upper + 1e-9 for upper, lower in pairwise(bounds))
    assert bounds[-1] < bounds[0] - 1


def test_a_unit_below_the_floor_has_no_gradient():
    """The likelihood leaves the last unit out, so only its KL could move its posterior."""
    pair, x = linear()
    posterior = (pair.slope, pair.offset, pair.log_scale)
    kl = closed_kl(pair, x).mean(0).detach()
    assert kl[-1] < kl.max()
    between = float(kl[-1] + kl.max()) / 2
    free = gradients(run(pair, x, pv.FreeBitsELBO(between)), posterior)
    full = gradients(run(pair, x, pv.FreeBitsELBO(0.0)), posterior)
    highest = int(kl.argmax())
    for below, pushed in zip(free, full, strict=True):
        assert bool((below[-1] == 0).all())
        assert bool((pushed[-1] != 0).all())
        torch.testing.assert_close(below[highest], pushed[highest])


def test_free_bits_scale_with_the_plate():
    pair, x = linear()
    scaled = around(poutine.scale(scale=2.5), pair)
    for floor in (0.0, 0.1):
        found = run(scaled, x, pv.FreeBitsELBO(floor))
        assert_same(found, 2.5 * run(pair, x, pv.FreeBitsELBO(floor)), pair)


def test_free_bits_leave_masked_rows_out():
    pair, x = linear()
    mask = torch.tensor([True, False, True, True, False, False])
    masked = around(poutine.mask(mask=mask), pair)
    found = run(masked, x, pv.FreeBitsELBO(0.0))
    assert_same(found, run(masked, x, TraceMeanField_ELBO()), pair)


def test_free_bits_of_a_site_that_does_not_split_into_units():
    pair, x = linear()
    factor = torch.tensor([[0.9, 0.0, 0.0], [0.4, 0.8, 0.0], [-0.2, 0.1, 1.1]]).double()
    pair.encoder = lambda x: dist.MultivariateNormal(x @ pair.slope.T, scale_tril=factor)
    pair.prior = lambda: dist.MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())
    kl = kl_divergence(pair.encoder(x), pair.prior()).mean()
    for floor in (0.5 * kl.item(), 2 * kl.item()):
        loss, [[z]] = watched(pair, x, pv.FreeBitsELBO(floor))
        reconstruction, _ = by_hand(pair, x, z)
        assert_same(loss, -(reconstruction.sum() - len(x) * kl.clamp(min=floor)), pair)


def test_free_bits_without_a_closed_kl_take_the_draws():
    pair, x = linear()
    zero = torch.zeros(3, dtype=torch.float64)
    pair.prior = lambda: dist.StudentT(5.0, zero, 1.0).to_event(1)
    loss, [[z]] = watched(pair, x, pv.FreeBitsELBO(0.3))
    reconstruction, _ = by_hand(pair, x, z)
    units = pair.encoder(x).base_dist.log_prob(z) - pair.prior().base_dist.log_prob(z)
    floored = units.mean(0).clamp(min=0.3)
    assert bool((floored == 0.3).any())
    assert bool((floored > 0.3).any())
    assert_same(loss, -(reconstruction.sum() - len(x) * floored.sum()), pair)


OBJECTIVES = {
    "one": Trace_ELBO(),
    "three": Trace_ELBO(num_particles=3),
    "four-vectorised": Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
    "closed-kl": TraceMeanField_ELBO(),
    "importance": pv.ImportanceWeightedELBO(5),
    "free-bits": pv.FreeBitsELBO(0.2),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("beta", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("kind", PAIRS)
def test_recorded_parts_are_those_of_the_draws(name, beta, kind):
    pair, x = PAIRS[kind]()
    weighted, parts = around(pv.KLWeight(beta), pair), Parts()
    loss, seen = watched(weighted, x, recorded(OBJECTIVES[name], parts))
    z = torch.cat([z.reshape(-1, *z.shape[-2:]) for (z,) in seen])
    assert len(z) == OBJECTIVES[name].num_particles
    reconstruction, log_ratio = by_hand(pair, x, z)
    assert parts.reconstruction.keys() == {"x"}
    assert parts.kl.keys() == {"z"}
    expected = reconstruction.mean(0).sum().detach(), log_ratio.mean(0).sum().detach()
    torch.testing.assert_close((parts.reconstruction["x"], parts.kl["z"]), expected)
    # Recording changes neither the loss nor the objective that it was made of.
    torch.testing.assert_close(loss, run(weighted, x, OBJECTIVES[name]))
    torch.testing.assert_close(parts.kl["z"], expected[1])


@pytest.mark.parametrize("particles", [1, 3])
def test_recorded_parts_leave_scales_out_and_keep_masks(particles):
    pair, x = linear()
    mask = torch.tensor([True, False, True, True, False, False])
    changed = around(poutine.scale(scale=3.0), around(poutine.mask(mask=mask), pair))
    parts = Parts()
    _, seen = watched(changed, x, recorded(Trace_ELBO(num_particles=particles), parts))
    reconstruction, log_ratio = by_hand(pair, x, torch.stack([z for (z,) in seen]))
    expected = [(part.detach() * mask).mean(0).sum() for part in (reconstruction, log_ratio)]
    torch.testing.assert_close([parts.reconstruction["x"], parts.kl["z"]], expected)


def test_recorded_parts_of_two_latents_make_the_loss():
    pair, x = plated()
    parts = Parts()
    loss, [[z, w]] = watched(pair, x, recorded(Trace_ELBO(), parts), ("z", "w"))
    kl_z = dist.Normal(pair.loc, 1.3).log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z)
    kl_w = dist.Normal(pair.loc + z, 0.7).log_prob(w) - dist.Normal(z, 1.0).log_prob(w)
    torch.testing.assert_close(parts.kl["z"], kl_z.sum().detach())
    torch.testing.assert_close(parts.kl["w"], kl_w.sum().detach())
    elbo = parts.reconstruction["x"] - parts.kl["z"] - parts.kl["w"]
    torch.testing.assert_close(elbo, -loss.detach())


def test_recorded_parts_make_the_loss_of_a_guide_with_an_auxiliary_latent():
    pair, x = linear()

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            auxiliary = dist.Normal(pair.offset, 1.0).to_event(1)
            u = pyro.sample("u", auxiliary, infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(u, 0.7).to_event(1))

    parts = Parts()
    loss = run(SimpleNamespace(model=pair.model, guide=guide), x, recorded(Trace_ELBO(), parts))
    reconstruction, kl = parts.per_example(len(x))
    assert reconstruction - sum(kl.values()) == pytest.approx(-loss.item() / len(x))


def test_parts_add_up_over_minibatches():
    pair, x = linear()
    parts = Parts()
    measured = recorded(Trace_ELBO(), parts)
    total = sum(run(pair, rows, measured, i).item() for i, rows in enumerate((x[:4], x[4:])))
    reconstruction, kl = parts.per_example(len(x))
    assert (reconstruction - sum(kl.values())) * len(x) == pytest.approx(-total)
    parts.clear()
    assert parts.per_example(len(x)) == (0, {})


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        (pv.Linear(4), {0: 0, 1: 0.25, 2.5: 0.625, 4: 1, 9: 1}),
        (pv.Linear(8, start=0.2), {0: 0.2, 2: 0.4, 8: 1, 100: 1}),
        (pv.Linear(10, start=1.0, end=0.5), {0: 1, 4: 0.8, 10: 0.5, 11: 0.5}),
        (pv.Cyclical(4, rise=0.25), {0: 0, 0.5: 0.5, 1: 1, 3.5: 1, 4: 0, 4.5: 0.5, 8.25: 0.25}),
        (pv.Cyclical(10, start=0.1, end=0.5), {0: 0.1, 2.5: 0.3, 5: 0.5, 9: 0.5, 12.5: 0.3}),
        (pv.Cyclical(2, rise=1.0), {0: 0, 1: 0.5, 1.5: 0.75, 2: 0, 3: 0.5}),
        (pv.Cosine(6), {0: 1, 2: 0.75, 3: 0.5, 4: 0.25, 6: 0, 7: 0}),
        (pv.Cosine(6, start=0.1, end=0.9), {0: 0.1, 2: 0.3, 3: 0.5, 6: 0.9, 60: 0.9}),
    ],
)
def test_schedules(schedule, points):
    assert [schedule(epoch) for epoch in points] == pytest.approx(list(points.values()))


def binary_pair(n=32):
    """A small VAE and rows of two kinds."""
    with seeded(6):
        pair = pv.VAE.mlp((6,), latent_dim=2, hidden=(8,))
        kind = torch.rand(n, 1).round()
        return pair, torch.where(torch.rand(n, 6) < 0.1, 1 - kind, kind.expand(n, 6))


def test_fit_reports_the_elbo_beside_a_weighted_objective():
    pair, x = binary_pair()
    beta = pv.Linear(epochs=4)
    history = pv.fit(
        pair, x, epochs=8, batch_size=32, learning_rate=0.02, beta=beta, progress=False
    )
    for number, epoch in enumerate(history.epochs):
        kl = epoch.kl["z"]
        assert epoch.beta == pytest.approx(beta(number))
        assert epoch.elbo == pytest.approx(epoch.reconstruction - kl, abs=1e-6)
        expected = epoch.reconstruction - beta(number) * kl
        assert epoch.objective == pytest.approx(expected, abs=1e-5)
        if number < 4:
            assert abs(epoch.objective - epoch.elbo) > 1e-3
        else:
            assert epoch.objective == pytest.approx(epoch.elbo, abs=1e-5)


def test_fit_moves_the_weight_within_an_epoch():
    pair, x = binary_pair()
    # Without a weight first, until the KL is so large that every estimate of it is positive.
    pv.fit(pair, x, epochs=30, batch_size=32, learning_rate=0.03, beta=0.0, progress=False)
    beta = pv.Linear(epochs=4)
    history = pv.fit(
        pair, x, epochs=3, batch_size=16, learning_rate=0.02, beta=beta, progress=False
    )
    assert history["beta"] == pytest.approx([0.125, 0.375, 0.625])
    for number, epoch in enumerate(history.epochs):
        weight = (epoch.reconstruction - epoch.objective) / epoch.kl["z"]
        assert beta(number) < weight < beta(number + 0.5)


def test_fit_with_a_heavier_kl_ends_with_less_of_it():
    ends = []
    for beta in (0.1, 4.0):
        pair, x = binary_pair()
        history = pv.fit(
            pair, x, epochs=40, batch_size=32, learning_rate=0.03, beta=beta, progress=False
        )
        ends.append(history["kl"][-1])
    assert ends[0] > 2 * max(ends[1], 0) + 0.5


def test_fit_reports_the_exact_elbo_of_a_pair_that_stands_still():
    """Forty epochs of hardly any learning are forty estimates of a known number."""
    pair, x = linear(100)
    reconstruction, kl = (part.mean().item() for part in pair.expectations(x))
    history = pv.fit(
        pair, x, epochs=40, batch_size=50, learning_rate=1e-12, beta=0.5, progress=False
    )
    expected = {
        "reconstruction": reconstruction,
        "kl": kl,
        "elbo": reconstruction - kl,
        "objective": reconstruction - 0.5 * kl,
    }
    for column, value in expected.items():
        found = torch.tensor(history[column], dtype=torch.float64)
        error = found.std() / sqrt(len(found))
        assert abs(found.mean() - value) < 5 * error, column
        assert error < 0.1


def test_fit_takes_the_learning_rate_from_a_schedule():
    pair, x = binary_pair()
    history = pv.fit(
        pair,
        x,
        epochs=5,
        batch_size=32,
        learning_rate=0.01,
        learning_rate_schedule=pv.Cosine(4),
        progress=False,
    )
    expected = [0.01, 0.01 * (2 + sqrt(2)) / 4, 0.005, 0.01 * (2 - sqrt(2)) / 4, 0]
    assert history["learning_rate"] == pytest.approx(expected, abs=1e-12)


class Auxiliary(PlainAttributes):
    """A classifier of the first pixel, trained by a term that is no part of p(x)."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(6, 2)

    def model(self, x):
        super().model(x)
        with pyro.plate("rows", len(x), dim=-1):
            label = dist.Categorical(logits=self.classifier(x))
            pyro.sample("label", label, obs=x[:, 0].long(), infer={"is_auxiliary": True})


def test_total_correlation_refuses_a_prior_that_depends_on_context():
    with seeded(0):
        factor = pv.Factor(pv.MLP([3], (), 4), pv.DiagonalNormal(), (2,))
        pair = pv.VAE.mlp((6,), 2, (5,), prior=factor, context_shapes=[(3,)])
    x, context = torch.rand(6, 6).round(), torch.eye(3)[torch.arange(6) % 3]
    words = "needs one prior for all data, that of 'z' differs from row to row"
    objective = pv.TotalCorrelationELBO(6)
    with pytest.raises(pv.UsageError, match=words):
        objective.loss(pair.model, pair.guide, x, context)
    assert words in pv.check(pair, (x, context), objective).errors[0]
    assert objective.loss(pair.model, pair.guide, x, context[:1].expand(6, 3)) > 0


@pytest.mark.parametrize(
    "objective",
    [
        Trace_ELBO(),
        pv.FreeBitsELBO(0.0),
        pv.ImportanceWeightedELBO(1),
        pv.ImportanceWeightedELBO(5),
        pv.TotalCorrelationELBO(50, 1.0),
    ],
)
def test_every_objective_adds_what_is_marked_auxiliary(objective):
    with seeded(0):
        pair = Auxiliary().double()
    (x,) = rows("plain", 50)
    terms = dist.Categorical(logits=pair.classifier(x)).log_prob(x[:, 0].long())
    losses = []
    for model in (pair.model, lambda x: PlainAttributes.model(pair, x)):
        with seeded(1):
            losses.append(objective.loss(model, pair.guide, x))
    assert losses[0] - losses[1] == pytest.approx(-terms.sum().item())


def test_rows_that_are_masked_have_no_floor():
    live = torch.arange(10) < 5

    class Masked(PlainAttributes):
        def model(self, x):
            with poutine.mask(mask=live):
                super().model(x)

        def guide(self, x):
            with poutine.mask(mask=live):
                super().guide(x)

    with seeded(0):
        pair = Masked().double()
    (x,) = rows("plain", 10)
    losses = []
    for floor in (0.0, 3.0):
        with seeded(1):
            losses.append(pv.FreeBitsELBO(floor).loss(pair.model, pair.guide, x))
    loc, raw = pair.encoder(x[live]).chunk(2, -1)
    q = dist.Normal(loc, nn.functional.softplus(raw))
    kl = kl_divergence(q, dist.Normal(0.0, 1.0)).sum()
    assert losses[1] - losses[0] == pytest.approx(5 * 2 * 3.0 - kl.item())

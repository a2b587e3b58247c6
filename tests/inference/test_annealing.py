"""Latents as one vector per datum, and annealing bounds on log p(x), compared with closed forms."""

import json
from math import log

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian, linear_gaussian
from pairs import ALL, ENUMERATED, FAULTS, Counts, Fault, TwoModes, make, rows
from pyro.distributions.transforms import Planar
from torch import nn

import pyro_vae as pv
from pyro_vae.diagnostics import figures as diagnostic_figures
from pyro_vae.inference import annealing, annealing_path
from pyro_vae.inference.joint import Joint
from pyro_vae.pairs import rng
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.simulation import simulate
from pyro_vae.pairs.weights import log_weights
from pyro_vae.training.check import require


class Spoiled(LinearGaussian):
    """A diagonal guide with its own scale; its mean is off by half a standard deviation."""

    def __init__(self, data_dim, latent_dim, scale):
        weight = linear_gaussian(data_dim, latent_dim).weight.detach()
        super().__init__(weight, noise=0.5)
        posterior = torch.distributions.MultivariateNormal(
            torch.zeros(latent_dim).double(),
            precision_matrix=torch.eye(latent_dim) + 4 * weight.T @ weight,
        )
        self.slope = 4 * weight @ posterior.covariance_matrix
        self.deviation = scale * posterior.stddev

    def guide(self, x):
        loc = x @ self.slope + 0.5 * self.deviation
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, self.deviation).to_event(1))


def first(batch):
    return tuple(tensor[:2] for tensor in batch)


# The densities of one vector per datum


@pytest.mark.sample(12)
@pytest.mark.parametrize("name", ALL)
def test_every_pair_has_its_weights_at_vectors_of_its_draws(name):
    """With the sample plate of `log_likelihood`, and one draw at a time."""
    pair, batch = make(name), rows(name, 4)
    require(pair, batch)
    joint = Joint(pair, first(batch))
    with using(pair, 0):
        weights = log_weights(pair, batch, 3, joint.nesting)
    with using(pair, 0):
        z = joint.draw(3, *batch)
        found = joint.gradients(z, *batch)
        values = joint.constrained(z, *batch)
        back = [
            joint.unconstrained({key: value[k] for key, value in values.items()}, *batch)
            for k in range(3)
        ]
        assert bool(joint.counts(*batch).any(1).all())
        joint.vectorized = False
        alone = joint.gradients(z, *batch)
    assert z.shape == (3, 4, joint.dim)
    if name not in ENUMERATED:  # here z is drawn separately for each value
        torch.testing.assert_close(found["joint"] - found["guide"], weights)
    assert all(value.shape[:2] == (3, 4) for value in values.values())
    torch.testing.assert_close(torch.cat(back), z)
    for key, value in found.items():
        torch.testing.assert_close(alone[key], value)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["bernoulli", "flows", "semi-supervised", "mixture", "bags"])
def test_the_joint_density_integrates_to_p_and_the_guide_to_one(name):
    """Compare with a grid over the two latents, also for enumerated pairs."""
    pair, batch = make(name), rows(name, 3)
    joint, step = Joint(pair, first(batch)), 0.1
    axis = torch.arange(-7, 7, step).double()
    grid = torch.cartesian_prod(axis, axis)[:, None].expand(-1, 3, 2)
    with using(pair):
        log_p = joint.log_joint(grid, *batch).logsumexp(0)
        log_q = joint.log_guide(grid, *batch).logsumexp(0)
    area = 2 * torch.tensor(step).double().log()
    torch.testing.assert_close(log_q + area, torch.zeros(3).double(), atol=5e-3, rtol=0)
    estimate = pv.log_likelihood(pair, *batch, num_samples=20_000)
    sure = estimate.pareto_k < 0.6  # without the bags, because their weights have heavy tails
    off = (log_p + area - estimate.per_datum).abs()
    assert bool((off < 4 * estimate.standard_errors + 1e-3)[sure].all())
    options = {"num_temperatures": 15, "num_chains": 64, "leapfrog_steps": 2, "progress": False}
    found = pv.anneal(pair, *batch, engine="eager", **options)
    assert bool(((log_p + area - found.per_datum).abs() < 5 * found.standard_errors).all())


COUNTS = torch.tensor([[0.0, 1, 9], [3, 2, 2]]).double()


def test_supports_bring_their_jacobians_and_plates_within_a_datum_their_dimensions():
    pair = Counts()
    joint = Joint(pair, (COUNTS,))
    assert joint.nesting == 2
    assert joint.dim == 3
    with using(pair, 0):
        z = joint.draw(5, COUNTS)
        rates = joint.constrained(z, COUNTS)["rate"]
        torch.testing.assert_close(rates, z.exp())
        at, rate = joint.log_joint(z, COUNTS), rates[2, 1]
        by_hand = dist.Gamma(2.0, 0.5).log_prob(rate) + dist.Poisson(rate).log_prob(COUNTS[1])
        torch.testing.assert_close(at[2, 1], (by_hand + z[2, 1]).sum())
        q = dist.Normal((COUNTS + 0.5).log() - 0.2, 0.6).log_prob(z).sum(-1)
        torch.testing.assert_close(joint.log_guide(z, COUNTS), q)


class Simplex(nn.Module):
    """Proportions, whose vectors have one number less, and a mask that hides data."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3).double())

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            p = pyro.sample("p", dist.Dirichlet(self.weight))
            with pyro.poutine.mask(mask=x[:, 0] >= 0):
                s = pyro.sample("s", dist.Gamma(self.weight[0], 1.0))
            pyro.sample("x", dist.Normal(p * s[..., None], 1.0).to_event(1), obs=x.clamp(min=0))

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("p", dist.Dirichlet(2 * self.weight))
            with pyro.poutine.mask(mask=x[:, 0] >= 0):
                pyro.sample("s", dist.Gamma(2 * self.weight[0], 1.0))


def test_the_simplex_integrates_to_the_mean_over_its_prior():
    pair, x = Simplex(), torch.tensor([[0.2, 0.5, 0.1], [1.0, 2, 0.4]]).double()
    joint = Joint(pair, (x,))
    assert joint.dim == 3
    with using(pair, 0):
        z = joint.draw(20_000, x)
        weights = joint.log_joint(z, x) - joint.log_guide(z, x)
        prior = joint.draw_prior(20_000, x)
        values = joint.constrained(prior, x)
        loc = values["p"] * values["s"][..., None]
        direct = dist.Normal(loc, 1.0).to_event(1).log_prob(x)
        back = joint.constrained(prior[:5], x)["p"]
    torch.testing.assert_close(back.sum(-1), torch.ones(5, 2).double())
    a, b = (part.exp().mean(0) for part in (weights, direct))
    error = (weights.exp().var(0) / 20_000 + direct.exp().var(0) / 20_000).sqrt()
    assert bool(((a - b).abs() < 4 * error).all())


def test_padding_takes_no_part():
    pair = make("deep-markov")
    x, lengths = rows("deep-markov", 6)
    joint = Joint(pair, (x[:2], lengths[:2]))
    with using(pair, 0):
        counts = joint.counts(x, lengths).reshape(6, 3, 2)
    inside = torch.arange(3) < lengths[:, None]
    assert torch.equal(counts, inside[..., None].expand(6, 3, 2))


def test_draws_of_the_model_include_their_latents():
    pair = linear_gaussian()
    with using(pair, 0):
        (x,), values = simulate(pair, 20_000)
    z = values["z"]
    assert z.std() == pytest.approx(1, abs=0.02)
    noise = x - z @ pair.weight.detach().T
    assert noise.std() == pytest.approx(0.5, abs=0.01)
    pair = make("semi-supervised")
    with using(pair, 0):
        (_, missing), values = simulate(pair, 4)
        assert missing.tolist() == [-1] * 4
        assert set(values) == {"y", "z"}


@pytest.mark.parametrize("kind", FAULTS)
def test_an_error_names_the_site_that_a_tool_cannot_use(kind):
    x = torch.tensor([[0.0], [1.0]]).double()
    with pytest.raises(pv.UsageError, match=FAULTS[kind]):
        pv.anneal(Fault(kind), x, progress=False)
    with pytest.raises(pv.UsageError, match=FAULTS[kind]):
        pv.sandwich(Fault(kind), progress=False)


class Bent(Fault):
    """A guide whose density is known only at its own draws."""

    def __init__(self):
        super().__init__("")
        self.bend = Planar(2)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., :1], self.weight).to_event(1), obs=x)

    def guide(self, x):
        base = dist.Normal(x.new_zeros(2), 1.0).to_event(1)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.TransformedDistribution(base.expand([len(x)]), [self.bend]))


def test_a_guide_without_a_density_is_refused_but_nuts_works():
    pair, x = Bent().double(), torch.tensor([[0.0], [1.0]]).double()
    with pytest.raises(pv.UsageError, match="density of site 'z' of the guide cannot be evaluated"):
        pv.anneal(pair, x, progress=False)
    result = pv.nuts(pair, x, num_draws=4, warmup=4, num_chains=2, engine="eager", progress=False)
    assert result.moments.mean.shape == (2, 2)


class Reads(Bent):
    """A model that branches on values, so it has no graph, and does not broadcast over samples."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            loc = z.reshape(len(x), 2)[:, :1] + (0.0 if z.sum().item() < 1e9 else 1.0)
            pyro.sample("x", dist.Normal(loc, self.weight).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.expand(len(x), 2) / 2, 0.8).to_event(1))


def test_a_pair_without_graph_and_plate_is_moved_particle_by_particle():
    pair, x = Reads().double(), torch.tensor([[0.0], [1.0]]).double()
    options = {"num_temperatures": 10, "num_chains": 8, "leapfrog_steps": 2, "progress": False}
    with pytest.warns(
        UserWarning, match="Reads is evaluated by the eager engine, because a branch"
    ):
        found = pv.anneal(pair, x, **options)
    truth = dist.Normal(0.0, 2**0.5).log_prob(x[:, 0])
    assert bool(((found.per_datum - truth).abs() < 5 * found.standard_errors).all())


# Bounds


@pytest.mark.sample(1)
@pytest.mark.parametrize("scale", [0.7, 1.3])
def test_forward_and_reverse_bracket_the_truth(scale):
    """Ten dimensions, 1,000 temperatures; the bound of the guide is off by at least three nats."""
    pair = Spoiled(20, 10, scale)
    both = pv.sandwich(
        pair, num_examples=8, num_temperatures=1000, leapfrog_steps=2, progress=False
    )
    truth = pair.marginal().log_prob(both.batch[0]).detach()
    assert pv.log_likelihood(pair, *both.batch, num_samples=50).elbo < truth.mean() - 3
    for side in (both.lower, both.upper):
        assert (side.per_datum - truth).mean().abs() < 0.05
        assert side.standard_error < 0.05
        assert side.acceptance.mean().item() == pytest.approx(0.7, abs=0.1)
    assert both.lower.value < truth.mean() + 4 * both.lower.standard_error
    assert both.upper.value > truth.mean() - 4 * both.upper.standard_error
    assert abs(both.gap) < 0.05


def test_a_transition_leaves_its_density_as_it_is():
    """Draws of the posterior stay exact, with steps so long that a third of them is rejected."""
    pair = Spoiled(4, 2, 0.8)
    with seeded(0):
        x = pair.marginal().sample((2,)).detach()
    mean, covariance = (part.detach() for part in pair.posterior(x))
    settings = annealing_path.AnnealingSettings(
        num_temperatures=1, num_chains=6000, leapfrog_steps=3
    )
    run = annealing._AnnealingRun(pair, (x,), settings, 2, "eager")
    with using(pair, 0):
        path = run.path((x,), lambda n: None)
        state = path._state(dist.MultivariateNormal(mean, covariance).sample((6000,)))
        for _ in range(4):
            state, accept = path._transition(state, 1.0, torch.full((2,), 1.9).double())
            assert 0.4 < accept.mean() < 0.85
    off = torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance), (state.z - mean)[..., None], upper=False
    )[..., 0]
    assert off.mean(0).abs().max() < 5 / 6000**0.5
    second = torch.einsum("cni,cnj->nij", off, off) / 6000
    assert (second - torch.eye(2)).abs().max() < 5 * (2 / 6000) ** 0.5


def test_weights_of_few_temperatures_have_the_right_mean():
    """w / p(x) and p(x) / w have mean 1 even if chains mix badly, because every step is exact."""
    pair = Spoiled(4, 2, 0.8)
    options = {"num_temperatures": 3, "num_chains": 1, "leapfrog_steps": 2, "progress": False}
    both = pv.sandwich(pair, num_examples=8000, **options)
    truth = pair.marginal().log_prob(both.batch[0]).detach()
    for ratio in (both.lower.per_datum - truth, truth - both.upper.per_datum):
        assert ratio.std() > 0.2
        error = ratio.exp().std() / 8000**0.5
        assert abs(ratio.exp().mean() - 1) < 4 * error
    assert both.lower.value < truth.mean() - 0.02
    assert both.upper.value > truth.mean() + 0.02
    assert both.lower.standard_errors.isnan().all()


def test_the_gap_closes_with_the_temperatures_and_errors_are_those_over_seeds():
    pair = Spoiled(6, 3, 0.6)
    options = {"num_chains": 16, "leapfrog_steps": 2, "progress": False, "engine": "eager"}
    few, many = (pv.sandwich(pair, num_examples=60, num_temperatures=t, **options) for t in (4, 60))
    assert few.gap > 0.1
    assert abs(many.gap) < few.gap / 3
    # Weights over p(x) have the same distribution for all data, so rows replace seeds.
    truth = pair.marginal().log_prob(many.batch[0]).detach()
    for side in (many.lower, many.upper):
        ratio = (side.per_datum - truth).std() / side.standard_errors.mean()
        assert ratio.item() == pytest.approx(1, abs=0.3)


def test_one_temperature_is_importance_sampling():
    pair = linear_gaussian()
    with seeded(0):
        x = pair.marginal().sample((5,)).detach()
    found = pv.anneal(pair, x, num_temperatures=1, num_chains=3, progress=False)
    truth = pair.marginal().log_prob(x).detach()
    torch.testing.assert_close(found.per_datum, truth)
    assert found.standard_error < 1e-6
    torch.testing.assert_close(found.effective_sample_size, torch.full((5,), 3.0).double())


def test_a_mode_that_the_guide_misses_shows_in_the_gap_alone():
    """The lower bound finds half of p(x), with weights that look good; the upper one is far off."""
    pair = TwoModes(0.5)
    options = {"num_temperatures": 40, "leapfrog_steps": 3, "progress": False}
    both = pv.sandwich(pair, num_examples=40, engine="traced", **options)
    grid = torch.arange(-15, 15, 0.01).double()[:, None]
    fit = dist.Normal(grid**2, 0.5).log_prob(both.batch[0][:, 0])
    truth = (dist.Normal(0.0, 3.0).log_prob(grid) + fit).logsumexp(0) + torch.tensor(0.01).log()
    apart = both.batch[0][:, 0] > 6
    assert 10 < apart.sum() < 40
    missing = (truth - both.lower.per_datum)[apart]
    assert bool(((missing - log(2)).abs() < 5 * both.lower.standard_errors[apart]).all())
    assert missing.mean().item() == pytest.approx(log(2), abs=0.1)
    assert both.lower.effective_sample_size[apart].min() > 4
    gaps = both.upper.per_datum - both.lower.per_datum
    assert (gaps > 5).double().mean() > 0.25  # the draws from the mode that the guide misses
    assert both.gap > 1


PAIRS = ("flows", "hierarchical", "deep-markov", "semi-supervised", "bags", "params", "conditional")


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", PAIRS)
def test_other_pairs_are_annealed(name):
    """The bound is below the true value, which importance sampling finds for these small pairs."""
    pair, batch = make(name), rows(name, 6)
    require(pair, batch)
    options = {"num_temperatures": 25, "progress": False, "engine": "eager", "leapfrog_steps": 2}
    found = pv.anneal(pair, *batch, **options)
    estimate = pv.log_likelihood(pair, *batch, num_samples=20_000)
    error = (found.standard_errors.square() + estimate.standard_errors.square()).sqrt()
    sure = estimate.pareto_k < 0.6
    assert bool(((found.per_datum - estimate.per_datum).abs() < 5 * error + 0.02)[sure].all())
    assert found.value > estimate.elbo
    assert found.acceptance.min() > 0.4


def test_rates_with_supports_and_inner_plates_are_annealed():
    pair = Counts()
    found = pv.anneal(pair, COUNTS, num_temperatures=60, engine="eager", progress=False)
    off = (found.per_datum - pair.truth(COUNTS)).abs()
    assert bool((off < 5 * found.standard_errors).all())
    assert found.standard_errors.max() < 0.1


def test_parts_of_the_data_and_engines(monkeypatch):
    pair = make("bernoulli")
    (x,) = rows("bernoulli", 7)
    options = {"num_temperatures": 6, "num_chains": 4, "leapfrog_steps": 2, "progress": False}
    with seeded(3):
        before = rng.state()["torch"]
        traced = pv.anneal(pair, x, engine="traced", **options)
        assert torch.equal(rng.state()["torch"], before)
    eager = pv.anneal(pair, x, engine="eager", **options)
    torch.testing.assert_close(traced.per_datum, eager.per_datum)
    monkeypatch.setattr("pyro_vae.inference.annealing.CELLS", 6 * 4 * 3)
    parts = pv.anneal(pair, x, engine="eager", **options)
    error = (parts.standard_errors.square() + eager.standard_errors.square()).sqrt()
    assert bool(((parts.per_datum - eager.per_datum).abs() < 5 * error).all())
    assert parts.per_datum.shape == (7,)


class HalfBlind(Fault):
    """A guide that gives no density to some of its draws."""

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", Truncated(x.new_zeros(len(x)), self.weight))


class Truncated(dist.Normal):
    def expand(self, batch_shape, _instance=None):
        return Truncated(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    def log_prob(self, value):
        return torch.where(value > 1, -torch.inf, super().log_prob(value))


def test_infinite_weights_are_reported():
    x = torch.tensor([[0.0], [1.0]]).double()
    found = pv.anneal(HalfBlind(""), x, num_temperatures=5, engine="eager", progress=False)
    assert int(found.infinite_weights.sum()) > 0
    assert found.value == torch.inf
    assert "infinite weights" in str(found)
    assert found.as_dict()["log_likelihood"] is None
    json.dumps(found.as_dict(), allow_nan=False)


def test_tables_records_and_misuse():
    pair = linear_gaussian()
    both = pv.sandwich(
        pair, num_examples=3, num_temperatures=5, num_chains=2, engine="eager", progress=False
    )
    assert [line.split("  ")[0] for line in str(both).splitlines()] == [
        "log p(x) ≥", "log p(x) ≤", "chains", "effective chains", "acceptance", "gap"
    ]  # fmt: skip
    assert str(both.lower).count("\n") == 3
    figure = diagnostic_figures.bounds(both)
    assert f"mean gap {both.gap:.3f}" in figure.axes[0].get_title()
    record = both.as_dict()
    assert record["gap"] == pytest.approx(both.gap)
    assert record["upper"]["num_temperatures"] == 5
    json.dumps(record, allow_nan=False)
    x = torch.zeros(2, 6).double()
    for name in ("num_temperatures", "num_chains", "leapfrog_steps"):
        with pytest.raises(pv.UsageError, match=f"{name} must be at least 1, got 0"):
            pv.anneal(pair, x, **{name: 0})
    with pytest.raises(pv.UsageError, match="num_examples must be at least 2, got 1"):
        pv.sandwich(pair, num_examples=1)
    with pytest.raises(pv.UsageError, match="all latents are summed out"):
        pv.anneal(Summed(), x)


class Summed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()).double())

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            fn = dist.Bernoulli(x.new_full((), 0.3))
            k = pyro.sample("k", fn, infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal((self.weight * k)[..., None], 1.0).to_event(1), obs=x)

    def guide(self, x):
        pass

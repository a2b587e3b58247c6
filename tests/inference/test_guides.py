"""Other guides for one model: refined and refitted guides reach the closed form."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import Spoiled, linear_gaussian
from pairs import ALL, make, rows
from torch import nn

import pyro_vae as pv
from pyro_vae.inference.refinement import Refined, _locations
from pyro_vae.inference.refitting import Encoders, Grafted
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import latents
from pyro_vae.training.check import require


def data(pair, n=40):
    with seeded(5):
        return pair.marginal().sample((n,)).detach()


@pytest.mark.sample(1)
@pytest.mark.parametrize("family", ["diagonal", "full", "low-rank"])
def test_refining_takes_back_what_spoils_the_encoder(family):
    pair = Spoiled(family, shift=0.6, stretch=1.4)
    x = data(pair)
    truth = pair.marginal().log_prob(x).detach()
    least = Spoiled(family).kl(x, Spoiled(family).q(x))  # the gap of the best member of the family
    if family == "diagonal":
        assert least.min() > 0.5
    put_in = pair.kl(x, pair.q(x)) - least
    result = pv.refine(pair, x, steps=200, num_samples=2000, progress=False)
    assert result.after.elbo == pytest.approx((truth - least).mean().item(), abs=0.02)
    error = (result.before.elbo_standard_errors**2 + result.after.elbo_standard_errors**2).sqrt()
    assert bool((result.gain - put_in).abs().le(0.03 + 5 * error).all())
    slack = 0.02 + 4 * result.before.elbo_standard_error
    assert result.gain.mean().item() == pytest.approx(put_in.mean().item(), abs=slack)
    assert put_in.max() > 4 * put_in.min()  # so that data differ


def test_an_optimal_guide_gains_nothing():
    pair = Spoiled("diagonal")
    x = data(pair)
    result = pv.refine(pair, x, steps=60, num_samples=2000, progress=False)
    assert result.gain.abs().mean() < 0.02


@pytest.mark.sample(10)
@pytest.mark.parametrize("name", ALL)
def test_without_offsets_a_refined_guide_is_the_guide(name):
    pair, batch = make(name), rows(name, 9)
    require(pair, batch)
    with using(pair):
        refined = Refined(pair, _locations(latents(trace_guide(pair, batch))))
    numbers = torch.arange(9)
    want = pv.log_likelihood(pair, *batch, num_samples=30)
    found = pv.log_likelihood(refined, *batch, numbers, num_samples=30)
    torch.testing.assert_close(found.per_datum, want.per_datum)
    torch.testing.assert_close(found.elbo_per_datum, want.elbo_per_datum)
    codes, same = pv.encode(refined, *batch, numbers), pv.encode(pair, *batch)
    for site, code in same.items():
        torch.testing.assert_close(codes[site], code)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["flows", "params", "semi-supervised", "hierarchical"])
def test_any_pair_is_refined_and_left_as_it_was(name):
    pair, batch = make(name), rows(name, 12)
    require(pair, batch)
    pair.train()
    next(pair.parameters()).requires_grad_(False)
    before, state = copy.deepcopy(pair.state_dict()), torch.get_rng_state()
    flags = [p.requires_grad for p in pair.parameters()]
    options = {"steps": 60, "num_samples": 400, "progress": False}
    result = pv.refine(pair, *batch, **options)
    assert result.gain.mean() > 0.05
    assert all(torch.equal(value, before[key]) for key, value in pair.state_dict().items())
    assert flags == [p.requires_grad for p in pair.parameters()]
    assert pair.training
    assert torch.equal(torch.get_rng_state(), state)
    assert len(pyro.get_param_store()) == 0
    again = pv.refine(pair, *batch, engine="eager", **options)
    torch.testing.assert_close(again.after.elbo_per_datum, result.after.elbo_per_datum)


def test_rows_keep_their_own_whatever_their_order_and_number(monkeypatch):
    pair = Spoiled("diagonal", shift=0.6)
    x = data(pair, 11)
    monkeypatch.setattr(
        "pyro_vae.inference.refinement.REFINED_ROWS", 4
    )  # blocks of 4, 4 and 3 rows
    result = pv.refine(pair, x, steps=100, progress=False)
    mean, _ = pair.posterior(x)
    torch.testing.assert_close(pv.encode(result.pair, *result.batch)["z"], mean, atol=0.1, rtol=0)
    backwards = [part.flip(0)[:5] for part in result.batch]
    found = pv.encode(result.pair, *backwards)["z"]
    torch.testing.assert_close(found, mean.flip(0)[:5], atol=0.1, rtol=0)


class Levels(nn.Module):
    """z ~ N(0, 1), y ~ N(z, 1), x ~ N(y, 0.5^2); the guide draws y, and z given y, both wrongly."""

    def __init__(self):
        super().__init__()
        self.off = nn.Parameter(torch.tensor(0.7).double())

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            y = pyro.sample("y", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(y[..., None], 0.5).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            y = pyro.sample("y", dist.Normal(x[:, 0] * 8 / 9 + self.off, (2 / 9) ** 0.5))
            pyro.sample("z", dist.Normal(y / 2 - self.off, 0.5**0.5))


def test_a_latent_keeps_its_dependence_on_another():
    """Independent levels would leave a gap here; offsets on each level close it."""
    x = torch.tensor([[0.3], [-2.0], [1.0]]).double()
    result = pv.refine(Levels(), x, steps=300, num_samples=2000, progress=False)
    truth = dist.Normal(0.0, 2.25**0.5).log_prob(x[:, 0])
    torch.testing.assert_close(result.after.elbo_per_datum, truth, atol=0.02, rtol=0)
    assert result.before.elbo < truth.mean() - 0.5


class Discrete(nn.Module):
    def __init__(self, beside):
        super().__init__()
        self.beside, self.weight = beside, nn.Parameter(torch.ones(()).double())

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            k = pyro.sample("k", dist.Bernoulli(x.new_full((), 0.3)))
            if self.beside:
                k = k + pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal((self.weight * k)[..., None], 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("k", dist.Bernoulli(x.new_full((), 0.4)))
            if self.beside:
                pyro.sample("z", dist.Normal(x.new_full((), 1.5), 1.0))


def test_discrete_latents_are_left_alone():
    x = torch.tensor([[0.0], [0.5]]).double()
    result = pv.refine(Discrete(True), x, steps=100, progress=False)
    assert {place.site for place in result.pair.places} == {"z"}
    assert result.gain.min() > 0.3
    with pytest.raises(pv.UsageError, match="no latent whose parameters can be refined"):
        pv.refine(Discrete(False), x, progress=False)
    with pytest.raises(pv.UsageError, match="'k' is discrete or not local"):
        pv.refit_guide(Discrete(True), x, posterior=pv.DiagonalNormal)


def test_misuse_raises_an_error_of_one_line():
    pair = Spoiled("diagonal")
    x = data(pair)
    with pytest.raises(pv.UsageError, match="steps must be at least 1, got 0"):
        pv.refine(pair, x, steps=0)
    result = pv.refine(pair, x, steps=1, num_samples=2, progress=False)
    with pytest.raises(pv.UsageError, match="must end with the row numbers"):
        pv.encode(result.pair, x)


def test_the_elbo_beside_log_p_is_the_closed_form_with_its_error():
    pair = linear_gaussian(spread=1.3)
    with seeded(0):
        x = pair.marginal().sample((50,)).detach()
    gap = 0.5 * 2 * (1.3**2 - 1) - 2 * torch.tensor(1.3).log()
    want = pair.marginal().log_prob(x).detach() - gap
    results = [pv.log_likelihood(pair, x, num_samples=100, seed=seed) for seed in range(40)]
    found = torch.stack([result.elbo_per_datum for result in results])
    claimed = torch.stack([result.elbo_standard_errors for result in results]).mean()
    assert found.mean() == pytest.approx(want.mean().item(), abs=5 * claimed.item() / 2000**0.5)
    assert (found.std(0).mean() / claimed).item() == pytest.approx(1.0, abs=0.08)
    totals = torch.tensor([result.elbo for result in results])
    assert totals.std() == pytest.approx(results[0].elbo_standard_error, rel=0.4)
    one = pv.log_likelihood(pair, x, num_samples=1)
    torch.testing.assert_close(one.elbo_per_datum, one.per_datum)
    assert one.elbo_standard_error != one.elbo_standard_error


@pytest.mark.thorough
def test_another_family_is_fitted_to_a_model_that_stays(tmp_path):
    truth = Spoiled("diagonal")
    x = data(truth, 400)
    with seeded(0):
        first = pv.VAE.mlp((4,), 2, (), likelihood=pv.Gaussian(0.6), posterior=pv.DiagonalNormal)
        first.double()
    (linear,) = (m for m in first.decoder.modules() if isinstance(m, nn.Linear))
    linear.weight.data, linear.bias.data = truth.weight.data.clone(), truth.bias.data.clone()
    before = copy.deepcopy(first.state_dict())
    options = {"epochs": 150, "batch_size": 100, "learning_rate": 5e-2, "progress": False}
    options |= {"learning_rate_schedule": pv.CosineSchedule(150), "hidden": ()}
    with seeded(0):
        full = pv.refit_guide(first, x, posterior=pv.FullRankNormal, **options)
    assert all(torch.equal(value, before[key]) for key, value in first.state_dict().items())
    assert all(parameter.requires_grad for parameter in first.parameters())
    assert full.pair is first
    result = pv.log_likelihood(full, x, num_samples=500)
    exact = truth.marginal().log_prob(x).mean().item()
    assert exact - 0.01 < result.elbo < exact + 1e-9 + 5 * result.elbo_standard_error
    assert pv.sample(full, 3, seed=1).equal(pv.sample(first, 3, seed=1))
    pv.save(full, tmp_path)
    torch.testing.assert_close(pv.encode(pv.load(tmp_path), x)["z"], pv.encode(full, x)["z"])
    table = pv.bounds_table({"full-rank": result, "amortized": pv.log_likelihood(first, x)})
    assert [line.split()[0] for line in table.splitlines()] == ["guide", "full-rank", "amortized"]
    assert f"{result.elbo:.3f} ± {result.elbo_standard_error:.3f}" in table


def test_a_users_encoder_and_two_latents():
    pair, (x,) = make("params"), rows("params", 32)
    require(pair, (x,))
    options = {"epochs": 2, "batch_size": 16, "engine": "eager", "progress": False}
    both = pv.refit_guide(pair, x, posterior=pv.DiagonalNormal, hidden=(4,), **options)
    assert both.inference.sites == ("a", "b")
    assert pv.encode(both, x)["a"].shape == (32, 2)
    vae = make("bernoulli")
    own = pv.Factor(pv.MLP(6, (3,), 4), pv.DiagonalNormal(), (2,)).double()
    other = pv.refit_guide(vae, rows("bernoulli", 32)[0], posterior=own, **options)
    assert list(other.inference.encoders) == [own]


def test_a_frozen_model_stays_in_evaluation_mode():
    """Otherwise the running means of its layers would change."""
    decoder = pv.Factor(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 6)), pv.Bernoulli(), (6,))
    encoder = pv.Factor(pv.MLP(6, (), 4), pv.DiagonalNormal(), (2,))
    pair = pv.VAE(encoder, decoder, pv.StandardNormal(2)).double()
    before = copy.deepcopy(pair.state_dict())
    x = rows("bernoulli", 32)[0]
    pair.train()
    other = pv.refit_guide(
        pair,
        x,
        posterior=pv.DiagonalNormal,
        epochs=2,
        batch_size=16,
        engine="eager",
        progress=False,
    )
    assert all(torch.equal(value, before[key]) for key, value in pair.state_dict().items())
    assert pair.decoder.training
    assert isinstance(other, Grafted)
    assert isinstance(other.inference, Encoders)


def test_a_pair_without_a_template_gets_another_guide():
    vae, x = make("bernoulli"), rows("bernoulli", 32)[0]
    plain = nn.Module()
    plain.vae, plain.model, plain.guide = vae, vae.model, vae.guide
    options = {"epochs": 1, "batch_size": 16, "engine": "eager", "progress": False}
    other = pv.refit_guide(plain, x, posterior=pv.DiagonalNormal, hidden=(4,), **options)
    assert pv.encode(other, x)["z"].shape == (32, 2)
    with pytest.raises(pv.UsageError, match="has no method template"):
        pv.sample(other, 2)

"""Global latents, for example the weights of a Bayesian decoder."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import make, rows
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae.cli.make_pair import make_pair
from pyro_vae.cli.options import Model
from pyro_vae.data.preparation import Preparation
from pyro_vae.data.sources import Arrays
from pyro_vae.pairs.model import global_latents
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.scope import registered, scope
from pyro_vae.training.check import check
from pyro_vae.training.engine import Engine
from pyro_vae.training.validation import bound

NOISE, SPREAD, PRIOR = 0.6, 0.3, 1.5
N, D, P = 90, 4, 3


class Known(nn.Module):
    """x = W z + noise, with z near a known place: q(W) has a closed form, and q(z) is the prior."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(P, D, bias=False)

    def model(self, x, place):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(place, SPREAD).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), NOISE).to_event(1), obs=x)

    def guide(self, x, place):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(place, SPREAD).to_event(1))

    def template(self, n):
        return torch.zeros(n, D), torch.zeros(n, P)


def known():
    """The pair with a Bayesian decoder."""
    torch.manual_seed(0)
    return pv.BayesianDecoder(Known(), prior_scale=PRIOR * math.sqrt(P)).double()


def data(n=N, seed=0):
    """Data of known weights, at places with orthogonal coordinates of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.randn(n, P, generator=generator, dtype=torch.float64)
    place = torch.linalg.qr(place)[0] * torch.tensor([2.0, 6.0, 10.0], dtype=torch.float64)
    weight = torch.randn(D, P, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    noise = torch.randn(n, D, generator=generator, dtype=torch.float64)
    return place @ weight.T + NOISE * noise, place


def conjugate(x, place):
    """The mean and the standard deviation of the posterior of each weight, given q(z)."""
    precision = 1 / PRIOR**2 + (place.square().sum(0) + len(x) * SPREAD**2) / NOISE**2
    return x.T @ place / NOISE**2 / precision, precision.rsqrt().expand(D, P)


def posterior(pair):
    scale = nn.functional.softplus(pair.free_scales[0]).detach()
    return pair.pair.decoder.weight.detach(), scale


def set_posterior(pair, mean, scale):
    pair.pair.decoder.weight.data.copy_(mean)
    pair.free_scales[0].data.copy_(scale.expm1().log())
    return pair


def exact():
    """The pair with the closed-form posterior as its guide."""
    return set_posterior(known(), *conjugate(*data()))


class ByHand(Known):
    """The same pair with explicit weights, which broadcast over many draws."""

    def __init__(self):
        super().__init__()
        self.decoder = None
        self.loc = nn.Parameter(torch.zeros(P, D))
        self.free = nn.Parameter(torch.full((P, D), -1.0))

    def model(self, x, place):
        w = pyro.sample("w", dist.Normal(x.new_zeros(P, D), PRIOR).to_event(2))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(place, SPREAD).to_event(1))
            loc = (z[..., :, None] * w).sum(-2)
            pyro.sample("x", dist.Normal(loc, NOISE).to_event(1), obs=x)

    def guide(self, x, place):
        pyro.sample("w", dist.Normal(self.loc, nn.functional.softplus(self.free)).to_event(2))
        super().guide(x, place)


# q(z) of these pairs is the prior, for any data.
same_posterior = pytest.mark.filterwarnings("ignore:the posterior of latent site 'z' has collapsed")


@same_posterior
def test_minibatches_lead_to_the_conjugate_posterior():
    """The last minibatch is smaller; a wrong share of the KL would widen q by a half."""
    torch.manual_seed(0)
    pair, batch = ByHand().double(), data()
    history = pv.fit(
        pair,
        *batch,
        objective=TraceMeanField_ELBO(200, vectorize_particles=True, max_plate_nesting=1),
        learning_rate_schedule=pv.CosineSchedule(200),
        batch_size=40,
        epochs=200,
        learning_rate=0.05,
        progress=False,
    )
    mean, scale = pair.loc.detach().T, nn.functional.softplus(pair.free.detach()).T
    wanted, wanted_scale = conjugate(*batch)
    assert (mean - wanted).norm() / wanted.norm() < 0.01
    torch.testing.assert_close(scale, wanted_scale, rtol=0.02, atol=0)
    prior = dist.Normal(0.0, PRIOR)
    kl = torch.distributions.kl_divergence(dist.Normal(wanted, wanted_scale), prior).sum() / N
    assert history["kl_w"][-1] == pytest.approx(kl.item(), rel=0.02)  # per datum
    assert history["kl_z"][-1] == pytest.approx(0, abs=1e-9)


@pytest.mark.thorough
@same_posterior
def test_a_bayesian_decoder_reaches_the_conjugate_posterior():
    """With ten draws of the weights for each step; the remaining error is from these draws."""
    pair, batch = known(), data()
    schedule = pv.CosineSchedule(300)
    settings = {"batch_size": 45, "epochs": 300, "learning_rate": 0.05, "progress": False}
    objective = TraceMeanField_ELBO(10)
    pv.fit(pair, *batch, objective=objective, learning_rate_schedule=schedule, **settings)
    mean, scale = posterior(pair)
    wanted, wanted_scale = conjugate(*batch)
    assert (mean - wanted).norm() / wanted.norm() < 0.015
    assert (scale / wanted_scale).log().mean().abs() < 0.01
    torch.testing.assert_close(scale, wanted_scale, rtol=0.05, atol=0)


class Weighed(nn.Module):
    """The weights are the only latents, so one seed gives one draw."""

    def __init__(self):
        super().__init__()
        self.decoder, self.loc = nn.Linear(P, D), nn.Parameter(torch.randn(P, D).double())

    def model(self, x, place):
        weight = pyro.sample("w", dist.Normal(x.new_zeros(P, D), 1.0).to_event(2))
        with pyro.plate("data", len(x), dim=-1):
            loc = self.decoder(place) + place @ weight
            pyro.sample("x", dist.Normal(loc, NOISE).to_event(1), obs=x)

    def guide(self, x, place):
        pyro.sample("w", dist.Normal(self.loc, 0.3).to_event(2))


@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_losses_and_gradients_of_minibatches_add_up_to_those_of_all_data(engine):
    """Compare with stock Trace_ELBO on the model of all data; the last batch is smaller."""
    torch.manual_seed(0)
    pair, batch = Weighed().double(), data()

    def run(objective, part):
        pair.zero_grad(set_to_none=True)
        with scope(pair), seeded(5):
            model = registered(pair, pair.model)
            loss = float(objective.loss_and_grads(model, pair.guide, *part))
        return loss, [parameter.grad.clone() for parameter in pair.parameters()]

    loss, gradients = run(Trace_ELBO(), batch)
    shared = Engine(pair, engine=engine, num_data=N)
    parts = [run(shared, part) for part in Arrays(batch).batches(40)]
    assert [len(part[0]) for part in Arrays(batch).batches(40)] == [40, 40, 10]
    assert sum(part for part, _ in parts) == pytest.approx(loss, rel=1e-12)
    for i, gradient in enumerate(gradients):
        torch.testing.assert_close(sum(part[i] for _, part in parts), gradient)
    assert shared.engine == engine


def test_the_weight_on_the_kl_is_that_of_codes():
    pair, batch = make("bayesian"), rows("bayesian")
    losses = {}
    for beta, share in ((1.0, 1.0), (0.0, 1.0), (0.0, 0.0), (1.0, 0.0)):
        weight = pv.KLWeight(beta, global_weight=share)
        with scope(pair), seeded(0):
            programs = weight(pair.model), weight(pair.guide)
            losses[beta, share] = Trace_ELBO().loss(*programs, *batch)
    codes = losses[1.0, 1.0] - losses[0.0, 1.0]
    assert codes == pytest.approx(losses[1.0, 0.0] - losses[0.0, 0.0], rel=1e-9)
    weights = losses[0.0, 1.0] - losses[0.0, 0.0]
    with scope(pair), seeded(0):
        guide = pyro.poutine.trace(pair.guide).get_trace(*batch)
        model = pyro.poutine.trace(pyro.poutine.replay(pair.model, trace=guide)).get_trace(*batch)
    names = global_latents(pair, batch)
    assert len(names) == 4
    kl = [
        guide.nodes[n]["fn"].log_prob(guide.nodes[n]["value"])
        - model.nodes[n]["fn"].log_prob(guide.nodes[n]["value"])
        for n in names
    ]
    assert weights == pytest.approx(sum(kl).item(), rel=1e-9)


def predictive(pair, place):
    """Mean and covariance of one element of x given its place, over weights, z and noise."""
    mean, scale = posterior(pair)
    second = place.square() + SPREAD**2
    variance = second @ scale.square().T + SPREAD**2 * mean.square().sum(1) + NOISE**2
    return place @ mean.T, variance


def test_log_likelihood_is_that_of_the_posterior_predictive():
    """If q(z) is a point, p(x) is N(W place, noise), with W integrated over its posterior."""
    pair, (x, place) = exact(), data(30, seed=1)
    pair.free_scales[0].data += 0.7  # wide, so that the prediction differs from that of the means
    mean, scale = posterior(pair)
    original = SPREAD
    globals()["SPREAD"] = 1e-4
    try:
        result = pv.log_likelihood(pair, x, place, num_samples=1500)
        evaluated = pv.evaluate(pair, x, place, num_samples=10)
    finally:
        globals()["SPREAD"] = original
    spread = (place.square() @ scale.square().T + NOISE**2).sqrt()
    wanted = dist.Normal(place @ mean.T, spread).log_prob(x).sum(1)
    assert ((result.per_datum - wanted).abs() < 5 * result.standard_errors).all()
    assert result.standard_errors.max() < 0.2
    # The ELBO of held-out data is E_q(W)[log p(x|W)], without the KL of the weights.
    excess = (place.square() @ scale.square().T).sum(1) / (2 * NOISE**2)
    inner = dist.Normal(place @ mean.T, NOISE).log_prob(x).sum(1) - excess
    assert result.elbo == pytest.approx(inner.mean().item(), abs=4 * result.elbo_standard_error)
    assert evaluated.elbo == pytest.approx(inner.mean().item(), abs=0.5)
    assert list(evaluated.kl_by_site) == ["z"]


def test_the_error_of_a_mean_over_data_that_share_draws_is_at_least_the_true_one():
    pair, (x, place) = exact(), data(30, seed=1)
    pair.free_scales[0].data += 1.0
    runs = [
        pv.log_likelihood(pair, x, place, num_samples=10, seed=seed, engine="eager")
        for seed in range(30)
    ]
    spread = torch.tensor([run.elbo for run in runs]).std().item()
    said = sum(run.elbo_standard_error for run in runs) / len(runs)
    independent = runs[0].elbo_standard_errors.square().sum().sqrt().item() / len(x)
    assert independent < 0.7 * spread < said  # errors of independent data would be too small


def test_draws_are_of_the_posterior_predictive():
    pair = exact()
    pair.free_scales[0].data += 1.0
    place = torch.tensor([[0.3, -0.5, 1.0]], dtype=torch.float64)
    draws = pv.sample(pair, 6000, place, seed=0)
    mean, variance = predictive(pair, place)
    # Sixty rows share a draw of the weights; 100 such draws give the spread of the mean.
    assert ((draws.mean(0) - mean[0]).abs() < 5 * (variance[0] / 100).sqrt()).all()
    torch.testing.assert_close(draws.var(0), variance[0], rtol=0.5, atol=0)
    assert pv.sample(pair, 2, place.expand(2, -1), seed=1).shape == (2, D)
    assert torch.equal(draws, pv.sample(pair, 6000, place, seed=0))


def test_means_are_of_the_means_of_the_weights():
    pair, (x, place) = exact(), data(5, seed=1)
    mean, _ = posterior(pair)
    torch.testing.assert_close(pv.reconstruct(pair, x, place), place @ mean.T)
    torch.testing.assert_close(pv.decode(pair, {"z": place}, place), place @ mean.T)
    drawn = pv.reconstruct(pair, x, place, means=False)
    assert not torch.equal(drawn, pv.reconstruct(pair, x, place, means=False, seed=1))
    codes = pv.encode(pair, x, place)
    assert next(iter(codes)) == "z"
    (weights,) = (value for name, value in codes.items() if name != "z")
    torch.testing.assert_close(weights, mean)


def test_uncertainty_has_the_parts_of_the_closed_form():
    pair, (x, place) = exact(), data(4, seed=1)
    pair.free_scales[0].data += 1.0
    mean, scale = posterior(pair)
    found = pv.uncertainty(pair, x, place, num_weights=800, num_samples=2, progress=False)
    weights = place.square() @ scale.square().T
    latent = SPREAD**2 * (mean.square() + scale.square()).sum(1).expand(4, D)
    torch.testing.assert_close(found.mean, place @ mean.T, rtol=0, atol=0.15)
    torch.testing.assert_close(found.weights, weights, rtol=0.25, atol=0.03)
    torch.testing.assert_close(found.latent, latent, rtol=0.2, atol=0)
    torch.testing.assert_close(found.noise, torch.full((4, D), NOISE**2).double())
    _, total = predictive(pair, place)
    torch.testing.assert_close(found.total, total, rtol=0.2, atol=0.03)
    assert found.as_dict()["weights_variance"] == found.epistemic.mean().item()
    assert "epistemic" in str(found)


@pytest.mark.parametrize("num_samples", [2, 5])
def test_few_draws_of_the_latents_do_not_pass_for_uncertain_weights(num_samples):
    """Where the weights are known, their part is 0, though a mean of few draws varies: by chance it
    is above and below."""
    pair, (x, place) = exact(), data(20, seed=1)
    pair.free_scales[0].data.fill_(-30.0)
    numbers = {"num_weights": 200, "num_samples": num_samples, "progress": False}
    found = pv.uncertainty(pair, x, place, **numbers)
    latent = found.latent.mean().item()
    mean, _ = posterior(pair)
    wanted = SPREAD**2 * mean.square().sum(1).mean().item()
    assert latent == pytest.approx(wanted, rel=0.1)
    # The standard error of a variance of 200 draws, over 80 elements that share none.
    error = latent / num_samples * (2 / 199 / len(x)) ** 0.5
    assert abs(found.weights.mean().item()) < 4 * error
    assert found.weights.min() < 0 < found.weights.max()


def test_more_data_take_epistemic_variance_away():
    spreads = []
    for n in (20, 80):
        x, place = data(N)
        pair = set_posterior(known(), *conjugate(x[:n], place[:n]))
        found = pv.uncertainty(pair, x[:5], place[:5], num_weights=100, progress=False)
        spreads.append((found.epistemic.mean().item(), found.noise.mean().item()))
    assert spreads[1][0] < 0.5 * spreads[0][0]
    assert spreads[1][1] == pytest.approx(spreads[0][1])


def test_validation_measures_what_the_weights_predict():
    """The validation bound is E_q(w) of the ELBO; the best epoch has the best prediction."""
    pair, batch, held = known(), data(), data(30, seed=2)
    history = pv.fit(
        pair, *batch, validation=held, batch_size=45, epochs=3, progress=False, engine="eager"
    )
    assert all(list(epoch.validation.kl) == ["z"] for epoch in history.epochs)
    assert set(history.epochs[0].kl) == {"z", "decoder.weight"}
    prepare = Preparation(torch.device("cpu"), torch.float64)
    measured = bound(pair, Arrays(held), prepare, Trace_ELBO())
    assert measured.bound == pytest.approx(measured.elbo)


@pytest.mark.parametrize("name", ["bayesian", "weights"])
def test_refinement_leaves_the_weights_as_they_are(name):
    pair, batch = make(name), rows(name, 6)
    few = {"num_particles": 2, "engine": "eager", "progress": False}
    result = pv.refine(pair, *batch, steps=15, num_samples=30, **few)
    assert {place.site for place in result.pair.places} == {"z"}
    assert result.after.elbo > result.before.elbo - 3 * result.before.elbo_standard_error


def test_what_is_refused():
    pair, batch = make("bayesian"), rows("bayesian")
    for objective in (pv.ImportanceWeightedELBO(2), RenyiELBO(num_particles=2)):
        assert "is not a local latent" in str(check(pair, batch, objective=objective))
    assert str(check(pair, batch, objective=pv.FreeBitsELBO(0.1))) == "the pair is sound"
    with pytest.raises(pv.UsageError, match=r"'decoder.*is not local"):
        pv.anneal(pair, *batch)
    parts = pv.kl_parts(pair, *batch)
    assert set(parts) == {"z"}
    with pytest.raises(pv.UsageError, match="no global latent"):
        pv.uncertainty(make("bernoulli"), *batch)
    with pytest.raises(pv.UsageError, match="num_weights must be at least 2, got 1"):
        pv.uncertainty(pair, *batch, num_weights=1)
    with pytest.raises(pv.UsageError, match=r"'head'.*encoder, decoder"):
        pv.BayesianDecoder(pv.VAE.mlp((4,)), "head")
    with pytest.raises(pv.UsageError, match="prior_scale must be positive, got 0"):
        pv.BayesianDecoder(pv.VAE.mlp((4,)), prior_scale=0)


class Misplaced(nn.Module):
    """A site that is in the plate only in the guide; or a plate with subsampling."""

    def __init__(self, size=None, inside=True):
        super().__init__()
        self.loc, self.size, self.inside = nn.Parameter(torch.zeros(2)), size, inside

    def plate(self, x):
        if self.size:
            return pyro.plate("data", self.size, subsample=x, dim=-1)
        return pyro.plate("data", len(x), dim=-1)

    def model(self, x):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with self.plate(x):
            pyro.sample("x", dist.Normal(w, 1.0).to_event(1), obs=x)

    def guide(self, x):
        if self.inside:
            with self.plate(x):
                pyro.sample("w", dist.Normal(self.loc, 1.0).to_event(1))
        else:
            pyro.sample("w", dist.Normal(self.loc, 1.0).to_event(1))


def test_a_latent_is_in_the_plate_in_both_or_in_neither():
    x = torch.zeros(5, 2)
    found = str(check(Misplaced(), (x,)))
    assert "'w' is outside the data plate in the model but inside it in the guide" in found
    assert str(check(Misplaced(inside=False), (x,))) == "the pair is sound"
    # A minibatch of 5 of 50 data.
    assert str(check(Misplaced(size=50, inside=False), (x,))) == "the pair is sound"


def test_a_configuration_asks_for_one():
    digits = pv.load_data("digits")
    pair = make_pair(Model(bayesian_decoder=True, hidden=(5,)), digits)
    assert isinstance(pair, pv.BayesianDecoder)
    assert isinstance(make_pair(Model(), digits), pv.VAE)
    with pytest.raises(pv.UsageError, match="does not have a module 'decoder'"):
        make_pair(Model(bayesian_decoder=True, model="deep-markov"), digits)


def test_recurrent_decoders_have_latent_weights_too():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = nn.LSTM(2, 3, batch_first=True)

        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                loc = self.decoder(x.new_ones(len(x), 4, 2))[0].sum(-1)
                pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

        def guide(self, x):
            pass

    torch.manual_seed(0)
    pair, x = pv.BayesianDecoder(Recurrent()), torch.zeros(3, 4)
    weights = pair.pair.decoder._flat_weights
    with scope(pair):
        drawn = [pyro.poutine.trace(pair.model).get_trace(x) for _ in range(2)]
    locs = [one.nodes["x"]["fn"].base_dist.loc for one in drawn]
    assert not torch.equal(*locs)
    assert pair.pair.decoder._flat_weights is weights
    assert torch.equal(locs[0][0], locs[0][1])  # all data share one draw


@pytest.mark.parametrize("groups", [1, 2])
def test_the_prior_of_a_transposed_convolution_goes_by_what_reaches_a_pixel(groups):
    """The mean square of a pixel away from the border, over all positions within a stride."""
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=groups)
    pair = Known()
    pair.decoder = layer
    scale = pv.BayesianDecoder(pair)._prior_scale("weight")
    nn.init.constant_(layer.weight, scale)
    nn.init.zeros_(layer.bias)
    with torch.no_grad():  # independent weights of this size: variances add up
        layer.weight.square_()
        variance = layer(torch.ones(1, 4, 8, 8))[0, 0, 2:-2, 2:-2].mean()
    assert variance.item() == pytest.approx(1.0, rel=1e-5)

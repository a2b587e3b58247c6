"""encode, posterior, NUTS and importance weights of global and group latents, in closed form."""

import json

import pyro
import pyro.distributions as dist
import pytest
import torch
from global_pairs import Amortized, Nested, data
from pairs import make, rows
from torch import nn

import pyro_vae as pv
from pyro_vae.diagnostics.global_figures import global_marginals
from pyro_vae.inference import joint_nuts
from pyro_vae.inference.chains import compared
from pyro_vae.pairs import frames
from pyro_vae.pairs.given_globals import at_one_draw

# encode


def test_encode_gives_means_and_scales_of_all_latents():
    x, g = data()
    pair = Nested().set(x, g)
    mean, covariance, _ = pair.exact(x, g)
    codes, scales = (pv.encode(pair, x, g, what=what) for what in ("mean", "scale"))
    assert list(codes) == ["z", "w", "u"]
    torch.testing.assert_close(codes["w"], mean[0])
    torch.testing.assert_close(codes["u"], mean[1:])
    torch.testing.assert_close(codes["z"], pair.local(x, mean[1:][g])[0].detach())
    torch.testing.assert_close(scales["w"], covariance[0, 0].sqrt())
    torch.testing.assert_close(scales["u"], covariance.diagonal()[1:].sqrt())
    assert scales["z"].shape == (12,)


def test_a_draw_of_encode_has_one_draw_of_the_global_latents_for_all_rows():
    """More rows than one pass takes; q(z | x, u) has almost no width."""
    x, g = data(1500)
    pair = Nested(stretch=1e-6)
    drawn = pv.encode(pair, x, g, what="draw")
    assert drawn["w"].shape == ()
    torch.testing.assert_close(
        drawn["z"], pair.local(x, drawn["u"][g])[0].detach(), atol=1e-4, rtol=0
    )


def test_a_guide_that_pools_all_rows_gets_all_rows():
    x, g = data(1500)
    mean, covariance, _ = Amortized().exact(x, g)
    codes = pv.encode(Amortized(), x, g)
    torch.testing.assert_close(codes["w"], mean[0])
    torch.testing.assert_close(codes["u"], mean[1:])
    torch.testing.assert_close(
        pv.encode(Amortized(), x, g, what="scale")["w"], covariance[0, 0].sqrt()
    )


def test_a_pair_without_global_latents_is_encoded_as_before():
    assert list(pv.encode(make("bernoulli"), *rows("bernoulli", 3))) == ["z"]


# posterior


def test_joint_draws_have_the_moments_of_the_exact_posterior():
    """The amortized guide is exact, so w, u and z have their covariances in closed form."""
    x, g = data()
    pair = Amortized()
    mean, covariance, _ = pair.exact(x, g)
    found = pv.posterior(pair, x, g, draws=500, progress=False)
    assert list(found) == ["w", "u", "z"]
    assert found["z"].shape == (500, 12)
    drawn = torch.cat([found["w"][:, None], found["u"]], 1)
    error = (covariance.diagonal() / 500).sqrt()
    assert bool(((drawn.mean(0) - mean).abs() < 4 * error).all())
    torch.testing.assert_close(drawn.T.cov(), covariance, atol=0.12, rtol=0)
    loc, scale = pair.local(x, found["u"][:, g])  # given the same draw of u
    residual = (found["z"] - loc) / scale
    assert abs(residual.std().item() - 1) < 4 / 12_000**0.5
    assert (residual.T @ (found["u"][:, 0] - mean[1]) / 500).abs().max() < 0.2


def test_draws_as_a_data_frame_and_as_inference_data():
    x, g = data(3)
    found = pv.posterior(Nested(), x, g, draws=4)
    frame = found.to_pandas()
    assert list(frame.columns) == ["w", "u[0]", "u[1]", "z[0]", "z[1]", "z[2]"]
    assert frame["u[1]"].tolist() == found["u"][:, 1].tolist()
    assert frame.index.name == "draw"
    group = found.to_arviz().posterior
    assert group["z"].dims == ("chain", "draw", "data")
    assert group["u"].shape == (1, 4, 2)
    assert group["z"].values[0].tolist() == found["z"].tolist()
    assert str(found).splitlines()[0] == "4 joint draws of 3 latents"


def test_without_pandas_there_is_one_line(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(frames, "import_module", missing)
    with pytest.raises(pv.UsageError, match="run pip install pandas"):
        pv.posterior(Nested(), *data(3), draws=2).to_pandas()


def test_new_groups_are_drawn_from_their_prior():
    """The guide of u has a standard deviation of 0.01, the prior one of 1 around w."""
    x, g = data(2)
    pair = Nested()
    with torch.no_grad():
        pair.log_scale.fill_(-4.6)
        pair.loc.copy_(torch.tensor([3.0, -5.0, -5.0]))
    found = pv.posterior(pair, x, g, draws=400, from_prior=["u"])
    off = found["u"] - found["w"][:, None]
    assert abs(off.mean().item()) < 4 / 800**0.5
    assert abs(off.std().item() - 1) < 4 / 1600**0.5
    loc, scale = pair.local(x, found["u"][:, g])
    assert abs(((found["z"] - loc) / scale).std().item() - 1) < 4 / 1600**0.5


@pytest.mark.parametrize(
    ("groups", "settings", "words"),
    [
        (
            5,
            {},
            "out of bounds.*number the new groups from 0 and draw their latents from the prior",
        ),
        (0, {"from_prior": ["z"]}, "from_prior must name global or group latents, got 'z'"),
        (0, {"draws": 0}, "draws must be at least 1, got 0"),
    ],
)
def test_what_posterior_refuses(groups, settings, words):
    x, g = data(4)
    with pytest.raises(pv.UsageError, match=words) as told:
        pv.posterior(Nested(), x, g + groups, **settings)
    assert "\n" not in str(told.value)


# NUTS


def test_chains_that_do_not_move_do_not_agree():
    """Each chain stays at one value, so within-chain variances are 0."""
    draws = torch.tensor([0.0, 1.0]).double()[:, None, None, None].expand(2, 50, 1, 1).clone()
    found = compared({"w": draws}, {"w": torch.randn(50, 1, 1)}, torch.zeros(1))
    assert found.r_hat.isinf().all()
    assert found.effective_sample_size.item() < 2
    assert not found.agrees.any()


@pytest.mark.thorough
def test_an_enumerated_latent_is_summed_out_of_the_joint():
    """Two components with unknown means; compare with a grid over both."""

    class Mixture(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.tensor([-1.0, 1.0]).double())

        def model(self, x):
            with pyro.plate("components", 2, dim=-1):
                mu = pyro.sample("mu", dist.Normal(x.new_tensor([-1.0, 1.0]), 1.0))
            with pyro.plate("data", len(x), dim=-1):
                fn = dist.Categorical(x.new_tensor([0.5, 0.5]))
                k = pyro.sample("k", fn, infer={"enumerate": "parallel"})
                loc = torch.where(k == 0, mu[..., :1], mu[..., 1:])[..., None]
                pyro.sample("x", dist.Normal(loc, 0.8).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("components", 2, dim=-1):
                pyro.sample("mu", dist.Normal(self.loc, 1.0))

    x = torch.tensor([[-1.5], [0.2], [1.4]]).double()
    axis = torch.arange(-6, 6, 0.05).double()
    a, b = torch.meshgrid(axis, axis, indexing="ij")
    log_p = dist.Normal(-1.0, 1.0).log_prob(a) + dist.Normal(1.0, 1.0).log_prob(b)
    for value in x[:, 0]:
        both = torch.stack([dist.Normal(m, 0.8).log_prob(value) for m in (a, b)])
        log_p = log_p + both.logsumexp(0) - torch.tensor(2.0).log()
    weights = log_p.flatten().softmax(0)
    grid = torch.stack([a.flatten(), b.flatten()])
    mean = grid @ weights
    scale = ((grid - mean[:, None]).square() @ weights).sqrt()
    pair = Mixture()
    weighed = pv.global_weights(pair, x, num_draws=500)
    assert bool(((weighed.mean - mean).abs() < 4 * weighed.mean_standard_error).all())
    torch.testing.assert_close(weighed.standard_deviation, scale, rtol=0.15, atol=0)
    estimate = weighed.log_weights.logsumexp(0) - torch.tensor(500.0).log()
    exact = log_p.flatten().logsumexp(0) + 2 * torch.tensor(0.05).double().log()
    assert abs(estimate - exact) < 4 * weighed.effective_sample_size**-0.5
    chains = {"num_draws": 100, "warmup": 50, "num_chains": 2, "progress": False}
    shared = pv.nuts(pair, x, **chains).shared
    assert bool(((shared.moments.mean[0] - mean).abs() < 4 * shared.mean_standard_error[0]).all())


@pytest.mark.thorough
def test_nuts_draws_all_latents_from_their_exact_posterior():
    x, g = data(4)
    pair = Nested().set(x, g, shift=1.0, stretch=0.5)
    mean, covariance, _ = pair.exact(x, g)
    found = pv.nuts(pair, x, g, num_draws=130, warmup=50, num_chains=2, progress=False)
    shared = found.shared
    assert shared.units == ("w", "u[0]", "u[1]")
    assert shared.draws["u"].shape == (2, 130, 1, 2)
    assert found.local.draws["z"].shape == (2, 130, 4)
    size = shared.effective_sample_size[0]
    scale = covariance.diagonal().sqrt()
    assert size.min() > 40
    off = (shared.moments.mean[0] - mean) / scale * size.sqrt()
    assert off.abs().max() < 4
    ratio = (shared.moments.standard_deviation[0] / scale).log() * (2 * size).sqrt()
    assert ratio.abs().max() < 4
    # Marginals of z given x: u is integrated out.
    share = pair.local(x, 1.0)[1] ** 2
    loc = pair.local(x, mean[1:][g])[0]
    wide = (share + share**2 * covariance.diagonal()[1:][g]).sqrt()
    of_z = found.local
    off = (of_z.moments.mean[:, 0] - loc) / wide * of_z.effective_sample_size[:, 0].sqrt()
    assert off.abs().max() < 4
    # The guide has a shift of 1 sd, and half the scale.
    assert ((shared.shift[0] - 1).abs() * size.sqrt()).max() < 6
    assert (shared.scale_ratio[0] / 0.5 - 1).abs().max() < 0.3
    assert "NUTS on all latents of 4 rows" in str(found)
    json.dumps(found.as_dict(), allow_nan=False)
    assert len(global_marginals(found).axes) == 3


def test_positive_latents_and_pairs_of_any_layout_are_moved():
    """tau ~ Gamma(2, 1) and x_i ~ N(0, 1 / sqrt(tau)): tau | x is Gamma(2 + n/2, 1 + sum x^2/2)."""

    class Precision(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Parameter(torch.ones(()).double())

        def model(self, x):
            tau = pyro.sample("tau", dist.Gamma(x.new_tensor(2.0), 1.0))
            with pyro.plate("data", len(x), dim=-1):
                fn = dist.Normal(x.new_zeros(()), tau.rsqrt()[..., None])
                pyro.sample("x", fn.expand([len(x), 1]).to_event(1), obs=x)

        def guide(self, x):
            pyro.sample("tau", dist.LogNormal(self.a, 0.5))

    x = torch.tensor([[0.3], [-1.2], [0.7]]).double()
    exact = dist.Gamma(2 + 3 / 2, 1 + x.square().sum() / 2)
    found = pv.nuts(Precision(), x, num_draws=100, warmup=50, num_chains=2, progress=False)
    shared = found.shared
    assert found.local is None
    error = 4 * shared.mean_standard_error[0, 0]
    assert abs(shared.moments.mean[0, 0] - exact.mean) < error
    assert abs(shared.moments.standard_deviation[0, 0] / exact.stddev - 1) < 0.3
    weighed = pv.global_weights(Precision(), x, num_draws=400)
    assert weighed.num_samples == 1
    assert abs(weighed.mean[0] - exact.mean) < 4 * weighed.mean_standard_error[0]


def test_too_many_latents_are_refused_with_their_cost(monkeypatch):
    monkeypatch.setattr(joint_nuts, "MOST_NUMBERS", 10)
    words = r"would move 15 numbers at once \(12 rows, 3 numbers of global latents\) and take about"
    with pytest.raises(pv.UsageError, match=words):
        pv.nuts(Nested(), *data(), progress=False)


def test_nuts_warns_if_the_guide_was_fitted_to_other_rows():
    x, g = data(4)
    pair = Nested()
    pv.fit(pair, x, g, epochs=1, batch_size=4, engine="eager", progress=False)
    short = {"num_draws": 4, "warmup": 4, "num_chains": 2, "engine": "eager", "progress": False}
    pv.nuts(pair, x[[2, 0, 1, 3]], g[[2, 0, 1, 3]], **short)  # the same rows in another order
    with pytest.warns(UserWarning, match="the guide was fitted to other rows than these"):
        pv.nuts(pair, x + 1, g, **short)


# Importance weights


def test_the_weights_have_the_mean_p_x_and_correct_the_guide():
    x, g = data()
    pair = Nested().set(x, g, shift=0.5, stretch=1.2)
    mean, covariance, log_p = pair.exact(x, g)
    found = pv.global_weights(pair, x, g, num_draws=600, num_samples=1)
    assert found.reliable
    assert found.units == ("w", "u[0]", "u[1]")
    estimate = found.log_weights.logsumexp(0) - torch.tensor(600.0).log()
    relative = found.effective_sample_size**-0.5
    assert abs(estimate - log_p) < 4 * relative
    assert bool(((found.mean - mean).abs() < 4 * found.mean_standard_error).all())
    torch.testing.assert_close(
        found.standard_deviation, covariance.diagonal().sqrt(), rtol=0.15, atol=0
    )
    torch.testing.assert_close(found.shift, torch.full((3,), 0.5).double(), atol=0.2, rtol=0)
    torch.testing.assert_close(found.scale_ratio, torch.full((3,), 1.2).double(), atol=0.2, rtol=0)
    assert "Pareto k" in str(found)
    json.dumps(found.as_dict(), allow_nan=False)


def test_inner_samples_integrate_the_local_latents():
    """The guide of z is 1.5 times too wide; the mean of the weights is still p(x)."""
    x, g = data(6)
    pair = Nested(stretch=1.5).set(x, g)
    log_p = pair.exact(x, g)[2]
    found = pv.global_weights(pair, x, g, num_draws=250, num_samples=50)
    estimate = found.log_weights.logsumexp(0) - torch.tensor(250.0).log()
    relative = (1 / found.effective_sample_size) ** 0.5
    assert 0.001 < relative < 0.2
    assert abs(estimate - log_p) < 4 * relative


def test_the_weights_of_an_exact_guide_are_constant():
    x, g = data(6)
    found = pv.global_weights(Amortized(), x, g, num_draws=40, num_samples=1)
    log_p = Amortized().exact(x, g)[2]
    torch.testing.assert_close(found.log_weights, log_p.expand(40))
    assert found.pareto_k == 0
    assert found.effective_sample_size == pytest.approx(40)


def test_a_guide_ten_posterior_sds_off_is_not_reliable():
    x, g = data()
    pair = Nested().set(x, g, shift=10.0)
    found = pv.global_weights(pair, x, g, num_draws=200, num_samples=1)
    assert found.pareto_k > 1
    assert not found.reliable
    assert "not reliable" in str(found)
    assert "mean" not in found.as_dict()["by_unit"]["w"]


def test_what_global_weights_refuses():
    with pytest.raises(pv.UsageError, match="VAE has no global latent, but global_weights needs"):
        pv.global_weights(make("bernoulli"), *rows("bernoulli", 3))
    with pytest.raises(pv.UsageError, match="num_draws must be at least 21, got 5"):
        pv.global_weights(Nested(), *data(), num_draws=5)


# Local latents given the global ones


class Guided(nn.Module):
    """Models of x with the latent v, which some guides lack."""

    def __init__(self, model, *guided):
        super().__init__()
        self.prior, self.guided = model, guided

    def model(self, x):
        v = self.prior(x)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(v.expand(x.shape), 1.0).to_event(1), obs=x)

    def guide(self, x):
        for name in self.guided:
            pyro.sample(name, dist.Normal(x.new_zeros(()), 1.0))


def enumerated(x):
    w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
    half = dist.Bernoulli(x.new_tensor(0.5))
    return w + pyro.sample("v", half, infer={"enumerate": "parallel"})[..., None, None]


def sometimes(x):
    w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
    return pyro.sample("v", dist.Normal(w, 1.0)) if w > -0.5 else w


def test_global_latents_that_are_not_in_every_run_are_refused():
    x, short = torch.zeros(6, 1), {"progress": False}
    with pytest.raises(pv.UsageError, match="latent site 'v' of the model, but the guide does not"):
        pv.global_weights(Guided(enumerated, "w"), x, num_draws=50, **short)
    with pytest.raises(pv.UsageError, match="does not draw latent site 'v' in every run"):
        pv.nuts(Guided(sometimes, "w", "v"), x, num_draws=20, warmup=20, num_chains=4, **short)


def test_gaps_are_those_of_the_local_latents_given_a_draw():
    """q(z | x, u) is 1.5 times too wide, so KL(q || p) is (r^2 - 1) / 2 - log r for every u."""
    x, g = data(8)
    pair = Nested(stretch=1.5).set(x, g, shift=3.0)
    found = pv.gaps(pair, x, g, steps=150, num_samples=400, progress=False, engine="eager")
    want = (1.5**2 - 1) / 2 - torch.tensor(1.5).log().item()
    assert abs(found.inference.value - want) < 4 * found.inference.standard_error
    assert abs(found.approximation.value) < 0.02  # the family contains the exact q(z | x, u)
    assert found.given == ("w", "u")
    assert "given one draw of the guide of w, u" in str(found)
    assert found.as_dict()["given_one_draw_of"] == ["w", "u"]


def test_a_pair_given_its_global_latents_has_the_posterior_of_a_row():
    x, g = data(2)
    fixed, names = at_one_draw(Nested().set(x, g), (x, g), seed=0)
    assert names == ("w", "u")
    codes = pv.encode(fixed, x, g)
    assert list(codes) == ["z"]
    found = pv.log_likelihood(fixed, x, g, num_samples=50)
    assert found.standard_error < 1e-6  # its guide is exact given u
    assert at_one_draw(make("bernoulli"), rows("bernoulli", 2), 0)[1] == ()

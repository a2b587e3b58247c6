"""The export of a pair's draws to ArviZ."""

import sys
import warnings

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import linear_gaussian
from pairs import ALL, ENUMERATED, GLOBAL, make, rows

import pyro_vae as pv
from pyro_vae.cli.main import main

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ArviZ announces its next version
    import arviz

matplotlib.use("Agg")
if not hasattr(arviz, "InferenceData"):
    pytest.skip("these are plots of ArviZ before 1.0", allow_module_level=True)

STATISTICS = {"mean": lambda x: x.mean(-1)}


def drawn(spread=1.3, n=60, **settings):
    pair = linear_gaussian(spread=spread)
    torch.manual_seed(0)
    x = pair.marginal().sample((n,))
    return pair, x, pv.to_arviz(pair, x, **{"statistics": STATISTICS} | settings)


def test_loo_is_log_p_of_each_datum():
    pair, x, data = drawn(n=30, num_particles=200)
    found = arviz.loo(data, pointwise=True)
    truth = pair.marginal().log_prob(x).detach()
    assert np.allclose(found.loo_i, truth, atol=0.05)
    assert found.elpd_loo == pytest.approx(truth.sum().item(), abs=0.15)
    assert 0 <= found.p_loo < 0.2
    assert (found.pareto_k < 0.7).all()


def test_draws_are_from_the_posterior_or_from_the_guide():
    pair, x, data = drawn(n=4, num_samples=4000)
    loc, covariance = (part.detach().numpy() for part in pair.posterior(x))
    z = data.posterior["z"].values[0]
    errors = np.sqrt(np.diag(covariance) / len(z))
    assert (np.abs(z.mean(0) - loc) < 4 * errors).all()
    assert np.allclose(np.cov(z[:, 0].T) / covariance, 1, atol=0.12)
    guide = pv.to_arviz(pair, x, num_particles=1, num_samples=4000).posterior["z"].values[0]
    assert np.allclose(guide[:, 0].var(0) / np.diag(covariance), 1.69, atol=0.2)


class Two(torch.nn.Module):
    """Two components, summed out: p(k | x) is known."""

    centers = torch.tensor([-1.0, 2.0], dtype=torch.float64)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            fn = dist.Categorical(x.new_tensor([0.3, 0.7]))
            k = pyro.sample("k", fn, infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(self.centers[k], 1.0))
            pyro.sample("x", dist.Normal(z, 0.8), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x, 1.0))


def test_a_summed_out_latent_is_drawn_from_its_posterior():
    x = torch.linspace(-2, 2, 6, dtype=torch.float64)
    data = pv.to_arviz(Two(), x, num_samples=4000, num_particles=20)
    spread = (1 + 0.8**2) ** 0.5
    joint = dist.Normal(Two.centers, spread).log_prob(x[:, None]).exp() * x.new_tensor([0.3, 0.7])
    k = data.posterior["k"].values[0]
    exact = (joint / joint.sum(1, keepdim=True))[:, 1].numpy()
    assert np.abs(k.mean(0) - exact).max() < 0.04
    p = np.exp(data.log_likelihood["x"].values[0])
    assert np.allclose(p.mean(0), joint.sum(1), rtol=0.02)


def test_predictive_draws():
    pair, x, data = drawn(n=3, num_samples=5000)
    new = data.posterior_predictive["x"].values[0]
    covariance = pair.marginal().covariance_matrix.detach().numpy()
    assert np.allclose(np.cov(new[:, 0].T), covariance, atol=0.12 * covariance.max())
    same = pv.to_arviz(pair, x, num_samples=5000, new_latents=False)
    again = same.posterior_predictive["x"].values[0]
    loc, spread = (part.detach() for part in pair.posterior(x))
    w = pair.weight.detach()
    assert np.allclose(again.mean(0), loc @ w.T, atol=0.06)
    expected = w @ spread @ w.T + pair.noise**2 * torch.eye(6)
    assert np.allclose(np.cov(again[:, 0].T), expected, atol=0.1)
    assert np.allclose(data.posterior_predictive["mean"], new.mean(-1))
    assert np.allclose(data.observed_data["mean"], x.mean(1))


def test_probability_integral_transform_is_uniform_for_the_right_model_alone():
    from scipy.stats import kstest

    _, x, data = drawn(n=200, num_samples=100)
    pit = arviz.loo_pit(data, y="mean", y_hat="mean")
    assert kstest(pit, "uniform").pvalue > 0.01
    data.observed_data["mean"] = data.observed_data["mean"] + x.std().item()
    assert kstest(arviz.loo_pit(data, y="mean", y_hat="mean"), "uniform").pvalue < 1e-6


@pytest.mark.filterwarnings("ignore")  # a warning of ArviZ about matplotlib
def test_plots_run():
    _, _, data = drawn(n=20, num_samples=50)
    arviz.plot_ppc(data, num_pp_samples=10, random_seed=0)
    arviz.plot_ppc(data, var_names=["mean"], kind="cumulative", num_pp_samples=10, random_seed=0)
    arviz.plot_loo_pit(data, y="mean", y_hat="mean")
    arviz.plot_bpv(data, var_names=["mean"])
    arviz.plot_khat(arviz.loo(data))
    arviz.plot_forest(data, var_names=["z"], coords={"data": [0, 1]})
    matplotlib.pyplot.close("all")


@pytest.mark.filterwarnings("ignore")  # a warning of ArviZ about pandas
def test_two_models_are_compared():
    _, x, data = drawn(n=40)
    other = linear_gaussian(spread=1.3)
    other.noise = 0.8
    found = arviz.compare({"right": data, "wrong": pv.to_arviz(other, x)})
    assert list(found.index) == ["right", "wrong"]


@pytest.mark.sample(12)
@pytest.mark.parametrize("name", ALL | GLOBAL)
def test_every_pair(name):
    batch = rows(name, 7)
    data = pv.to_arviz(make(name), *batch, num_samples=3, num_particles=2)
    for site, code in pv.encode(make(name), *batch).items():
        assert data.posterior[site].shape == (1, 3, *code.shape)
    assert data.posterior_predictive["x"].shape == (1, 3, *batch[0].shape)
    (site,) = data.log_likelihood  # of labels and x together, one "joint" density
    assert data.log_likelihood[site].dims == ("chain", "draw", "data")
    if name in ("deep-markov", "multilevel"):  # the padding is masked
        inside = torch.arange(3) < batch[1][:, None]
        batch = (torch.where(inside[..., None], batch[0], torch.nan), *batch[1:])
    if name == "text":  # the tokens after the first 0 are not part of the text
        ended = (batch[0] == 0).cumsum(-1) > 0
        batch = (batch[0].where(~ended, 0.0), *batch[1:])
    assert np.array_equal(data.observed_data["x"], batch[0], equal_nan=True)
    assert np.isfinite(data.log_likelihood[site]).all()
    assert len(batch) == 1 or "context_1" in data.constant_data or name in ENUMERATED


class Shared(torch.nn.Module):
    """A global mean with its exact posterior given these data, and a local latent."""

    def __init__(self, x):
        super().__init__()
        self.register_buffer("precision", 1 + len(x) / x.new_tensor(1.0 + 0.25))
        self.register_buffer("mean", x.sum() / 1.25 / self.precision)

    def model(self, x):
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(w + z, 0.5), obs=x)

    def guide(self, x):
        w = pyro.sample("w", dist.Normal(self.mean, self.precision**-0.5))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal((x - w) / 1.25, 0.5))


@pytest.mark.thorough
def test_loo_leaves_a_datum_out_of_what_all_share():
    x = torch.tensor([-1.0, 0.4, 3.0, 1.1], dtype=torch.float64)
    data = pv.to_arviz(Shared(x), x, num_samples=3000, num_particles=10)
    assert data.posterior["w"].dims == ("chain", "draw")
    others = x.sum() - x  # predict each datum from the other three
    precision = 1 + 3 / 1.25
    exact = dist.Normal(others / 1.25 / precision, (1.25 + 1 / precision) ** 0.5).log_prob(x)
    found = arviz.loo(data, pointwise=True)
    assert np.allclose(found.loo_i, exact, atol=0.06)
    within = dist.Normal(Shared(x).mean, (1.25 + 1 / Shared(x).precision) ** 0.5).log_prob(x)
    assert (
        found.elpd_loo < within.sum().item() - 0.3
    )  # the effect of each datum on its own prediction
    w = data.posterior["w"].values
    assert w.mean() == pytest.approx(Shared(x).mean.item(), abs=0.04)


def test_changes_nothing_and_repeats_itself():
    pair, x, data = drawn(n=5, num_samples=3)
    state = torch.get_rng_state()
    again = pv.to_arviz(pair, x, num_samples=3)
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(again.posterior["z"], data.posterior["z"])


class Narrow(torch.nn.Module):
    """Its guide has no density in a part of the posterior."""

    def __init__(self, pair):
        super().__init__()
        self.pair = pair

    def model(self, x):
        self.pair.model(x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_full((len(x), 2), 1e200), 1.0).to_event(1))


def test_words_for_what_is_wrong(monkeypatch):
    pair, x, _ = drawn(n=4, num_samples=2)
    with pytest.raises(pv.UsageError, match="num_particles must be at least 1, got 0"):
        pv.to_arviz(pair, x, num_particles=0)
    with pytest.raises(pv.UsageError, match=r"statistic 'all' must return shape \(8,\)"):
        pv.to_arviz(pair, x, num_samples=2, statistics={"all": lambda x: x})
    with pytest.raises(pv.UsageError, match="4 data have infinite weights, or only weights of 0"):
        pv.to_arviz(Narrow(pair), x, num_samples=2)
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(pv.UsageError, match=r"pip install 'pyro-vae\[arviz\]'"):
        pv.to_arviz(pair, x)


def test_nothing_else_needs_arviz(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "arviz", None)
    main(["--help"])
    assert "evaluate" in capsys.readouterr().out

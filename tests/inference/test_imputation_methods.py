"""Imputation after a refinement and by NUTS, against the closed form."""

from math import exp, log10

import pyro
import pyro.distributions as dist
import pytest
import torch
from imputation_helpers import Enumerated, Holes, rows
from torch import nn

import pyro_vae as pv
from pyro_vae.parts.missing import PartlyObserved


def within(found, pair, x, i, margin):
    """Whether mean, covariance and interval of row i are the exact ones, up to Monte Carlo."""
    m = x[i].isnan()
    mean, covariance = pair.missing(x[i])
    deviation, size = covariance.diagonal().sqrt(), found.effective_sample_size[i]
    drawn = torch.atleast_2d(found.draws[:, i, m].T.cov()) / torch.outer(deviation, deviation)
    exact = covariance / torch.outer(deviation, deviation)
    high = (found.high[i][m] - mean) / deviation
    return (
        bool(((found.mean[i][m] - mean).abs() < 5 * deviation / size.sqrt()).all())
        and bool(((drawn - exact).abs() < margin).all())
        and bool(((high - 1.645).abs() < margin).all())
    )


def test_a_refined_guide_has_more_effective_samples_and_the_exact_posterior():
    pair, x = Holes(spread=3.0), rows(4)
    usual = pv.impute(pair, x, draws=1, num_samples=800)
    found = pv.impute(pair, x, method="refine", draws=1500, num_samples=800)
    assert usual.method == "importance"
    assert bool(usual.reliable.all())
    assert bool((usual.effective_sample_size[1:] < 0.4 * 800).all())
    assert bool((found.effective_sample_size[1:] > 0.9 * 800).all())
    assert float(found.pareto_k.max()) < 0.5
    assert bool(found.r_hat.isnan().all())
    assert all(within(found, pair, x, i, 0.2) for i in (1, 2, 3))
    assert torch.equal(found.mean[0], x[0])  # a complete row


def test_nuts_has_the_exact_posterior_and_reports_its_chains():
    pair, x = Holes(spread=0.2), rows(3)
    found = pv.impute(pair, x[[0, 2]], method="nuts", draws=1000, num_samples=120)
    assert within(found, pair, x[[0, 2]], 1, 0.6)
    assert bool(found.r_hat[0].isnan())
    assert 0.9 < float(found.r_hat[1]) < 1.1
    assert found.reliable.tolist() == [True, False]  # 120 draws are too few, whatever R-hat is
    assert "chains apart or short" in str(found)
    assert bool(found.pareto_k[1].isnan())
    assert found.pareto_k[0] == 0
    assert 20 < float(found.effective_sample_size[1]) <= 120


def test_unreliable_rows_name_the_method_to_try():
    pair, x = Holes(spread=0.3), rows(8)
    found = pv.impute(pair, x, draws=1, num_samples=400)
    limit = 1 - 1 / log10(400)
    assert bool((found.pareto_k > limit).any())
    assert torch.equal(found.reliable, found.pareto_k <= limit)
    assert "what to try         the method refine" in str(found)
    assert "what to try" not in str(pv.impute(Holes(), x, draws=1, num_samples=400))


class Explosive(nn.Module):
    """x[1] = exp(30 z) is infinite in float32 for z > 3; x[0] = 0 excludes such z."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 2.0))
            means = torch.stack([z, (30 * z).exp()], -1)
            pyro.sample("x", PartlyObserved(dist.Normal(means, 0.01)).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 2.0))


def test_a_draw_of_weight_zero_does_not_make_the_mean_nan():
    found = pv.impute(Explosive(), torch.tensor([[0.0, torch.nan]]), num_samples=5000)
    want = exp(0.5 * (30 * 0.01) ** 2)  # E[exp(30 z)] for z ~ N(0, 0.01)
    assert float(found.mean[0, 1]) == pytest.approx(want, abs=0.2)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("mice", "method cannot be 'mice'; known: importance, refine, nuts"),
        ("nuts", "method 'nuts' does not draw latent site 'y', which is enumerated"),
    ],
)
def test_a_method_that_cannot_serve_is_one_line(method, words):
    x = torch.tensor([[0.5, 1.0], [torch.nan, 0.2]])
    with pytest.raises(pv.UsageError, match=words):
        pv.impute(Enumerated(), x, method=method)


class Summed(nn.Module):
    """x[j] ~ N(4 y + z, 1); only the model has the class y, which is summed out."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            fn = dist.Bernoulli(x.new_full((len(x),), 0.3))
            y = pyro.sample("y", fn, infer={"enumerate": "parallel"})
            fn = dist.Normal((4 * y + z)[..., None].expand(*(y + z).shape, 2), 1.0)
            pyro.sample("x", fn.mask(~x.isnan()).to_event(1), obs=x.nan_to_num())

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))


@pytest.mark.parametrize(("method", "num_samples"), [("importance", 2000), ("nuts", 120)])
def test_classes_that_only_the_model_has_are_drawn_given_the_data(method, num_samples):
    """For x[1] = 4 the class is 1 with probability 0.96; its prior is 0.3."""
    x = torch.tensor([[torch.nan, 4.0]])
    found = pv.impute(Summed(), x, method=method, draws=1, num_samples=num_samples)
    weights = torch.tensor([0.7 * exp(-4.0), 0.3])
    p = float(weights[1] / weights.sum())
    want = 4 * p + 0.5 * (4 - 4 * p)
    assert float(found.mean[0, 0]) == pytest.approx(want, abs=0.5)


def test_nuts_refuses_global_latents():
    """Global latents have another posterior for each set of rows."""
    likelihood = pv.Missing(pv.Gaussian)
    pair = pv.BayesianDecoder(pv.VAE.mlp((2,), 1, (), likelihood))
    with pytest.raises(pv.UsageError, match=r"is shared by all rows: use 'importance' or 'refine'"):
        pv.impute(pair, torch.tensor([[0.5, torch.nan]]), method="nuts")

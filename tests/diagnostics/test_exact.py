"""Estimators, compared with closed forms on one pair."""

import math

import pyro.distributions as dist
import pytest
import torch
from exact import linear_gaussian, ppca_log_likelihood
from pyro.infer import Trace_ELBO
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import pyro_vae as pv
from pyro_vae.data.preparation import Preparation
from pyro_vae.data.sources import Arrays
from pyro_vae.training.validation import bound


def data(pair, n, seed=0):
    torch.manual_seed(seed)
    return pair.marginal().sample((n,))


def test_exact_guide_has_no_variance_and_hits_the_truth():
    pair = linear_gaussian()
    x = data(pair, 50)
    truth = pair.marginal().log_prob(x)
    result = pv.log_likelihood(pair, x, num_samples=7)
    torch.testing.assert_close(result.per_datum, truth.detach(), rtol=0, atol=1e-9)
    assert result.standard_error < 1e-6
    assert torch.allclose(result.effective_sample_size, torch.full((50,), 7.0).double())


def test_elbo_of_the_exact_guide_is_log_p():
    pair = linear_gaussian()
    x = data(pair, 50)
    rows, prepare = Arrays([x]), Preparation(torch.device("cpu"), torch.float64)
    measured = bound(pair, rows, prepare, Trace_ELBO())
    truth = pair.marginal().log_prob(x).mean().item()
    assert measured.elbo == pytest.approx(truth, abs=1e-9)
    assert measured.bound == pytest.approx(truth, abs=1e-9)


def test_elbo_gap_is_the_kl_to_the_posterior():
    spread = 1.5
    pair = linear_gaussian(spread=spread)
    x = data(pair, 4000)
    d = pair.weight.shape[1]
    gap = 0.5 * d * (spread**2 - 1) - d * math.log(spread)  # KL(N(m, r^2 S) || N(m, S))
    rows, prepare = Arrays([x]), Preparation(torch.device("cpu"), torch.float64)
    elbo = bound(pair, rows, prepare, Trace_ELBO()).elbo
    truth = pair.marginal().log_prob(x).mean().item()
    assert elbo == pytest.approx(truth - gap, abs=5 * 2.0 / math.sqrt(4000))
    assert elbo < truth


@pytest.mark.parametrize("spread", [0.8, 1.3])
def test_log_likelihood_is_within_its_standard_error(spread):
    pair = linear_gaussian(spread=spread)
    x = data(pair, 200)
    truth = pair.marginal().log_prob(x).mean().item()
    result = pv.log_likelihood(pair, x, num_samples=2000)
    assert 0 < result.standard_error < 0.01
    assert abs(result.value - truth) < 5 * result.standard_error


def test_standard_errors_are_the_spread_over_seeds():
    pair = linear_gaussian(spread=1.3)
    x = data(pair, 50)
    results = [pv.log_likelihood(pair, x, num_samples=100, seed=seed) for seed in range(40)]
    spread = torch.stack([r.per_datum for r in results]).std(0)
    claimed = torch.stack([r.standard_errors for r in results]).mean(0)
    assert torch.allclose((spread / claimed).mean(), torch.ones(()).double(), atol=0.08)


def test_log_likelihood_does_not_depend_on_how_it_is_cut(monkeypatch):
    pair = linear_gaussian(spread=1.2)
    x = data(pair, 30)
    whole = pv.log_likelihood(pair, x, num_samples=400)
    monkeypatch.setattr("pyro_vae.inference.importance.CELLS", 6 * 10 * 7)
    cut = pv.log_likelihood(pair, x, num_samples=400)
    assert abs(whole.value - cut.value) < 5 * (whole.standard_error + cut.standard_error)
    assert cut.num_samples == 400
    assert len(cut.per_datum) == 30


def test_kl_and_active_units_are_those_of_the_closed_form():
    pair = linear_gaussian()
    x = data(pair, 300)
    result = pv.evaluate(pair, x, num_samples=5)
    mean, covariance = pair.posterior(x)
    exact = torch.distributions.kl_divergence(
        torch.distributions.MultivariateNormal(mean, covariance),
        torch.distributions.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double()),
    )
    assert result.kl == pytest.approx(exact.mean().item(), abs=0.3)
    assert result.active_units == {"z": 2}
    assert result.num_units == {"z": 2}
    assert result.bits_per_dim is None
    assert result.elbo == pytest.approx(result.reconstruction - result.kl, abs=1e-9)


def test_fit_reaches_the_maximum_likelihood_of_probabilistic_pca():
    torch.manual_seed(1)
    truth = linear_gaussian(data_dim=5, latent_dim=2)
    x = truth.marginal().sample((1000,)) + torch.arange(5.0)
    vae = pv.VAE.mlp((5,), latent_dim=2, hidden=(), likelihood=pv.Gaussian(1.0, learned=True))
    vae.double()
    pv.fit(
        vae,
        x,
        epochs=50,
        batch_size=125,
        learning_rate=5e-2,
        learning_rate_schedule=pv.CosineSchedule(50),
        progress=False,
    )
    best = ppca_log_likelihood(x, 2)
    result = pv.log_likelihood(vae, x, num_samples=300)
    # The posterior of this model is not diagonal in general, so the ELBO may be a little lower.
    assert best - 0.05 < result.value < best + 4 * result.standard_error + 1e-3
    elbo = pv.evaluate(vae, x, num_samples=10).elbo
    assert best - 0.15 < elbo < best + 0.02


def test_ppca_reference_agrees_with_the_density_of_its_own_optimum():
    torch.manual_seed(0)
    x = linear_gaussian().marginal().sample((500,))
    centered = x - x.mean(0)
    values, vectors = torch.linalg.eigh(centered.T @ centered / len(x))
    values, vectors = values.flip(0), vectors.flip(1)
    noise = values[2:].mean()
    weight = vectors[:, :2] * (values[:2] - noise).sqrt()
    covariance = weight @ weight.T + noise * torch.eye(6).double()
    by_hand = dist.MultivariateNormal(x.mean(0), covariance).log_prob(x).mean().item()
    assert ppca_log_likelihood(x, 2) == pytest.approx(by_hand, abs=1e-9)


def test_bits_per_dimension_of_a_fair_coin_are_one():
    vae = pv.VAE.mlp((6,), latent_dim=2, hidden=())
    torch.nn.init.zeros_(vae.decoder.network.layers[0].weight)
    torch.nn.init.zeros_(vae.decoder.network.layers[0].bias)
    for part in (vae.encoder.network.layers[0].weight, vae.encoder.network.layers[0].bias):
        torch.nn.init.zeros_(part)  # q(z | x) = N(0, I), the prior and the posterior
    result = pv.evaluate(vae, torch.eye(6), num_samples=3)
    assert result.bits_per_dim == pytest.approx(1.0, abs=1e-6)
    assert result.log_likelihood == pytest.approx(-6 * math.log(2), abs=1e-5)
    assert result.kl_by_unit["z"] == pytest.approx([0, 0], abs=1e-6)


def test_kl_by_unit_is_that_of_two_normals():
    vae = pv.VAE.mlp((6,), latent_dim=2, hidden=()).double()
    x = torch.eye(6).double()
    result = pv.evaluate(vae, x, num_samples=3)
    mean, scale = pv.encode(vae, x)["z"], pv.encode(vae, x, what="scale")["z"]
    by_hand = 0.5 * (mean**2 + scale**2 - 1) - scale.log()
    assert result.kl_by_unit["z"] == pytest.approx(by_hand.mean(0).tolist())


def test_the_linear_probe_reads_what_is_in_the_codes_and_nothing_else():
    pair = linear_gaussian()
    x, held = data(pair, 400), data(pair, 200, seed=1)
    labels, held_labels = ((pair.posterior(part)[0][:, 0] > 0).long() for part in (x, held))
    options = {"num_samples": 2, "train": (x,), "train_labels": labels}
    # The reference is fitted only to the exact posterior means of the training rows.
    codes, held_codes = (pair.posterior(part)[0].detach().numpy() for part in (x, held))
    reference = make_pipeline(StandardScaler(), LogisticRegression()).fit(codes, labels)
    want = reference.score(held_codes, held_labels)
    assert want > 0.9
    right = pv.evaluate(pair, held, labels=held_labels, **options).probe_accuracy
    wrong = pv.evaluate(pair, held, labels=1 - held_labels, **options).probe_accuracy
    assert right == pytest.approx(want, abs=0.011)  # two rows on the edge, in float32
    assert wrong == pytest.approx(1 - right)
    with pytest.raises(pv.UsageError, match="got 3 labels but 200 rows of x"):
        pv.evaluate(pair, held, labels=held_labels[:3], **options)


def test_one_sample_is_printed_without_an_error():
    pair = linear_gaussian()
    result = pv.evaluate(pair, data(pair, 5), num_samples=1)
    assert math.isnan(result.log_likelihood_standard_error)
    assert "1 sample, which gives no error" in str(result)
    assert "nan" not in str(result)
    assert result.as_dict()["log_likelihood_standard_error"] is None
    found = pv.log_likelihood(pair, data(pair, 5), num_samples=1)
    tables = [str(found), pv.bounds_table({"one": found})]
    assert "nan" not in "".join(tables)
    assert "±" not in "".join(tables)

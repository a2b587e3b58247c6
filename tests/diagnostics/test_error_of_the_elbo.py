"""The errors that `evaluate` reports for the ELBO and for log p(x)."""

from math import isnan

import pytest
import torch

import pyro_vae as pv


def measured(pair, x, seeds, num_samples=50):
    found = [pv.evaluate(pair, x, num_samples=num_samples, seed=seed) for seed in range(seeds)]
    elbo = torch.tensor([one.elbo for one in found]).double()
    errors = torch.tensor([one.elbo_standard_error for one in found]).double()
    return elbo, errors


@pytest.mark.thorough
def test_the_error_of_the_elbo_is_its_spread_over_seeds():
    torch.manual_seed(1)
    pair = pv.VAE.mlp((4,), latent_dim=2, hidden=(8,), likelihood=pv.Gaussian)
    elbo, errors = measured(pair, 3 * torch.randn(6, 4), 60)
    spread = elbo.std().item()
    assert errors.square().mean().sqrt().item() == pytest.approx(spread, rel=4 / 120**0.5)
    assert spread > 0.01


def test_the_printed_errors_are_those_of_the_fields():
    torch.manual_seed(1)
    pair, x = pv.VAE.mlp((4,), latent_dim=2, likelihood=pv.Gaussian), 3 * torch.randn(6, 4)
    found = pv.evaluate(pair, x, num_samples=30)
    weighed = pv.log_likelihood(pair, x, num_samples=30)
    assert found.log_likelihood_total_error == weighed.total_error > weighed.standard_error
    shown = (
        f"ELBO                {found.elbo:.3f} ± {found.elbo_standard_error:.3f} nats per example"
    )
    assert shown in str(found)
    shown = f"log p(x) ≥          {weighed.value:.3f} ± {weighed.total_error:.3f}, 30 samples"
    assert shown in str(found)


def test_one_sample_and_sums_over_classes_give_no_error():
    one = pv.evaluate(pv.VAE.mlp((4,), latent_dim=2), torch.ones(8, 4), num_samples=1)
    classes = pv.SemiSupervisedVAE.mlp((4,), num_classes=3)
    for found in (one, pv.evaluate(classes, torch.ones(8, 4), num_samples=30)):
        assert isnan(found.elbo_standard_error)
        assert f"ELBO                {found.elbo:.3f} nats per example" in str(found)
        assert found.as_dict()["elbo_standard_error"] is None

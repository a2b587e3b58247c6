"""Posteriors and priors compared with closed forms."""

from math import log

import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian
from pyro.infer import TraceMeanField_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae.pairs.rng import seeded


def test_a_full_rank_normal_has_the_covariance_that_its_outputs_spell():
    raw = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).double()
    family = pv.FullRankNormal(low=1e-3, high=5.0)
    found = family(raw, (3,))
    assert family.outputs((3,)) == 9
    for row in range(4):
        factor = torch.zeros(3, 3).double()
        factor[1, 0], factor[2, 0], factor[2, 1] = raw[row, 6:]
        diagonal = pv.DiagonalNormal(low=1e-3, high=5.0)(raw[row, :6], (3,)).base_dist.scale
        factor = factor + torch.diag(diagonal)
        torch.testing.assert_close(found.covariance_matrix[row], factor @ factor.T)
        torch.testing.assert_close(found.mean[row], raw[row, :3])


def test_a_low_rank_normal_is_the_dense_one_of_the_same_covariance():
    raw = torch.randn(5, 20, generator=torch.Generator().manual_seed(1)).double()
    family = pv.LowRankNormal(3)
    found, z = family(raw, (4,)), torch.randn(5, 4).double()
    assert family.outputs((4,)) == 20
    scale = pv.DiagonalNormal()(raw[:, :8], (4,)).base_dist.scale
    columns = raw[:, 8:].reshape(5, 3, 4).mT
    covariance = columns @ columns.mT + torch.diag_embed(scale.square())
    dense = dist.MultivariateNormal(raw[:, :4], covariance)
    torch.testing.assert_close(found.log_prob(z), dense.log_prob(z))


@pytest.mark.parametrize("family", [pv.FullRankNormal(), pv.LowRankNormal(2)])
def test_draws_have_the_moments_of_the_family(family):
    with seeded(3):
        raw = torch.randn(family.outputs((3,))).double()
        q = family(raw, (3,))
        draws = q.rsample((200_000,))
    spread = q.covariance_matrix.diagonal().sqrt()
    assert torch.allclose(draws.mean(0), q.mean, atol=float(5 * spread.max() / 400))
    error = 5 * (spread[:, None] * spread) * (2 / 200_000) ** 0.5
    assert bool((torch.cov(draws.T) - q.covariance_matrix).abs().le(error).all())


@pytest.mark.parametrize("family", [pv.FullRankNormal, pv.LowRankNormal])
def test_latents_that_are_no_vectors_are_refused(family):
    with pytest.raises(pv.UsageError, match=r"latents that are vectors, got shape \(2, 3\)"):
        family().outputs((2, 3))


def test_sizes_that_make_no_sense_are_refused():
    with pytest.raises(pv.UsageError, match="rank must be at least 1, got 0"):
        pv.LowRankNormal(0)
    with pytest.raises(pv.UsageError, match="components must be at least 1, got 0"):
        pv.GaussianMixture(2, 0)


def correlated():
    """The parts of a linear-Gaussian model with a strongly correlated posterior, and its data."""
    with seeded(5):
        weight = torch.tensor([[1.0, 0.9], [0.8, 1.1], [1.2, 1.0], [0.2, -0.3]]).double()
        truth = LinearGaussian(weight, 0.6)
        return truth, truth.marginal().sample((500,)).detach()


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("posterior", "best"),
    [(pv.DiagonalNormal, False), (pv.FullRankNormal, True), (pv.LowRankNormal(1), True)],
    ids=["diagonal", "full-rank", "low-rank"],
)
def test_the_gap_that_a_family_leaves_is_that_of_the_closed_form(posterior, best):
    """Only the guide is fitted. The best diagonal normal has the posterior's precisions."""
    truth, x = correlated()
    with seeded(0):
        vae = pv.VAE.mlp(
            (4,), latent_dim=2, hidden=(), likelihood=pv.Gaussian(0.6), posterior=posterior
        ).double()
    with torch.no_grad():
        (linear,) = (m for m in vae.decoder.modules() if isinstance(m, nn.Linear))
        linear.weight.copy_(truth.weight)
        linear.bias.zero_()
    vae.decoder.requires_grad_(False)
    options = {"objective": None if best else TraceMeanField_ELBO(), "progress": False}
    pv.fit(
        vae,
        x,
        epochs=400,
        batch_size=100,
        learning_rate=1e-2,
        seed=1,
        learning_rate_schedule=pv.CosineSchedule(400),
        **options,
    )
    q = vae.encoder(x)
    if not best:
        q = dist.MultivariateNormal(q.base_dist.loc, torch.diag_embed(q.base_dist.scale.square()))
    mean, covariance = truth.posterior(x)
    exact = dist.MultivariateNormal(mean, covariance)
    q = dist.MultivariateNormal(q.mean, q.covariance_matrix)
    gap = torch.distributions.kl_divergence(q, exact).mean().item()
    precision = torch.linalg.inv(covariance)
    diagonal = (precision.diagonal().log().sum() - torch.logdet(precision)).item() / 2
    assert diagonal > 0.5  # so that there is room for improvement
    assert gap == pytest.approx(0.0 if best else diagonal, abs=0.01)


def test_a_mixture_sums_its_components_out():
    with seeded(0):
        prior = pv.GaussianMixture(2, 3).double()
        prior.logits.data = torch.tensor([0.5, -1.0, 0.2]).double()
        prior.raw_scales.data = torch.randn(3, 2).double()
        z = torch.randn(7, 2).double()
    weights = prior.logits.softmax(0)
    scales = pv.Gaussian(bounds=(1e-2, 1e2))(
        torch.cat([prior.means, prior.raw_scales], -1), (2,)
    ).base_dist.scale
    each = torch.stack(
        [
            dist.Normal(m, s).log_prob(z).sum(-1).exp()
            for m, s in zip(prior.means, scales, strict=True)
        ]
    )
    torch.testing.assert_close(prior().log_prob(z), (weights[:, None] * each).sum(0).log())


def test_a_mixture_prior_finds_the_clusters_of_what_it_is_fitted_to():
    """With two distant clusters of equal weight, the KL is log 2 more than under one cluster."""
    centers = torch.tensor([[6.0, 0.0], [-6.0, 0.0]])
    with seeded(2):
        z = centers[torch.arange(600) % 2] + 0.5 * torch.randn(600, 2)
        prior = pv.GaussianMixture(2, 2)
        prior.means.data = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    optimizer = torch.optim.Adam(prior.parameters(), lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        loss = -prior().log_prob(z).mean()
        loss.backward()
        optimizer.step()
    one = dist.Normal(torch.zeros(2), 0.5).to_event(1)
    expected = one.entropy().item() + log(2)
    assert loss.item() == pytest.approx(expected, abs=0.1)
    assert prior.means.detach().sort(0).values[:, 0].tolist() == pytest.approx([-6, 6], abs=0.15)


@pytest.mark.thorough
def test_a_prior_may_depend_on_the_context():
    """If labels determine the codes, the conditional prior learns them and the KL is near zero."""
    with seeded(4):
        labels = torch.arange(400) % 2
        context = pv.one_hot(labels, 2)
        x = torch.where(labels[:, None] > 0, 3.0, -3.0) + 0.1 * torch.randn(400, 3)
        prior = pv.Factor(pv.MLP([2], (8,), 2), pv.DiagonalNormal(), (1,))
        common = {"latent_dim": 1, "hidden": (16,), "likelihood": pv.Gaussian(0.5)}
        learned = pv.VAE.mlp((3,), context_shapes=[(2,)], prior=prior, **common)
        fixed = pv.VAE.mlp((3,), **common)
    options = {"epochs": 60, "batch_size": 50, "learning_rate": 1e-2, "progress": False}
    pv.fit(learned, x, context, **options)
    pv.fit(fixed, x, **options)
    assert pv.evaluate(learned, x, context, num_samples=10).kl < 0.1
    assert pv.evaluate(fixed, x, num_samples=10).kl > 0.5
    assert pv.sample(learned, 5, pv.one_hot(torch.ones(5, dtype=torch.long), 2)).mean() > 2

"""The article's loss is the negative ELBO of a Gaussian likelihood of scale 1, minus a constant."""

import math
import runpy
from pathlib import Path

import pyro
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

import pyro_vae as pv
from pyro_vae.pairs.rng import seeded

ARTICLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "article.py"))
N, D, LATENT = 32, 12, 5
CONSTANT = D / 2 * math.log(2 * math.pi)


def vae_and_images(likelihood, posterior=pv.DiagonalNormal):
    with seeded(0):
        vae = pv.VAE.mlp((D,), LATENT, (8, 6), likelihood=likelihood, posterior=posterior)
        return vae.double(), torch.rand(N, D, dtype=torch.float64)


def of_pyro(vae, x, objective, beta):
    """The objective of a minibatch, per image, and its gradients."""
    weight = pv.KLWeight(beta)
    with pyro.get_param_store().scope(), seeded(1):
        loss = objective.differentiable_loss(weight(vae.model), weight(vae.guide), x) / N
    return loss, torch.autograd.grad(loss, list(vae.parameters()))


def code(vae, x):
    """The posterior's means and scales from a program without Pyro, and the same draw."""
    q = vae.encoder(x).base_dist
    with seeded(1):
        return q.loc, q.scale, q.rsample()


def by_hand(vae, x, beta, sigmoid, kl):
    """sum ||x - x'||^2 / (2 N) + beta KL, in plain torch."""
    mean, scale, z = code(vae, x)
    out = vae.decoder.network(z)
    error = (x - (out.sigmoid() if sigmoid else out)).square().sum() / (2 * N)
    loss = error + beta * kl(mean, scale, z).sum() / N
    return loss, torch.autograd.grad(loss, list(vae.parameters()))


def closed(mean, scale, z):
    """The KL to N(0, I) with the sign that the article lost: -(1 + log s^2 - m^2 - s^2) / 2."""
    return -(1 + scale.square().log() - mean.square() - scale.square()) / 2


def drawn(mean, scale, z):
    """log q(z|x) - log p(z) at the draw."""
    return (z.square() - ((z - mean) / scale).square()) / 2 - scale.log()


def require_same(one, other, constant):
    torch.testing.assert_close(one[0], other[0] + constant, rtol=0, atol=1e-12)
    torch.testing.assert_close(one[1], other[1], rtol=1e-10, atol=1e-13)
    assert any(gradient.abs().max() > 1e-4 for gradient in one[1])


@pytest.mark.parametrize("beta", [1.0, 0.02, 0.0, -0.02])
@pytest.mark.parametrize("sigmoid", [True, False])
@pytest.mark.parametrize(
    ("objective", "kl"), [(TraceMeanField_ELBO(), closed), (Trace_ELBO(), drawn)]
)
def test_scale_one_is_the_articles_loss(beta, sigmoid, objective, kl):
    likelihood = ARTICLE["Intensities"](1.0) if sigmoid else pv.Gaussian(scale=1.0)
    vae, x = vae_and_images(likelihood)
    require_same(of_pyro(vae, x, objective, beta), by_hand(vae, x, beta, sigmoid, kl), CONSTANT)


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_a_scale_is_a_weight_on_the_kl(scale):
    """The ELBO of scale s is the article's loss with beta = s^2, over s^2."""
    vae, x = vae_and_images(pv.Gaussian(scale=scale))
    loss, gradients = by_hand(vae, x, scale**2, False, closed)
    wanted = loss / scale**2, [gradient / scale**2 for gradient in gradients]
    found = of_pyro(vae, x, TraceMeanField_ELBO(), 1.0)
    require_same(found, wanted, CONSTANT + D * math.log(scale))


def test_a_mean_over_pixels_hides_a_beta_as_great_as_their_number():
    vae, x = vae_and_images(ARTICLE["Intensities"](1.0))
    mean, scale, z = code(vae, x)
    kl = closed(mean, scale, z).sum(1).mean()
    loss = F.mse_loss(vae.decoder.network(z).sigmoid(), x) / 2 + kl
    by_pixel = loss, torch.autograd.grad(loss, list(vae.parameters()))
    loss, gradients = of_pyro(vae, x, TraceMeanField_ELBO(), D)
    require_same(((loss - CONSTANT) / D, [g / D for g in gradients]), by_pixel, 0.0)


@pytest.mark.parametrize("beta", [0.02, 0.0])
def test_without_a_posterior_scale_an_autoencoder_with_small_codes_is_trained(beta):
    vae, x = vae_and_images(ARTICLE["Intensities"](1.0), ARTICLE["Point"])
    codes = vae.encoder.network(x)
    error = (x - vae.decoder.network(codes).sigmoid()).square().sum() / (2 * N)
    loss = error + beta * codes.square().sum() / (2 * N)
    wanted = loss, torch.autograd.grad(loss, list(vae.parameters()))
    constant = CONSTANT + beta * LATENT / 2 * math.log(2 * math.pi)
    require_same(of_pyro(vae, x, Trace_ELBO(), beta), wanted, constant)


def test_a_learned_scale_ends_at_the_root_mean_squared_error():
    """The best s^2 is the mean squared error of all pixels, for the same draws."""
    vae, x = vae_and_images(pv.Gaussian(1.0, learned=True))
    family = vae.decoder.family
    optimizer = torch.optim.LBFGS([family.raw_scale], line_search_fn="strong_wolfe", max_iter=200)

    def closure():
        optimizer.zero_grad()
        loss = of_pyro_loss(vae, x)
        family.raw_scale.grad = torch.autograd.grad(loss, family.raw_scale)[0]
        return loss

    optimizer.step(closure)
    _, _, z = code(vae, x)
    error = (x - vae.decoder(z).base_dist.mean).square().mean().sqrt()
    torch.testing.assert_close(vae.decoder(z).base_dist.scale.mean(), error, rtol=1e-4, atol=0)


def of_pyro_loss(vae, x):
    with pyro.get_param_store().scope(), seeded(1):
        return TraceMeanField_ELBO().differentiable_loss(vae.model, vae.guide, x) / N

"""The density of a draw of a normal with full covariance, where a solve has no correct digit."""

import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.parts.distributions import CholeskyNormal


def steep(dim=20, dtype=torch.float32):
    """Parameters of L with a small diagonal beside larger entries, (3, dim, dim)."""
    generator = torch.Generator().manual_seed(0)
    below = 0.3 * torch.randn(3, dim, dim, generator=generator, dtype=torch.float64).tril(-1)
    loc = torch.randn(3, dim, generator=generator, dtype=torch.float64)
    factor = below + 0.05 * torch.eye(dim, dtype=torch.float64)
    return loc.to(dtype).requires_grad_(), factor.to(dtype).requires_grad_()


def test_a_draw_has_the_density_of_its_noise():
    loc, factor = steep()
    normal = CholeskyNormal(loc, scale_tril=factor, validate_args=False).expand((3,))
    torch.manual_seed(1)
    z = normal.rsample((5,))
    found = normal.log_prob(z)
    assert found.shape == (5, 3)
    torch.manual_seed(1)
    noise = torch.randn(5, 3, 20)
    want = dist.Normal(0.0, 1.0).log_prob(noise).sum(-1) - 20 * torch.tensor(0.05).log()
    assert torch.allclose(found, want, atol=1e-4)
    stock = dist.MultivariateNormal(loc, scale_tril=factor, validate_args=False)
    assert (stock.log_prob(z) - want).abs().max() > 1e3  # why this class exists
    # Only the determinant depends on the parameters: each diagonal entry has 5 times -1 / 0.05.
    slopes = torch.autograd.grad(found.sum(), [loc, factor], allow_unused=True)
    assert slopes[0] is None or not slopes[0].any()
    assert torch.allclose(slopes[1], -100.0 * torch.eye(20).expand(3, 20, 20), atol=1e-3)


@pytest.mark.parametrize("how", ["rsample", "sample", "other", "detached"])
def test_densities_and_gradients_are_those_of_stock_torch_where_it_can_solve(how):
    torch.manual_seed(2)
    loc = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    raw = torch.randn(4, 3, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for family in (CholeskyNormal, dist.MultivariateNormal):
        factor = raw.tril(-1) + torch.diag_embed(raw.diagonal(dim1=-2, dim2=-1).exp())
        normal = family(loc, scale_tril=factor)
        torch.manual_seed(3)
        z = normal.sample() if how == "sample" else normal.rsample()
        z = {"other": z + 1.0, "detached": z.detach()}.get(how, z)
        density = normal.log_prob(z)
        slopes = torch.autograd.grad(density.sum(), [loc, raw], allow_unused=True)
        found.append([z, density, *slopes])
    for ours, stock in zip(*found, strict=True):
        # The density of a draw does not depend on the mean.
        assert torch.allclose(torch.zeros_like(stock) if ours is None else ours, stock, atol=1e-9)


def test_the_elbo_of_a_full_rank_guide_of_many_latents():
    """The decoder ignores z, so that the ELBO is log p(x) minus a KL in closed form."""
    torch.manual_seed(0)
    vae = pv.VAE.mlp((2,), latent_dim=20, posterior=pv.FullRankNormal, likelihood=pv.Gaussian(1.0))
    with torch.no_grad():
        for part in (vae.encoder, vae.decoder):
            last = [m for m in part.modules() if isinstance(m, torch.nn.Linear)][-1]
            last.weight.zero_()
            last.bias.zero_()
            if part is vae.encoder:
                last.bias[20:40] = -3.0
                last.bias[40:] = 0.3 * torch.randn(190)
    x = torch.zeros(2, 2)
    q = vae.encoder(x)
    twice = dist.MultivariateNormal(q.loc.double(), scale_tril=q.scale_tril.double())
    prior = dist.MultivariateNormal(torch.zeros(20).double(), torch.eye(20).double())
    want = 2 * dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.0))
    want = (want - torch.distributions.kl_divergence(twice, prior).mean()).item()
    found = pv.log_likelihood(vae, x, num_samples=1000, engine="eager")
    assert found.elbo_standard_error < 0.5
    assert abs(found.elbo - want) < 5 * found.elbo_standard_error

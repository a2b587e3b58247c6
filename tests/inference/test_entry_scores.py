"""Scores of entries against exact conditional densities of a linear-Gaussian multilevel model."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

import pyro_vae as pv


class Linear(nn.Module):
    """The mean of z given u."""

    def forward(self, u):
        return 1.3 * u + 0.2


def pair_of(x):
    """u ~ N(0, 1), z_i ~ N(1.3 u + 0.2, 0.7), and x_i normal around a linear function of z_i."""
    torch.manual_seed(0)
    likelihood = pv.Missing(pv.Standardized(pv.Gaussian(0.6), (2,)).standardize(x))
    pair = pv.MultilevelVAE.mlp(
        (2,), latent_dim=1, group_dim=1, hidden=(8,), members=3, likelihood=likelihood
    )
    pair.transition = pv.Factor(Linear(), pv.Gaussian(0.7), (1,))
    pair.decoder = pv.Factor(pv.MLP(1, (), 2), likelihood, (2,))
    for factor in (pair.transition, pair.decoder):
        factor.requires_grad_(False)
    return pair


def moments(pair, size):
    """The mean and the covariance of all entries of a group of this size."""
    constants = pair.decoder.family.likelihood
    layer = next(m for m in pair.decoder.modules() if isinstance(m, nn.Linear))
    slope = (layer.weight[:, 0] * constants.spread).double()
    start = (layer.bias * constants.spread + constants.center).double()
    z = 1.69 + 0.49 * torch.eye(size).double()
    noise = torch.diag(((0.6 * constants.spread.double()) ** 2).repeat(size))
    cov = torch.kron(z, torch.outer(slope, slope)) + noise
    return (0.2 * slope + start).repeat(size), cov


@pytest.mark.thorough
def test_entries_of_groups_with_holes_have_their_exact_conditional_densities():
    torch.manual_seed(1)
    x = torch.randn(24, 2) * torch.tensor([5.0, 0.2]) + torch.tensor([100.0, -3.0])
    ids = torch.cat([torch.arange(8), torch.arange(8), torch.arange(4), torch.arange(4)])
    x[3, 0], x[9, 1], x[20] = torch.nan, torch.nan, torch.nan
    groups = pv.by_group(x, ids)
    pair = pair_of(x)
    pv.fit(
        pair,
        *groups.batch,
        epochs=600,
        batch_size=8,
        learning_rate=0.02,
        engine="eager",
        progress=False,
    )
    found = pv.score(pair, *groups.batch, num_samples=8000)
    errors, shapes = [], []
    for g, size in enumerate(groups.sizes.tolist()):
        entries = groups.x[g, :size].reshape(-1).double()
        seen = ~entries.isnan()
        mean, cov = (part[seen] for part in moments(pair, size))
        law, off = MultivariateNormal(mean, cov[:, seen]), entries[seen] - mean
        exact = law.log_prob(entries[seen])
        if found.pareto_k[g] < 0.5:
            assert abs(found.log_likelihood[g] - exact) < 0.1
        precision = torch.linalg.inv(cov[:, seen])
        variance = 1 / precision.diag()
        cpo = -0.5 * (2 * math.pi * variance).log() - (precision @ off) ** 2 * variance / 2
        errors.append(found.by_entry[g, :size].reshape(-1)[seen] - cpo)
        shapes.append(found.entry_pareto_k[g, :size].reshape(-1)[seen])
    errors, shapes = torch.cat(errors).abs(), torch.cat(shapes)
    assert (shapes < 0.5).sum() >= 10
    assert errors[shapes < 0.5].max() < 0.1
    assert (shapes[errors > 0.2] > 0.6).all()


def test_constant_weights_have_a_shape_of_zero():
    vae = pv.VAE.mlp((3,), latent_dim=2, hidden=(), likelihood=pv.Missing(pv.Gaussian(1.0)))
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
    found = pv.score(vae, torch.tensor([[1.0, torch.nan, 2.0]]), num_samples=30)
    assert found.entry_pareto_k[0].nan_to_num(-1.0).tolist() == [0.0, -1.0, 0.0]
    exact = [-0.5 * math.log(2 * math.pi) - value**2 / 2 for value in (1.0, 2.0)]
    torch.testing.assert_close(found.by_entry[0, ::2], torch.tensor(exact).double())

"""Priors by hand: where a VampPrior starts, what one component is, what is saved; products."""

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.parts.posteriors import product
from pyro_vae.parts.priors import StandardNormal

BYTES = torch.tensor([[0, 51, 255], [102, 0, 204], [255, 153, 0]], dtype=torch.uint8)


def encoder(width=3):
    torch.manual_seed(0)
    return pv.VAE.mlp((width,), latent_dim=2, hidden=(4,)).encoder


def starts(x, **options):
    """The rows that pseudo-inputs start at, sorted."""
    prior = pv.VampPrior.of_data(encoder(x.shape[1]), x, **options)
    return sorted(prior.pseudo_inputs[0].tolist())


def test_pseudo_inputs_start_at_each_row_once():
    x = torch.rand(7, 3)
    assert starts(x) == sorted(x.tolist())
    few = starts(x, components=4)
    assert len(few) == len({tuple(row) for row in few}) == 4
    assert all(row in x.tolist() for row in few)
    assert few == starts(x, components=4)
    assert few != starts(x, components=4, seed=1)


def test_intensities_in_bytes_become_floats_and_others_stay():
    as_floats = sorted((BYTES.double() / 255).float().tolist())
    assert starts(BYTES) == [pytest.approx(row) for row in as_floats]
    assert starts(BYTES, whole=True) == sorted(BYTES.float().tolist())
    assert starts((BYTES > 100).to(torch.uint8)) == sorted((BYTES > 100).float().tolist())
    assert starts(BYTES[:1] // 127) == [pytest.approx([0.0, 0.0, 2 / 255])]
    assert starts(BYTES.float()) == sorted(BYTES.float().tolist())
    assert starts(BYTES.long()) == sorted(BYTES.float().tolist())


def test_there_are_five_hundred_pseudo_inputs_but_at_most_one_for_each_row():
    x = torch.rand(502, 3)
    assert pv.VampPrior.of_data(encoder(), x).components == 500
    assert pv.VampPrior.of_data(encoder(), x[:499]).components == 499
    assert pv.VampPrior(encoder(), 3).components == 500
    pv.VampPrior.of_data(encoder(), x, components=502)
    with pytest.raises(pv.UsageError):
        pv.VampPrior.of_data(encoder(), x, components=503)


def test_a_vamp_prior_is_the_mean_of_its_posteriors():
    x, z = torch.rand(4, 3), torch.randn(6, 2)
    for components in (1, 4):
        prior = pv.VampPrior.of_data(encoder(), x[:components])
        each = prior.encoder(x[:components]).log_prob(z[:, None])
        torch.testing.assert_close(prior().log_prob(z), each.exp().mean(1).log())


@pytest.mark.parametrize("components", [1, 3])
def test_a_gaussian_mixture_is_its_weighed_sum(components):
    torch.manual_seed(0)
    prior = pv.GaussianMixture(2, components).double()
    nn.init.normal_(prior.logits)
    nn.init.normal_(prior.raw_scales)
    scales = prior().component_distribution.base_dist.scale
    z = torch.randn(6, 2).double()
    each = dist.Normal(prior.means, scales).log_prob(z[:, None]).sum(-1).exp()
    torch.testing.assert_close(prior().log_prob(z).exp(), each @ prior.logits.softmax(0))


@pytest.mark.parametrize("make", [pv.GaussianMixture, lambda d, c: pv.VampPrior(encoder(), 3, c)])
def test_no_components_are_refused(make):
    for components in (0, -1):
        with pytest.raises(pv.UsageError):
            make(2, components)


@pytest.mark.parametrize("make", [StandardNormal, pv.FlowPrior])
def test_what_is_constant_is_not_saved(make):
    prior = make(3)
    names = set(dict(prior.named_parameters()))
    assert "zero" not in prior.state_dict()
    assert names <= set(prior.state_dict())


def test_a_product_of_normals_by_hand():
    """N(1, 0.5^2) N(-2, 2^2): precisions 4 and 1/4, so the mean is (4 - 0.5) / 4.25."""
    one = dist.Normal(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 3.0])).to_event(1)
    two = dist.Normal(torch.tensor([-2.0, 5.0]), torch.tensor([2.0, 3.0])).to_event(1)
    for found in (product(one, two), product(two, one)):
        assert found.mean.tolist() == pytest.approx([3.5 / 4.25, 2.5])
        assert found.variance.tolist() == pytest.approx([1 / 4.25, 4.5])
        assert found.event_shape == (2,)
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    apart = one.log_prob(z) + two.log_prob(z) - product(one, two).log_prob(z)
    torch.testing.assert_close(apart, apart[:1].expand(5))  # the constant of normalization alone

"""Where families stop: scales, means and degrees of freedom of a network that says +-1e9."""

import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.parts.distributions import LevelLogistic


def of(family, raw, part, shape=(1,)):
    """A parameter of the distribution that a family makes of these outputs."""
    fn = family(torch.tensor([raw], dtype=torch.float64), shape)
    return getattr(fn.base_dist, part).detach().flatten()[0].item()


FAR = 1e9
BOUNDED = {
    "a predicted Gaussian scale": (pv.Gaussian, 2, "scale", 1e-3, 1e3),
    "the scale of Student's t": (lambda: pv.StudentT(3.0), 2, "scale", 1e-3, 1e3),
    "predicted degrees of freedom": (pv.StudentT, 3, "df", 1.01, 1001),
    "the scale of a logistic": (pv.DiscretizedLogistic, 2, "scale", 1e-3, 10),
    "the mean of a Poisson": (pv.Poisson, 1, "rate", 1e-6, 1e8),
    "the mean of a negative binomial": (pv.NegativeBinomial, 1, "mean", 1e-6, 1e8),
    "its inverse dispersion": (pv.NegativeBinomial, 2, "total_count", 1e-4, 1e4),
    "the scale of a posterior": (pv.DiagonalNormal, 2, "scale", 1e-4, 10),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_a_family_levels_off_at_its_default_bounds(name):
    make, place, part, low, high = BOUNDED[name]
    family = make()
    width = family.outputs((1,))
    for far, bound in ((-FAR, low), (FAR, high)):
        raw = [0.0] * width
        raw[place - 1] = far
        assert of(family, raw, part) == pytest.approx(bound, rel=1e-6)


@pytest.mark.parametrize("name", BOUNDED)
def test_the_output_of_an_untrained_network_is_well_inside(name):
    """At 0 the scales are 1, but a tenth for levels; means are 1 and degrees of freedom 4."""
    make, _, part, *_ = BOUNDED[name]
    family = make()
    start = {"df": 4.0}.get(part, 0.1 if make is pv.DiscretizedLogistic else 1.0)
    assert of(family, [0.0] * family.outputs((1,)), part) == pytest.approx(start, rel=1e-6)


@pytest.mark.parametrize(("far", "bound"), [(-FAR, 1.01), (FAR, 1001.0)])
def test_learned_degrees_of_freedom_level_off(far, bound):
    family = pv.StudentT(learned=True)
    assert of(family, [0.0, 0.0], "df") == pytest.approx(4.0)  # where they start
    nn.init.constant_(family.raw_excess, far)
    assert of(family, [0.0, 0.0], "df") == pytest.approx(bound)


@pytest.mark.parametrize(("far", "bound"), [(-FAR, 1e-3), (FAR, 1e3)])
def test_a_learned_gaussian_scale_levels_off(far, bound):
    family = pv.Gaussian(learned=True)
    assert of(family, [0.0], "scale") == pytest.approx(1.0)  # where it starts
    nn.init.constant_(family.raw_scale, far)
    assert of(family, [0.0], "scale") == pytest.approx(bound)


@pytest.mark.parametrize(
    ("make", "lowest", "highest"),
    [(lambda s: pv.Gaussian(s), 1e-3, 1e3), (lambda f: pv.StudentT(f), 1.01, 1001)],
)
def test_what_is_fixed_lies_strictly_within_the_bounds(make, lowest, highest):
    for outside in (lowest, highest, 0.9 * lowest, 1.1 * highest):
        with pytest.raises(pv.UsageError):
            make(outside)
    for inside in (1.001 * lowest, 0.999 * highest):
        make(inside)


@pytest.mark.parametrize(("far", "bound"), [(-FAR, 1e-4), (FAR, 10.0)])
def test_scales_of_all_posterior_families_level_off(far, bound):
    full = pv.FullRankNormal()(torch.tensor([[0.0, 0, far, far, 0]]).double(), (2,))
    assert full.scale_tril.diagonal(dim1=-2, dim2=-1)[0].tolist() == pytest.approx([bound] * 2)
    low = pv.LowRankNormal(1)(torch.tensor([[0.0, 0, far, far, 0, 0]]).double(), (2,))
    assert low.variance[0].tolist() == pytest.approx([bound**2] * 2)
    torch.manual_seed(0)
    flow = pv.FlowPosterior(2, context_dim=0).double()
    spread = flow(torch.tensor([[0.0, 0, far, far]]).double(), (2,)).rsample((4000,)).std(0)
    assert spread[0].tolist() == pytest.approx([bound] * 2, rel=0.1)


@pytest.mark.parametrize(("far", "bound"), [(-FAR, 1e-2), (FAR, 1e2)])
def test_scales_of_a_mixture_prior_level_off(far, bound):
    prior = pv.GaussianMixture(2, 3)
    assert prior().component_distribution.base_dist.scale.unique().tolist() == [1.0]
    nn.init.constant_(prior.raw_scales, far)
    scale = prior().component_distribution.base_dist.scale
    assert scale.unique().item() == pytest.approx(bound)


@pytest.mark.parametrize("components", [1, 2, 4, 5])
def test_any_number_of_logistics_is_their_weighed_sum(components):
    """Of a network's outputs: logits, then locations, then scales; locations share the range."""
    torch.manual_seed(0)
    family, levels = pv.DiscretizedLogistic(8, components=components), 8
    grid = torch.arange(levels).double() / (levels - 1)
    if components == 1:
        raw = torch.randn(2).double()
        (loc, scale), logits = raw[:, None], torch.zeros(1).double()
    else:
        raw = torch.randn(3 * components).double()
        logits, loc, scale = raw.view(3, components)
    start = (torch.arange(components) + 0.5) / components
    found = family(raw.expand(levels, -1), (1,)).log_prob(grid[:, None]).exp()
    scales = torch.stack(
        [
            torch.tensor(of(pv.DiscretizedLogistic(8), [0.0, float(s)], "scale")).double()
            for s in scale
        ]
    )
    parts = LevelLogistic(loc + start, scales, levels).log_prob(grid[:, None]).exp()
    torch.testing.assert_close(found, parts @ logits.softmax(0), rtol=1e-6, atol=1e-12)

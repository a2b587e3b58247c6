"""Likelihoods: densities, means, draws."""

from itertools import product
from math import prod

import numpy as np
import pytest
import scipy.stats
import torch
from pairs import CONTINUOUS, DISCRETE, EVERY, FAMILIES
from torch import nn

import pyro_vae as pv
from pyro_vae.parts.distributions import LevelCategorical, LevelLogistic

SPREADS = (1.0, 10.0, 1e3)


def outputs(family, shape, spread, n=8, dtype=torch.float64):
    """Network outputs: random; or for a spread of 1000, all signs of very large outputs."""
    generator = torch.Generator().manual_seed(7)
    raw = torch.randn(n, family.outputs(shape), generator=generator, dtype=torch.float64)
    return ((raw.sign() if spread >= 100 else raw) * spread).to(dtype)


def grid(levels, dims):
    """All vectors of levels, of shape (levels ** dims, dims)."""
    points = [k / (levels - 1) for k in range(levels)]
    return torch.tensor(list(product(points, repeat=dims)), dtype=torch.float64)


def composite(edges):
    """Nodes and weights of 20-point Gauss-Legendre quadrature between adjacent edges."""
    node, weight = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(20))
    edges = torch.as_tensor(edges)
    half, middle = edges.diff()[:, None] / 2, (edges[1:] + edges[:-1])[:, None] / 2
    return (middle + half * node).flatten(), (half * weight).flatten()


def quadrature(fn):
    """Nodes and weights of shape (nodes, *batch) over the support of a distribution of scalars."""
    if fn.support.base_constraint is torch.distributions.constraints.unit_interval:
        near = np.concatenate([[0.0], np.geomspace(1e-7, 0.5, 40)])
        x, weight = composite(np.concatenate([near, 1 - near[-2::-1]]))
        return x[:, None, None], weight[:, None, None]
    loc, scale = fn.base_dist.loc, fn.base_dist.scale
    t, weight = composite(np.linspace(-12, 12, 25))
    return loc + scale * t[:, None, None], scale * weight[:, None, None]


@pytest.mark.parametrize("name", DISCRETE)
@pytest.mark.parametrize("spread", SPREADS)
def test_probabilities_of_all_data_sum_to_one(name, spread):
    make, levels = DISCRETE[name]
    family, shape = make(), (1, 2, 2)
    fn = family(outputs(family, shape, spread), shape)
    x = grid(levels, 4).reshape(-1, 1, 1, 2, 2)
    torch.testing.assert_close(
        fn.log_prob(x).exp().sum(0), torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("family", [pv.Categorical(256), pv.DiscretizedLogistic(256)])
@pytest.mark.parametrize("spread", SPREADS)
def test_probabilities_of_256_levels_sum_to_one(family, spread):
    fn = family(outputs(family, (1,), spread), (1,))
    total = fn.log_prob(grid(256, 1)[:, None]).exp().sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("spread", SPREADS)
def test_densities_integrate_to_one(name, spread):
    family = CONTINUOUS[name]()
    fn = family(outputs(family, (1,), spread), (1,))
    x, weight = quadrature(fn)
    total = (fn.log_prob(x).exp() * weight[..., 0]).sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)


@pytest.mark.parametrize("spread", [0.01, 1.0, 10.0, 20.0, 100.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_continuous_bernoulli_is_a_truncated_exponential(spread, dtype):
    """p(x) = l exp(l x) / (exp(l) - 1), whose mean is 1 / (1 - exp(-l)) - 1 / l."""
    logits = torch.tensor([spread, -spread, spread / 3, -spread / 3], dtype=dtype)
    fn = pv.ContinuousBernoulli()(logits[:, None], (1,))
    size = logits.double().abs()
    x = torch.linspace(0, 1, 9, dtype=dtype)[:, None]
    from_end = torch.where(logits > 0, 1 - x.double(), x.double())
    expected = size.log() - size * from_end - torch.log(-torch.expm1(-size))
    tolerance = 1e-3 if dtype is torch.float32 else 1e-6
    found = fn.log_prob(x[..., None]).double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=tolerance)
    mean = 1 / (-torch.expm1(-size)) - 1 / size
    mean = torch.where(logits > 0, mean, 1 - mean)
    torch.testing.assert_close(fn.mean[:, 0].double(), mean, rtol=0, atol=tolerance)


@pytest.mark.parametrize("logit", [0.0, 1e-3, -0.3, 5.0])
def test_slope_of_the_continuous_bernoulli_is_x_less_its_mean(logit):
    logits = torch.full((5, 1), logit, dtype=torch.float64, requires_grad=True)
    fn = pv.ContinuousBernoulli()(logits, (1,))
    x = torch.linspace(0, 1, 5, dtype=torch.float64)[:, None]
    (slope,) = torch.autograd.grad(fn.log_prob(x).sum(), logits)
    torch.testing.assert_close(slope, x - fn.mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("spread", SPREADS)
def test_mean_is_the_sum_of_x_times_its_probability(name, spread):
    family = FAMILIES[name]()
    fn = family(outputs(family, (1,), spread), (1,))
    if name in DISCRETE:
        x = grid(DISCRETE[name][1], 1)[:, None]
        weight = torch.ones_like(x)
    else:
        x, weight = quadrature(fn)
    expected = (x[..., 0] * fn.log_prob(x).exp() * weight[..., 0]).sum(0)
    torch.testing.assert_close(fn.mean[:, 0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_samples_have_the_mean(name, spread):
    torch.manual_seed(0)
    family, shape, n = FAMILIES[name](), (1, 3), 10_000
    fn = family(outputs(family, shape, spread, n=4), shape)
    draws = fn.sample((n,))
    assert draws.shape == (n, 4, 1, 3)
    assert bool(fn.support.check(draws).all())
    # 1/n covers the variance of a level that is too rare to be drawn.
    error = ((draws.var(0) + 1 / n) / n).sqrt()
    assert float(((draws.mean(0) - fn.mean).abs() / error).max()) < 5


@pytest.mark.parametrize("name", DISCRETE)
def test_samples_have_the_probabilities(name):
    torch.manual_seed(1)
    (make, levels), n = DISCRETE[name], 10_000
    family = make()
    fn = family(outputs(family, (1,), 1.0), (1,))
    x = grid(levels, 1)
    probability = fn.log_prob(x[:, None]).exp()
    draws = fn.sample((n,))[..., 0]
    frequency = torch.stack([(draws - value).abs().lt(1e-9).double().mean(0) for value in x[:, 0]])
    error = (probability * (1 - probability) / n).sqrt() + 1 / n
    assert float(((frequency - probability).abs() / error).max()) < 5


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("spread", [0.3, 4.0])
def test_samples_have_the_mean_square(name, spread):
    torch.manual_seed(17)
    family, n = CONTINUOUS[name](), 10_000
    fn = family(outputs(family, (1,), spread), (1,))
    x, weight = quadrature(fn)
    expected = (x.square() * (fn.log_prob(x).exp()[..., None] * weight)).sum(0).detach()
    squares = fn.sample((n,)).square()
    error = (squares.var(0) / n).sqrt()
    assert float(((squares.mean(0) - expected).abs() / error).max()) < 5


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_of_extreme_outputs_lie_in_the_support(name, dtype):
    torch.manual_seed(2)
    family = EVERY[name]().to(dtype)
    fn = family(outputs(family, (3,), 1e3, dtype=dtype), (3,))
    draws = fn.sample((1000,))
    assert bool(torch.isfinite(draws).all())
    assert bool(fn.support.check(draws).all())


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [1.0, 1e3])
def test_log_density_and_gradient_are_finite(name, dtype, spread):
    family = EVERY[name]().to(dtype)
    every_sign = torch.tensor(
        list(product((-spread, 0.0, spread), repeat=min(family.outputs((1,)), 5))), dtype=dtype
    )
    raw = every_sign.repeat(1, 2)[:, : family.outputs((1,))].requires_grad_()
    levels = DISCRETE[name][1] if name in DISCRETE else 5
    log_prob = family(raw, (1,)).log_prob(grid(levels, 1).to(dtype)[:, None])
    (gradient,) = torch.autograd.grad(log_prob.sum(), raw)
    assert bool(torch.isfinite(log_prob).all())
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("name", EVERY)
def test_gradient_is_the_slope(name):
    family, shape = EVERY[name](), (2,)
    raw = outputs(family, shape, 1.0, n=1).requires_grad_()
    x = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda r: family(r, shape).log_prob(x), (raw,))


@pytest.mark.parametrize("name", EVERY)
def test_single_precision_agrees_with_double(name):
    family, shape = EVERY[name](), (2, 3)
    raw = outputs(family, shape, 1.0)
    x = torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    expected = family(raw, shape).log_prob(x)
    found = family.float()(raw.float(), shape).log_prob(x.float())
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_elements_are_independent_and_outputs_are_in_pieces(name):
    """The first outputs of all elements precede the second outputs of all elements."""
    family, shape = EVERY[name](), (3, 1, 2)
    dims = prod(shape)
    pieces = family.outputs(shape) // dims
    assert family.outputs(shape) == pieces * dims
    raw = outputs(family, shape, 1.0, n=5)
    fn = family(raw, shape)
    assert fn.batch_shape == (5,)
    assert fn.event_shape == shape
    x = fn.sample()
    each = [
        family(raw[:, d::dims], (1,)).log_prob(x.reshape(5, dims)[:, d : d + 1])
        for d in range(dims)
    ]
    torch.testing.assert_close(fn.log_prob(x), torch.stack(each).sum(0))


@pytest.mark.parametrize("name", EVERY)
def test_expand_keeps_the_log_density(name):
    family, shape = EVERY[name](), (2, 2)
    fn = family(outputs(family, shape, 1.0, n=3), shape)
    wide = fn.expand(torch.Size((4, 3)))
    assert wide.batch_shape == (4, 3)
    assert wide.event_shape == shape
    torch.manual_seed(3)
    x = wide.sample()
    assert x.shape == (4, 3, 2, 2)
    expected = torch.stack([fn.log_prob(part) for part in x])
    torch.testing.assert_close(wide.log_prob(x), expected)
    # Tokens have a mode but not a mean.
    torch.testing.assert_close(wide.mean, fn.mean.expand(4, 3, 2, 2), equal_nan=name == "tokens")
    # One value for a whole batch, and several values for one batch.
    torch.testing.assert_close(fn.log_prob(x[0, 0])[0], expected[0, 0])
    torch.testing.assert_close(fn.log_prob(x), expected)


def test_level_distributions_expand_by_themselves():
    torch.manual_seed(4)
    logits = torch.randn(3, 1, 7, dtype=torch.float64)
    loc, scale = torch.randn(2, 3, 1, dtype=torch.float64)
    for fn in (LevelCategorical(logits), LevelLogistic(loc, scale.exp(), 7)):
        wide = fn.expand(torch.Size((2, 3, 5)))
        assert wide.batch_shape == (2, 3, 5)
        x = wide.sample((6,))
        assert x.shape == (6, 2, 3, 5)
        assert bool(wide.support.check(x).all())
        torch.testing.assert_close(wide.log_prob(x), fn.log_prob(x))
        torch.testing.assert_close(wide.mean, fn.mean.expand(2, 3, 5))


@pytest.mark.parametrize("levels", [2, 7, 256])
def test_support_is_the_grid_of_levels(levels):
    support = LevelCategorical(torch.zeros(levels)).support
    pixels = torch.arange(levels).float() / (levels - 1)
    assert bool(support.check(pixels).all())
    between = pixels[:-1] + 0.5 / (levels - 1)
    outside = torch.tensor([-1.0 / (levels - 1), 1 + 1.0 / (levels - 1), torch.nan])
    assert not bool(support.check(torch.cat([between, outside])).any())
    assert support.is_discrete


@pytest.mark.parametrize("levels", [2, 4, 256])
@pytest.mark.parametrize("loc", [-0.7, 0.0, 0.31, 0.5, 1.2])
@pytest.mark.parametrize("scale", [0.003, 0.1, 2.0])
def test_discretized_logistic_is_a_difference_of_cdfs(levels, loc, scale):
    fn = LevelLogistic(torch.tensor(loc).double(), torch.tensor(scale).double(), levels)
    x = grid(levels, 1)[:, 0]
    logistic = scipy.stats.logistic(float(fn.loc), float(fn.scale))
    inner = (x[1:].numpy() + x[:-1].numpy()) / 2
    low, high = np.append(-np.inf, inner), np.append(inner, np.inf)
    # Of the cdf and the survival function, the one that is small at the bin keeps its digits.
    expected = np.where(
        low < loc, logistic.cdf(high) - logistic.cdf(low), logistic.sf(low) - logistic.sf(high)
    )
    np.testing.assert_allclose(fn.log_prob(x).exp().numpy(), expected, rtol=1e-9, atol=1e-15)


def test_discretized_logistic_starts_in_the_middle():
    """Outputs of 0 give location 1/2; the first output moves it, and the second sets the scale."""
    raw = torch.tensor([[0.0, 0.0], [0.3, 0.0], [-0.3, 1.0], [0.0, -1.0]]).double()
    fn = pv.DiscretizedLogistic(256)(raw, (1,))
    torch.testing.assert_close(fn.base_dist.loc[:, 0], torch.tensor([0.5, 0.8, 0.2, 0.5]).double())
    scale = fn.base_dist.scale[:, 0]
    assert scale[3] < scale[0] == scale[1] < scale[2]


def test_discretized_logistic_starts_with_a_tenth_of_the_range():
    fn = pv.DiscretizedLogistic(256)(torch.zeros(1, 2).double(), (1,))
    assert fn.base_dist.scale.item() == pytest.approx(0.1, rel=0.01)


def test_bernoulli_is_the_cross_entropy():
    family, shape = pv.Bernoulli(), (2, 3)
    logits = torch.cat([outputs(family, shape, spread) for spread in SPREADS]).reshape(-1, *shape)
    x = grid(2, 6).reshape(-1, 1, *shape)
    found = family(logits.flatten(1), shape).log_prob(x)
    one, none = nn.functional.logsigmoid(logits), nn.functional.logsigmoid(-logits)
    torch.testing.assert_close(found, torch.where(x == 1, one, none).sum((-1, -2)))


def test_a_value_beside_a_level_counts_as_that_level():
    torch.manual_seed(16)
    fn = LevelCategorical(torch.randn(7, dtype=torch.float64))
    x = grid(7, 1)[:, 0]
    for beside in (-1e-4, 1e-4):
        torch.testing.assert_close(fn.log_prob(x + beside), fn.log_prob(x))
    assert fn.log_prob(x).unique().numel() == 7


@pytest.mark.parametrize("levels", [2, 10, 256])
def test_categorical_is_the_cross_entropy(levels):
    torch.manual_seed(5)
    shape = (3, 4, 5)
    family = pv.Categorical(levels)
    raw = 3 * torch.randn(2, family.outputs(shape))
    k = torch.randint(levels, (2, *shape))
    found = family(raw, shape).log_prob(k.float() / (levels - 1))
    logits = raw.reshape(2, levels, *shape)
    expected = -nn.functional.cross_entropy(logits, k, reduction="none").sum((1, 2, 3))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", [pv.Categorical(256), pv.DiscretizedLogistic(256)])
def test_every_8_bit_pixel_finds_its_level(family):
    """Pixels k/255 in single precision have the density of level k in double precision."""
    raw = outputs(family, (1,), 1.0, n=1)
    pixels = torch.arange(256, dtype=torch.uint8)[:, None].float() / 255
    found = family(raw.float(), (1,)).log_prob(pixels)
    expected = family(raw, (1,)).log_prob(grid(256, 1))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "scales"),
    [
        (pv.Gaussian(scale=0.5), [0.5, 0.5]),
        (pv.Gaussian(scale=0.5, learned=True), [0.5, 0.5]),
        (pv.Gaussian(learned=True), [1.0, 1.0]),
        (pv.Gaussian(), [1.0, 1.0]),
    ],
)
def test_gaussian_scales(family, scales):
    raw = torch.zeros(1, family.outputs((2,)), dtype=torch.float64)
    raw[0, 0] = 0.7
    x = np.array([0.1, -0.4])
    expected = scipy.stats.norm([0.7, 0.0], scales).logpdf(x).sum()
    found = family(raw, (2,)).log_prob(torch.from_numpy(x)).item()
    assert found == pytest.approx(expected, abs=1e-6)


def test_learned_gaussian_scale_is_a_bounded_parameter():
    family = pv.Gaussian(scale=0.2, learned=True, bounds=(0.01, 5.0))
    (parameter,) = family.parameters()
    x = torch.tensor([[0.5]], requires_grad=False)
    (slope,) = torch.autograd.grad(family(torch.zeros(1, 1), (1,)).log_prob(x).sum(), parameter)
    assert slope.item() > 0  # the datum lies 2.5 scales from the mean
    for value, scale in ((-1e6, 0.01), (1e6, 5.0)):
        parameter.data.fill_(value)
        fn = family(torch.zeros(1, 1), (1,))
        assert fn.base_dist.scale.item() == pytest.approx(scale, rel=1e-5)

"""Likelihoods, posterior, prior and networks: what holds whatever the network says."""

from itertools import product
from math import log, pi, prod

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.distributions import LevelCategorical, LevelLogistic
from pyro_vae.factors import bounded_scale, unbounded_scale

DISCRETE = {
    "bernoulli": (pv.Bernoulli, 2),
    "categorical": (lambda: pv.Categorical(5), 5),
    "categorical-2": (lambda: pv.Categorical(2), 2),
    "discretized-logistic": (lambda: pv.DiscretizedLogistic(5), 5),
    "discretized-logistic-2": (lambda: pv.DiscretizedLogistic(2), 2),
    "logistic-mixture": (lambda: pv.DiscretizedLogistic(5, components=3), 5),
    "logistic-mixture-2": (lambda: pv.DiscretizedLogistic(2, components=2), 2),
}
CONTINUOUS = {
    "continuous-bernoulli": pv.ContinuousBernoulli,
    "gaussian": pv.Gaussian,
    "gaussian-bounded": lambda: pv.Gaussian(bounds=(0.1, 2.0)),
    "gaussian-fixed": lambda: pv.Gaussian(scale=0.3),
    "gaussian-learned": lambda: pv.Gaussian(scale=0.3, learned=True).double(),
}
FAMILIES = {name: make for name, (make, _) in DISCRETE.items() if name[-2:] != "-2"} | CONTINUOUS
# Held against independent references in test_counts.py; what holds for every family, here.
EVERY = FAMILIES | {
    "tokens": lambda: pv.Categorical(5, tokens=True),
    "student-t": pv.StudentT,
    "student-t-learned": lambda: pv.StudentT(3.0, learned=True).double(),
    "poisson": pv.Poisson,
    "negative-binomial": pv.NegativeBinomial,
    "zero-inflated": lambda: pv.NegativeBinomial(zero_inflated=True),
}
SPREADS = (1.0, 10.0, 1e3)


def outputs(family, shape, spread, n=8, dtype=torch.float64):
    """Network outputs: random, or, for a spread of a thousand, every sign of very large ones."""
    generator = torch.Generator().manual_seed(7)
    raw = torch.randn(n, family.outputs(shape), generator=generator, dtype=torch.float64)
    return ((raw.sign() if spread >= 100 else raw) * spread).to(dtype)


def grid(levels, dims):
    """All vectors of levels, of shape (levels ** dims, dims)."""
    points = [k / (levels - 1) for k in range(levels)]
    return torch.tensor(list(product(points, repeat=dims)), dtype=torch.float64)


def composite(edges):
    """Nodes and weights of 20-point Gauss-Legendre quadrature between each two edges."""
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
    # 1/n is what a level so rare that it is hardly ever drawn may add to the variance.
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
def test_elements_are_independent_and_outputs_come_piece_by_piece(name):
    """The first output of every element comes first, then the second of every element."""
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
    # Tokens have a mode, and no mean.
    torch.testing.assert_close(wide.mean, fn.mean.expand(4, 3, 2, 2), equal_nan=name == "tokens")
    # One value for all of the batch, and one batch for several values.
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
    # Of cdf and survival function the one that is small at the bin loses no digits.
    expected = np.where(
        low < loc, logistic.cdf(high) - logistic.cdf(low), logistic.sf(low) - logistic.sf(high)
    )
    np.testing.assert_allclose(fn.log_prob(x).exp().numpy(), expected, rtol=1e-9, atol=1e-15)


def test_discretized_logistic_starts_in_the_middle():
    """Outputs of zero are a location of a half; the first output moves it, the second the scale."""
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
    """Pixels k/255 in single precision score as level k in double precision."""
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


BOUNDS = [(1e-4, 10.0), (1e-3, 1e3), (0.1, 1.5), (0.9, 50.0)]


@pytest.mark.parametrize(("low", "high"), BOUNDS)
def test_bounded_scale(low, high):
    raw = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    scale = bounded_scale(raw, low, high)
    assert bool((scale.diff() >= 0).all())
    middle = bounded_scale(torch.linspace(-1, 1, 201).double(), low, high)
    assert bool((middle.diff() > 0).all())
    far = bounded_scale(torch.tensor([-1e30, -1e3, 1e3, 1e30]).double(), low, high)
    everywhere = torch.cat([far, scale])
    assert bool((everywhere >= low * (1 - 1e-12)).all())
    assert bool((everywhere <= high * (1 + 1e-12)).all())
    torch.testing.assert_close(far, torch.tensor([low, low, high, high]).double())
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    one = bounded_scale(zero, low, high)
    (slope,) = torch.autograd.grad(one, zero)
    assert one.item() == pytest.approx(1, abs=1e-12)
    assert slope.item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("low", "high"), BOUNDS)
@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 0.8, 0.99])
def test_unbounded_scale_inverts(low, high, fraction):
    scale = low * (high / low) ** fraction
    raw = unbounded_scale(scale, low, high)
    again = bounded_scale(torch.tensor(raw, dtype=torch.float64), low, high)
    assert again.item() == pytest.approx(scale, rel=1e-9)


@pytest.mark.parametrize("shape", [(3,), (2, 2)])
def test_diagonal_normal_by_hand(shape):
    torch.manual_seed(6)
    family, dims = pv.DiagonalNormal(low=0.05, high=4.0), prod(shape)
    raw = 2 * torch.randn(5, family.outputs(shape), dtype=torch.float64)
    q = family(raw, shape)
    assert q.has_rsample
    loc, scale = raw[:, :dims], bounded_scale(raw[:, dims:], 0.05, 4.0)
    z = torch.randn(5, *shape, dtype=torch.float64)
    normal = torch.distributions.Normal(loc, scale)
    torch.testing.assert_close(q.log_prob(z), normal.log_prob(z.reshape(5, dims)).sum(1))
    torch.testing.assert_close(q.mean, loc.reshape(5, *shape))
    torch.testing.assert_close(q.variance, scale.square().reshape(5, *shape))


def test_prior_is_a_standard_normal():
    prior = pv.StandardNormal(3).double()
    p = prior(torch.ones(5, 2), torch.zeros(5))
    z = torch.tensor([[0.3, -2.0, 1.1], [0.0, 0.0, 0.0]], dtype=torch.float64)
    expected = -0.5 * z.square().sum(1) - 1.5 * log(2 * pi)
    torch.testing.assert_close(p.log_prob(z), expected)
    assert p.sample().dtype is torch.float64
    assert not prior.state_dict()
    torch.manual_seed(8)
    draws = p.sample((20_000,))
    assert float(draws.mean(0).abs().max()) < 5 / 20_000**0.5
    assert float((draws.var(0) - 1).abs().max()) < 5 * (2 / 20_000) ** 0.5


def test_kl_of_posterior_and_prior():
    torch.manual_seed(9)
    raw = torch.randn(4, 6, dtype=torch.float64)
    q, p = pv.DiagonalNormal()(raw, (3,)), pv.StandardNormal(3).double()()
    mean, scale = raw[:, :3], bounded_scale(raw[:, 3:], 1e-4, 10.0)
    expected = 0.5 * (mean.square() + scale.square() - 1 - 2 * scale.log()).sum(1)
    torch.testing.assert_close(torch.distributions.kl_divergence(q, p), expected)


def test_mlp_is_its_layers_in_order():
    torch.manual_seed(10)
    network = pv.MLP([(2, 3), 4], (5, 7), 6, nn.Tanh)
    a, b = torch.randn(8, 2, 3), torch.randn(8, 4)
    first, second, last = (layer for layer in network.layers if isinstance(layer, nn.Linear))
    hidden = torch.tanh(first(torch.cat([a.reshape(8, 6), b], 1)))
    torch.testing.assert_close(network(a, b), last(torch.tanh(second(hidden))))
    linear = pv.MLP(3, (), 2)
    slope, offset = linear.layers[0].weight, linear.layers[0].bias
    x = torch.randn(4, 3)
    torch.testing.assert_close(linear(x), x @ slope.T + offset)


NETWORKS = {
    "mlp": (lambda: pv.MLP([3, 2], (8,), 4), (3,)),
    "conv-decoder": (lambda: pv.ConvDecoder([3, 2], (8,), (4, 3), (2, 5, 8)), (3,)),
    "conv-encoder": (lambda: pv.ConvEncoder([(2, 5, 8), 2], (3, 4), (8,), 6), (2, 5, 8)),
    "residual-decoder": (lambda: pv.ConvDecoder([3, 2], (8,), (4, 3), (2, 5, 8), blocks=1), (3,)),
    "residual-encoder": (
        lambda: pv.ConvEncoder([(2, 5, 8), 2], (3, 4), (8,), 6, blocks=2),
        (2, 5, 8),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_leading_dimensions_broadcast(name):
    torch.manual_seed(11)
    make, shape = NETWORKS[name]
    network = make()
    wide, context = torch.randn(4, 5, *shape), torch.randn(5, 2)
    expected = torch.stack([network(part, context) for part in wide])
    torch.testing.assert_close(network(wide, context), expected)
    row = torch.stack([network(wide[0, i : i + 1], context[i : i + 1])[0] for i in range(5)])
    torch.testing.assert_close(expected[0], row)
    # Samples of the context around one batch of the first input, and one row without a batch.
    contexts = torch.randn(4, 5, 2)
    expected = torch.stack([network(wide[0], part) for part in contexts])
    torch.testing.assert_close(network(wide[0], contexts), expected)
    torch.testing.assert_close(network(wide[0, 0], contexts[0, 0]), expected[0, 0])


def test_a_factor_scores_samples_by_batch():
    torch.manual_seed(12)
    network = pv.MLP([3, 2], (8,), 12)
    decoder = pv.Factor(network, pv.Bernoulli(), (3, 2, 2))
    z, context = torch.randn(4, 5, 3), torch.randn(5, 2)
    x = torch.rand(5, 3, 2, 2).round()
    expected = torch.stack([decoder(part, context).log_prob(x) for part in z])
    assert expected.shape == (4, 5)
    torch.testing.assert_close(decoder(z, context).log_prob(x), expected)


IMAGES = [(1, 1), (1, 2), (2, 2), (3, 3), (5, 8), (8, 8), (28, 28), (17, 30)]


@pytest.mark.parametrize("size", IMAGES)
@pytest.mark.parametrize("channels", [(4,), (4, 3), (4, 3, 2)])
def test_conv_encoder_sees_every_pixel(size, channels):
    torch.manual_seed(13)
    network = pv.ConvEncoder([(2, *size)], channels, (8,), 5, nn.Tanh)
    image = torch.randn(3, 2, *size, requires_grad=True)
    found = network(image)
    assert found.shape == (3, 5)
    (gradient,) = torch.autograd.grad(found[0].sum(), image)
    assert bool((gradient[0] != 0).all())
    assert bool((gradient[1:] == 0).all())


@pytest.mark.parametrize("size", IMAGES)
@pytest.mark.parametrize("channels", [(4,), (4, 3), (4, 3, 2)])
def test_conv_decoder_paints_every_pixel(size, channels):
    torch.manual_seed(14)
    network = pv.ConvDecoder(3, (8,), channels, (2, *size), nn.Tanh)
    found = network(torch.randn(6, 3))
    assert found.shape == (6, 2 * prod(size))
    assert bool((found.std(0) > 0).all())


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8)])
def test_a_gradient_reaches_every_parameter_of_residual_networks(size):
    torch.manual_seed(18)
    encoder = pv.ConvEncoder([(2, *size), (1, 3, 4)], (4, 3), (8,), 3, nn.Tanh, blocks=1)
    decoder = pv.ConvDecoder([3, (1, 3, 4)], (8,), (3, 4), (2, *size), nn.Tanh, blocks=2)
    context = torch.randn(6, 1, 3, 4)
    found = decoder(encoder(torch.randn(6, 2, *size), context), context)
    assert found.shape == (6, 2 * prod(size))
    found.square().sum().backward()
    for name, parameter in [*encoder.named_parameters(), *decoder.named_parameters()]:
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name


def test_a_residual_block_is_the_identity_and_what_its_last_convolution_adds():
    torch.manual_seed(19)
    block, x = pv.ResidualBlock(4).double(), torch.randn(3, 4, 5, 7).double()
    last = block.layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.arange(4.0))
    torch.testing.assert_close(block(x), x + torch.arange(4.0)[:, None, None])


def test_a_residual_block_normalises_row_by_row():
    torch.manual_seed(20)
    block, x = pv.ResidualBlock(4), torch.randn(3, 4, 5, 7)
    assert not torch.allclose(block(x), x)
    alone = block(x[:1])
    torch.testing.assert_close(block(torch.cat([x[:1], 100 * x[1:]]))[:1], alone)
    # The difference is of the normalised image: its size and level do not matter to it.
    wide = 50 * x + 7
    torch.testing.assert_close(block(wide) - wide, block(x) - x, rtol=1e-3, atol=1e-3)


def test_images_of_the_context_go_through_convolutions_of_their_own():
    torch.manual_seed(21)
    shapes, inputs = [(2, 5, 8), 3, (1, 9, 2)], [torch.randn(4, 2, 5, 8), torch.randn(4, 3)]
    network, context = pv.ConvEncoder(shapes, (3, 4), (8,), 6), torch.randn(4, 1, 9, 2)
    first, second = network.layers.images
    expected = network.head(first(inputs[0]), inputs[1], second(context))
    torch.testing.assert_close(network(*inputs, context), expected)
    assert second(context).shape == (4, 4, 3, 1)
    decoder = pv.ConvDecoder([3, (1, 9, 2)], (8,), (4, 3), (2, 5, 8), nn.Tanh)
    torch.testing.assert_close(decoder.context.shapes, [(3,), (4, 3, 1)])
    moved = context.clone()
    moved[0] += 1
    change = (decoder(inputs[1], moved) != decoder(inputs[1], context)).any(1)
    assert change.tolist() == [True, False, False, False]


def test_conv_decoder_gives_channels_first_pieces_outermost():
    torch.manual_seed(15)
    network, shape = pv.ConvDecoder(3, (8,), (4, 3), (4, 5, 8)), (2, 5, 8)
    z = torch.randn(6, 3)
    raw = network.layers(network.head(z).reshape(6, *network.small))
    fn = pv.Factor(network, pv.Gaussian(), shape)(z)
    torch.testing.assert_close(fn.base_dist.loc, raw[:, :2])
    torch.testing.assert_close(fn.base_dist.scale, bounded_scale(raw[:, 2:], 1e-3, 1e3))


WRONG = [
    ("mlp", [(5, 4), (5, 2)], r"shape \(\.\.\., 3\).*\(5, 4\)"),
    ("mlp", [(5, 3), (5, 3)], r"shape \(\.\.\., 2\).*\(5, 3\)"),
    ("mlp", [(5, 3)], "takes 2 inputs, 1 came"),
    ("mlp", [(), (5, 2)], r"shape \(\.\.\., 3\)"),
    ("conv-decoder", [(5, 4), (5, 2)], r"shape \(\.\.\., 3\).*\(5, 4\)"),
    ("conv-encoder", [(4, 2, 5, 8)], "takes 2 inputs, 1 came"),
    ("conv-encoder", [(4, 2, 5, 8), (4, 3)], r"shape \(\.\.\., 2\).*\(4, 3\)"),
    ("conv-encoder", [(4, 5, 8, 2), (4, 2)], r"2, 5, 8.*\(4, 5, 8, 2\)"),
    ("conv-encoder", [(4, 1, 5, 8), (4, 2)], r"2, 5, 8.*\(4, 1, 5, 8\)"),
    ("conv-encoder", [(4, 2, 4, 8), (4, 2)], r"2, 5, 8.*\(4, 2, 4, 8\)"),
    ("conv-encoder", [(5, 8), (2,)], r"2, 5, 8.*\(5, 8\)"),
]


@pytest.mark.parametrize(("name", "shapes", "message"), WRONG)
def test_wrong_inputs_are_named_in_one_line(name, shapes, message):
    network = NETWORKS[name][0]()
    with pytest.raises(ValueError, match=message) as caught:
        network(*(torch.zeros(shape) for shape in shapes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", EVERY)
def test_a_network_of_the_wrong_width_is_named_in_one_line(name):
    family = EVERY[name]()
    right = family.outputs((3,))
    factor = pv.Factor(pv.MLP(2, (), right + 1), family, (3,))
    with pytest.raises(
        pv.UsageError, match=f"needs {right} network outputs, {right + 1} came"
    ) as e:
        factor(torch.zeros(5, 2))
    assert "\n" not in str(e.value)
    assert type(family).__name__ in str(e.value)

"""Counts, tokens and Student's t compared with scipy, and the preparation of such data."""

from math import pi

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.cli.make_pair import make_pair
from pyro_vae.cli.options import Model
from pyro_vae.data.preparation import preparation
from pyro_vae.data.sources import source
from pyro_vae.data.split import Data, Split
from pyro_vae.pairs.rng import seeded
from pyro_vae.parts.factors import bounded_scale

FAMILIES = {
    "poisson": pv.Poisson,
    "negative-binomial": pv.NegativeBinomial,
    "zero-inflated": lambda **options: pv.NegativeBinomial(zero_inflated=True, **options),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def outputs(family, dims, n=4, seed=0):
    with seeded(seed):
        return torch.randn(n, family.outputs((dims,)), dtype=torch.float64)


def reference(name, raw, mean, x):
    """log p of each element from scipy, given network outputs (n, pieces * d) and means (n, d)."""
    _, *rest = raw.unflatten(-1, (-1, mean.shape[-1])).unbind(-2)
    m, x = mean.numpy(), np.asarray(x)
    if name == "poisson":
        return scipy.stats.poisson(m).logpmf(x)
    r = bounded_scale(rest[0], 1e-4, 1e4).numpy()
    counts = scipy.stats.nbinom(r, r / (r + m)).logpmf(x)
    if name == "negative-binomial":
        return counts
    g = torch.sigmoid(rest[1]).numpy()
    return np.log(np.where(x == 0, g, 0) + (1 - g) * np.exp(counts))


@every_family
def test_counts_are_those_of_scipy(name):
    family = FAMILIES[name]()
    raw, x = outputs(family, 3), torch.tensor([[0, 1, 7], [3, 0, 0], [40, 2, 1], [0, 0, 900]])
    mean = bounded_scale(raw[:, :3], 1e-6, 1e8)
    found = family(raw, (3,)).log_prob(x.double())
    expected = reference(name, raw, mean, x).sum(-1)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


@every_family
def test_means_are_shares_of_the_library_size(name):
    family = FAMILIES[name](library_size=True)
    raw, x = outputs(family, 6), torch.arange(24).reshape(4, 2, 3)
    library = torch.tensor([[15.0], [51.0], [87.0], [1.0]]).double()
    mean = library * raw[:, :6].softmax(-1)
    fn = family(raw, (2, 3), library.log())
    expected = reference(name, raw, mean, x.flatten(1)).sum(-1)
    torch.testing.assert_close(
        fn.log_prob(x.double()), torch.from_numpy(expected), rtol=1e-6, atol=0
    )
    if name != "zero-inflated":
        torch.testing.assert_close(fn.mean.sum((1, 2)), library[:, 0])
    wide = family(raw.expand(5, 4, -1), (2, 3), library.log())  # a plate of samples
    torch.testing.assert_close(wide.log_prob(x.double()), fn.log_prob(x.double()).expand(5, 4))


@every_family
def test_probabilities_of_counts_sum_to_one_and_give_the_mean(name):
    family = FAMILIES[name]()
    fn = family(outputs(family, 1, n=8), (1,))
    x = torch.arange(3000.0).double()
    p = fn.log_prob(x[:, None, None]).exp()
    torch.testing.assert_close(p.sum(0), torch.ones(8).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close((x[:, None] * p).sum(0), fn.mean[:, 0], rtol=0, atol=1e-6)


@every_family
def test_counts_drawn_have_the_probabilities(name):
    family, n = FAMILIES[name](), 10_000
    fn = family(outputs(family, 1, n=5), (1,))
    with seeded(3):
        draws = fn.sample((n,))[..., 0]
    for k in range(4):
        p = fn.log_prob(torch.full((5, 1), float(k)).double()).exp()
        error = (p * (1 - p) / n).sqrt()
        assert bool(((draws == k).double().mean(0) - p).abs().lt(5 * error).all())


@every_family
@pytest.mark.parametrize("library", [None, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_and_gradients_are_finite_at_extremes(name, library, dtype):
    family = FAMILIES[name](library_size=library is not None)
    pieces = family.outputs((1,))
    signs = torch.cartesian_prod(*[torch.tensor([-1e4, 0.0, 1e4])] * pieces).reshape(-1, pieces, 1)
    # With a second element, shares of the library can also be extreme.
    raw = torch.cat([signs, -signs], -1).flatten(1).to(dtype).requires_grad_()
    context = () if library is None else (torch.tensor([[library]], dtype=dtype).log(),)
    for x in (0.0, 1.0, 1e6):
        log_prob = family(raw, (2,), *context).log_prob(torch.tensor([x, 0.0], dtype=dtype))
        (gradient,) = torch.autograd.grad(log_prob.sum(), raw)
        assert bool(torch.isfinite(log_prob).all())
        assert bool(torch.isfinite(gradient).all())


@every_family
def test_single_precision_keeps_the_digits_of_large_counts(name):
    family = FAMILIES[name](library_size=True)
    raw, log_library = outputs(family, 2), torch.tensor([[2e6]]).double().log()
    x = (log_library.exp() * raw[:, :2].softmax(-1)).round()
    expected = family(raw, (2,), log_library).log_prob(x)
    found = family(raw.float(), (2,), log_library.float()).log_prob(x.float())
    # Means in single precision have errors of a few units in 2e6, which affect this Poisson.
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-2)


def test_the_decoders_network_does_not_see_the_library_size():
    with seeded(0):
        vae = pv.VAE.mlp(
            (4,), 2, (5,), likelihood=pv.Poisson(library_size=True), context_shapes=[(3,), (1,)]
        ).double()
        z, label = torch.randn(2, 2).double(), torch.eye(3)[:2].double()
    few, many = (vae.decoder(z, label, torch.full((2, 1), size).double()) for size in (1.0, 5.0))
    torch.testing.assert_close(
        few.mean / few.mean.sum(-1, True), many.mean / many.mean.sum(-1, True)
    )
    assert not torch.allclose(few.mean, many.mean)
    drawn = pv.sample(vae, 300, label[:1], torch.tensor([[100.0]]).log(), seed=0)
    assert drawn.sum(-1).mean().item() == pytest.approx(100, abs=5 * (100 / 300) ** 0.5)


def test_the_encoder_sees_counts_by_their_logarithm():
    with seeded(0):
        vae = pv.VAE.mlp((4,), 2, (), likelihood=pv.Poisson).double()
        x = torch.tensor([[0.0, 1.0, 50.0, 1e6]]).double()
    (linear,) = vae.encoder.network.network.layers
    torch.testing.assert_close(vae.encoder(x).base_dist.loc, linear(torch.log1p(x))[:, :2])


def test_pseudo_inputs_of_a_vamp_prior_are_counts():
    """They start at the data, with bytes as integers, and may become negative."""
    part = Split(torch.arange(60, dtype=torch.uint8).reshape(20, 3))
    config = Model(likelihood="poisson", prior="vamp", components=20, hidden=(4,))
    vae = make_pair(config, Data("cells", part, part, part))
    (start,) = vae.prior.pseudo_inputs
    assert torch.equal(start.sort(0).values, part.x.float())
    (direct,) = pv.VampPrior.of_data(vae.encoder, part.x, whole=True).pseudo_inputs
    assert torch.equal(direct, start)
    start.data -= 30
    assert bool(torch.isfinite(vae.prior().log_prob(torch.zeros(20))).all())


COUNTS = torch.tensor([[0, 3, 200], [1, 0, 255], [7, 7, 7]], dtype=torch.uint8)


def test_bytes_are_whole_numbers_where_the_pair_observes_counts():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.ones(3))

        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("x", dist.Poisson(self.rate.exp()).to_event(1), obs=x)

        def guide(self, x):
            pass

    for pair in (Own(), pv.VAE.mlp((3,), 2, likelihood=pv.NegativeBinomial)):
        rows = source(COUNTS)
        prepared = preparation(pair, rows)((COUNTS,))[0]
        assert torch.equal(prepared, COUNTS.float())
    gray = preparation(pv.VAE.mlp((3,), 2, likelihood=pv.Gaussian), source(COUNTS))((COUNTS,))[0]
    assert torch.equal(gray, COUNTS.float() / 255)


def test_counts_score_the_same_in_every_type():
    with seeded(0):
        vae = pv.VAE.mlp((3,), 2, (4,), likelihood=pv.NegativeBinomial(zero_inflated=True))
    pv.fit(vae, COUNTS, epochs=1, batch_size=3, progress=False, engine="eager")
    values = [
        pv.evaluate(vae, x, num_samples=5).log_likelihood
        for x in (COUNTS, COUNTS.long(), COUNTS.float(), COUNTS.numpy().astype(np.uint16))
    ]
    assert len(set(values)) == 1


@pytest.mark.parametrize("value", [-1.0, 0.5])
def test_values_that_are_not_counts_are_refused(value):
    x = torch.tensor([[0.0, 3.0, value], [1.0, 0.0, 2.0]])
    vae = pv.VAE.mlp((3,), 2, likelihood=pv.NegativeBinomial)
    with pytest.raises(pv.UsageError, match=f"x holds {value:g}, outside the support of the Neg"):
        pv.fit(vae, x, epochs=1, batch_size=2, progress=False, engine="eager")
    many = torch.tensor([[0.0, 3.0, 800.0]])
    with pytest.raises(pv.UsageError, match="for counts, use a Poisson or NegativeBinomial"):
        pv.evaluate(pv.VAE.mlp((3,), 2), many)


@pytest.mark.parametrize("freedom", [None, 2.5, 30.0])
def test_students_t_is_that_of_scipy(freedom):
    family = pv.StudentT(freedom)
    raw, x = outputs(family, 2), torch.tensor([0.3, -40.0]).double()
    loc, raw_scale, *predicted = raw.unflatten(-1, (-1, 2)).unbind(1)
    fn = family(raw, (2,))
    nu = fn.base_dist.df.numpy() if freedom is None else freedom
    scale = bounded_scale(raw_scale, 1e-3, 1e3)
    expected = scipy.stats.t(nu, loc.numpy(), scale.numpy()).logpdf(x.numpy()).sum(-1)
    torch.testing.assert_close(fn.log_prob(x), torch.from_numpy(expected))
    torch.testing.assert_close(fn.mean, loc)
    for piece in predicted:  # the degrees of freedom rise with their output, and are 4 at 0
        order = piece.flatten().argsort()
        assert bool((fn.base_dist.df.flatten()[order].diff() > 0).all())
        at_zero = family(torch.zeros(1, 6).double(), (2,)).base_dist.df
        assert at_zero.flatten().tolist() == pytest.approx([4.0, 4.0])


@pytest.mark.parametrize("freedom", [1.1, 3.0, 900.0])
def test_students_t_integrates_to_one(freedom):
    fn = pv.StudentT(freedom)(torch.tensor([[0.7, 0.3]]).double(), (1,))
    node, weight = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(400))
    angle = node * pi / 2  # x = loc + s tan(angle)
    x = fn.base_dist.loc + fn.base_dist.scale * angle.tan()[:, None, None]
    slope = fn.base_dist.scale[:, 0] / angle.cos()[:, None].square()
    total = (fn.log_prob(x).exp() * slope * weight[:, None]).sum(0) * pi / 2
    assert total.item() == pytest.approx(1.0, abs=1e-3 if freedom < 2 else 1e-8)


def test_degrees_of_freedom_learned_from_data_with_outliers():
    """From the same start, they fall for Cauchy-like data and rise for normal data."""
    found = []
    for truth in (1.5, None):
        with seeded(1):
            x = torch.randn(2000, 1) if truth is None else dist.StudentT(truth).sample((2000, 1))
        family = pv.StudentT(4.0, learned=True)
        raw = nn.Parameter(torch.zeros(1, 2))
        optimizer = torch.optim.Adam([raw, *family.parameters()], lr=0.1)
        for _ in range(300):
            optimizer.zero_grad()
            (-family(raw, (1,)).log_prob(x).mean()).backward()
            optimizer.step()
        found.append(family(raw, (1,)).base_dist.df.item())
    assert found[0] == pytest.approx(1.5, abs=0.2)  # five standard errors
    assert found[1] > 15


@pytest.mark.parametrize("freedom", [1.0, -2.0, 2000.0])
def test_degrees_of_freedom_without_a_mean_are_refused(freedom):
    with pytest.raises(pv.UsageError, match=r"between 1\.01 and 1001"):
        pv.StudentT(freedom)


def test_tokens_are_whole_numbers():
    family = pv.Categorical(4, tokens=True)
    logits = outputs(family, 3).reshape(4, 4, 3)
    fn = family(logits.flatten(1), (3,))
    x = torch.tensor([[0, 1, 3], [3, 3, 2], [1, 0, 0], [2, 2, 1]])
    expected = -nn.functional.cross_entropy(logits, x, reduction="none").sum(-1)
    torch.testing.assert_close(fn.log_prob(x), expected)
    torch.testing.assert_close(fn.log_prob(x.double()), expected)
    mean = (logits.softmax(1) * torch.arange(4.0).double()[:, None]).sum(1)
    assert bool(fn.mean.isnan().all())  # tokens do not have a mean
    torch.testing.assert_close(fn.mode, logits.argmax(1).to(logits.dtype))
    with seeded(0):
        draws = fn.sample((4000,))
    assert set(draws.unique().tolist()) == {0.0, 1.0, 2.0, 3.0}
    assert bool((draws.mean(0) - mean).abs().lt(5 * draws.std(0) / 4000**0.5).all())
    vae = pv.VAE.mlp((3,), 2, likelihood=family)
    x = x.to(torch.uint8)
    assert torch.equal(preparation(vae, source(x))((x,))[0], x.float())
    with pytest.raises(pv.UsageError, match="x holds 4, outside the support of the Categorical"):
        pv.fit(vae, x + 1, epochs=1, batch_size=4, progress=False, engine="eager")


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4)])
def test_the_encoder_sees_tokens_as_rows_with_a_one(shape):
    view = pv.Categorical(5, tokens=True).view(shape)
    x = torch.randint(5, (6, *shape), generator=torch.Generator().manual_seed(0))
    seen = view(x.float())
    assert seen.shape == (6, 5 * shape[0], *shape[1:])
    expected = nn.functional.one_hot(x, 5).movedim(-1, 1).flatten(1, 2).float()
    assert torch.equal(seen, expected)


def test_a_mixture_of_logistics_sums_its_components():
    family, single = pv.DiscretizedLogistic(8, components=3), pv.DiscretizedLogistic(8)
    raw, x = outputs(family, 2), torch.tensor([0.0, 3 / 7]).double()
    logits, locs, scales = raw.unflatten(-1, (3, 3, 2)).unbind(1)
    parts = []
    for j, start in enumerate((1 / 6, 3 / 6, 5 / 6)):  # spread over the range at the start
        each = torch.cat([locs[:, j] + start - 0.5, scales[:, j]], -1)
        parts.append(single(each, (2,)).base_dist.log_prob(x))
    expected = torch.logsumexp(torch.stack(parts, 1) + logits.log_softmax(1), 1).sum(-1)
    torch.testing.assert_close(family(raw, (2,)).log_prob(x), expected)
    with pytest.raises(pv.UsageError, match="components must be at least 1, got 0"):
        pv.DiscretizedLogistic(components=0)


@pytest.mark.parametrize(
    ("likelihood", "greatest", "advice"),
    [
        (pv.Categorical(3), 2, r"from 0 to 2, use Categorical\(3, tokens=True\)"),
        (pv.Categorical(3, tokens=True), 4, r"from 0 to 4, use Categorical\(5, tokens=True\)"),
        (pv.Categorical, 255, "pass them as uint8"),
    ],
)
def test_codes_that_do_not_fit_are_told_which_likelihood_fits(likelihood, greatest, advice):
    x = torch.arange(40.0).remainder(greatest + 1).reshape(10, 4)
    x[0, 0] = greatest
    pair = pv.VAE.mlp((4,), hidden=(), likelihood=likelihood)
    with pytest.raises(pv.UsageError, match=advice):
        pv.fit(pair, x, epochs=1, engine="eager", progress=False)

"""The likelihood by column: its densities, its mask, its standardization, and what encoders see."""

from copy import deepcopy
from math import log

import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv

KINDS = ("continuous", "positive", "count", "binary", "categorical", "ordinal")
LEVELS = (0, 0, 0, 2, 3, 4)


def rows(n=40):
    torch.manual_seed(0)
    x = torch.stack(
        [
            50 + 8 * torch.randn(n),
            torch.randn(n).exp() * 100,
            torch.poisson(torch.full((n,), 4.0)),
            *(torch.randint(0, levels, (n,)).float() for levels in LEVELS[3:]),
        ],
        1,
    )
    return x


def likelihood(x=None, **options):
    return pv.Columns(KINDS, LEVELS, **options).standardize(rows() if x is None else x)


def outputs(n):
    torch.manual_seed(1)
    return torch.randn(n, likelihood().outputs((6,))).double()


def fn_of(raw, **options):
    return likelihood(**options).double()(raw, (6,)).base_dist


def test_the_density_of_each_kind_sums_to_one():
    fn = fn_of(outputs(1))

    def densities(values, j):
        x = torch.full((len(values), 6), torch.nan).double()
        x[:, j] = values
        return fn.log_prob(x)[:, j].exp().detach()

    grid = torch.linspace(-4000, 4000, 400_001).double()
    step = float(grid[1] - grid[0])
    assert densities(grid, 0).sum() * step == pytest.approx(1, abs=1e-3)
    logs = torch.linspace(-10, 25, 20001).double()
    positive = densities(logs.exp(), 1) * logs.exp()
    assert positive.sum() * float(logs[1] - logs[0]) == pytest.approx(1, abs=1e-3)
    assert densities(torch.arange(5000), 2).sum() == pytest.approx(1, abs=1e-4)
    for j, levels in enumerate(LEVELS[3:], 3):
        assert densities(torch.arange(levels), j).sum() == pytest.approx(1, abs=1e-9)


def test_densities_have_the_units_of_the_data():
    """Rescaled data have the density of the data divided by the factor."""
    x, raw = rows().double(), outputs(40)
    scaled = x.clone()
    scaled[:, :2] *= 1000
    one, other = (likelihood(data).double()(raw, (6,)).base_dist for data in (x, scaled))
    lost = one.log_prob(x) - other.log_prob(scaled)
    want = torch.zeros(6).double()
    want[:2] = torch.tensor(1000.0).log()
    torch.testing.assert_close(lost, want.expand(40, 6), atol=1e-3, rtol=0)


def test_parts_are_the_distributions_of_their_kinds():
    x, raw = rows().double(), outputs(40)
    family = likelihood(robust=False).double()
    raw = raw[:, 1:]  # a normal has no degrees of freedom
    found = family(raw, (6,)).base_dist.log_prob(x)
    center, spread = family.center.detach(), family.spread.detach()
    assert center[0] == pytest.approx(float(x[:, 0].mean()), rel=1e-5)
    assert spread[1] == pytest.approx(float(x[:, 1].log().std(correction=0)), rel=1e-5)
    loc = raw[:, 2] * spread[1] + center[1]
    scale = pv.parts.factors.bounded_scale(raw[:, 3], 1e-2, 1e2) * spread[1]
    torch.testing.assert_close(found[:, 1], dist.LogNormal(loc, scale).log_prob(x[:, 1]))
    bernoulli = dist.Bernoulli(logits=raw[:, 6]).log_prob(x[:, 3])
    torch.testing.assert_close(found[:, 3], bernoulli)
    categorical = dist.Categorical(logits=raw[:, 7:10]).log_prob(x[:, 4])
    torch.testing.assert_close(found[:, 4], categorical)
    cuts = family._cutpoints(5).detach()
    ordered = dist.OrderedLogistic(raw[:, 10], cuts).log_prob(x[:, 5])
    torch.testing.assert_close(found[:, 5], ordered)


def test_missing_entries_contribute_nothing():
    x = rows().double()
    holes = torch.where(torch.rand(40, 6) < 0.5, torch.nan, x)
    raw = outputs(40).requires_grad_()
    fn = fn_of(raw)
    found = fn.log_prob(holes)
    want = torch.where(holes.isnan(), 0.0, fn.log_prob(x))
    assert torch.equal(found, want)
    (gradient,) = torch.autograd.grad(found.sum(), raw)
    assert bool(gradient.isfinite().all())


def test_categories_are_never_averaged():
    fn = fn_of(outputs(40))
    assert bool(fn.mean[:, 3:].isnan().all())
    assert bool((fn.mode[:, 3:] == fn.mode[:, 3:].round()).all())
    vae = pv.VAE.mlp((6,), 2, (8,), likelihood())
    made = pv.reconstruct(vae, rows())
    assert bool((made[:, 3:] == made[:, 3:].round()).all())
    assert bool((made[:, 3:].amax(0) < torch.tensor(LEVELS[3:])).all())
    assert not torch.equal(made[:, 0], made[:, 0].round())
    drawn = pv.sample(vae, 200, seed=0)
    assert [sorted(drawn[:, j].unique().tolist()) for j in (3, 4, 5)] == [
        [0.0, 1.0],
        [0.0, 1.0, 2.0],
        [0.0, 1.0, 2.0, 3.0],
    ]


def test_a_loaded_pair_takes_raw_rows(tmp_path):
    vae = pv.VAE.mlp((6,), 2, (8,), likelihood())
    x = torch.where(torch.rand(40, 6) < 0.2, torch.nan, rows())
    pv.fit(vae, x, epochs=1, engine="eager", progress=False, out=tmp_path)
    again = pv.load(tmp_path)
    for one, other in zip(pv.encode(vae, x).values(), pv.encode(again, x).values(), strict=True):
        assert torch.equal(one, other)
    one, other = (pv.log_likelihood(p, x, num_samples=30).per_datum for p in (vae, again))
    assert torch.equal(one, other)


def test_the_graph_equals_the_eager_step():
    x = torch.where(torch.rand(40, 6) < 0.3, torch.nan, rows())
    found = []
    for engine in ("eager", "traced"):
        torch.manual_seed(0)
        vae = pv.VAE.mlp((6,), 2, (8,), likelihood())
        options = {"objective": pv.ImportanceWeightedELBO(3), "progress": False, "mask_rate": 0.2}
        found.append(pv.fit(vae, x, epochs=1, batch_size=20, engine=engine, **options)["elbo"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("family", [pv.Gaussian(0.7), pv.Bernoulli(), pv.Poisson(), pv.StudentT()])
def test_complete_data_have_exactly_the_unmasked_bound(family):
    torch.manual_seed(0)
    x = torch.rand(30, 5).round()
    masked = pv.VAE.mlp((5,), 2, (8,), pv.Missing(family))
    plain = deepcopy(masked)
    plain.decoder.family = plain.decoder.family.likelihood
    one, other = (pv.evaluate(pair, x, num_samples=5) for pair in (masked, plain))
    assert (one.elbo, one.log_likelihood) == (other.elbo, other.log_likelihood)


def test_standardized_data_have_densities_in_their_own_units(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(50, 3) * torch.tensor([1e-3, 1.0, 1e4]) + torch.tensor([0.0, 5.0, 1e5])
    for inner in (pv.Gaussian, pv.StudentT):
        family = pv.Standardized(inner, (3,)).standardize(x)
        raw = torch.randn(50, family.outputs((3,)))
        u = (x - x.mean(0)) / x.std(0, correction=0)
        want = family.likelihood(raw, (3,)).log_prob(u) - x.std(0, correction=0).log().sum()
        torch.testing.assert_close(family(raw, (3,)).log_prob(x), want, atol=1e-3, rtol=1e-4)
    family = pv.Standardized(pv.Gaussian, (3,)).standardize(x)
    vae = pv.VAE.mlp((3,), 2, (8,), pv.Missing(family))
    pv.save(vae, tmp_path)
    holes = torch.where(torch.rand(50, 3) < 0.3, torch.nan, x)
    holes[:, 1] = x[:, 1]
    assert torch.equal(pv.encode(vae, holes)["z"], pv.encode(pv.load(tmp_path), holes)["z"])
    assert float(pv.encode(vae, x)["z"].abs().max()) < 10  # the encoder sees standard units


@pytest.mark.parametrize(
    ("kinds", "levels", "words"),
    [
        (["continuous", "real"], [0, 0], "must be one of continuous, .*, got 'real'"),
        (["categorical"], [1], "column 0 is categorical, so it cannot have 1 levels"),
        (["binary"], [3], "column 0 is binary, so it cannot have 3 levels"),
        (["count"], [4], "column 0 is count, so it cannot have 4 levels"),
        (["count"], [0, 0], "got 1 kinds but 2 levels"),
        ([], [], "kinds must name at least one column"),
    ],
)
def test_wrong_kinds_are_one_line(kinds, levels, words):
    with pytest.raises(pv.UsageError, match=words):
        pv.Columns(kinds, levels)


def test_values_outside_a_column_are_one_line():
    vae, x = pv.VAE.mlp((6,), 2, (8,), likelihood()), rows()
    for column, value in ((1, -1.0), (2, 1.5), (4, 3.0), (5, -1.0)):
        wrong = x.clone()
        wrong[3, column] = value
        with pytest.raises(pv.UsageError, match=f"x holds {value:g}, outside the support"):
            pv.log_likelihood(vae, wrong, num_samples=5)


def test_missing_entries_need_a_likelihood_that_leaves_them_out():
    x = torch.rand(20, 4)
    x[5, 2] = torch.nan
    plain = pv.VAE.mlp((4,), 2, (8,), pv.Gaussian)
    with pytest.raises(pv.UsageError, match=r"first in row 5; for NaN as a missing entry, use"):
        pv.fit(plain, x, epochs=1)
    with pytest.raises(pv.UsageError, match="mask_rate needs a likelihood that leaves out missing"):
        pv.fit(plain, torch.rand(20, 4), epochs=1, mask_rate=0.5)
    x[7, 1] = torch.inf
    with pytest.raises(pv.UsageError, match=r"not finite .*first in row 7"):
        pv.fit(pv.VAE.mlp((4,), 2, (8,), pv.Missing(pv.Gaussian)), x, epochs=1)


def test_masked_arrays_are_missing_entries():
    import numpy as np

    torch.manual_seed(0)
    vae, x = pv.VAE.mlp((4,), 2, (8,), pv.Missing(pv.Gaussian)), torch.rand(10, 4)
    mask = torch.rand(10, 4) < 0.3
    masked = np.ma.array(x.numpy(), mask=mask.numpy())
    want = pv.encode(vae, torch.where(mask, torch.nan, x))["z"]
    assert torch.equal(pv.encode(vae, masked)["z"], want)
    with pytest.raises(pv.UsageError, match="has masked values"):
        pv.encode(pv.VAE.mlp((4,), 2, (8,), pv.Gaussian), masked)


def test_tools_leave_out_missing_entries():
    """The observed statistics and those of replicates have the same holes."""
    torch.manual_seed(0)
    x = torch.randn(200, 4) * 0.1 + torch.tensor([0.0, 0.0, 0.0, 50.0])
    x[::2, 3] = torch.nan
    family = pv.Standardized(pv.Gaussian(1.0), (4,)).standardize(x)
    vae = pv.VAE.mlp((4,), 2, (8,), pv.Missing(family))
    with torch.no_grad():
        for layer in vae.decoder.network.layers[-1:]:
            layer.weight.zero_(), layer.bias.zero_()
    found = pv.predictive_check(vae, x, num_replicates=50, progress=False)
    assert 0.05 < found.whole_p_values["mean"] < 0.95
    data = pv.to_arviz(vae, x, num_samples=4, num_particles=5, new_latents=False, progress=False)
    predicted = torch.as_tensor(data.posterior_predictive["x"].values[0])
    observed = torch.as_tensor(data.observed_data["x"].values)
    assert torch.equal(observed.isnan(), x.isnan())
    assert torch.equal(predicted.isnan(), x.isnan().expand(4, 200, 4))


def test_a_semi_supervised_pair_takes_columns(tmp_path):
    """Its classifier sees the same view of a row as its encoder."""
    torch.manual_seed(0)
    x, y = rows(), torch.arange(40) % 2
    pair = pv.SemiSupervisedVAE.mlp((6,), 2, latent_dim=2, hidden=(8,), likelihood=likelihood(x))
    holes = torch.where(torch.rand(40, 6) < 0.2, torch.nan, x)
    pv.fit(pair, holes, y, epochs=1, engine="eager", progress=False, out=tmp_path)
    assert torch.equal(pv.predict(pair, holes), pv.predict(pv.load(tmp_path), holes))


@pytest.mark.parametrize("unit", [1e-15, 1e-13, 1e-9, 1e9, 1e15])
@pytest.mark.parametrize("family", ["columns", "standardized"])
def test_other_units_move_densities_by_the_logarithm_of_the_unit(family, unit):
    x = torch.tensor([[-1.0], [0.5], [2.0]]).double()
    raw, densities = torch.zeros(3, 2), []
    for rows in (x, x * unit):
        if family == "columns":
            likelihood = pv.Columns(["continuous"], [0], robust=False).standardize(rows)
        else:
            likelihood = pv.Standardized(pv.Gaussian(), (1,)).standardize(rows)
        densities.append(likelihood(raw, (1,)).log_prob(rows.float()))
    torch.testing.assert_close(densities[1], densities[0] - log(unit), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("unit", [1e-30, 1e30])
def test_units_that_single_precision_cannot_square_are_refused(unit):
    x = unit * torch.tensor([[-1.0], [0.5], [2.0]]).double()
    for likelihood in (
        pv.Columns(["continuous"], [0]),
        pv.Standardized(pv.Gaussian(), (1,)),
    ):
        with pytest.raises(pv.UsageError, match="give the column another unit"):
            likelihood.standardize(x)
        doubled = likelihood.double().standardize(x)
        assert float(doubled.spread) == pytest.approx(unit * 1.2247, rel=1e-3)

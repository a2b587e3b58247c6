"""Imputation, scores by entry and models of the mask, against closed forms."""

import pyro.distributions as dist
import pytest
import torch
from imputation_helpers import WIDTH, Holes, rows
from torch import nn

import pyro_vae as pv
from pyro_vae.data import sizes


def test_the_masked_bound_and_log_p_are_exact():
    pair, x = Holes(spread=1.0), rows()
    want = torch.stack([pair.log_p(row) for row in x])
    found = pv.log_likelihood(pair, x, num_samples=30)
    torch.testing.assert_close(found.per_datum, want, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.elbo_per_datum, want, atol=1e-6, rtol=0)
    scores = pv.score(pair, x, num_samples=30)
    torch.testing.assert_close(scores.log_likelihood, want, atol=1e-6, rtol=0)


def test_imputations_have_the_exact_mean_and_covariance():
    pair, x = Holes(), rows()
    found = pv.impute(pair, x, draws=4000, num_samples=4000, level=0.9)
    assert torch.equal(found.missing, x.isnan())
    assert torch.equal(found.mean[~x.isnan()], x[~x.isnan()])
    assert bool((found.draws == x)[:, ~x.isnan()].all())
    assert float(found.pareto_k.max()) < 0.5
    assert found.effective_sample_size[0] == 4000  # a complete row
    for i, row in enumerate(x[1:], 1):
        m = ~row.isnan()
        mean, rest = pair.missing(row)
        deviation = rest.diagonal().sqrt()
        error = 5 / found.effective_sample_size[i].sqrt()
        assert bool(((found.mean[i][~m] - mean) < error * deviation).all())
        drawn = torch.atleast_2d(found.draws[:, i, ~m].T.cov())
        bound = 0.15 * torch.outer(deviation, deviation)
        assert bool(((drawn - rest).abs() < bound).all())
        for edge, sign in ((found.low, -1.0), (found.high, 1.0)):
            quantile = mean + sign * 1.6449 * deviation
            assert bool(((edge[i][~m] - quantile).abs() < 0.15 * deviation).all())


def test_scores_by_entry_are_exact_conditionals():
    pair, x = Holes(spread=2.5), rows()
    found = pv.score(pair, x, num_samples=20_000)
    assert torch.equal(found.by_entry.isnan(), x.isnan())
    for i, row in enumerate(x):
        for j in (~row.isnan()).nonzero().flatten().tolist():
            rest = row.clone()
            rest[j] = torch.nan
            want = pair.log_p(row) - (0.0 if rest.isnan().all() else pair.log_p(rest))
            assert found.by_entry[i, j] == pytest.approx(float(want), abs=0.1)


def test_a_strange_entry_has_its_name():
    pair, x = Holes(), rows(30, 0.0)
    x[7, 3] = x[7, 3] + 8
    found = pv.score(pair, x, num_samples=500)
    assert int(found.strangest(1)) == 7
    assert found.entries(7, 1) == [3]


def test_imputation_works_with_a_refined_guide():
    pair, x = Holes(spread=3.0), rows()
    refined = pv.refine(pair, x, steps=3)
    found = pv.impute(refined.pair, *refined.batch, draws=2, num_samples=100)
    assert torch.equal(found.missing, x.isnan())
    assert not bool(found.mean.isnan().any())


class Certain(nn.Module):
    """An encoder of a VAE whose posterior is the prior; ``dim`` latents."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return self.bias.expand(*x.shape[:-1], self.outputs)


def not_at_random(slope, offset):
    """x ~ N(0.3, 0.8^2), which does not depend on z; P(observed) = sigmoid(slope x + offset)."""
    family = pv.Missing(pv.Gaussian(0.8))
    encoder = pv.Factor(Certain(2), pv.DiagonalNormal(), (1,))
    decoder = pv.Factor(Certain(1), family, (1,))
    pair = pv.NotAtRandomVAE(pv.VAE(encoder, decoder, pv.StandardNormal(1))).double()
    with torch.no_grad():
        pair.vae.decoder.network.bias.fill_(0.3)
        pair.slope.fill_(slope), pair.offset.fill_(offset)
    return pair


def test_the_model_of_the_mask_is_integrated_out():
    """log p(x, s) and the mean of a missing entry equal one-dimensional integrals."""
    slope, offset = -1.5, 0.4
    pair = not_at_random(slope, offset)
    x = torch.tensor([[torch.nan], [0.5]]).double()
    found = pv.log_likelihood(pair, x, num_samples=40_000, engine="eager")
    grid = torch.linspace(-8, 8, 40_001).double()
    density = dist.Normal(0.3, 0.8).log_prob(grid).exp()
    hidden = density * torch.sigmoid(-(slope * grid + offset))
    total = hidden.sum() * (grid[1] - grid[0])
    assert found.per_datum[0] == pytest.approx(
        float(total.log()), abs=5 * float(found.standard_errors[0])
    )
    seen = (
        dist.Normal(0.3, 0.8).log_prob(x[1, 0]) + torch.tensor(slope * 0.5 + offset).sigmoid().log()
    )
    assert found.per_datum[1] == pytest.approx(float(seen), abs=1e-5)
    made = pv.impute(pair, x, draws=2, num_samples=40_000)
    mean = (hidden * grid).sum() / hidden.sum()
    assert mean > 0.5  # larger values are missing more often
    assert made.mean[0, 0] == pytest.approx(float(mean), abs=0.03)


def test_a_model_of_the_mask_is_sound_and_trains():
    x = rows(60).float()
    pair = pv.NotAtRandomVAE(
        pv.VAE.mlp((WIDTH,), 2, (8,), pv.Missing(pv.Gaussian)), known_sign=True
    ).standardize(x)
    objective = pv.ImportanceWeightedELBO(5)
    assert pv.check(pair, x, objective=objective).errors == ()
    history = pv.fit(pair, x, objective=objective, epochs=2, engine="eager", progress=False)
    assert not history.collapsed
    assert pv.evaluate(pair, x, num_samples=5).kl_by_site["x_unobserved"] == 0


def test_a_model_of_the_mask_needs_draws_with_gradients():
    with pytest.raises(pv.UsageError, match="draws are reparametrized: continuous and positive"):
        pv.NotAtRandomVAE(pv.VAE.mlp((2,), 2, (8,), pv.Columns(["count", "binary"], [0, 2])))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"num_samples": 5}, "num_samples must be at least 21, which Pareto k needs, got 5"),
        ({"level": 1.0}, "level must be between 0 and 1, got 1.0"),
    ],
)
def test_wrong_numbers_are_one_line(options, words):
    with pytest.raises(pv.UsageError, match=words):
        pv.impute(Holes(), rows(), **options)


def test_complete_rows_are_nothing_to_impute():
    with pytest.raises(pv.UsageError, match="x has no missing entry"):
        pv.impute(Holes(), rows(share=0.0)[:1])


def test_an_imputation_larger_than_the_memory_is_refused_at_once(monkeypatch):
    vae = pv.VAE.mlp((3,), latent_dim=2, likelihood=pv.Missing(pv.Gaussian))
    x = torch.randn(50, 3)
    x[0, 0] = torch.nan
    need = 2 * (6 + 4) * 150 * 4
    monkeypatch.setattr(sizes, "available_memory", lambda: need)
    pv.impute(vae, x, draws=6, num_samples=21)
    with pytest.raises(pv.UsageError, match=r"7 draws of 50 rows needs .* GiB of memory"):
        pv.impute(vae, x, draws=7, num_samples=21)

"""Groups of rows of a table: positive columns, missing entries, and padding outside the support."""

import numpy as np
import pytest
import torch
from scipy import stats

import pyro_vae as pv

KINDS, LEVELS = ["continuous", "positive", "count"], [0, 0, 0]


def members():
    """Nine rows of three groups, with a missing entry of each kind."""
    torch.manual_seed(0)
    x = torch.stack(
        [
            100 + 5 * torch.randn(9),
            (2 * torch.randn(9)).exp(),
            torch.poisson(torch.full((9,), 4.0)),
        ],
        1,
    )
    x[0, 0], x[4, 1], x[8, 2] = torch.nan, torch.nan, torch.nan
    return x, ["a", "b", "b", "c", "c", "c", "c", "b", "c"]


def pair_of(x):
    torch.manual_seed(1)
    likelihood = pv.Columns(KINDS, LEVELS, robust=False).standardize(x)
    return pv.MultilevelVAE.mlp(
        (3,), latent_dim=2, group_dim=1, hidden=(8,), members=5, likelihood=likelihood
    )


def test_padding_outside_the_support_leaves_gradients_finite():
    x, ids = members()
    pair, groups = pair_of(x), pv.by_group(x, ids)
    assert groups.sizes.tolist() == [1, 3, 5]
    pv.fit(pair, *groups.batch, epochs=3, batch_size=3, progress=False, engine="eager")
    assert all(bool(parameter.isfinite().all()) for parameter in pair.parameters())


@pytest.mark.parametrize("value", [0.0, -7.0, 1e6])
def test_values_of_the_padding_do_not_count(value):
    x, ids = members()
    pair, groups = pair_of(x), pv.by_group(x, ids)
    other = torch.where(groups.rows[..., None] < 0, value, groups.x)
    found = [
        pv.log_likelihood(pair, part, groups.sizes, num_samples=50, seed=0).per_datum
        for part in (groups.x, other)
    ]
    torch.testing.assert_close(*found)


def test_scores_of_members_are_their_densities_if_the_likelihood_ignores_the_latents():
    x, ids = members()
    pair, groups = pair_of(x), pv.by_group(x, ids)
    with torch.no_grad():
        for parameter in pair.decoder.parameters():
            parameter.zero_()
    found = pv.score(pair, *groups.batch, num_samples=50)
    rows = groups.member_rows(found.by_entry).numpy()
    seen = x.double().numpy()
    level, log = np.nanmean(seen, 0), np.log(seen[:, 1])
    expected = [
        stats.norm.logpdf(seen[:, 0], level[0], np.nanstd(seen[:, 0])),
        stats.lognorm.logpdf(seen[:, 1], np.nanstd(log), scale=np.exp(np.nanmean(log))),
    ]
    np.testing.assert_allclose(rows[:, :2], np.stack(expected, 1), rtol=1e-4)
    assert found.by_entry[groups.rows < 0].isnan().all()
    assert np.array_equal(np.isnan(rows), np.isnan(seen))

"""Missing entries that NaN marks in the data, in tools that simulate or compare data."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from masks_helpers import Holes, holes
from torch import nn

import pyro_vae as pv
from pyro_vae.diagnostics.guide_studies import calibration_study
from pyro_vae.diagnostics.study import Bench

NOTE = {"rows with missing entries": "simulated rows are complete"}


class Marked(Holes):
    """The pair with holes, where NaN in x marks them and no mask is passed; its guide is exact."""

    def __init__(self):
        super().__init__(spread=1.0)

    def model(self, x):
        super().model(x.nan_to_num(), ~x.isnan())

    def guide(self, x):
        super().guide(x.nan_to_num(), ~x.isnan())

    def template(self, n):
        return super().template(n)[:1]


class Whole(nn.Module):
    """x | z ~ N(z, 1) without any mask, real or whole numbers."""

    def __init__(self, whole):
        super().__init__()
        self.whole, self.shift = whole, nn.Parameter(torch.zeros(()))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            family = dist.Poisson(z.exp()) if self.whole else dist.Normal(z + self.shift, 1.0)
            pyro.sample("x", family, obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.5 * x, 0.5**0.5))

    def template(self, n):
        return (torch.zeros(n, dtype=torch.long if self.whole else torch.float),)


FEW = {"num_simulations": 100, "num_draws": 19, "progress": False}


def test_calibration_says_that_its_rows_are_complete():
    found = pv.calibration(
        pv.VAE.mlp((4,), latent_dim=1, likelihood=pv.Missing(pv.Gaussian)), **FEW
    )
    assert found.left_out == NOTE
    assert "'rows with missing entries' is left out: simulated rows are complete" in str(found)
    assert pv.calibration(Marked(), **FEW).left_out == NOTE


@pytest.mark.parametrize("whole", [True, False])
def test_calibration_says_nothing_of_a_pair_that_takes_no_missing_entries(whole):
    assert pv.calibration(Whole(whole), **FEW).left_out == {}


def test_masks_in_the_context_apply_in_calibration():
    pair, (_, seen) = Holes(spread=1.0), holes(60)
    found = pv.calibration(pair, seen, num_simulations=300, num_draws=39, progress=False)
    assert found.calibrated
    assert found.left_out == {}


def test_missing_entries_are_not_compared_with_draws():
    x, seen = holes(300)
    x, pair = torch.where(seen, x, torch.nan)[:-1], Marked()
    found = pv.predictive_check(pair, x, num_replicates=200, progress=False)
    assert all(0.05 < p < 0.95 for p in found.whole_p_values.values())
    torch.testing.assert_close(found.observed[:, 0], x.nanmean(1))
    wanted = pair.log_p(x.nan_to_num(), seen[:-1])
    log_p = pv.log_likelihood(pair, x, num_samples=50)
    torch.testing.assert_close(log_p.per_datum, wanted, atol=1e-6, rtol=0)  # its guide is exact


@pytest.mark.parametrize("missing", [True, False])
def test_diagnose_calibrates_the_guide_on_rows_with_the_same_missing_entries(missing):
    x, seen = holes(60)
    x = torch.where(seen, x, torch.nan)[:-1]
    batch = (x if missing else x.nan_to_num(),)
    rows = torch.arange(len(x))
    study = calibration_study(Bench(Marked(), batch, rows, 0, "eager", 0.0, 0.0, 0.0))
    assert study.rungs[0].run().left_out == ({} if missing else NOTE)

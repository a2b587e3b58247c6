"""What each study says by itself on both sides of its limits (docs/diagnostics/verdict.md)."""

from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.diagnostics import guide_studies, model_studies
from pyro_vae.diagnostics.information import Estimate
from pyro_vae.diagnostics.outliers import OutlierScores
from pyro_vae.diagnostics.predictive import PredictiveCheck
from pyro_vae.diagnostics.signs import Sign
from pyro_vae.diagnostics.study import Bench

BENCH = Bench(nn.Module(), (torch.zeros(200, 2),), torch.arange(200), 0, "eager", 1e-3, 1e-6, 1e-6)


def kinds(study, found):
    """The kinds of findings that a study makes of this result."""
    return [finding.kind for finding in study.judge(found)]


def test_an_auroc_of_nine_tenths_detects_outliers():
    area = {"high": 0.91, "at": 0.9, "below": 0.89, "low": 0.5}
    found = OutlierScores(inside=None, other=None, reference_nll=0.0, auroc=area)
    study = model_studies.outliers_study(BENCH._replace(other=BENCH.batch))
    assert kinds(study, found) == ["trust", "trust", "doubt", "doubt"]


def standing(by):
    """A check in which the data are this many standard deviations of replicates away."""
    replicates = torch.arange(100).double()[:, None]
    observed = replicates.mean(0) + by * replicates.std(0)
    flat = torch.zeros(1, 1).double()
    return PredictiveCheck(("mean",), observed[None], flat, flat, flat, replicates)


@pytest.mark.parametrize(("by", "said"), [(3.9, 0), (4.1, 1), (-3.9, 0), (-4.1, 1)])
def test_replicates_differ_from_four_deviations_on(by, said):
    (told,) = model_studies.predictive_study(BENCH).judge(standing(by))
    assert isinstance(told, Sign) == bool(said)
    assert told.kind == ("decoder" if said else "trust")


@pytest.mark.parametrize(
    ("aggregate", "error", "said"), [(1.1, 0.0, 1), (1.2, 0.1, 0), (0.9, 0, 0)]
)
def test_codes_beside_the_prior_are_a_sign_from_one_nat_and_three_errors(aggregate, error, said):
    parts = SimpleNamespace(aggregate_kl=Estimate(aggregate, error))
    told = model_studies.information_study(BENCH).judge({"z": parts})
    assert [sign.kind for sign in told] == ["prior"] * said


@pytest.mark.parametrize("weights", [0.0, 0.9, 9.0])
def test_a_large_share_of_the_weights_is_honest_uncertainty(weights):
    found = SimpleNamespace(epistemic=torch.tensor([weights]), total=torch.tensor([10.0]))
    study = model_studies.uncertainty_study(BENCH._replace(shared=("w",)))
    (told,) = study.judge(found)
    assert told.kind == "trust"
    assert f"{10 * weights:.0f} %" in told.words or not weights


@pytest.mark.parametrize(
    ("gap", "error", "said"),
    [(0.9, 0.04, ["trust"]), (0.9, 0.06, ["doubt", "next"]), (1.1, 0.0, ["doubt", "next"])],
)
def test_a_sandwich_is_trusted_within_one_nat(gap, error, said):
    found = SimpleNamespace(gap=gap, gap_standard_error=error)
    assert kinds(guide_studies.sandwich_study(BENCH), found) == said


class Moving(nn.Module):
    """x = +-1, and a posterior mean of each unit that moves by as much: its variance is known."""

    def __init__(self, *moves):
        super().__init__()
        self.moves = nn.Parameter(torch.tensor(moves).double())

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(self.moves)), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., :1], 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(7 + x * self.moves, 1.0).to_event(1))


def test_a_unit_is_active_whose_mean_has_a_variance_over_a_hundredth():
    x = torch.tensor([[1.0], [-1.0]]).double().repeat(50, 1)
    pair = Moving(0.0, 0.0985**0.5 / 10**0.5, 0.1015**0.5 / 10**0.5, -1.0)
    assert pair.moves.square().tolist() == pytest.approx([0, 0.00985, 0.01015, 1])
    found = pv.evaluate(pair, x, num_samples=2, engine="eager")
    assert found.num_units == {"z": 4}
    assert found.active_units == {"z": 2}

"""What each study says on both sides of each threshold that docs/diagnostics.md lists."""

from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.diagnostics import guide_studies, model_studies
from pyro_vae.diagnostics.calibration import Calibration
from pyro_vae.diagnostics.outliers import OutlierScores
from pyro_vae.diagnostics.study import Bench

BENCH = Bench(nn.Module(), (torch.zeros(200, 2),), torch.arange(200), 0, "eager", 1e-3, 1e-6)


def kinds(study, found, results=None):
    """The kinds of findings that a study makes of this result."""
    return [finding.kind for finding in study.judge(found, results or {})]


def over(share, n=100):
    """Pareto k of n data: 0.7 itself is not over 0.7."""
    return torch.tensor([0.71] * share + [0.7] * (n - share)).double()


@pytest.mark.parametrize(
    ("share", "said"), [(0, ["trust"]), (5, ["trust"]), (6, ["doubt", "next"])]
)
def test_log_likelihood_is_doubted_from_over_five_percent_of_large_pareto_k(share, said):
    study = guide_studies.reliability_study(BENCH)
    found = SimpleNamespace(
        pareto_k=over(share),
        infinite_weights=torch.zeros(100),
        value=-1.0,
        standard_error=0.1,
    )
    assert kinds(study, found) == said


@pytest.mark.parametrize("kind", ["infinite", "finite"])
def test_an_infinite_weight_is_doubted_whatever_pareto_k_is(kind):
    infinite = torch.zeros(100)
    infinite[3] = kind == "infinite"
    found = SimpleNamespace(
        pareto_k=over(0), infinite_weights=infinite, value=-1.0, standard_error=0.1
    )
    said = kinds(guide_studies.reliability_study(BENCH), found)
    assert said == (["doubt"] if kind == "infinite" else ["trust"])


def gaps(whole, encoder=0.0, family=0.0, k=None, each=None):
    each = torch.full((100,), whole).double() if each is None else each
    return SimpleNamespace(
        inference=SimpleNamespace(value=whole, per_datum=each),
        amortization=SimpleNamespace(value=encoder),
        approximation=SimpleNamespace(value=family),
        pareto_k=over(0) if k is None else k,
    )


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (gaps(0.99), ["trust"]),
        (gaps(1.0), ["doubt"]),
        (gaps(0.5, k=over(5)), ["trust"]),
        (gaps(0.5, k=over(6)), ["doubt"]),
        (gaps(0.01, k=over(100)), ["trust"]),  # at 0.01 nats the weights are as good as constant
        (gaps(0.011, k=over(100)), ["doubt"]),
        (gaps(-0.011, k=over(100)), ["doubt"]),
    ],
)
def test_the_gap_is_doubted_from_one_nat_or_where_pareto_k_matters(found, said):
    assert kinds(guide_studies.gaps_study(BENCH), found) == said


@pytest.mark.parametrize(
    ("encoder", "family", "advice"),
    [(0.9, 0.6, 1), (0.6, 0.9, 1), (0.51, 0.5, 1), (0.5, 0.49, 0), (0.49, 0.5, 0), (0.7, 0.7, 0)],
)
def test_advice_goes_to_the_larger_gap_over_half_a_nat(encoder, family, advice):
    study = guide_studies.gaps_study(BENCH)
    said = study.judge(gaps(1.5, encoder, family), {})[1:]
    assert len(said) == advice
    if advice:
        assert (said[0].words == guide_studies.RICHER) == (family > encoder)


def bunched(outside):
    """Ranks in the middle but for some of 1000 at the lower end: they leave their band, and the
    95 % intervals hold all but those."""
    ranks = torch.tensor([0] * outside + [50] * (1000 - outside))[:, None]
    return Calibration(names=("z",), ranks=ranks, num_draws=99, level=0.05, left_out={})


@pytest.mark.parametrize(
    ("outside", "said"),
    [
        (28, ["doubt", "next"]),
        (31, ["trust"]),
        (50, ["trust"]),
        (69, ["trust"]),
        (72, ["doubt", "next"]),
    ],
)
def test_calibration_is_doubted_from_two_points_of_coverage_away_from_95(outside, said):
    found = bunched(outside)
    assert found.failures
    assert found.coverage[0, -1].item() == pytest.approx(1 - outside / 1000)
    assert kinds(guide_studies.calibration_study(BENCH), found) == said


def test_an_auroc_of_nine_tenths_detects_outliers():
    area = {"high": 0.91, "at": 0.9, "below": 0.89, "low": 0.5}
    found = OutlierScores(inside=None, other=None, reference_nll=0.0, auroc=area)
    study = model_studies.outliers_study(BENCH._replace(other=BENCH.batch))
    assert kinds(study, found) == ["trust", "trust", "doubt", "doubt"]


@pytest.mark.parametrize(
    ("p", "said"),
    [
        (0.024, ["doubt", "next"]),
        (0.026, ["trust"]),
        (0.974, ["trust"]),
        (0.976, ["doubt", "next"]),
    ],
)
def test_predictive_p_values_are_doubted_outside_95_percent(p, said):
    found = SimpleNamespace(whole_p_values={"mean": 0.5, "largest": p})
    assert kinds(model_studies.predictive_study(BENCH), found) == said


@pytest.mark.parametrize(("weights", "said"), [(0.9, ["trust"]), (1.0, ["doubt", "next"])])
def test_a_tenth_of_the_variance_asks_for_more_data(weights, said):
    found = SimpleNamespace(epistemic=torch.tensor([weights]), total=torch.tensor([10.0]))
    assert kinds(model_studies.uncertainty_study(BENCH), found) == said


@pytest.mark.parametrize(
    ("aggregate", "information", "said"),
    [
        (0.9, 0.0, []),
        (1.1, 0.0, ["doubt", "next"]),
        (1.1, 3.59, ["doubt", "next"]),
        (9.0, 3.61, []),
    ],
)
def test_codes_beside_the_prior_are_reported_if_the_information_is_known(
    aggregate, information, said
):
    """log 100 - 1 = 3.605 nats: closer to the ceiling the aggregate KL is not known."""
    parts = SimpleNamespace(
        num_examples=100,
        mutual_information=SimpleNamespace(value=information),
        aggregate_kl=SimpleNamespace(value=aggregate),
    )
    assert kinds(model_studies.information_study(BENCH), {"z": parts}) == said


@pytest.mark.parametrize(
    ("by", "error", "said"),
    [
        (0.09, 0.0, ["trust"]),
        (0.11, 0.0, ["doubt"]),
        (-0.11, 0.0, ["doubt", "next"]),
        (0.14, 0.05, ["trust"]),  # 0.14 + 2 * 0.05 is under 0.3
        (0.16, 0.05, ["doubt"]),  # over three errors
        (0.0, 0.14, ["trust"]),
        (0.0, 0.16, ["doubt", "next"]),
    ],
)
def test_annealing_and_importance_weights_agree_within_their_errors(by, error, said):
    n = 10
    weighed = SimpleNamespace(per_datum=torch.zeros(2 * n), standard_errors=torch.zeros(2 * n))
    found = SimpleNamespace(
        per_datum=torch.full((n,), by).double(), standard_error=error, num_temperatures=20
    )
    study = guide_studies.annealing_study(BENCH)
    assert kinds(study, found, {"log_likelihood": weighed}) == said
    # The error of the importance weights counts as much: sqrt(n) e / n of each is that of the mean.
    weighed.standard_errors[:n] = error * n**0.5
    found.standard_error = 0.0
    assert kinds(study, found, {"log_likelihood": weighed}) == said
    assert kinds(study, found) == []


@pytest.mark.parametrize(
    ("gap", "error", "said"),
    [(0.9, 0.04, ["trust"]), (0.9, 0.06, ["doubt", "next"]), (1.1, 0.0, ["doubt", "next"])],
)
def test_a_sandwich_is_trusted_within_one_nat(gap, error, said):
    found = SimpleNamespace(gap=gap, gap_standard_error=error)
    assert kinds(guide_studies.sandwich_study(BENCH), found) == said


@pytest.mark.parametrize(
    ("agree", "apart", "said"),
    [(4, 0.9, ["trust"]), (4, 1.1, ["doubt"]), (3, 0.0, ["doubt", "next"])],
)
def test_nuts_is_a_reference_where_all_chains_agree(agree, apart, said):
    found = SimpleNamespace(
        agrees=torch.ones(4),
        disagreement=torch.full((4, 2), apart / 2),
        as_dict=lambda: {"agree": agree, "mean_shift": 0.1, "mean_scale_ratio": 0.9},
    )
    assert kinds(guide_studies.nuts_study(BENCH), found) == said


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

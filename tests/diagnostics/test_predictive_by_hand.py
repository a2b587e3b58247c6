"""p-values, distances and statistics of a predictive check, from numbers written by hand."""

import pytest
import torch

import pyro_vae as pv
from pyro_vae.diagnostics.predictive import STATISTICS, PredictiveCheck, _p_values

NAN = torch.nan


def found(observed, replicated):
    """The check of statistics (n, statistics) and their replicates (replicates, n, statistics)."""
    observed, replicated = (torch.tensor(part).double() for part in (observed, replicated))
    return PredictiveCheck(
        tuple("ab"[: observed.shape[1]]),
        observed,
        replicated.mean(0),
        replicated.std(0, correction=0),
        _p_values(replicated, observed),
        replicated.nanmean(1),
    )


def test_p_values_count_what_is_above_and_half_of_what_is_equal():
    """(above + (equal + 1) / 2) / (R + 1)."""
    replicated = torch.tensor([1.0, 2.0, 2.0, 3.0]).double()[:, None, None]
    for value, wanted in ((0, 4.5), (1, 4), (1.5, 3.5), (2, 2.5), (2.5, 1.5), (3, 1), (9, 0.5)):
        (p,) = _p_values(replicated, torch.tensor([[value]]).double()).flatten().tolist()
        assert p == pytest.approx(wanted / 5)
    assert _p_values(replicated, torch.tensor([[NAN]]).double()).isnan().all()


@pytest.mark.parametrize("value", [3.0, -3.0])
def test_rounding_alone_is_a_tie(value):
    observed = torch.tensor([[value]]).double()
    for apart, wanted in ((0.9e-6, 0.5), (1.1e-6, 0.75), (-0.9e-6, 0.5), (-1.1e-6, 0.25)):
        p = _p_values(observed[None] + apart * abs(value), observed)
        assert p.item() == pytest.approx(wanted)


def test_statistics_leave_out_what_is_not_seen():
    x = torch.tensor([[[0.0, 2.0], [NAN, 4.0]], [[-3.0, NAN], [NAN, NAN]]]).double()
    values = {name: statistic(x).tolist() for name, statistic in STATISTICS.items()}
    assert values["mean"] == [2.0, -3.0]
    assert values["variance"] == pytest.approx([8 / 3, 0.0])
    assert values["greatest"] == [4.0, -3.0]
    assert values["share of zeros"] == pytest.approx([1 / 3, 0.0])


def test_a_check_by_hand():
    check = found([[1.0, 0.0], [6.0, NAN]], [[[0.0, 1.0], [2.0, NAN]], [[4.0, 3.0], [2.0, NAN]]])
    assert check.num_replicates == 2
    assert check.distances[0].tolist() == [-0.5, -2.0]  # (1 - 2) / 2 and (0 - 2) / 1
    assert check.distances[1, 0] == torch.inf
    assert check.worst().tolist() == [1, 0]
    assert check.worst("b").tolist() == [0, 1]
    assert check.worst("a", 1).tolist() == [1]
    # Means over data: 3.5 beside 1 and 3; 0 beside 1 and 3.
    assert check.whole_p_values == pytest.approx({"a": 0.5 / 3, "b": 2.5 / 3})
    record = check.as_dict()["statistics"]
    assert record["a"]["observed"] == 3.5
    assert record["a"]["replicated"] == 2.0
    assert record["b"]["observed"] == 0.0


@pytest.mark.parametrize(
    ("p", "share"), [([0.026, 0.5], 0), ([0.024, 0.5], 0.5), ([0.976, 0.02], 1), ([0.974, NAN], 0)]
)
def test_the_share_outside_95_percent(p, share):
    blank = torch.zeros(2, 1)
    check = PredictiveCheck(
        ("a",), blank, blank, blank, torch.tensor(p)[:, None], torch.zeros(20, 1)
    )
    assert check.as_dict()["statistics"]["a"]["fraction_outside_95"] == share


@pytest.mark.parametrize(("classes", "shown"), [(3, 3), (10, 10), (12, 10)])
def test_data_that_are_classes_have_the_share_of_each_of_the_first_ten(classes, shown):
    torch.manual_seed(0)
    vae = pv.VAE.mlp((4,), latent_dim=2, hidden=(3,), likelihood=pv.Categorical(classes, True))
    x = torch.arange(8).reshape(2, 4) % 3
    check = pv.predictive_check(vae, x, num_replicates=20, progress=False)
    assert check.observed.shape == (2, shown)
    assert check.observed[0, :3].tolist() == [0.5, 0.25, 0.25]  # 0 1 2 0

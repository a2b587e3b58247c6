"""Statistics of two samples: classifiers, scales, correlations, and what codes explain."""

import numpy as np
import pytest
import torch

from pyro_vae.diagnostics.two_samples import (
    clipped,
    correlation_statistic,
    difference,
    explained,
    scale_statistics,
    separation,
    some_columns,
)


def test_a_classifier_sees_a_shift_and_bounds_the_kl():
    torch.manual_seed(0)
    first, second = torch.randn(1000, 2) + torch.tensor([1.0, 0.0]), torch.randn(1000, 2)
    one = separation(first, second)
    # The best score is the first column: AUC = Phi(1 / sqrt 2), and the KL is 1/2.
    assert one.auc == pytest.approx(0.760, abs=0.03)
    assert 0.3 < one.nats < 0.55
    assert one.deviations > 15
    same = separation(torch.randn(1000, 2), second)
    assert abs(same.deviations) < 4
    assert same.nats < 0.02


def test_a_classifier_sees_two_modes_with_the_moments_of_one():
    torch.manual_seed(0)
    signs_of = torch.where(torch.rand(1000, 1) < 0.5, 1.0, -1.0)
    first = 0.3 * torch.randn(1000, 1) + (1 - 0.09) ** 0.5 * signs_of
    assert separation(first, torch.randn(1000, 1)).deviations > 10


def test_scales_of_residuals_by_hand():
    residuals = torch.tensor([[1.0, 1.0], [2.0, 2.0], [torch.nan, 1.0]]).double()
    whole, rows, columns = scale_statistics(residuals)

    def excess(c):
        return c - 1 - torch.tensor(c).log().item()

    assert whole.item() == pytest.approx(torch.tensor(11 / 5).log().item())
    assert rows.item() == pytest.approx(0.5 * (2 * excess(1.0) + 2 * excess(4.0) + excess(1.0)) / 3)
    by_column = (excess(2.5) * 2 / 3 + excess(2.0)) / 2
    assert columns.item() == pytest.approx(by_column)
    whole, rows, columns = scale_statistics(torch.tensor([[1.0, 3.0], [2.0, 0.5], [1.0, 1.0]]))
    assert whole.item() == pytest.approx(torch.tensor(16.25 / 6).log().item())
    by_row = [excess(5.0), excess(2.125), excess(1.0)]
    assert rows.item() == pytest.approx(sum(by_row) / 3)
    assert columns.item() == pytest.approx((excess(2.0) + excess(10.25 / 3)) / 2)


def test_correlated_residuals_have_their_closed_form():
    torch.manual_seed(0)
    e = torch.randn(20_000, 2).double()
    correlated = torch.stack([e[:, 0], 0.6 * e[:, 0] + 0.8 * e[:, 1]], 1)
    wanted = -0.5 * torch.tensor(1 - 0.36).log().item()
    assert correlation_statistic(correlated).item() == pytest.approx(wanted, rel=0.05)
    assert correlation_statistic(3 * correlated + 1).item() == pytest.approx(wanted, rel=0.05)
    assert correlation_statistic(e).item() < 1e-3


def test_correlations_of_few_rows_of_holes_and_of_equal_columns():
    torch.manual_seed(0)
    r = torch.randn(7, 3).double()
    wanted = -0.5 * np.linalg.slogdet(np.corrcoef(r.numpy().T))[1]
    assert correlation_statistic(r).item() == pytest.approx(wanted, rel=1e-6)
    r[2, 1] = 0.0
    wanted = correlation_statistic(r)
    r[2, 1] = torch.nan  # a missing residual counts as 0, its expectation
    assert correlation_statistic(r) == wanted
    equal = correlation_statistic(r[:, :1].expand(7, 2))
    assert equal.item() == pytest.approx(-0.5 * np.log(2e-9), rel=1e-3)


Z = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize(
    ("effect", "nats"),
    [
        (torch.zeros(20_000), 0.0),
        (torch.full((20_000,), 0.7), 0.5 * 0.49),
        (2 * Z[:, 0], 0.5 * 4),
        (Z[:, 0].square() - Z[:, 1].square(), 0.5 * 4),
        (Z[:, 0] * Z[:, 1], 0.5),
    ],
    ids=["nothing", "a constant", "a line", "squares", "a product"],
)
@pytest.mark.parametrize("holes", [False, True])
def test_what_codes_explain_is_half_of_its_mean_square(effect, nats, holes):
    """A mean that is off by a(z) costs E[a(z)^2] / 2 nats, and the rest keeps its scale."""
    torch.manual_seed(1)
    residuals = 1.5 * torch.randn(20_000, 2).double()
    residuals[:, 0] += effect
    if holes:
        residuals[:10_000, 0], nats = torch.nan, nats / 2
    gain, left = explained(Z, residuals)
    assert gain.item() == pytest.approx(nats, rel=0.1, abs=0.02)
    assert left.square().nanmean(0).tolist() == pytest.approx([2.25, 2.25], rel=0.03)
    assert torch.equal(left.isnan(), residuals.isnan())


@pytest.mark.parametrize(("width", "products"), [(0, 0), (2, 1), (10, 45), (11, 0)])
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_regression_is_that_of_least_squares(width, products, shift):
    """A constant, the causes, their squares, and the products of at most ten."""
    torch.manual_seed(0)
    n, z = 300, shift + torch.randn(300, width).double()
    r = torch.randn(n, 4).double()
    a, b = np.triu_indices(width, 1)
    few = z[:, a] * z[:, b] if products else z[:, :0]
    design = torch.cat([torch.ones(n, 1), z, z.square(), few], 1).numpy()
    assert design.shape[1] == 1 + 2 * width + products
    fitted = torch.as_tensor(design @ np.linalg.lstsq(design, r.numpy(), rcond=1e-15)[0])
    wanted = (r - fitted) * (n / (n - design.shape[1])) ** 0.5
    gain, left = explained(z, r)
    assert torch.allclose(left, wanted, atol=1e-5)
    assert gain.item() == pytest.approx(
        0.5 * (r.square() - wanted.square()).sum().item() / n, abs=1e-6
    )


def test_terms_are_at_most_a_quarter_of_the_rows():
    """100 rows: a constant and the first 24 of 40 causes are used."""
    torch.manual_seed(0)
    z = torch.randn(100, 40).double()
    gains = [explained(z, 3 * z[:, i : i + 1])[0].item() for i in (0, 23, 24, 30)]
    assert gains[:2] == pytest.approx(4.5 * z[:, [0, 23]].square().mean(0).numpy(), rel=1e-6)
    assert max(gains[2:]) < 3


def test_a_column_with_few_values_is_corrected_by_a_factor_of_two_at_most():
    torch.manual_seed(0)
    z, r = torch.randn(100, 2).double(), torch.full((100, 1), torch.nan).double()
    r[[3, 50, 70]] = torch.tensor([1.0, -2.0, 0.5]).double()[:, None]
    design = torch.cat([torch.ones(100, 1), z, z.square(), z[:, :1] * z[:, 1:]], 1)
    q, _ = np.linalg.qr(design.numpy())
    fitted = torch.as_tensor(q @ (q.T @ r.nan_to_num(0.0).numpy()) * 100 / 3)
    gain, left = explained(z, r)
    assert torch.allclose(left, (r - fitted) * 2**0.5, equal_nan=True)
    assert gain.item() == pytest.approx(
        0.5 * (r.square().nansum() - left.square().nansum()).item() / 100
    )
    nothing = torch.full((100, 1), torch.nan)
    assert explained(z.float(), nothing)[0] == 0


@pytest.mark.parametrize("causes", [0, 3, 40])
def test_regression_on_noise_gains_nothing_on_average(causes):
    """Also with more terms than a quarter of the rows, which are then left out."""
    torch.manual_seed(0)
    both = [explained(torch.randn(100, causes), 2 * torch.randn(100, 5)) for _ in range(200)]
    gains = torch.stack([gain for gain, _ in both])
    assert abs(gains.mean()) < 4 * gains.std() / 200**0.5
    left = torch.stack([left.square().mean() for _, left in both])
    assert left.mean().item() == pytest.approx(4, rel=0.02)


def test_residuals_are_clipped_at_ten_robust_deviations_of_both_samples():
    torch.manual_seed(0)
    first, second = torch.randn(2, 5000, 3).double()
    first[:, 1] *= 100  # a scale that is far off stays
    second[:, 2] = 0.0
    second[0, 2], first[0, 2], first[1, 2] = 1000.0, -12.0, torch.nan
    one, other = clipped(first, second)
    assert torch.equal(one[:, :2], first[:, :2])
    assert torch.equal(other[:, :2], second[:, :2])
    assert (other[0, 2], one[0, 2]) == (10, -10)
    assert one[1, 2].isnan()
    far, normal = 100 * torch.randn(5000, 1), torch.randn(5000, 1)
    far[0], far[1] = 800.0, 2000.0
    one, _ = clipped(far, normal)
    assert one[0].item() == 800
    assert one[1].item() == pytest.approx(1000, rel=0.05)
    nothing = torch.full((50, 1), torch.nan)
    assert clipped(nothing, torch.full((50, 1), 12.0))[1].max() == 12
    assert clipped(nothing, torch.tensor([[12.0], *[[0.1]] * 49]))[1].max() == 10
    assert clipped(nothing, nothing)[0].isnan().all()


def test_a_difference_is_standard_normal_under_equal_distributions():
    torch.manual_seed(0)
    off = []
    for seed in range(30):
        rows = torch.randn(200, 3).double()
        off += [d.deviations for d in difference(scale_statistics, rows[:100], rows[100:], seed)]
    off = torch.tensor(off)
    assert abs(off.mean()) < 0.4
    assert 0.75 < off.std() < 1.3


def test_at_most_thirty_columns_are_compared():
    assert some_columns(5).tolist() == [0, 1, 2, 3, 4]
    assert len(set(some_columns(784).tolist())) == 30

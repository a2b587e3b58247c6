"""The American names of the fields of `Gaps`, and the deprecated British ones."""

import pytest
import torch

import pyro_vae as pv
from pyro_vae.diagnostics.gaps import _split
from pyro_vae.models.exact import linear_gaussian
from pyro_vae.pairs.rng import seeded

NAMES = {"amortised": "amortized", "amortisation": "amortization"}


@pytest.fixture(scope="module")
def found():
    pair = linear_gaussian(spread=1.3)
    with seeded(0):
        x = pair.marginal().sample((6,)).detach()
    options = {"steps": 2, "num_samples": 30, "engine": "eager", "progress": False}
    return pv.gaps(pair, x, **options)


@pytest.mark.parametrize("old", NAMES)
def test_an_old_name_gives_the_same_numbers_and_names_the_new_one(found, old):
    new = NAMES[old]
    with pytest.warns(
        DeprecationWarning, match=f"Gaps.{old} is deprecated.*use Gaps.{new}$"
    ) as told:
        assert getattr(found, old) is getattr(found, new)
    assert [warning.filename for warning in told] == [__file__]


def test_tables_and_records_have_the_new_names_alone(found):
    record = found.as_dict()
    assert record["amortization"] == pytest.approx(record["refined"] - record["amortized"])
    assert "amortized ELBO" in str(found)
    assert "amortization gap" in str(found)
    for old in NAMES:
        assert old not in found._fields
        assert not any(old in name for name in [*record, str(found)])


def test_blocks_of_data_are_joined_by_field(monkeypatch):
    """Each field keeps its own numbers, in the order of the data, however the data are split."""
    pair = linear_gaussian(spread=1.3)
    with seeded(0):
        x = pair.marginal().sample((5,)).detach()
        before, after = torch.randn(2, 40, 5, dtype=torch.float64)
    chosen = torch.tensor([True, False, True, False, True])
    whole = _split(before, after, chosen, torch.float64)
    torch.testing.assert_close(whole.amortized.per_datum, before.mean(0))
    torch.testing.assert_close(whole.refined.per_datum, after.mean(0))
    log_p = torch.where(chosen, after, before).exp().mean(0).log()
    torch.testing.assert_close(whole.log_likelihood.per_datum, log_p)
    torch.testing.assert_close(
        whole.approximation.per_datum + whole.amortization.per_datum, whole.inference.per_datum
    )
    options = {"steps": 1, "num_samples": 30, "engine": "eager", "progress": False}
    together = pv.gaps(pair, x, **options)
    monkeypatch.setattr("pyro_vae.diagnostics.gaps.BLOCK", 2)
    blocks = pv.gaps(pair, x, **options)
    for name in ("log_likelihood", "refined", "amortized"):
        one, other = getattr(together, name), getattr(blocks, name)
        assert one.per_datum.shape == other.per_datum.shape == (5,)
        # Each block has its own draws, so the numbers agree within their errors.
        errors = (one.standard_errors**2 + other.standard_errors**2).sqrt()
        assert bool(((one.per_datum - other.per_datum).abs() <= 6 * errors + 1e-6).all())

"""NaN in a Dataset or a DataLoader is a missing entry, as it is in an array."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pyro_vae as pv


class Rows(Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index]


def rows(first=30):
    """Rows of which only later ones have holes, so that the first minibatch has none."""
    torch.manual_seed(0)
    x = torch.randn(60, 3)
    x[first::3, 1] = torch.nan
    return x


def partly():
    torch.manual_seed(0)
    return pv.VAE.mlp((3,), latent_dim=1, hidden=(4,), likelihood=pv.Missing(pv.Gaussian))


@pytest.mark.parametrize("wrap", [TensorDataset, Rows, lambda x: DataLoader(Rows(x), 20)])
def test_results_are_those_of_the_array(wrap):
    x, pair = rows(), partly()
    for tool, options in (
        (pv.log_likelihood, {"num_samples": 30}),
        (pv.impute, {"num_samples": 30, "draws": 2}),
        (pv.encode, {}),
    ):
        ours, theirs = tool(pair, wrap(x), **options), tool(pair, x, **options)
        if tool is pv.impute:
            assert torch.equal(ours.missing, x.isnan())
            assert not bool(ours.mean.isnan().any())
            torch.testing.assert_close(ours.mean[~x.isnan()], x[~x.isnan()])
        elif tool is pv.encode:
            torch.testing.assert_close(ours["z"], theirs["z"])
        else:
            assert ours.value == pytest.approx(theirs.value, abs=0.1)


def test_a_fit_is_that_of_the_array():
    """Without shuffling, the minibatches of a loader are those of the array."""
    x, found = rows(0), []
    for data in (DataLoader(Rows(x), 60), x):
        pair = partly()
        pv.fit(pair, data, epochs=3, batch_size=60, seed=0, engine="eager", progress=False)
        assert all(bool(p.isfinite().all()) for p in pair.parameters())
        found.append(pv.log_likelihood(pair, x, num_samples=100).value)
    assert found[0] == pytest.approx(found[1], abs=0.05)


@pytest.mark.parametrize("wrap", [Rows, lambda x: DataLoader(Rows(x), 20)])
def test_a_pair_that_scores_nan_refuses_it_in_one_line(wrap):
    pair = pv.VAE.mlp((3,), latent_dim=1, hidden=(4,), likelihood=pv.Gaussian)
    with pytest.raises(pv.UsageError, match=r"first in row 30 of the epoch; for NaN as a missing"):
        pv.fit(pair, wrap(rows()), epochs=1, progress=False, engine="eager")


def test_infinite_values_and_nan_in_the_context_stay_refused():
    x = rows()
    x[40, 0] = torch.inf
    with pytest.raises(pv.UsageError, match="first in row 40 of the epoch"):
        pv.log_likelihood(partly(), Rows(x), num_samples=2)
    pair = pv.VAE.mlp((3,), 1, (4,), pv.Missing(pv.Gaussian), context_shapes=((1,),))
    with pytest.raises(pv.UsageError, match="context 1 holds values that are not finite"):
        pv.log_likelihood(pair, TensorDataset(rows(), rows()[:, 1:2]), num_samples=2)


def masked(x):
    return np.ma.array(x.nan_to_num().numpy(), mask=x.isnan().numpy())


@pytest.mark.parametrize("wrap", [lambda x: x, Rows, masked])
def test_a_row_without_an_observed_entry_is_refused(wrap):
    """As `read_table` and the command line refuse it."""
    x = rows()
    x[45] = torch.nan
    for tool in (pv.encode, pv.log_likelihood):
        with pytest.raises(pv.UsageError, match="x has no observed entry in row 45"):
            tool(partly(), wrap(x))


def test_a_row_of_nan_is_data_if_its_mask_is_observed():
    x = rows()
    x[45] = torch.nan
    pair = pv.NotAtRandomVAE(partly())
    assert bool(pv.log_likelihood(pair, x, num_samples=2).per_datum.isfinite().all())

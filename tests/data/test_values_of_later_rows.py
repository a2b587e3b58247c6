"""Rows that arrive later than the first ones have values that the likelihood can score."""

import re

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.data import disk, stored
from pyro_vae.data.supports import Allowed
from pyro_vae.errors import UsageError

FAST = {"epochs": 1, "batch_size": 16, "progress": False, "engine": "eager"}


def vae(likelihood=pv.Bernoulli, shape=(4,)):
    torch.manual_seed(0)
    return pv.VAE.mlp(shape, latent_dim=2, hidden=(5,), likelihood=likelihood)


def binary():
    return (torch.rand(90, 4) > 0.5).float()


def gray():
    return torch.rand(90, 4)


def counts():
    return torch.poisson(torch.ones(90, 4))


def tokens():
    return torch.randint(0, 5, (90, 4))


CASES = {
    "binary": (vae, binary, 2.0, "holds 2 in row"),
    "binary, then gray": (vae, binary, 0.5, "holds 0.5 in row"),
    "gray": (vae, gray, 1.5, "holds 1.5 in row"),
    "counts": (lambda: vae(pv.Poisson), counts, -1.0, "holds -1 in row"),
    "counts, then a fraction": (lambda: vae(pv.Poisson), counts, 1.5, "holds 1.5 in row"),
    "tokens": (lambda: vae(pv.Categorical(5, tokens=True)), tokens, 7, "holds 7 in row"),
}
SOURCES = {
    "data set": TensorDataset,
    "loader": lambda x: DataLoader(TensorDataset(x), batch_size=16),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("case", CASES)
def test_a_value_outside_the_support_is_named(case, source):
    """The row has the number in the order of reading."""
    make, data, value, words = CASES[case]
    x = data()
    pv.fit(make(), SOURCES[source](x), **FAST)
    x[80, 1] = value
    with pytest.raises(UsageError, match=re.escape(words)):
        pv.fit(make(), SOURCES[source](x), **FAST)
    pair = make()
    for tool in (pv.evaluate, lambda pair, x: pv.log_likelihood(pair, x, num_samples=5)):
        with pytest.raises(UsageError, match=re.escape(words + " 80")):
            tool(pair, SOURCES[source](x))


def test_intensities_after_binary_rows_have_a_message_of_their_own():
    x = binary()
    x[80, 1] = 0.5
    with pytest.raises(UsageError, match="its first rows have only the values 0 and 1"):
        pv.evaluate(vae(), TensorDataset(x))


def test_missing_entries_pass():
    x = binary()
    x[70, 2] = torch.nan
    pv.fit(vae(pv.Missing(pv.Bernoulli)), TensorDataset(x), **FAST)
    x[71, 0] = 3.0
    with pytest.raises(UsageError, match="holds 3 in row"):
        pv.fit(vae(pv.Missing(pv.Bernoulli)), TensorDataset(x), **FAST)


@pytest.mark.parametrize("case", ["binary", "counts, then a fraction", "gray"])
def test_arrays_on_disk(case, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "LEAST_BYTES", 1)
    monkeypatch.setattr(disk, "BLOCK_BYTES", 80)  # 5 rows
    monkeypatch.setattr(stored, "WINDOW_BLOCKS", 4)
    make, data, value, words = CASES[case]
    x = data()
    np.save(tmp_path / "sound.npy", x.numpy())
    x[80, 1] = value
    np.save(tmp_path / "x.npy", x.numpy())
    pv.fit(make(), np.load(tmp_path / "sound.npy", mmap_mode="r"), **FAST)
    with pytest.raises(UsageError, match=re.escape(words)):
        pv.fit(make(), np.load(tmp_path / "x.npy", mmap_mode="r"), **FAST)
    with pytest.raises(UsageError, match=re.escape(words + " 80")):
        pv.evaluate(make(), np.load(tmp_path / "x.npy", mmap_mode="r"))


def test_eight_bit_intensities_and_real_values_are_not_checked():
    calls = []
    real = Allowed.__call__

    def seen(self, x):
        calls.append(x.dtype)
        return real(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Allowed, "__call__", seen)
        pv.fit(vae(pv.Gaussian), TensorDataset(torch.randn(90, 4)), **FAST)
        assert calls == []
        pv.fit(vae(), TensorDataset((torch.rand(90, 4) * 255).to(torch.uint8)), **FAST)
        assert set(calls) == {torch.uint8}

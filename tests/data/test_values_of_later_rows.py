"""Rows that arrive later than the first ones have values that the likelihood can score."""

import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.data import disk, stored
from pyro_vae.data.preparation import preparation
from pyro_vae.data.sources import Arrays
from pyro_vae.data.supports import Allowed
from pyro_vae.errors import UsageError

FAST = {"epochs": 1, "batch_size": 16, "progress": False, "engine": "eager"}


def vae(likelihood=pv.Bernoulli, shape=(4,)):
    torch.manual_seed(0)
    return pv.VAE.mlp(shape, latent_dim=2, hidden=(5,), likelihood=likelihood)


def binary():
    return (torch.rand(390, 4) > 0.5).float()


def gray():
    return torch.rand(390, 4)


def counts():
    return torch.poisson(torch.ones(390, 4))


def tokens():
    return torch.randint(0, 5, (390, 4))


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
    x[380, 1] = value
    with pytest.raises(UsageError, match=re.escape(words)):
        pv.fit(make(), SOURCES[source](x), **FAST)
    pair = make()
    for tool in (pv.evaluate, lambda pair, x: pv.log_likelihood(pair, x, num_samples=5)):
        with pytest.raises(UsageError, match=re.escape(words + " 380")):
            tool(pair, SOURCES[source](x))


def test_intensities_after_binary_rows_have_a_message_of_their_own():
    x = binary()
    x[380, 1] = 0.5
    with pytest.raises(UsageError, match="first rows have only the values 0 and 1"):
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
    x[380, 1] = value
    np.save(tmp_path / "x.npy", x.numpy())
    pv.fit(make(), np.load(tmp_path / "sound.npy", mmap_mode="r"), **FAST)
    with pytest.raises(UsageError, match=re.escape(words)):
        pv.fit(make(), np.load(tmp_path / "x.npy", mmap_mode="r"), **FAST)
    with pytest.raises(UsageError, match=re.escape(words + " 380")):
        pv.evaluate(make(), np.load(tmp_path / "x.npy", mmap_mode="r"))


def test_eight_bit_intensities_and_real_values_are_not_checked():
    calls = []
    real = Allowed.holds

    def seen(self, x):
        calls.append(x.dtype)
        return real(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Allowed, "holds", seen)
        patch.setattr(Allowed, "__call__", lambda self, x: pytest.fail("a slow check"))
        pv.fit(vae(pv.Gaussian), TensorDataset(torch.randn(390, 4)), **FAST)
        assert calls == []
        pv.fit(vae(), TensorDataset((torch.rand(390, 4) * 255).to(torch.uint8)), **FAST)
        assert set(calls) == {torch.uint8}


def images(black, dtype=torch.float32):
    """Gray images; the first ones are black with one white pixel."""
    x = torch.rand(390, 4)
    x[:black] = torch.tensor([1.0, 0, 0, 0])
    return x if dtype is torch.float32 else (x * 255).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_black_images_come_first(dtype):
    """They are binarized like those in memory. Later intensities are refused."""
    x = images(100, dtype)
    found = [pv.evaluate(vae(), rows, seed=1).elbo for rows in (x, TensorDataset(x))]
    assert found[0] == pytest.approx(found[1], rel=0.03)  # other draws
    plain = pv.evaluate(vae(), TensorDataset(x), binarize="none", seed=1).elbo
    assert found[1] != plain
    with pytest.raises(UsageError, match="so x is not treated as intensities"):
        pv.evaluate(vae(), TensorDataset(images(300, dtype)))


class Changing(torch.nn.Module):
    """A pair that observes a function of x, and may mask some entries."""

    def __init__(self, likelihood, change=lambda x: x, mask=lambda x: None):
        super().__init__()
        torch.manual_seed(0)
        self.shift, self.likelihood = torch.nn.Linear(2, 4), likelihood
        self.change, self.mask = change, mask

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            mask = self.mask(x)
            given = self.likelihood(self.shift(z))
            given = given if mask is None else given.mask(mask)
            pyro.sample("x", given.to_event(1), obs=self.change(x))

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).expand([len(x), 2]).to_event(1))


def bernoulli(logits):
    return dist.Bernoulli(logits=logits, validate_args=False)


def poisson(logits):
    return dist.Poisson(logits.exp(), validate_args=False)


def with_minus_one():
    x = binary()
    x[380, 1] = -1
    return x


LEGITIMATE = {
    "a threshold": (lambda: Changing(bernoulli, lambda x: (x > 0.5).float()), lambda: images(100)),
    "a least value": (lambda: Changing(poisson, lambda x: x.clamp(min=0)), with_minus_one),
    "a mask of few rows": (
        lambda: Changing(bernoulli, mask=lambda x: (x >= 0) if (x < 0).any() else None),
        with_minus_one,
    ),
}


@pytest.mark.parametrize("name", LEGITIMATE)
def test_a_pair_that_changes_or_hides_only_later_values(name):
    """The first rows do not show what the pair does with such values."""
    make, data = LEGITIMATE[name]
    x, pair = data(), make()
    rows = Arrays([x])
    bound = [pv.evaluate(pair, rows, seed=1).elbo for rows in (x, TensorDataset(x))]
    assert bound[0] == pytest.approx(bound[1], rel=0.02)  # other draws
    assert not preparation(pair, rows).binarize
    pv.fit(pair, TensorDataset(x), **FAST)


def test_a_mask_of_some_rows_does_not_end_the_check():
    x = with_minus_one()
    x[385, 0] = 3.0
    pair = Changing(bernoulli, mask=lambda x: (x >= 0) if (x < 0).any() else None)
    with pytest.raises(UsageError, match="holds 3 in row 385"):
        pv.log_likelihood(pair, TensorDataset(x), num_samples=5, batch_size=1)


def test_a_fast_check_agrees_with_the_full_one():
    """Also for values next to those of the support, and for positive whole numbers."""
    odd = [0.0, 1.0, -1.0, 2.0, 0.5, 1 + 2**-23, 1 - 2**-24, 1e-45, -0.0, torch.nan, -1e-45, 255.0]
    supports = [
        constraints.boolean,
        constraints.nonnegative_integer,
        constraints.positive_integer,
        constraints.unit_interval,
        constraints.positive,
    ]
    for support, gray in [*((one, False) for one in supports), (constraints.boolean, True)]:
        allowed = Allowed({}, support, torch.float32, False, True, gray, lambda batch: None)
        for value in odd:
            x = torch.tensor([[1.0, value]])
            assert allowed.holds(x) == bool(allowed(x).all()), (support, gray, value)
        for value in (0, 1, 130, 255):
            x = torch.tensor([[0, value]], dtype=torch.uint8)
            assert allowed.holds(x) == bool(allowed(x).all()), (support, gray, value)

"""Loaders whose samplers repeat or leave out rows, and loaders with errors."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import pyro_vae as pv
from pyro_vae.data.sources import source
from pyro_vae.errors import UsageError

FAST = {"epochs": 1, "engine": "eager", "progress": False}
X = torch.randn(400, 1, generator=torch.Generator().manual_seed(0)) + 2
DATA = TensorDataset(X)


class Mean(nn.Module):
    """A global latent, the mean of the data; its posterior has the precision n + 1."""

    def __init__(self):
        super().__init__()
        self.loc, self.raw = nn.Parameter(torch.zeros(1)), nn.Parameter(-torch.ones(1))

    def model(self, x):
        w = pyro.sample("w", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(w, 1.0).expand([len(x), 1]).to_event(1), obs=x)

    def guide(self, x):
        pyro.sample("w", dist.Normal(self.loc, self.raw.exp()).to_event(1))


class Every(Sampler):
    """A sampler of a user with every tenth row; its length may be wrong."""

    def __init__(self, n, length=None):
        self.n, self.length = n, length

    def __iter__(self):
        return iter(range(0, self.n, 10))

    def __len__(self):
        return self.n // 10 if self.length is None else self.length


class Rows(IterableDataset):
    """Rows in order, with a length that may be wrong or missing."""

    def __init__(self, n, length):
        self.n, self.length = n, length

    def __iter__(self):
        return iter(X[: self.n])

    def __len__(self):
        if self.length is None:
            raise TypeError("no length")
        return self.length


def weighted(number):
    return WeightedRandomSampler([1.0] * 50 + [0.0] * 350, number)


LOADERS = {  # rows of an epoch, and different rows of all epochs
    "plain": (lambda: DataLoader(DATA, 20), 400, 400),
    "shuffled": (lambda: DataLoader(DATA, 20, shuffle=True), 400, 400),
    "subset": (lambda: DataLoader(DATA, 20, sampler=SubsetRandomSampler(range(40))), 40, 40),
    "some at a time": (
        lambda: DataLoader(DATA, 20, sampler=RandomSampler(DATA, num_samples=40)),
        40,
        400,
    ),
    "with replacement": (
        lambda: DataLoader(DATA, 20, sampler=RandomSampler(DATA, True, num_samples=1000)),
        1000,
        400,
    ),
    "weighted": (lambda: DataLoader(DATA, 20, sampler=weighted(1000)), 1000, 50),
    "of a user": (lambda: DataLoader(DATA, 20, sampler=Every(400)), 40, 40),
    "of a wrong length": (lambda: DataLoader(DATA, 20, sampler=Every(400, 400)), 40, 40),
    "batches": (
        lambda: DataLoader(
            DATA, batch_sampler=BatchSampler(SubsetRandomSampler(range(40)), 20, False)
        ),
        40,
        40,
    ),
    "lists of rows": (lambda: DataLoader(DATA, batch_sampler=[[0, 1, 2], [3, 4], [0, 1]]), 7, 5),
    "drop_last": (lambda: DataLoader(DATA, 30, drop_last=True), 390, 390),
    "drop_last, shuffled": (lambda: DataLoader(DATA, 30, shuffle=True, drop_last=True), 390, 400),
    "iterable": (lambda: DataLoader(Rows(60, 60), 20), 60, 60),
    "data set": (lambda: DATA, 400, 400),
}


@pytest.mark.parametrize("name", LOADERS)
def test_the_numbers_of_rows_are_those_of_the_sampler(name):
    make, epoch, different = LOADERS[name]
    rows = source(make(), (), Mean())
    assert (len(rows), rows.num_data) == (epoch, different)
    batches = list(rows.batches(20))
    assert sum(len(batch[0]) for batch in batches) == epoch
    assert rows.steps(20) == len(batches)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["subset", "weighted"])
def test_the_posterior_of_a_global_latent_counts_the_different_rows(name):
    make, epoch, different = LOADERS[name]
    torch.manual_seed(0)
    pair, epochs = Mean(), 30_000 // epoch  # 1,500 steps
    pv.fit(
        pair,
        make(),
        epochs=epochs,
        learning_rate=0.03,
        learning_rate_schedule=pv.CosineSchedule(epochs),
        progress=False,
    )
    assert pair.raw.exp().item() == pytest.approx((different + 1) ** -0.5, rel=0.15)


def test_schedules_use_the_rows_of_an_epoch():
    seen = []
    loader = LOADERS["subset"][0]()
    pv.fit(Mean(), loader, beta=lambda epoch: seen.append(epoch) or 1.0, **FAST | {"epochs": 2})
    assert seen == [0.0, 0.5, 1.0, 1.5]


@pytest.mark.parametrize(("gives", "says"), [(40, 400), (400, 40)])
def test_a_wrong_length_is_rejected(gives, says):
    with pytest.raises(UsageError, match=f"length of {says} rows but gave {gives} in an epoch"):
        pv.fit(Mean(), DataLoader(Rows(gives, says), 20), **FAST)


def test_a_stream_without_a_length_is_rejected():
    with pytest.raises(UsageError, match="Rows has no length"):
        pv.fit(Mean(), DataLoader(Rows(40, None), 20), **FAST)


def test_a_loader_without_minibatches_is_rejected():
    few = DataLoader(TensorDataset(X[:33]), 64, drop_last=True)
    for call in (lambda: pv.fit(Mean(), few, **FAST), lambda: pv.evaluate(small(), few)):
        with pytest.raises(UsageError, match="gives no minibatch; with drop_last=True"):
            call()


def small():
    torch.manual_seed(0)
    return pv.VAE.mlp((1,), latent_dim=2, hidden=(8,), likelihood=pv.Gaussian)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize(
    "tool",
    [
        lambda pair, rows: pv.fit(pair, rows, **FAST),
        lambda pair, rows: pv.encode(pair, rows),
        lambda pair, rows: pv.evaluate(pair, rows, num_samples=2),
    ],
    ids=["fit", "encode", "evaluate"],
)
def test_a_value_in_a_later_minibatch_is_named_by_its_row(tool, value):
    x = X[:33].double()
    x[32] = value
    with pytest.raises(UsageError, match=r"x holds .* in row 32 of the epoch"):
        tool(small(), DataLoader(TensorDataset(x), 8))


class Masked(Dataset):
    def __getitem__(self, index):
        return np.ma.array([1.0], mask=[index % 2 == 0])

    def __len__(self):
        return 40


class Sparse(Dataset):
    def __getitem__(self, index):
        return torch.ones(1).to_sparse()

    def __len__(self):
        return 40


@pytest.mark.parametrize(("rows", "words"), [(Masked, "masked arrays"), (Sparse, "is sparse")])
def test_a_data_set_must_give_plain_numbers(rows, words):
    for given in (rows(), DataLoader(rows(), 8)):
        with pytest.raises(UsageError, match=words):
            pv.fit(small(), given, **FAST)


class Normalized(nn.Module):
    """A pair whose encoder has batch normalization."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.decoder = nn.Linear(1, 1)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.tanh().exp()).to_event(1))


@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_batch_normalization_of_one_row_is_rejected_with_advice(engine):
    options = FAST | {"engine": engine, "batch_size": 8}
    words = "batch normalization cannot compute the variance .*; choose a batch_size"
    with pytest.raises(UsageError, match=words):
        pv.fit(Normalized(), X[:33], **options)
    loader = DataLoader(TensorDataset(X[:33]), 8, drop_last=True)
    assert len(pv.fit(Normalized(), loader, **options)) == 1

"""The epoch that is kept if the validation bound is not finite in some or all epochs."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.training.curves import curves
from pyro_vae.training.history import is_better
from pyro_vae.training.validation import Bound

FAST = {"batch_size": 16, "engine": "eager", "progress": False}


class Overflowing(nn.Module):
    """The scale of the guide is the exponential of a number of x, until training changes it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(5, 4), nn.Linear(2, 5)
        self.encoder.weight.data[2:] = 0
        self.encoder.weight.data[2:, 0] = 1

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


def data(extreme):
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
    held = x.clone()
    held[0] = torch.tensor([extreme, 0.0, 0.0, 0.0, 0.0])
    return x, held


def bounds(history):
    return [epoch.validation.bound for epoch in history.epochs]


def test_an_epoch_without_a_bound_is_never_kept_beside_one_with_it():
    pair, (x, held) = Overflowing(), data(90.0)
    with pytest.warns(UserWarning, match=r"not finite in \d of 20 epochs"):
        history = pv.fit(pair, x, validation=held, epochs=20, learning_rate=0.05, **FAST)
    found = bounds(history)
    assert not math.isfinite(found[0])
    finite = [value for value in found if math.isfinite(value)]
    assert found[history.best_epoch - 1] == max(finite)
    # The parameters are those of that epoch.
    alone = Overflowing()
    options = FAST | {"epochs": history.best_epoch, "learning_rate": 0.05}
    pv.fit(alone, x, **options)
    torch.testing.assert_close(pair.decoder.weight, alone.decoder.weight)


def test_the_last_epoch_is_kept_where_no_epoch_has_a_bound(tmp_path):
    pair, (x, held) = Overflowing(), data(1e6)
    words = "in 3 of 3 epochs; the pair has the parameters of the last epoch"
    with pytest.warns(UserWarning, match=words):
        history = pv.fit(pair, x, validation=held, epochs=3, out=tmp_path / "run", **FAST)
    assert history.best_epoch == 3
    assert not any(map(math.isfinite, bounds(history)))
    alone = Overflowing()
    pv.fit(alone, x, epochs=3, **FAST)
    torch.testing.assert_close(pair.decoder.weight, alone.decoder.weight)
    curves({name: history[name] for name in history.epochs[0].row()})  # a figure, and no error


def test_patience_ends_where_no_epoch_has_a_bound():
    pair, (x, held) = Overflowing(), data(1e6)
    with pytest.warns(UserWarning, match="in 4 of 4 epochs"):
        history = pv.fit(pair, x, validation=held, epochs=20, patience=4, **FAST)
    assert history.stopped_early
    assert len(history) == 4


@pytest.mark.parametrize(
    ("found", "best"),
    [
        ([math.nan, -5.0, -4.0, -6.0], 3),
        ([-math.inf, math.nan, -9.0], 3),
        ([-3.0, math.nan, -3.0], 1),
        ([-3.0, math.inf, -2.0], 3),  # an infinite value is not a bound either
        ([math.nan, -math.inf], 2),
        ([math.nan, math.nan, math.nan], 3),
        ([-1.0], 1),
    ],
)
def test_the_best_epoch(found, best):
    assert best_of([Bound(value, value, value, {}) for value in found]) == best
    assert best_of([None] * len(found)) == len(found)


def best_of(measured):
    """The number of the last epoch that was better than the best one before it."""
    best, number = None, 0
    for i, bound in enumerate(measured):
        if is_better(bound, best):
            best, number = bound, i + 1
    return number

"""Data far from the range of the untrained model give a warning, and other data do not."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import pyro_vae as pv
from pyro_vae.data.preparation import preparation
from pyro_vae.data.ranges import extreme, range_fault
from pyro_vae.data.sources import source
from pyro_vae.errors import UsageError
from pyro_vae.training.stopping import NonFiniteError

FAST = {"batch_size": 32, "engine": "eager", "progress": False}
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(300, 5, generator=GENERATOR)
DIGITS = load_digits().images.reshape(-1, 64)


def vae(likelihood=pv.Gaussian, width=5):
    torch.manual_seed(0)
    return pv.VAE.mlp((width,), latent_dim=2, hidden=(16,), likelihood=likelihood)


def fault(pair, x):
    rows = source(x, (), pair)
    return range_fault(pair, rows, preparation(pair, rows))


class Standardized(nn.Module):
    """A pair of a user, which contains the scale of its data."""

    def __init__(self, scale):
        super().__init__()
        self.encoder, self.decoder, self.scale = nn.Linear(5, 4), nn.Linear(2, 5), scale

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            loc = self.scale * self.decoder(z)
            pyro.sample("x", dist.Normal(loc, self.scale).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            loc, raw = self.encoder(x / self.scale).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.tanh().exp()).to_event(1))


ONE = torch.ones(5)
FAR, APART, SMALL = "5 of 5 columns are far", "differ in range", "vary by"
ODD = {
    "100 times": (vae, 100 * X, FAR),
    "30 times": (vae, 30 * X, FAR),
    "1e8 times": (vae, 1e8 * X, FAR),
    "an offset": (vae, X + 1e4, FAR),
    "1e-4 times": (vae, 1e-4 * X, SMALL),
    "one column 1,000 times": (
        vae,
        X * torch.tensor([1, 1, 1e3, 1, 1]),
        "Column 2 is the farthest",
    ),
    "one column a thousandth": (vae, X * torch.tensor([1, 1e-3, 1, 1, 1]), "column 1 varies"),
    "from 0.1 to 100": (vae, X * torch.tensor([0.01, 1, 1, 1, 10]), "column 0 varies"),
    "heavy tails": (lambda: vae(pv.StudentT), 100 * X, FAR),
    "pixels to 255, as floats": (
        lambda: vae(pv.Gaussian, 64),
        np.rint(DIGITS * 255 / 16),
        "columns are far",
    ),
    "counts as real numbers": (vae, torch.poisson(torch.full((300, 5), 5e3), GENERATOR), FAR),
    "the pair's own": (lambda: Standardized(1.0), 100 * X, FAR),
    "the pair's own, far too large": (lambda: Standardized(1e5), X, SMALL),
}

ORDINARY = {
    "standardized": (vae, X),
    "3 times": (vae, 3 * X),
    "a tenth": (vae, 0.1 * X),
    "small fixed scale": (lambda: vae(pv.Gaussian(scale=0.01)), X),
    "a scale that starts there": (lambda: vae(pv.Gaussian(scale=100.0, learned=True)), 100 * X),
    "constant": (vae, torch.ones(20, 5)),
    "8-bit pixels": (lambda: vae(pv.Gaussian, 64), np.rint(DIGITS * 255 / 16).astype(np.uint8)),
    "pixels in [0, 1]": (lambda: vae(pv.Gaussian, 64), DIGITS / 16),
    "pixels, continuous Bernoulli": (lambda: vae(pv.ContinuousBernoulli, 64), DIGITS / 16),
    "pixels, levels": (
        lambda: vae(pv.DiscretizedLogistic, 64),
        np.rint(DIGITS * 255 / 16).astype(np.uint8),
    ),
    "counts, Poisson": (lambda: vae(pv.Poisson), torch.poisson(torch.full((300, 5), 5e3))),
    "counts, negative binomial": (
        lambda: vae(pv.NegativeBinomial),
        torch.poisson(torch.full((300, 5), 5e3)),
    ),
    "without a variance": (
        lambda: vae(pv.StudentT),
        torch.from_numpy(np.random.default_rng(0).standard_cauchy((300, 5))),
    ),
    "the pair's own": (lambda: Standardized(100.0), 100 * X),
    "rare columns": (vae, (torch.rand(300, 5, generator=GENERATOR) < 0.01).float() + 0.0),
}


@pytest.mark.parametrize("name", ODD)
def test_an_unusual_range_gives_a_message(name):
    make, x, words = ODD[name]
    said = fault(make(), x)
    assert words in said
    assert "standardize x" in said


@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_range_gives_no_message(name):
    make, x = ORDINARY[name]
    assert fault(make(), x) is None


def test_standardized_data_are_ordinary():
    x = (torch.randn(300, 5, generator=GENERATOR) + 3) * torch.tensor([1e-6, 1, 1e3, 1e6, 1e9])
    assert fault(vae(), x) is not None
    assert fault(vae(), (x - x.mean(0)) / x.std(0)) is None


def test_fit_warns_once_and_only_if_the_pair_does_not_know_the_range(tmp_path):
    pair = Standardized(100.0)
    pv.fit(pair, 100 * X, epochs=1, **FAST)
    pair, run = vae(), tmp_path / "run"
    with pytest.warns(
        UserWarning, match="range of x differs from that of the untrained model"
    ) as heard:
        pv.fit(pair, 100 * X, epochs=1, out=run, **FAST)
    assert sum("range of x" in str(warning.message) for warning in heard) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pv.fit(vae(), 100 * X, epochs=2, out=run, resume=True, **FAST)


@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_the_error_of_a_loss_that_is_not_finite_names_the_range(engine):
    with (
        pytest.warns(UserWarning, match="range of x"),
        pytest.raises(NonFiniteError, match=r"not finite.*standardize x") as caught,
    ):
        pv.fit(vae(pv.Gaussian(scale=0.01)), 1e20 * X, epochs=1, **FAST | {"engine": engine})
    assert "learning_rate" not in str(caught.value)


def test_the_error_of_a_loss_that_is_not_finite_names_the_extreme_value():
    x = X.clone()
    x[7, 2] = 1e30
    words = r"x holds a value of size 1e\+30, but .* median row has size"
    with (
        pytest.warns(UserWarning, match="column 2 by 1e"),
        pytest.raises(UsageError, match=words),
    ):
        pv.fit(vae(), x, epochs=1, **FAST)


def test_a_large_learning_rate_is_not_reported_as_a_problem_of_the_range():
    options = FAST | {"optimizer": torch.optim.SGD, "learning_rate": 1e38}
    with pytest.raises(NonFiniteError, match="a smaller learning_rate"):
        pv.fit(vae(), X, epochs=3, **options)


def test_an_extreme_value_is_compared_with_other_rows():
    assert extreme(X) is None
    assert extreme(1e3 * X) is None  # all rows are large, so no row is extreme
    assert extreme(torch.cat([X, torch.full((1, 5), 1e6)])) is not None

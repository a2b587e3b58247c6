"""Padding of any value counts for nothing: NaN, infinite, or outside the support."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.errors import UsageError

N, STEPS = 6, 4
FILLS = [-1.0, 1e6, float("nan"), float("inf")]


class Masked(nn.Module):
    """Independent entries with one latent for each row; what is not seen is masked."""

    def __init__(self, way: str, likelihood: str = "normal") -> None:
        super().__init__()
        self.way, self.likelihood = way, likelihood
        self.weight = nn.Parameter(torch.linspace(-1.0, 1.0, STEPS))
        self.encoder = nn.Linear(STEPS, 1)

    def observation(self, z: Tensor) -> dist.TorchDistribution:
        loc = z[..., None] * self.weight
        return dist.Normal(loc, 1.0) if self.likelihood == "normal" else dist.Poisson(loc.exp())

    def model(self, x: Tensor, seen: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            fn = self.observation(z)
            if self.way == "entries":
                pyro.sample("x", fn.mask(seen).to_event(1), obs=x)
            else:
                with pyro.poutine.mask(mask=seen[:, 0]):
                    pyro.sample("x", fn.to_event(1), obs=x)

    def guide(self, x: Tensor, seen: Tensor) -> None:
        read = self.encoder(torch.where(seen, x, 0.0))[..., 0]
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(read, 1.0))


class Visits(Masked):
    """The entries are in a plate within a datum."""

    def model(self, x: Tensor, seen: Tensor) -> None:
        visits = pyro.plate("visits", STEPS, dim=-2)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with visits, pyro.poutine.mask(mask=seen.T):
                pyro.sample("x", dist.Normal(z * self.weight[:, None], 1.0), obs=x.T)


class ByValue(Masked):
    """The model finds the missing entries itself, so they cannot be replaced."""

    def model(self, x: Tensor, seen: Tensor) -> None:
        super().model(x, ~x.isnan())


def data(way: str, likelihood: str = "normal") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, STEPS, generator=generator)
    x = x if likelihood == "normal" else x.abs().round()
    seen = torch.rand(N, STEPS, generator=generator) < 0.6
    seen[:, 0] |= ~seen.any(1)
    return x, seen if way != "rows" else seen[:, :1].expand(N, STEPS).clone()


def numbers(pair: nn.Module, *batch: Tensor, rows: int = 4) -> list[Tensor]:
    """Results of tools before and after some steps of training, and the parameters."""
    found = [
        pv.log_likelihood(pair, *batch, num_samples=20).per_datum,
        pv.encode(pair, *batch)["z"],
    ]
    settings = {"epochs": 1, "batch_size": rows, "engine": "eager", "progress": False}
    history = pv.fit(pair, *batch, validation=batch, learning_rate=0.05, **settings)
    found += [torch.tensor(history["objective"]), torch.tensor(history["validation_bound"])]
    found.append(torch.tensor(pv.evaluate(pair, *batch, num_samples=5).log_likelihood))
    return [*found, *(p.detach() for p in pair.parameters())]


PAIRS = {
    "entries": (lambda: Masked("entries"), lambda: data("entries")),
    "rows": (lambda: Masked("rows"), lambda: data("rows")),
    "counts": (lambda: Masked("entries", "counts"), lambda: data("entries", "counts")),
    "visits": (lambda: Visits("entries"), lambda: data("entries")),
}


@pytest.mark.parametrize("name", PAIRS)
def test_padding_of_any_value_changes_no_number(name):
    make, given = PAIRS[name]
    x, seen = given()
    wanted = None
    for fill in (0.0, *(FILLS if name == "entries" else [-1.0, torch.nan])):
        torch.manual_seed(0)
        found = numbers(make(), torch.where(seen, x, fill), seen)
        wanted = found if wanted is None else wanted
        for a, b in zip(found, wanted, strict=True):
            assert bool(a.isfinite().all())
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("likelihood", [pv.Gaussian, pv.Bernoulli])
def test_padding_after_the_length_of_a_sequence_changes_no_number(likelihood):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(N, STEPS, 2, generator=generator).round()
    lengths = torch.tensor([4, 1, 2, 3, 4, 2])
    inside = (torch.arange(STEPS) < lengths[:, None])[..., None]
    wanted = None
    for fill in (0.0, 1e6, torch.nan):
        torch.manual_seed(0)
        pair = pv.DeepMarkovModel.usual(
            STEPS, 2, latent_dim=1, hidden=3, likelihood=likelihood, ragged=True
        )
        found = numbers(pair, torch.where(inside, x, fill), lengths, rows=N)
        wanted = found if wanted is None else wanted
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_padding_after_the_end_token_changes_no_number():
    rows = torch.tensor([[2.0, 1, 0, 0], [1, 0, 0, 0], [2, 2, 1, 0]])
    after = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0]]).bool()
    wanted = None
    for fill in (0.0, *FILLS):
        torch.manual_seed(0)
        likelihood = pv.Autoregressive(3, embedding_dim=2, hidden=3)
        pair = pv.VAE.mlp((4,), latent_dim=1, hidden=(3,), likelihood=likelihood)
        found = pv.log_likelihood(pair, torch.where(after, fill, rows), num_samples=20).per_datum
        wanted = found if wanted is None else wanted
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fill", [float("nan"), float("inf")])
def test_an_unusable_entry_that_counts_is_refused(fill):
    x, seen = data("entries")
    x[2, int(seen[2].nonzero()[0])] = fill
    for tool in (pv.fit, pv.encode, pv.log_likelihood):
        with pytest.raises(UsageError, match=r"values that are not finite .*, first in row 2(;|$)"):
            tool(Masked("entries"), torch.where(seen, x, torch.nan), seen)


def test_entries_that_the_model_itself_finds_missing_are_refused():
    x, seen = data("entries")
    with pytest.raises(UsageError, match="not finite"):
        pv.log_likelihood(ByValue("entries"), torch.where(seen, x, torch.nan), seen)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8])
def test_tokens_after_the_end_change_no_predictive_check(dtype):
    """A replicate has zeros after its end, so the share of zeros of the data counts zeros there."""
    pair = pv.VAE.recurrent((5,), 4, latent_dim=2, hidden=4)
    x = torch.randint(0, 4, (60, 5), generator=torch.Generator().manual_seed(0))
    after = (x == 0).cumsum(1) - (x == 0).long() > 0
    wanted = pv.predictive_check(pair, torch.where(after, 0, x), num_replicates=20)
    found = pv.predictive_check(pair, x.to(dtype), num_replicates=20)
    assert bool((x[after] > 0).any())
    assert str(found) == str(wanted)

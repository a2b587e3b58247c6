"""``plate("data", N, subsample_size=B)`` with local and global latents."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import pyro_vae as pv

N = 48


class Whole(nn.Module):
    """A global mean w and a local latent z; x is N(w + z, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.slope = nn.Parameter(torch.tensor(0.3))

    def plate(self, x: Tensor, *rows: Tensor) -> pyro.plate:
        return pyro.plate("data", len(x))

    def model(self, x: Tensor, *rows: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with self.plate(x, *rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(w + z, 1.0), obs=x)

    def guide(self, x: Tensor, *rows: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(self.loc, self.log_scale.exp()))
        with self.plate(x, *rows):
            pyro.sample("z", dist.Normal(self.slope * (x - w), 0.7))


class Part(Whole):
    """The rows of a minibatch are a part of N data."""

    def plate(self, x: Tensor, *rows: Tensor) -> pyro.plate:
        return pyro.plate("data", N, subsample=rows[0])


class Sized(Whole):
    """Pyro draws which rows they are, and nothing depends on it."""

    def plate(self, x: Tensor, *rows: Tensor) -> pyro.plate:
        return pyro.plate("data", N, subsample_size=len(x))


def data() -> Tensor:
    return 1.0 + 1.4 * torch.randn(N, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_a_part_of_the_data_trains_like_a_plate_of_the_minibatch(engine):
    x, options = data(), {"epochs": 20, "batch_size": 12, "learning_rate": 0.02, "engine": engine}
    whole, part = Whole(), Part()
    one = pv.fit(whole, x, validation=x, progress=False, **options)
    rows = torch.arange(N)
    other = pv.fit(part, x, rows, validation=(x, rows), progress=False, **options)
    assert one["elbo"] == pytest.approx(other["elbo"], rel=1e-5)
    assert one["validation_bound"] == pytest.approx(other["validation_bound"], rel=1e-5)
    for name, value in whole.named_parameters():
        assert torch.allclose(part.get_parameter(name), value, atol=1e-5), name


def test_the_loss_is_that_of_stock_pyro_times_the_share_of_the_data():
    pair, x, rows = Part(), data()[:12], torch.arange(12)
    pyro.clear_param_store()
    torch.manual_seed(3)
    stock = SVI(pair.model, pair.guide, pyro.optim.Adam({}), Trace_ELBO()).evaluate_loss(x, rows)
    whole = Whole()
    torch.manual_seed(3)
    each = parts_of_the_loss(whole, x)
    assert stock == pytest.approx(each["local"] * N / 12 + each["global"], rel=1e-5)


def parts_of_the_loss(pair: nn.Module, x: Tensor) -> dict[str, float]:
    """The two parts of the loss of one minibatch, from traces."""
    guide = pyro.poutine.trace(pair.guide).get_trace(x)
    model = pyro.poutine.trace(pyro.poutine.replay(pair.model, trace=guide)).get_trace(x)
    model.compute_log_prob()
    guide.compute_log_prob()
    of = {
        name: node["log_prob_sum"].item()
        for name, node in model.nodes.items()
        if "log_prob_sum" in node
    }
    q = {
        name: node["log_prob_sum"].item()
        for name, node in guide.nodes.items()
        if "log_prob_sum" in node
    }
    return {"local": q["z"] - of["z"] - of["x"], "global": q["w"] - of["w"]}


@pytest.mark.thorough
def test_the_posterior_of_a_global_latent_is_that_of_all_data():
    x, pair = data(), Sized()
    options = {"epochs": 400, "batch_size": 12, "learning_rate": 0.03, "progress": False}
    pv.fit(pair, x, learning_rate_schedule=pv.CosineSchedule(400), engine="traced", **options)
    # x is N(w, 2) with a prior N(0, 1) of w. The guide of z given w can be exact.
    precision = 1 + N / 2
    assert pair.loc.item() == pytest.approx(x.sum().item() / 2 / precision, abs=0.08)
    assert pair.log_scale.exp().item() == pytest.approx(precision**-0.5, rel=0.15)
    assert pv.check(pair, x).errors == ()
    predictive = dist.Normal(pair.loc, (2 + pair.log_scale.exp() ** 2) ** 0.5).log_prob(x)
    found = pv.evaluate(pair, x, num_samples=5000)
    assert found.log_likelihood == pytest.approx(predictive.mean().item(), abs=0.02)

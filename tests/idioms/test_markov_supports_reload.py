"""Pyro idioms: markov chains, supports with bounds, lazy AutoGuides, boolean masks."""

from math import log

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.errors import UsageError


class Chain(nn.Module):
    """A random walk in ``pyro.markov``, without enumeration."""

    def __init__(self, steps: int = 3) -> None:
        super().__init__()
        self.steps, self.slope = steps, nn.Parameter(torch.tensor(0.5))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = torch.zeros(())
            for t in pyro.markov(range(self.steps)):
                z = pyro.sample(f"z{t}", dist.Normal(z, 1.0))
                pyro.sample(f"x{t}", dist.Normal(z, 0.5), obs=x[:, t])

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(self.steps)):
                pyro.sample(f"z{t}", dist.Normal(self.slope * x[:, t], 0.6))

    def exact(self, x: Tensor) -> Tensor:
        steps = torch.arange(1, self.steps + 1)
        walk = torch.minimum(steps[:, None], steps).float()
        covariance = walk + 0.25 * torch.eye(self.steps)
        return dist.MultivariateNormal(torch.zeros(self.steps), covariance).log_prob(x)


def test_a_markov_chain_that_is_drawn_has_its_exact_likelihood():
    pair = Chain()
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    assert pv.check(pair, x).errors == ()
    found = pv.log_likelihood(pair, x, num_samples=20_000)
    assert torch.allclose(found.per_datum.float(), pair.exact(x), atol=0.1)
    assert set(pv.evaluate(pair, x, num_samples=20).kl_by_site) == {"z0", "z1", "z2"}
    assert pv.fit(pair, x, epochs=2, batch_size=10, progress=False, engine="eager")["elbo"][0] < 0


def test_training_raises_the_elbo_of_a_markov_chain():
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    fitted, start = Chain(), Chain()
    pv.fit(fitted, x, epochs=30, batch_size=16, learning_rate=0.01, engine="eager", progress=False)
    after = pv.log_likelihood(fitted, x, num_samples=2000).elbo
    before = pv.log_likelihood(start, x, num_samples=2000).elbo
    assert after > before + 0.1


class Votes(nn.Module):
    """Nine votes on each of three questions; the support depends on the number of votes."""

    def __init__(self, total: int | Tensor = 9) -> None:
        super().__init__()
        self.total, self.weight = total, nn.Parameter(torch.tensor([0.5, -1.0, 1.0]))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            votes = dist.Binomial(self.total, logits=z[..., None] * self.weight)
            pyro.sample("x", votes.to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.1 * (x @ self.weight), 0.7))

    def exact(self, x: Tensor) -> Tensor:
        z = torch.linspace(-8, 8, 2001)
        votes = dist.Binomial(self.total, logits=z[:, None] * self.weight.detach())
        terms = votes.log_prob(x[:, None].float()).sum(-1) + dist.Normal(0.0, 1.0).log_prob(z)
        return terms.logsumexp(1) + log(16 / 2000)


@pytest.mark.parametrize("kind", [torch.long, torch.float, torch.int16])
def test_a_support_with_bounds_is_checked_row_by_row(kind):
    pair = Votes()
    x = torch.randint(0, 10, (60, 3), generator=torch.Generator().manual_seed(2))
    found = pv.log_likelihood(pair, x.to(kind), num_samples=5000)
    assert torch.allclose(found.per_datum.float(), pair.exact(x), atol=0.1)
    pv.fit(pair, x.to(kind), epochs=1, progress=False, engine="eager")
    x[37, 1] = 10
    with pytest.raises(UsageError, match=r"10.*support of the Binomial"):
        pv.fit(pair, x.to(kind), epochs=1, progress=False, engine="eager")


class Regression(nn.Module):
    """A global latent under an AutoGuide, whose parameters are made by its first run."""

    def __init__(self) -> None:
        super().__init__()
        self.guide = AutoNormal(self.model)

    def model(self, x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0).to_event(1), obs=x)


class Correlated(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.guide = AutoMultivariateNormal(self.model)


@pytest.mark.parametrize("kind", [Regression, Correlated])
def test_an_autoguide_is_loaded_by_its_class_alone(kind, tmp_path):
    pair, x = kind(), torch.randn(40, 3)
    pv.fit(pair, x, epochs=3, out=tmp_path / "run", engine="eager", progress=False)
    loaded = pv.load(tmp_path / "run", kind)
    for name, value in pair.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    score = pv.log_likelihood(loaded, x, num_samples=50)
    assert score.value == pv.log_likelihood(pair, x, num_samples=50).value


class Columns(nn.Module):
    """The model picks columns by a boolean mask, which a graph cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.4))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            kept = torch.ones_like(x, dtype=torch.bool)
            kept[:, 0] = False
            seen = x[kept].view(len(x), -1)
            loc = z[..., None].expand(*z.shape, seen.shape[-1])
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=seen)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.slope * x[:, 1:].sum(1) / 2, 0.6))


def test_boolean_indexing_is_run_eagerly_with_one_line():
    pair, x = Columns(), torch.randn(40, 3, generator=torch.Generator().manual_seed(3))
    with pytest.warns(UserWarning, match="eager engine, because .* depends on the values") as said:
        pv.fit(pair, x, epochs=1, engine="traced", progress=False)
    assert len(said) == 1
    exact = dist.MultivariateNormal(torch.zeros(2), torch.eye(2) + 1).log_prob(x[:, 1:])
    found = pv.log_likelihood(pair, x, num_samples=5000, engine="eager")
    assert torch.allclose(found.per_datum.float(), exact, atol=0.1)

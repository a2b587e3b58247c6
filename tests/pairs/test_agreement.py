"""What `check` refuses, no tool answers with a number; what it accepts, every tool serves."""

from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.errors import UsageError


class Mixture(nn.Module):
    """Three components; only the model has the component k, which is not marked."""

    infer: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.0, 1.0, -1.0]))
        self.means = nn.Parameter(torch.tensor([-1.0, 0.0, 2.0]))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            fn = dist.Categorical(logits=self.logits)
            k = pyro.sample("k", fn, infer=dict(self.infer))
            pyro.sample("x", dist.Normal(self.means[k], 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        pass

    def template(self, n: int) -> tuple[Tensor]:
        return (torch.zeros(n),)


class Sequential(Mixture):
    infer: ClassVar[dict[str, Any]] = {"enumerate": "sequential"}


class Sampled(Mixture):
    infer: ClassVar[dict[str, Any]] = {"enumerate": "parallel", "num_samples": 5}


class Configured(Mixture):
    """Pyro's decorator marks the site."""

    @config_enumerate
    def model(self, x: Tensor) -> None:
        super().model(x)


class AtOnce(Mixture):
    """The model runs only if k takes all of its values at once."""

    infer: ClassVar[dict[str, Any]] = {"enumerate": "parallel"}

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(logits=self.logits), infer=dict(self.infer))
            means = self.means.reshape(3, 1) if k.shape == (3, 1) else self.means[k[:, 0]]
            pyro.sample("x", dist.Normal(means, 1.0), obs=x)


class Sides(nn.Module):
    """Two sites observe the two columns of x, and pyro.deterministic sites come between."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = pyro.deterministic("loc", 2 * z)
            pyro.sample("left", dist.Normal(loc, 1.0), obs=x[:, 0])
            pyro.sample("right", dist.Normal(-loc, 1.0), obs=x[:, 1])

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = pyro.deterministic("guess", self.slope * (x[:, 0] - x[:, 1]))
            pyro.sample("z", dist.Normal(loc, 0.4))


TOOLS = [
    pv.encode,
    pv.reconstruct,
    pv.predict,
    pv.log_likelihood,
    pv.evaluate,
    pv.predictive_check,
    pv.nuts,
    pv.anneal,
    pv.refine,
    pv.gaps,
    pv.kl_parts,
    pv.traverse,
]


def data() -> Tensor:
    return torch.tensor([-1.2, 0.1, 1.9, 0.4])


@pytest.mark.parametrize("kind", [Mixture, Sequential, Sampled, AtOnce])
def test_no_tool_answers_for_a_latent_that_check_refuses(kind):
    pair = kind()
    assert len(pv.check(pair, data()).errors) == 1
    for tool in (*TOOLS, pv.fit):
        x = data()[:1] if tool is pv.traverse else data()
        with pytest.raises(UsageError) as caught:
            tool(pair, x)
        assert "\n" not in str(caught.value), tool
    if kind is AtOnce:
        with pytest.raises(UsageError, match="the pair fails on a value"):
            pv.sample(pair, 3)


def test_a_decorator_of_pyro_marks_a_site_as_well_as_we_do():
    pair, x = Configured(), data()
    exact = torch.logsumexp(
        pair.logits.log_softmax(0) + dist.Normal(pair.means, 1.0).log_prob(x[:, None]), 1
    )
    assert str(pv.check(pair, x)) == "the pair is sound"
    found = pv.log_likelihood(pair, x, num_samples=5)
    assert torch.allclose(found.per_datum.float(), exact)
    assert pv.evaluate(pair, x, num_samples=2).elbo == pytest.approx(exact.mean().item(), abs=1e-5)
    joint = pair.logits.log_softmax(0) + dist.Normal(pair.means, 1.0).log_prob(x[:, None])
    assert torch.allclose(pv.predict(pair, x), joint.softmax(1), atol=1e-6)


def test_several_observed_sites_are_one_x():
    pair, x = Sides(), torch.tensor([[1.0, -0.5], [0.2, 0.3], [-2.0, 1.0]])
    covariance = torch.eye(2) + 4 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    exact = dist.MultivariateNormal(torch.zeros(2), covariance).log_prob(x)
    assert str(pv.check(pair, x)) == "the pair is sound"
    found = pv.log_likelihood(pair, x, num_samples=4000)
    assert torch.allclose(found.per_datum.float(), exact, atol=0.03)
    assert list(pv.encode(pair, x)) == ["z"]
    code = 0.3 * (x[:, 0] - x[:, 1])
    assert torch.allclose(pv.reconstruct(pair, x, site="right"), -2 * code)
    with pytest.raises(UsageError, match=r"several sites \(left, right\)"):
        pv.reconstruct(pair, x)
    annealed = pv.anneal(pair, x[:1], num_chains=8, num_temperatures=50, progress=False)
    assert annealed.per_datum.item() == pytest.approx(exact[0].item(), abs=0.1)

"""The noise that local latents leave in the weights of global latents."""

from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.diagnostics.global_studies import NOISE, judge_globals
from pyro_vae.inference.global_weights import _Evidence


class Rows(nn.Module):
    """w ~ N(0, 1), z_i ~ N(w, 1), x_i ~ N(z_i, 1), with an exact guide of w and a wide one of z."""

    def __init__(self, n, total):
        super().__init__()
        # x_i ~ N(w, 2) given w, so 1 / var(w | x) = 1 + n / 2.
        self.register_buffer("scale", torch.tensor((1 + n / 2) ** -0.5))
        self.register_buffer("loc", self.scale**2 * total / 2)

    def model(self, x):
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x)

    def guide(self, x):
        w = pyro.sample("w", dist.Normal(self.loc, self.scale))
        with pyro.plate("data", len(x), dim=-1):
            # The posterior is N((w + x) / 2, 1/2).
            pyro.sample("z", dist.Normal((w + x[:, 0]) / 2, 1.5))


@pytest.fixture
def rows():
    x = 0.5 + 2**0.5 * torch.randn(60, 1)
    return Rows(60, x.sum()), x


def test_the_noise_is_the_spread_of_the_evidence_given_the_global_latents(rows):
    pair, x = rows
    evidence, values = _Evidence(pair, (x,), ["w"], 20), {"w": torch.tensor(0.4)}
    found = [evidence(values) for _ in range(400)]
    spread = torch.stack([value for value, _ in found]).std().item()
    told = torch.stack([variance for _, variance in found]).mean().sqrt().item()
    assert told == pytest.approx(spread, rel=0.12)  # the error of a spread of 400 values is 4 %
    of_tool = pv.global_weights(pair, x, num_draws=50, num_samples=20, progress=False)
    assert of_tool.noise == pytest.approx(told, rel=0.1)
    assert of_tool.as_dict()["noise"] == of_tool.noise
    more = pv.global_weights(pair, x, num_draws=50, num_samples=80, progress=False)
    assert more.noise == pytest.approx(of_tool.noise / 2, rel=0.15)


def test_a_pair_without_local_latents_has_none():
    class Mean(nn.Module):
        def model(self, x):
            w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("x", dist.Normal(w, 1.0).expand([1]).to_event(1), obs=x)

        def guide(self, x):
            pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))

    found = pv.global_weights(Mean(), torch.ones(5, 1), num_draws=21, progress=False)
    assert found.noise == 0.0


def test_noise_is_no_fault_of_the_guide_of_global_latents(rows):
    """Few samples of each row make Pareto k large, though the guide of w is the posterior."""
    pair, x = rows
    found = pv.global_weights(pair, x, num_draws=200, num_samples=2, progress=False)
    assert found.noise > NOISE
    assert not found.reliable
    (said,) = judge_globals(["w"], {"global_weights": replace(found, pareto_k=1.2)}, {})
    assert said.kind == "unchecked"
    assert f"a noise of {found.noise:.1f} nats in each weight" in said.words
    far = replace(found, pareto_k=1.2, noise=NOISE)
    said = judge_globals(["w"], {"global_weights": far}, {})
    assert said[0].kind == "doubt"
    assert "far from the posterior" in said[0].words


def test_one_sample_does_not_show_its_noise(rows):
    pair, x = rows
    found = pv.global_weights(pair, x, num_draws=21, num_samples=1, progress=False)
    assert found.noise != found.noise  # NaN
    (said,) = judge_globals(["w"], {"global_weights": replace(found, pareto_k=3.0)}, {})
    assert said.kind == "unchecked"


def test_noise_does_not_hide_a_guide_that_is_far_off(rows):
    pair, x = rows
    pair.loc += 8 * pair.scale
    found = pv.global_weights(pair, x, num_draws=100, num_samples=20, progress=False)
    assert NOISE < found.noise < found.log_weights.std() / 2
    said = judge_globals(["w"], {"global_weights": replace(found, pareto_k=2.0)}, {})
    assert said[0].kind == "doubt"


@pytest.mark.parametrize(("noise", "kind"), [(0.5, "doubt"), (0.51, "unchecked")])
@pytest.mark.parametrize("spread", [0.9, 1.0])
def test_noise_counts_from_half_a_nat(noise, kind, spread, rows):
    assert judged(rows, noise, spread) == kind


@pytest.mark.parametrize(("noise", "kind"), [(1.99, "doubt"), (2.01, "unchecked")])
def test_noise_counts_from_half_of_the_spread(noise, kind, rows):
    assert judged(rows, noise, 4.0) == kind


def judged(rows, noise, spread):
    """The verdict on weights with a large Pareto k, this noise and this spread."""
    pair, x = rows
    found = pv.global_weights(pair, x[:4], num_draws=21, num_samples=2, progress=False)
    even = torch.linspace(-1, 1, 21, dtype=torch.float64)
    weights = spread * even / even.std()
    far = replace(found, pareto_k=0.9, noise=noise, log_weights=weights)
    return judge_globals(["w"], {"global_weights": far}, {})[0].kind

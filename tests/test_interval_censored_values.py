"""The pair of the docs for interval-censored values, against numbers of scipy."""

import math
from pathlib import Path

import pytest
import torch
from mktestdocs import grab_code_blocks
from scipy import integrate, stats

import pyro_vae as pv

PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "your-own-data.md"
INF = math.inf


@pytest.fixture(scope="module")
def names():
    """What the block of the page defines, without its data and its training."""
    page = PAGE.read_text()
    block = grab_code_blocks(page[page.index("## Interval-censored") :], lang="python")[0]
    found = {"pv": pv}
    exec(block[: block.index("truth =")], found)
    return found


def reference(a, b):
    """log(F(b) - F(a)) by numeric integration, relative to the density at the larger end."""
    peak = min(max(0.0, a), b)
    top = stats.norm.logpdf(peak)
    low, high = max(a, peak - 40), min(b, peak + 40)
    value, _ = integrate.quad(
        lambda t: math.exp(stats.norm.logpdf(t) - top), low, high, points=[peak], limit=200
    )
    return top + math.log(value)


ENDS = [(-1, 1), (-INF, 0.3), (0.3, INF), (-INF, -12), (12, INF), (20, 21), (-9, -8), (1, 1.001)]


@pytest.mark.parametrize(("a", "b"), ENDS)
def test_probability_of_an_interval_also_in_the_tails(names, a, b):
    ends = torch.tensor([a, b], dtype=torch.double)
    found = names["log_probability"](*ends.nan_to_num(posinf=1e30, neginf=-1e30))
    assert found.item() == pytest.approx(reference(a, b), rel=1e-8)


@pytest.mark.parametrize(("a", "b"), ENDS)
def test_gradient_of_an_interval(names, a, b):
    a, b = max(a, -40), min(b, 40)  # where numeric differences are possible
    ends = [torch.tensor(end, dtype=torch.double, requires_grad=True) for end in (a, b)]
    assert torch.autograd.gradcheck(names["log_probability"], ends, rtol=1e-4)


def test_log_likelihood_of_the_pair_is_that_of_censored_normal_values(names):
    pair, far = names["Censored"](dim=4), names["FAR"]
    with torch.no_grad():
        for parameter in [*pair.decoder.parameters(), *pair.encoder.parameters()]:
            parameter.zero_()  # so that x does not depend on z
        last = list(pair.encoder.parameters())[-1]
        last[2:] = math.log(math.expm1(1 - 1e-3))  # so that q(z | x) is the prior
        pair.log_scale.copy_(torch.tensor([0.5, 1.0, 2.0, 0.1]).log())
    nan = math.nan
    x = torch.tensor([[0.4, nan, nan, nan], [nan, -1.0, 3.0, nan]])
    lower = torch.tensor([[0.0, -far, 1.0, 0.5], [-0.2, 0.0, 0.0, -far]])
    upper = torch.tensor([[0.0, -0.5, far, 0.8], [0.3, 0.0, 0.0, far]])
    scale = pair.log_scale.exp().tolist()
    expected = [
        stats.norm.logpdf(0.4, 0, scale[0])
        + stats.norm.logcdf(-0.5, 0, scale[1])
        + stats.norm.logsf(1.0, 0, scale[2])
        + reference(0.5 / scale[3], 0.8 / scale[3]),
        reference(-0.2 / scale[0], 0.3 / scale[0])
        + stats.norm.logpdf(-1.0, 0, scale[1])
        + stats.norm.logpdf(3.0, 0, scale[2]),
    ]
    batch = (x, lower, upper, torch.ones_like(x))
    found = pv.log_likelihood(pair.double(), *batch, num_samples=5, engine="eager")
    assert found.per_datum.tolist() == pytest.approx(expected, rel=1e-5)

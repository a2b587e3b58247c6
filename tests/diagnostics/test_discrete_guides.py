"""Guides of discrete latents: their weights have ties, and `gaps` cannot refine them."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.inference.pareto import pareto_shape

MEANS = torch.tensor([[-2.0, 0.0, 1.0], [0.0, 2.0, -1.0], [2.0, -1.0, 0.0]])
PRIOR = torch.tensor([0.5, 0.3, 0.2])


def log_joint(x):
    """log p(x, y) for each of the three classes, (n, 3)."""
    return PRIOR.log() + dist.Normal(MEANS, 1.0).log_prob(x[:, None]).sum(-1)


class Classes(nn.Module):
    """A class y and x ~ N(m_y, 1). The logits of the guide are a factor times the exact ones."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            y = pyro.sample("y", dist.Categorical(PRIOR))
            pyro.sample("x", dist.Normal(MEANS[y], 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("y", dist.Categorical(logits=self.factor * log_joint(x)))

    def template(self, n):
        return (torch.zeros(n, 3),)

    def gap(self, x):
        """log p(x) minus the ELBO, nats per example."""
        q = (self.factor * log_joint(x)).softmax(-1)
        terms = q * (q.clamp(min=1e-30).log() - log_joint(x).log_softmax(-1))
        return terms.sum(-1).mean().item()


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(0)
    return MEANS[dist.Categorical(PRIOR).sample((600,))] + torch.randn(600, 3)


def diagnosed(pair, x):
    return pv.diagnose(pair, x, budget=6, progress=False)


@pytest.mark.thorough
@pytest.mark.parametrize("factor", [1.0, 0.9])
def test_a_guide_of_classes_that_is_almost_exact_has_no_fault(data, factor):
    pair = Classes(factor)
    assert pair.gap(data) < 0.01
    found = diagnosed(pair, data)
    assert found.blamed == []
    assert "guide" in {one.about for one in found.findings if one.kind == "trust"}


@pytest.mark.thorough
def test_a_guide_of_classes_that_is_off_is_charged_to_the_encoder_with_its_size(data):
    pair = Classes(0.5)
    found = diagnosed(pair, data)
    (blame,) = found.blamed
    assert blame.part == "encoder"
    assert blame.nats == pytest.approx(pair.gap(data), abs=0.03)
    assert "the ELBO is" in blame.words
    for tool, options in ((pv.refine, {}), (pv.refit_guide, {"posterior": pv.DiagonalNormal})):
        with pytest.raises(pv.UsageError):
            tool(pair, data, **options)
        assert f"pyro_vae.{tool.__name__}" not in blame.next
    weighed = found.results["log_likelihood"]
    exact = log_joint(data).logsumexp(-1)[found.rows][: len(weighed.per_datum)].mean().item()
    assert abs(weighed.value - exact) < 4 * weighed.total_error + 1e-4
    assert "log p(x)" in {one.about for one in found.findings if one.kind == "trust"}


@pytest.mark.thorough
def test_a_guide_of_classes_that_ignores_the_data_is_charged_to_the_encoder(data):
    assert diagnosed(Classes(0.0), data).blamed[0].part == "encoder"


@pytest.mark.parametrize(
    ("greatest", "shape"),
    [([0.0] * 5, 0.0), ([0.0] * 4, torch.inf), ([0.0, *[-1.0] * 9], torch.inf)],
)
def test_weights_whose_largest_value_occurs_five_times_are_bounded(greatest, shape):
    """If only some draws are above all others, which are equal, nothing is known of the tail."""
    weights = torch.tensor([greatest + [-1.0] * (100 - len(greatest))])
    assert pareto_shape(weights).tolist() == [shape]


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_weights_that_are_not_finite_are_not_bounded(value):
    weights = torch.full((1, 100), value)
    assert pareto_shape(weights).tolist() == [torch.inf]

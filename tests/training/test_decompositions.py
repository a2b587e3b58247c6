"""The formulas of compiled graphs, against float64."""

import pytest
import torch

from pyro_vae import compat
from pyro_vae.training import decompositions

UP = torch.logspace(-38, 38, 20_001)
NEAR = torch.linspace(-12, 12, 20_001)
CASES = {
    "log1p": torch.cat([UP, -torch.logspace(-38, -1e-3, 20_001), NEAR[NEAR > -1]]),
    "expm1": torch.cat([torch.logspace(-38, 1.9, 20_001), -UP, NEAR]),
    "tanh": torch.cat([UP, -UP, NEAR]),
}


@pytest.mark.parametrize("name", CASES)
def test_each_value_is_exact_to_a_few_units_in_the_last_place(name):
    x = CASES[name]
    found = getattr(decompositions, name)(x).double()
    exact = getattr(torch, name)(x.double())
    tiny = torch.finfo(torch.float32).tiny
    error = (found - exact).abs() / exact.abs().clamp(min=tiny)
    assert error.max() < 3e-7


@pytest.mark.parametrize("name", CASES)
def test_limits_and_signs_are_those_of_torch(name):
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -1.0])
    found, exact = getattr(decompositions, name)(x), getattr(torch, name)(x)
    assert torch.allclose(found, exact, equal_nan=True)
    assert torch.equal(found.signbit()[:2], exact.signbit()[:2])


def test_other_types_are_left_to_inductor():
    for formula in decompositions.DECOMPOSITIONS.values():
        assert formula(torch.ones(2, dtype=torch.float64)) is NotImplemented
        assert formula(torch.ones(2, dtype=torch.bfloat16)) is NotImplemented


def test_no_slow_function_remains_in_a_bernoulli_likelihood():
    """Inductor's own formula for this likelihood contains log1p."""

    def likelihood(x, logits):
        return [torch.nn.functional.binary_cross_entropy_with_logits(logits, x)]

    inputs = [torch.rand(3, 4), torch.randn(3, 4)]
    graph = compat.make_graph(likelihood, inputs)
    replaced = compat.with_formulas(graph, inputs, decompositions.DECOMPOSITIONS)
    used = {node.target for node in replaced.graph.nodes}
    assert torch.ops.aten.log.default in used
    assert not used & set(decompositions.DECOMPOSITIONS)
    torch.testing.assert_close(replaced(*inputs), likelihood(*inputs))

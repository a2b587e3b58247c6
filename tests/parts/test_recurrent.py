"""The gated transition, against its formula and by hand."""

import numpy as np
import torch

from pyro_vae.parts.recurrent import GatedTransition


def affine(layer, value):
    return value @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


def perceptron(network, value):
    """An MLP of one hidden layer of rectified units, without torch's own forward."""
    first, last = (m for m in network.modules() if isinstance(m, torch.nn.Linear))
    return affine(last, np.maximum(affine(first, value), 0))


def transition(latent_dim=3):
    torch.manual_seed(0)
    network = GatedTransition(latent_dim, 8).double()
    for parameter in network.parameters():
        parameter.data = torch.randn_like(parameter)
    return network


def test_a_gated_transition_is_its_formula():
    """Krishnan et al., 2017: g = sigmoid(MLP z), loc = (1 - g) (W z + b) + g h, and the scale is
    linear in relu(h), where h = MLP z is the proposal."""
    network = transition()
    z = torch.randn(20, 3).double()
    gate = 1 / (1 + np.exp(-perceptron(network.gate, z.numpy())))
    proposal = perceptron(network.proposal, z.numpy())
    loc = (1 - gate) * affine(network.linear, z.numpy()) + gate * proposal
    scale = affine(network.scale, np.maximum(proposal, 0))
    assert (proposal < 0).any()  # so that the rectifier counts
    found = network(z).detach().numpy()
    np.testing.assert_allclose(found, np.concatenate([loc, scale], -1), rtol=1e-10)


def gated(bias, z):
    network = transition()
    last = [m for m in network.gate.modules() if isinstance(m, torch.nn.Linear)][-1]
    last.weight.data.zero_()
    last.bias.data.fill_(bias)
    return network, network(z)[..., :3]


def test_an_open_gate_takes_the_proposal_and_a_closed_one_the_linear_map():
    z = torch.randn(5, 3).double()
    network, opened = gated(50.0, z)
    torch.testing.assert_close(opened, network.proposal(z))
    network, closed = gated(-50.0, z)
    torch.testing.assert_close(closed, network.linear(z))


def test_the_linear_map_starts_as_the_identity():
    z = torch.randn(5, 3)
    torch.testing.assert_close(GatedTransition(3, 8).linear(z), z)

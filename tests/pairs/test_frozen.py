"""Parameters of a PyroModule that take no gradients stay as they are, from the first call on."""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import nn

import pyro_vae as pv


class Decoder(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 4)
        self.shift = nn.Parameter(torch.full((4,), 0.3), requires_grad=False)

    def forward(self, z):
        return self.linear(z) + self.shift


class Pair(PyroModule):
    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = Decoder(), nn.Linear(4, 2)
        self.noise = nn.Parameter(torch.tensor(0.5), requires_grad=False)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.noise).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))


def test_a_pair_that_was_never_called_is_sound():
    assert pv.check(Pair(), torch.ones(8, 4)).errors == ()


def test_training_leaves_frozen_parameters_alone():
    pair = Pair()
    weight = pair.decoder.linear.weight.detach().clone()
    pv.fit(pair, torch.rand(16, 4), batch_size=8, epochs=2, engine="eager", progress=False)
    assert torch.equal(pair.decoder.shift, torch.full((4,), 0.3))
    assert not pair.decoder.shift.requires_grad
    assert pair.noise.item() == 0.5
    assert not torch.equal(pair.decoder.linear.weight, weight)

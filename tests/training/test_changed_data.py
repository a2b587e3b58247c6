"""Programs that change their data in place are refused, and the user's data stay as they are."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import pyro_vae as pv


class Changes(nn.Module):
    """A pair whose model or guide changes x, or its context, in place."""

    def __init__(self, where):
        super().__init__()
        self.where, self.encoder, self.decoder = where, nn.Linear(6, 4), nn.Linear(2, 6)

    def model(self, x, *context):
        if self.where == "model":
            x[x > 1] = 1.0
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x, *context):
        if self.where == "guide":
            x.mul_(0.5)
        if self.where == "context":
            context[0].add_(1.0)
        with pyro.plate("data", len(x), dim=-1):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


FIT = {"epochs": 1, "batch_size": 20, "progress": False}
TOOLS = {
    "fit": lambda pair, *data: pv.fit(pair, *data, **FIT),
    "evaluate": lambda pair, *data: pv.evaluate(pair, *data, num_samples=5),
    "log_likelihood": lambda pair, *data: pv.log_likelihood(pair, *data, num_samples=5),
    "encode": pv.encode,
    "reconstruct": pv.reconstruct,
    "score": lambda pair, *data: pv.score(pair, *data, num_samples=100),
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("where", ["model", "guide", "context"])
def test_it_is_refused_and_the_data_stay(where, tool):
    data = (2 * torch.randn(60, 6), torch.zeros(60, 1))
    before = [part.clone() for part in data]
    name = "context 1" if where == "context" else "x"
    with pytest.raises(pv.UsageError, match=f"changes {name} in place, and so your data"):
        TOOLS[tool](Changes(where), *data)
    assert all(map(torch.equal, data, before))


@pytest.mark.parametrize("where", ["model", "guide"])
def test_check_names_it(where):
    x = 2 * torch.randn(60, 6)
    before = x.clone()
    (error,) = pv.check(Changes(where), x).errors
    assert "in place, and so your data" in error
    assert torch.equal(x, before)


def test_a_data_set_is_refused_too():
    data = TensorDataset(2 * torch.randn(60, 6))
    with pytest.raises(pv.UsageError, match="changes x in place"):
        pv.fit(Changes("guide"), data, **FIT)

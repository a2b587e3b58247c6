"""Rows with missing entries whose group numbers are short integers, as pandas gives them."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.parts.missing import PartlyObserved

GROUPS = 3


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.zeros(GROUPS)), nn.Parameter(torch.zeros(2))

    def model(self, x, group):
        with pyro.plate("groups", GROUPS, dim=-1):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            fn = dist.Normal(u[..., group, None].expand(x.shape), 1.0, validate_args=False)
            pyro.sample("x", PartlyObserved(fn).to_event(1), obs=x)

    def guide(self, x, group):
        with pyro.plate("groups", GROUPS, dim=-1):
            pyro.sample("u", dist.Normal(self.loc, self.log_scale[0].exp()))


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", [torch.int8, torch.int16, torch.uint8, torch.int32])
def test_any_integers_number_the_groups_of_rows_with_holes(kind):
    torch.manual_seed(0)
    x, group = torch.randn(30, 2), torch.arange(30) % GROUPS
    x[3, 0] = torch.nan
    bounds = []
    for numbers in (group, group.to(kind)):
        pair = Grouped()
        pv.fit(pair, x, numbers, epochs=2, batch_size=10, progress=False)
        bounds.append(pv.log_likelihood(pair, x, numbers, num_samples=20).value)
    assert bounds[0] == bounds[1]

"""Negative numbers of groups, such as the -1 that pandas gives to an unknown category."""

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv

GROUPS, N = 4, 40


class Grouped(nn.Module):
    """Rows of groups; with a mask, a negative number says that the group is not known."""

    def __init__(self, masked=False):
        super().__init__()
        self.masked = masked
        self.loc = nn.Parameter(torch.arange(GROUPS).float())

    def model(self, x, group, change):
        with pyro.plate("groups", GROUPS, dim=-1):
            u = pyro.sample("u", dist.Normal(0.0, 3.0))
        own = u[..., group]
        if self.masked:
            own = torch.where(group < 0, 0.0, own)
        with pyro.plate("data", len(x), dim=-1):
            mean = own + 0.1 * change
            pyro.sample("x", dist.Normal(mean[..., None], 1.0).to_event(1), obs=x)

    def guide(self, x, group, change):
        with pyro.plate("groups", GROUPS, dim=-1):
            pyro.sample("u", dist.Normal(self.loc, 0.1))


def rows():
    torch.manual_seed(0)
    group = torch.arange(N) % GROUPS
    return group[:, None] + torch.randn(N, 1), group, torch.arange(N) % 5 - 2


@pytest.mark.parametrize(
    "tool",
    [
        lambda *batch: pv.log_likelihood(*batch, num_samples=20),
        lambda *batch: pv.score(*batch, num_samples=30),
        lambda *batch: pv.posterior(*batch, draws=3),
        lambda *batch: pv.fit(*batch, epochs=1, progress=False),
        pv.encode,
    ],
)
def test_a_negative_group_is_refused(tool):
    x, _, change = rows()
    known = pd.Index([f"R{i}" for i in range(GROUPS)])
    group = torch.tensor(known.get_indexer([*known, "new", *known] * 4 + list(known)))
    assert group[4] == -1
    words = r"context 1 numbers one of 4 groups, from 0, and holds -1 in row 4 \(pandas"
    with pytest.raises(pv.UsageError, match=words):
        tool(Grouped(), x, group, change)


def test_other_negative_integers_are_used():
    x, group, change = rows()
    assert change.min() == -2
    pv.log_likelihood(Grouped(), x, group, change, num_samples=20)
    unknown = torch.where(torch.arange(N) < 5, -1, group)
    pv.log_likelihood(Grouped(masked=True), x, unknown, change, num_samples=20)


class Stepped(Grouped):
    """The change, from -1 to 2, has an effect for each value. There is none for 3."""

    def model(self, x, group, change):
        super().model(x, group, torch.tensor([0.5, 0.0, 1.0, 2.0])[change + 1])


def test_a_number_that_cannot_count_from_the_last_group_is_used():
    x, group, change = rows()
    change = change.clamp(-1, 2)
    found = pv.log_likelihood(Stepped(), x, group, change, num_samples=20)
    assert found.per_datum.isfinite().all()

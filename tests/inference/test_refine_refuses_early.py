"""`refine` refuses a pair before the bounds, which may take long."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.inference import refinement


class Shared(nn.Module):
    """One latent of all data, so that no datum has parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(()))

    def model(self, x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.sample("w", dist.Normal(self.loc, 0.5))


def test_no_bound_is_estimated_before_a_refusal(monkeypatch):
    calls = []
    monkeypatch.setattr(refinement, "estimate", lambda *given: calls.append(given))
    with pytest.raises(pv.UsageError, match="no latent whose parameters can be refined"):
        pv.refine(Shared(), torch.randn(30), progress=False)
    assert calls == []

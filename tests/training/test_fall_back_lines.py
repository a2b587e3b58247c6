"""A warning about a slower engine names the user's own file and line, and nothing of a library."""

import inspect

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.4))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.slope * z + self.extra(x), 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.slope * x, 0.8))

    def extra(self, x: Tensor) -> Tensor:
        return torch.zeros(())


class Boolean(Plain):
    def extra(self, x: Tensor) -> Tensor:
        return x[x > 0].mean().nan_to_num() * 0  # here


class Branch(Plain):
    def extra(self, x: Tensor) -> Tensor:
        return torch.ones(()) if x.sum().item() > 0 else torch.zeros(())  # here


class Draws(Plain):
    def model(self, x: Tensor) -> None:  # here
        np.random.rand()
        super().model(x)


def line_of(kind: type) -> str:
    """The file and line of the comment in the source of a class."""
    source, start = inspect.getsourcelines(kind)
    return f"({__file__}:{start + next(i for i, line in enumerate(source) if '# here' in line)})"


@pytest.mark.parametrize("kind", [Boolean, Branch, Draws])
@pytest.mark.parametrize("done", ["trained", "evaluated"])
def test_a_fall_back_names_the_line_of_the_user(kind, done):
    pair, x = kind(), torch.randn(8, generator=torch.Generator().manual_seed(0))
    options = {"epochs": 1} if done == "trained" else {"num_samples": 8}
    tool = pv.fit if done == "trained" else pv.log_likelihood
    with pytest.warns(UserWarning, match=f"is {done} by the eager engine") as caught:
        tool(pair, x, engine="traced", progress=False, **options)
    (warning,) = caught
    assert str(warning.message).endswith(line_of(kind))
    assert warning.filename == __file__
    assert "\n" not in str(warning.message)


class Reads(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z.new_full((*z.shape[:-1], 4), 0.5 if z.sum().item() > 0 else 0.6)  # here


def test_a_network_of_the_user_in_a_pair_of_the_library_is_named():
    vae = pv.VAE.mlp((4,), latent_dim=2)
    vae.decoder.network = Reads()
    with pytest.warns(UserWarning, match="eager engine") as caught:
        pv.log_likelihood(vae, torch.ones(4, 4), num_samples=4, engine="traced")
    assert str(caught[0].message).endswith(line_of(Reads))

"""Helpers of the tests of bad input."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import UsageError

FAST = {"epochs": 1, "batch_size": 4, "engine": "eager", "progress": False}

GENERATOR = torch.Generator().manual_seed(0)

SCALES = {
    "real": 3.0 * torch.randn(8, 4, generator=GENERATOR),
    "unit": torch.rand(8, 4, generator=GENERATOR),
}

SCALES["whole"] = (255 * SCALES["unit"]).round()


def refused(call, *words):
    """The call raises a `UsageError` with one line that contains these words."""
    with pytest.raises(UsageError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def snapshot(folder):
    """Every file in a folder and its subfolders, with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def small(**options):
    return pv.VAE.mlp((4,), latent_dim=2, hidden=(8,), **options)


def binary(n=8):
    return torch.rand(n, 4, generator=torch.Generator().manual_seed(0)).round()


# Sound and faulty pairs

NORMAL = dist.Normal


def plate(x):
    return pyro.plate("data", len(x), dim=-1)


def sound_model(pair, x):
    with plate(x):
        z = pyro.sample("z", NORMAL(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", NORMAL(pair.decoder(z), 1.0).to_event(1), obs=x)


def sound_guide(pair, x):
    with plate(x):
        pyro.sample("z", pair.posterior(x).to_event(1))


class Pair(nn.Module):
    """A sound pair over rows of four numbers, unless another model or guide is given."""

    def __init__(self, model=sound_model, guide=sound_guide):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(2, 4)
        self.programs = model, guide

    def posterior(self, x):
        loc, scale = self.encoder(x).chunk(2, -1)
        return NORMAL(loc, scale.exp())

    def model(self, x):
        self.programs[0](self, x)

    def guide(self, x):
        self.programs[1](self, x)


def guide_without_site(pair, x):
    pass


def model_with_global_site(pair, x):
    pyro.sample("w", NORMAL(0.0, 1.0))
    sound_model(pair, x)


def guide_with_global_site(pair, x):
    pyro.sample("w", NORMAL(pair.encoder.bias[0], 1.0))
    sound_guide(pair, x)


class Parameterless(nn.Module):
    """A pair without parameters."""

    def model(self, x):
        with plate(x):
            pyro.sample("z", NORMAL(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", NORMAL(torch.zeros(4), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with plate(x):
            pyro.sample("z", NORMAL(torch.zeros(2), 1.0).to_event(1))


def bad(value, row=5):
    x = torch.rand(8, 4)
    x[row, 2] = value
    return x


OUTSIDE = ["outside the support", "site 'x'"]


# Files that would run code


class Marker:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))

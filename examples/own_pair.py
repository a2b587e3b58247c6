"""Your own pair in 25 lines of Pyro: every tool of the library accepts it.

    python examples/own_pair.py [--epochs 60]

This is a model of ink. Each digit has an overall boldness b and a shape z. Pixels are Poisson
counts (0 to 16). Their rate is the boldness times a picture of the shape. The pair has two latent
sites, a likelihood that the library does not provide in this form, and parameters in three of
Pyro's styles. `fit`, `evaluate`, `encode` and `sample` know only its traces.

Expect: an ELBO of the test digits of about -117 nats per example. The correlation between the
posterior mean of log b and the log of the ink in the image is about 0.5, because the shape explains
a part of the ink. The program takes about half a minute on two cores.
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

import pyro_vae as pv


class Ink(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 22))
        self.decoder = nn.Sequential(nn.Linear(10, 128), nn.ReLU(), nn.Linear(128, 64))

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        width = pyro.param("width", torch.tensor(0.3), constraint=constraints.positive)
        with pyro.plate("data", len(x), dim=-1):
            log_b = pyro.sample("log_b", dist.Normal(0.0, width))
            z = pyro.sample("z", dist.Normal(torch.zeros(10), 1.0).to_event(1))
            rate = nn.functional.softplus(self.decoder(z)) * log_b.exp()[..., None] + 1e-3
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        loc, raw = self.encoder(x / 16).chunk(2, -1)
        scale = nn.functional.softplus(raw) + 1e-3
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("log_b", dist.Normal(loc[:, 0], scale[:, 0]))
            pyro.sample("z", dist.Normal(loc[:, 1:], scale[:, 1:]).to_event(1))

    def template(self, n: int) -> tuple[Tensor, ...]:
        return (torch.zeros(n, 64),)


def counts(images: Tensor) -> Tensor:
    """Return the original values of the digits: each pixel is a count from 0 to 16."""
    return (images.flatten(1).float() * 16 / 255).round()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    options = parser.parse_args()
    torch.manual_seed(0)  # for the initial weights

    digits = pv.load_data("digits")
    train, validation, test = (
        counts(part.x) for part in (digits.train, digits.validation, digits.test)
    )
    pair = Ink()
    print(pv.check(pair, train[:16]))
    pv.fit(pair, train, validation=validation, epochs=options.epochs, batch_size=64)
    print(pv.evaluate(pair, test))
    boldness = pv.encode(pair, test)["log_b"]
    both = torch.stack([boldness, test.sum(1).log()])
    print(f"correlation of log b and log ink: {both.corrcoef()[0, 1]:.2f}")
    print(f"drawn from the prior: {tuple(pv.sample(pair, 5).shape)}")


if __name__ == "__main__":
    main()

"""Why an inverse autoregressive flow gains nothing on MNIST: a bug, a setting, or a finding?

    python benchmarks/flow_posterior.py --data-dir DIR [--epochs 40] [--out runs/flow_posterior]

Each model is fixed. Guides of other families start as its diagonal guide, and are fitted to it with
the same settings. Two models have 40 latents and 784 observed numbers:

- "linear": x ~ N(W z + b, s^2 I). The posteriors of all data have one covariance, and the distance
  of the best diagonal normal from log p(x) has a closed form. A flow can close it without looking
  at x. If it does not, there is a bug, or the settings are wrong.
- "MNIST": a VAE that was trained with a diagonal guide.

The family "shared" is a normal whose correlations are parameters, the same for all data. Its gain
on MNIST tells how much of the gain of a full-rank guide needs correlations that differ by image.
"""

import argparse
import copy
import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.data.split import Data
from pyro_vae.pairs.rng import seeded
from pyro_vae.parts.distributions import CholeskyNormal
from pyro_vae.parts.factors import bounded_scale, split, unbounded_scale

LATENTS, OBSERVED, NOISE = 40, 784, 1.0
BOUNDS = 1e-4, 10.0
"""The bounds of a scale that the families have by default."""


class SharedCorrelations(pv.Family):
    """A normal with means and scales by datum, and one matrix of correlations for all data."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.below = nn.Parameter(torch.zeros(dim, dim))

    def outputs(self, shape: tuple[int, ...]) -> int:
        return 2 * shape[0]

    def forward(self, raw: Tensor, shape: tuple[int, ...]) -> dist.TorchDistribution:
        loc, scale = split(raw, shape, 2)
        lower = self.below.tril(-1) + torch.eye(len(self.below))
        factor = bounded_scale(scale, *BOUNDS)[..., None] * lower
        return CholeskyNormal(loc, scale_tril=factor, validate_args=False)


class Linear(nn.Module):
    """A linear-Gaussian model with the diagonal guide that is best for it."""

    def __init__(self) -> None:
        super().__init__()
        with seeded(1):
            mix = torch.eye(LATENTS) + 0.1 * torch.randn(LATENTS, LATENTS)
            weight = torch.randn(OBSERVED, LATENTS) @ mix / math.sqrt(OBSERVED) * 2
        precision = torch.eye(LATENTS) + weight.T @ weight / NOISE**2
        self.register_buffer("weight", weight)
        self.register_buffer("scale", precision.diagonal().rsqrt())
        gain = torch.linalg.solve(precision, weight.T) / NOISE**2
        self.gap = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision)).item()
        raw = [unbounded_scale(scale, *BOUNDS) for scale in self.scale.tolist()]
        self.encoder = nn.Linear(OBSERVED, 2 * LATENTS)
        with torch.no_grad():
            self.encoder.weight.copy_(torch.cat([gain, torch.zeros_like(gain)]))
            self.encoder.bias.copy_(torch.cat([torch.zeros(LATENTS), torch.tensor(raw)]))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            standard = dist.Normal(x.new_zeros(LATENTS), 1.0).to_event(1)
            z = pyro.sample("z", standard)
            pyro.sample("x", dist.Normal(z @ self.weight.T, NOISE).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            loc = self.encoder(x)[:, :LATENTS]
            pyro.sample("z", dist.Normal(loc, self.scale).to_event(1))

    def draw(self, number: int, seed: int) -> Tensor:
        with seeded(seed):
            z = torch.randn(number, LATENTS)
            return z @ self.weight.T + NOISE * torch.randn(number, OBSERVED)


def widened(last: nn.Linear, family: pv.Family) -> nn.Linear:
    """Return a last layer with the outputs of another family, which starts as the diagonal one."""
    wider = nn.Linear(last.in_features, family.outputs((last.out_features // 2,)))
    with torch.no_grad():
        wider.weight.zero_(), wider.bias.zero_()
        wider.weight[: last.out_features] = last.weight
        wider.bias[: last.out_features] = last.bias
    return wider


def families() -> dict[str, pv.Family]:
    with seeded(0):
        return {
            "diagonal": pv.DiagonalNormal(),
            "shared": SharedCorrelations(LATENTS),
            "full-rank": pv.FullRankNormal(),
            "flow": pv.FlowPosterior(LATENTS, hidden=(320,), context_dim=64),
            "flow, one layer": pv.FlowPosterior(LATENTS, layers=1, hidden=(320,), context_dim=64),
        }


def encoder_of(pair: nn.Module, family: pv.Family) -> nn.Module:
    if isinstance(pair, Linear):
        network: nn.Module = widened(pair.encoder, family)
    else:
        network = copy.deepcopy(pair.encoder.network)
        network.layers[-1] = widened(network.layers[-1], family)
        network.outputs = network.layers[-1].out_features
    return pv.Factor(network, family, (LATENTS,))


def bound(pair: nn.Module, x: Tensor) -> float:
    return pv.log_likelihood(pair, x, num_samples=50, progress=False).elbo


def compare(
    title: str, pair: nn.Module, train: Tensor, tests: dict[str, Tensor], args: argparse.Namespace
) -> None:
    """Fit each family to the fixed model, and print its gain over the diagonal guide."""
    before = {part: bound(pair, x) for part, x in tests.items()}
    print(f"\n{title}: ELBO as trained", {part: round(b, 3) for part, b in before.items()})
    for name, family in families().items():
        found = pv.refit_guide(
            pair,
            train,
            posterior=encoder_of(pair, family),
            epochs=args.refit_epochs,
            batch_size=100,
            learning_rate=args.learning_rate,
            learning_rate_schedule=pv.CosineSchedule(args.refit_epochs),
            progress=False,
        )
        gains = {part: f"{bound(found, x) - before[part]:+.3f}" for part, x in tests.items()}
        print(f"  {name:16s} gain", gains, flush=True)


def trained(data: Data, args: argparse.Namespace) -> nn.Module:
    """Return a VAE of MNIST with a diagonal guide, trained now or before."""
    with seeded(0):
        vae = pv.VAE.mlp(data.shape, latent_dim=LATENTS, hidden=(300, 300))
    pv.fit(
        vae,
        data.train.x,
        validation=data.validation.x,
        epochs=args.epochs,
        batch_size=100,
        learning_rate_schedule=pv.CosineSchedule(args.epochs),
        precision="auto",
        out=args.out,
        resume=args.out.exists(),
    )
    return vae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir")
    parser.add_argument("--out", type=Path, default=Path("runs/flow_posterior"))
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--refit-epochs", type=int, default=15)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args()
    linear = Linear()
    print(f"linear: the best diagonal guide is {linear.gap:.3f} nats below log p(x)")
    rows = linear.draw(20_000, 2)
    compare("linear", linear, rows, {"train": rows[:1000], "test": linear.draw(1000, 3)}, args)
    if args.data_dir:
        data = pv.load_data("mnist", args.data_dir)
        parts = {"train": data.train.x[:1000], "test": data.test.x[:1000]}
        compare("MNIST", trained(data, args), data.train.x, parts, args)


if __name__ == "__main__":
    main()

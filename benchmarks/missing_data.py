"""Missing values: the breast-cancer table of MIWAE (Mattei & Frellsen, 2019), in 30 lines.

    python benchmarks/missing_data.py [--epochs 1001] [--samples 10000]

Half of the entries of scikit-learn's standardized table are removed completely at random. The pair
receives the observed entries, zeros for the others, and a mask as context. It maximizes the
importance-weighted bound of the observed entries, with 20 samples. Removed entries are imputed by
their posterior mean: the self-normalized, importance-weighted mean of the likelihood's mean. The
program prints the mean squared error over the removed entries. The authors report 1.73 at the first
epoch and 0.287 at epochs 501 and 1001.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn.functional import softplus

import pyro_vae as pv
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.weights import log_weights

LATENT, HIDDEN = 10, 128


class Table(nn.Module):
    """z ~ N(0, I), x ~ Student-t, q(z | x) Student-t; only observed entries are scored."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = pv.MLP(width, (HIDDEN, HIDDEN), 3 * LATENT)
        self.decoder = pv.MLP(LATENT, (HIDDEN, HIDDEN), 3 * width)

    def model(self, x: Tensor, mask: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            likelihood = student(self.decoder(z)).mask(mask > 0).to_event(1)
            pyro.sample("x", likelihood, obs=x)

    def guide(self, x: Tensor, mask: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", student(self.encoder(x)).to_event(1))


def student(raw: Tensor) -> dist.StudentT:
    loc, scale, df = raw.chunk(3, -1)
    return dist.StudentT(softplus(df) + 3, loc, softplus(scale) + 1e-3, validate_args=False)


def table() -> tuple[Tensor, Tensor]:
    """Return the standardized table, and a mask that is 1 for observed entries."""
    x = load_breast_cancer().data
    x = (x - x.mean(0)) / x.std(0)
    mask = np.ones(x.size, bool)
    state = np.random.RandomState(1234)
    mask[state.choice(x.size, x.size // 2, replace=False)] = False
    return torch.from_numpy(x).float(), torch.from_numpy(mask.reshape(x.shape)).float()


def impute(pair: Table, x: Tensor, mask: Tensor, num_samples: int) -> Tensor:
    """Return the posterior mean of every entry."""
    means = []
    with torch.no_grad(), seeded(0):
        for rows in zip(x.split(10), mask.split(10), strict=True):
            # Draw the samples of the weights again, from the same state.
            state = torch.get_rng_state()
            weights = log_weights(pair, rows, num_samples).softmax(0)
            torch.set_rng_state(state)
            with pyro.plate("importance_samples", num_samples, dim=-2):
                z = pyro.poutine.trace(pair.guide).get_trace(*rows).nodes["z"]["value"]
            mean = student(pair.decoder(z)).mean
            means.append((weights[..., None] * mean).sum(0))
    return torch.cat(means)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=1001)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path("runs/published/missing-data"))
    options = parser.parse_args()
    x, mask = table()
    torch.manual_seed(0)  # for the initial weights
    pair, removed = Table(x.shape[1]), mask == 0
    began = time.perf_counter()
    pv.fit(
        pair,
        x * mask,
        mask,
        objective=pv.ImportanceWeightedELBO(20),
        epochs=options.epochs,
        batch_size=32,
        learning_rate=2e-4,
        engine="traced",
    )
    found = impute(pair, x * mask, mask, options.samples)
    error = (found - x)[removed].square().mean().item()
    print(f"imputation MSE after {options.epochs} epochs: {error:.4f}")
    options.out.mkdir(parents=True, exist_ok=True)
    minutes = (time.perf_counter() - began) / 60
    result = {"mse": error, "epochs": options.epochs, "minutes": minutes}
    (options.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Counts with a library size: find cell types for any sequencing depth.

    python examples/counts.py [--epochs 100]

The cells are simulated, so the true types are known. Each cell has one of four types. A type gives
each of 60 genes its share of the reads of a cell. The total, the library size, varies tenfold
between cells and is of no interest. Counts have a negative binomial distribution with inverse
dispersion 2.

The program fits three VAEs. The first two have a Poisson and a negative binomial likelihood, whose
means are shares of the observed total. The third has a negative binomial likelihood and must
explain the totals too.

Expect, on test cells: log p(x | total) of about -196 nats for the Poisson and -133 for the negative
binomial. The inferred shares of the genes have a correlation with the truth of about 0.86 and 0.96.
If the total is given, the codes contain no information about the depth (R² of 0.00); otherwise they
contain most of it (0.89). log p(x) of the third model includes the totals, so do not compare it
with the others. The program takes about half a minute on two cores.
"""

import argparse

import pyro.distributions as dist
import torch
from sklearn.linear_model import LinearRegression
from torch import Tensor

import pyro_vae as pv

GENES, TYPES, DISPERSION = 60, 4, 2.0
CELLS = (1500, 300, 500)


def simulate() -> tuple[Tensor, Tensor, Tensor]:
    """Return counts (cells, genes), types (cells,) and the shares of each type (types, genes)."""
    shares = dist.Dirichlet(torch.full((GENES,), 0.5)).sample((TYPES,))
    kind = torch.randint(TYPES, (sum(CELLS),))
    depth = dist.LogNormal(6.0, 0.8).sample((len(kind), 1))
    mean = depth * shares[kind]
    counts = dist.GammaPoisson(DISPERSION, DISPERSION / mean.clamp(min=1e-6)).sample()
    return counts, kind, shares


def log_totals(counts: Tensor) -> Tensor:
    return counts.sum(-1, keepdim=True).log()


def r_squared(codes: Tensor, target: Tensor) -> float:
    """Return R² of the linear regression of a number on the codes."""
    return LinearRegression().fit(codes, target).score(codes, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=100)
    options = parser.parse_args()
    torch.manual_seed(0)

    counts, kind, shares = simulate()
    train, validation, test = counts.split(CELLS)
    test_kind = kind[-len(test) :]
    likelihoods = {
        "Poisson, shares of the total": pv.Poisson(library_size=True),
        "negative binomial, shares of the total": pv.NegativeBinomial(library_size=True),
        "negative binomial": pv.NegativeBinomial(),
    }
    for name, likelihood in likelihoods.items():
        given = likelihood.library_size
        vae = pv.VAE.mlp((GENES,), 4, (64,), likelihood, context_shapes=[(1,)] if given else [])
        parts = [(x, log_totals(x)) if given else (x,) for x in (train, validation, test)]
        pv.fit(
            vae,
            *parts[0],
            validation=parts[1],
            epochs=options.epochs,
            batch_size=64,
            learning_rate=2e-3,
        )
        found = pv.log_likelihood(vae, *parts[2], num_samples=200)
        depth = r_squared(pv.encode(vae, *parts[2])["z"], log_totals(test)[:, 0])
        print(name)
        print(f"  log p(x{' | total' if given else ''}) {found.value:.1f}")
        print(f"  R² of the log depth from the codes {depth:.2f}")
        if given:
            inferred = pv.reconstruct(vae, test, torch.zeros(len(test), 1))  # for a total of 1
            both = torch.stack([inferred.flatten(), shares[test_kind].flatten()])
            print(f"  correlation of shares with the truth {both.corrcoef()[0, 1]:.2f}")


if __name__ == "__main__":
    main()

"""A decoder with latent weights: how much a few data leave unknown about the decoder.

    python examples/bayesian_decoder.py [--steps 2000] [--out runs/bayesian-decoder.png]

The same VAE, with fixed noise, is fitted to 100 and to 1,000 digits. The weights of the decoder are
either parameters or global latents with an approximate posterior. Training does not stop early.

Expect, in nats per test digit: with 100 digits, log p(x) is about 2 for the posterior and -0.4 for
point weights. The ELBO on their own 100 digits is 36 nats higher than on test digits for point
weights, and 24 nats higher for the posterior. With 1,000 digits, log p(x) is about 13 and 15. These
estimates are low, as their Pareto k shows, because few draws dominate for each digit. The share of
the weights in the variance of a pixel falls from 16 to 6 %. The figure shows this share. The
program takes about a minute and a half on two cores.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.diagnostics import figures as diagnostic_figures

SIZES = (100, 1000)
BATCH_SIZE = 50
LATENT_DIM, HIDDEN = 4, (32,)
NOISE = 0.15
LEARNING_RATE = 3e-3


def fitted(pair: nn.Module, x: torch.Tensor, steps: int) -> float:
    """Fit a pair for a number of steps, and return its ELBO on the training data."""
    epochs = max(2, steps * BATCH_SIZE // len(x))
    pv.fit(
        pair,
        x,
        epochs=epochs,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        learning_rate_schedule=pv.CosineSchedule(epochs),
        beta=pv.LinearSchedule(epochs / 4),
    )
    return pv.evaluate(pair, x, num_samples=1).elbo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--num-samples", type=int, default=500)
    parser.add_argument("--out", default="runs/bayesian-decoder.png")
    options = parser.parse_args()
    digits = pv.load_data("digits")
    test, found = digits.test.x, {}
    print(f"{'':<24}{'ELBO, own':>10}{'test':>8}{'log p(x)':>18}")
    for size in SIZES:
        for name in ("point weights", "posterior"):
            torch.manual_seed(0)  # for the initial weights
            pair = pv.VAE.mlp(digits.shape, LATENT_DIM, HIDDEN, pv.Gaussian(NOISE))
            if name == "posterior":
                pair = pv.BayesianDecoder(pair)
            own = fitted(pair, digits.train.x[:size], options.steps)
            score = pv.log_likelihood(pair, test, num_samples=options.num_samples)
            numbers = f"{score.value:>10.2f} ± {score.standard_error:.2f}"
            print(f"{size:>5} digits, {name:<15}{own:>7.2f}{score.elbo:>8.2f}{numbers:>18}")
        found[f"{size} digits"] = pv.uncertainty(pair, test)
    for name, one in found.items():
        print(f"\nvariance of a pixel after {name}\n{one}")
    figure = diagnostic_figures.uncertainty(found, test)
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=120)
    print(f"\nfigure: {options.out}")


if __name__ == "__main__":
    main()

"""Signal-to-noise of the encoder's gradient by the number of importance samples K.

    python benchmarks/gradients.py [--epochs 30] [--repeats 300] [--out docs/figures/gradients.png]

The program trains a VAE 64-64-8 on binarized digits for its ELBO. Then it fixes the parameters and
draws each estimator of the gradient of the importance-weighted bound many times, on one minibatch
of 64. Signal-to-noise is |E g| / sqrt(E |g - E g|^2) over all parameters of the encoder. The square
of the mean is corrected for the number of draws. The result is NaN if the noise hides the signal.
"""

import argparse
from math import nan, sqrt
from pathlib import Path

import torch
from matplotlib.figure import Figure

import pyro_vae as pv
from pyro_vae.pairs.scope import scope

SAMPLES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def signal_to_noise(vae: pv.VAE, x: torch.Tensor, k: int, kind: pv.Gradient, repeats: int) -> float:
    """Signal-to-noise of the gradient of the bound with k samples, for the encoder."""
    objective = pv.ImportanceWeightedELBO(k, gradient=kind)
    parameters = list(vae.encoder.parameters())
    rows = []
    with scope(vae):
        for _ in range(repeats):
            loss = objective.differentiable_loss(vae.model, vae.guide, x)
            found = torch.autograd.grad(loss, parameters)
            rows.append(torch.cat([part.flatten() for part in found]).double())
    draws = torch.stack(rows)
    noise = draws.var(0).sum().item()
    signal = draws.mean(0).square().sum().item() - noise / repeats
    return sqrt(signal / noise) if signal > 0 else nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("docs/figures/gradients.png"))
    options = parser.parse_args()
    torch.manual_seed(0)
    x = (pv.load_data("digits").train.x.float() / 255).bernoulli()
    vae = pv.VAE.mlp((1, 8, 8), latent_dim=8, hidden=(64,))
    pv.fit(vae, x, epochs=options.epochs, progress=False)
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    print(f"| K | {' | '.join(pv.Gradient)} |\n| --- | --- | --- | --- |")
    found = {kind: list[float]() for kind in pv.Gradient}
    for k in SAMPLES:
        for kind, ratios in found.items():
            ratios.append(signal_to_noise(vae, x[:64], k, kind, options.repeats))
        print(f"| {k} | {' | '.join(f'{ratios[-1]:.2f}' for ratios in found.values())} |")
    for kind, ratios in found.items():
        biased = " (biased for K > 1)" if kind == pv.Gradient.STICKING_THE_LANDING else ""
        axes.loglog(SAMPLES, ratios, marker="o", label=kind.replace("-", " ") + biased)
    axes.set(xlabel="importance samples K", ylabel="signal-to-noise, encoder")
    axes.set_xticks(SAMPLES, [str(k) for k in SAMPLES])
    axes.minorticks_off()
    axes.legend(frameon=False)
    figure.savefig(options.out, dpi=130)


if __name__ == "__main__":
    main()

"""A deep Markov model: digits row by row, and a forecast of their last rows.

    python examples/sequence.py [--epochs 60]

Each digit is a sequence of eight rows of eight binary pixels. A latent vector changes from row to
row. The guide reads the rows from the last one up (Krishnan, Shalit & Sontag, 2017). Sequences may
end early. So a digit that is cut after four rows has its own likelihood and code. From this code
the transition continues the chain, which forecasts the other four rows.

Expect: log p(x) of the test digits of about -22.3 nats per example (0.50 bits per pixel). Their
last four rows given the first four have -11.6 nats; the mean of each pixel gives -13.1. The program
takes about half a minute on two cores.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.pairs import figures
from pyro_vae.plots import canvas

LATENT_DIM = 12
HIDDEN = 64
BATCH_SIZE = 64
LEARNING_RATE = 3e-3
WARM_UP = 15
SEEN = 4


def forecast(pair: pv.DeepMarkovModel, x: Tensor, paths: int = 5) -> Tensor:
    """Return probabilities (paths, n, steps, pixels) of the rows after x, along drawn paths."""
    seen = x.shape[-2]
    padded = torch.nn.functional.pad(x, (0, 0, 0, pair.steps - seen))
    lengths = torch.full((len(x),), seen)
    found = []
    with torch.no_grad():
        for seed in range(paths):
            code = pv.encode(pair, padded, lengths, what="draw", seed=seed)["z"][:, seen - 1]
            ahead = torch.ones(len(x), pair.steps - seen)
            path = pv.MarkovChain(pair.transition, code, ahead).sample()
            found.append(pair.emission(path).mean)
    return torch.stack(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--out", default="runs/example-sequence")
    options = parser.parse_args()
    torch.manual_seed(0)  # for the initial weights and the paths

    digits = pv.load_data("digits")
    train, validation, test = (
        (part.x[:, 0] > 127).float() for part in (digits.train, digits.validation, digits.test)
    )
    steps, pixels = train.shape[1:]
    pair = pv.DeepMarkovModel.usual(steps, pixels, LATENT_DIM, HIDDEN, ragged=True)
    # Half of the digits end early, so that the guide learns to work without the last rows.
    lengths = torch.where(torch.rand(len(train)) < 0.5, SEEN, steps)
    pv.fit(
        pair,
        train,
        lengths,
        validation=(validation, torch.full((len(validation),), steps)),
        epochs=options.epochs,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        beta=pv.LinearSchedule(WARM_UP),
    )
    whole, cut = (torch.full((len(test),), length) for length in (steps, SEEN))
    result = pv.evaluate(pair, test, whole)
    print(result)
    first = pv.log_likelihood(pair, test, cut)
    rates = train[:, SEEN:].mean(0).clamp(0.01, 0.99)
    blind = torch.distributions.Bernoulli(rates).log_prob(test[:, SEEN:]).flatten(1).sum(-1).mean()
    print(f"log p of the last rows given the first: {result.log_likelihood - first.value:.2f}")
    print(f"log p of the last rows by the mean of each pixel: {blind:.2f}")

    paths = forecast(pair, test[:, :SEEN])
    Path(options.out).mkdir(parents=True, exist_ok=True)
    some = torch.linspace(0, len(test) - 1, 12).long()
    ends = [torch.cat([test[some, :SEEN], path[some]], 1)[:, None] for path in paths]
    rows = [("data", test[some, None]), *((f"path {i + 1}", end) for i, end in enumerate(ends))]
    figure = Path(options.out) / "forecast.png"
    title = "the upper half is given, the lower half is forecast"
    figure.write_bytes(figures.png(canvas.grid(rows, title)))
    print(f"pictures: {figure}")


if __name__ == "__main__":
    main()

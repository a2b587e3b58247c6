"""Follow the verdict's advice on digits and MNIST: the figures of docs/walk-through.md.

    python benchmarks/walk_through.py digits
    python benchmarks/walk_through.py mnist --data-dir DIR

Train a small VAE, diagnose it, and refine the test rows. Then fit a larger encoder to training data
and draws of the model, for digits also of a richer family. Diagnose after each step.
"""

import argparse
import time

import torch

import pyro_vae as pv
from pyro_vae.diagnostics import sizing

BUDGET = 20.0
"""Seconds of one core for each diagnosis."""

REFINED = 300
"""Rows of test data that are refined."""

SETTINGS = {
    "digits": {
        "pair": {"latent_dim": 16, "hidden": (256, 128), "likelihood": pv.DiscretizedLogistic},
        "fit": {"epochs": 120, "batch_size": 64, "learning_rate": 3e-3},
        "families": [pv.DiagonalNormal, pv.FullRankNormal],
        "draws": 60_000,
        "copies": 6,
        "encoder": (512, 256),
        "refit": {"epochs": 15, "batch_size": 128, "learning_rate": 2e-3},
    },
    "mnist": {
        "pair": {"latent_dim": 20, "hidden": (200,)},
        "fit": {"epochs": 8, "batch_size": 128, "learning_rate": 1e-3},
        "families": [pv.DiagonalNormal],
        "draws": 50_000,
        "copies": 1,
        "encoder": (500,),
        "refit": {"epochs": 3, "batch_size": 256, "learning_rate": 1e-3},
    },
}


def told(step: str, pair: torch.nn.Module, *batch: torch.Tensor, **more: object) -> None:
    """Diagnose, and print the parts at fault with their sizes."""
    found = pv.diagnose(pair, *batch, budget=BUDGET, progress=False, **more)
    weighed = found.results["log_likelihood"]
    parts = ", ".join(
        f"{blame.part} {'?' if blame.nats is None else f'{blame.nats:.2f}'}"
        for blame in found.blamed
    )
    print(f"## {step}: {parts or 'no part'}")
    print(
        f"log p(x) >= {weighed.value:.2f}, ELBO {weighed.elbo:.2f}\n{found.summary}\n", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", choices=list(SETTINGS))
    parser.add_argument("--data-dir")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizing.now = time.process_time  # other programs do not count
    data, own = pv.load_data(options.data, data_dir=options.data_dir), SETTINGS[options.data]
    train, test = data.train.x, data.test.x[:1000]
    settings = {"validation": data.validation.x[:1000], "progress": False, "seed": 0}

    torch.manual_seed(0)
    vae = pv.VAE.mlp(data.shape, **own["pair"])
    warm_up = {"beta": pv.LinearSchedule(60)} if options.data == "digits" else {}
    cosine = pv.CosineSchedule(own["fit"]["epochs"])
    pv.fit(vae, train, learning_rate_schedule=cosine, **own["fit"], **settings, **warm_up)
    told("trained", vae, test, train=train)
    refined = pv.refine(vae, test[:REFINED], steps=200, num_samples=300, progress=False)
    told("refined", refined.pair, *refined.batch)

    drawn = pv.sample(vae, own["draws"], seed=1).reshape(-1, *train.shape[1:])
    more = torch.cat([*[train] * own["copies"], (255 * drawn).round().byte()])
    settings |= {"learning_rate_schedule": pv.CosineSchedule(own["refit"]["epochs"])}
    for family in own["families"]:
        pair = pv.refit_guide(
            vae, more, posterior=family, hidden=own["encoder"], **own["refit"], **settings
        )
        told(f"another encoder, {family.__name__}", pair, test, train=train)
        refined = pv.refine(pair, test[:REFINED], steps=200, num_samples=300, progress=False)
        told(f"{family.__name__}, refined", refined.pair, *refined.batch)


if __name__ == "__main__":
    main()

"""Repeat rows of published tables: fit and measure them.

    python benchmarks/published.py --data-dir DIR [ROW ...] [--epochs N]
    python benchmarks/published.py --table

Each row is a run folder under runs/published. If a row was stopped (Ctrl-C, a kill), the program
continues it. It stores the results in result.json. ``--epochs`` makes a shorter run in a separate
folder, labeled by its epochs. ``--table`` prints all results, and ``--curves FILE`` draws them, for
docs/benchmarks/index.md.

Other rows have their own scripts: pyro_example.py, semisupervised.py, missing_data.py.

Binary MNIST is "dynamic": pixels are drawn again at each visit as Bernoulli(intensity). Validation
images (10,000 of the 60,000 training images) and test images are drawn once, with a fixed seed.
"""

import argparse
import csv
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae.data.split import Data
from pyro_vae.pairs.rng import seeded
from pyro_vae.runs import files as run_files
from pyro_vae.runs import folder as run_folder

RUNS = Path("runs/published")
SEED = 0


class Row(NamedTuple):
    """One row of a published table."""

    what: str
    published: str
    """The published figure, with its source, for the table."""
    make: Callable[[Data], nn.Module]
    epochs: int
    warm_up: float


def _vamp(pair: Any, encoder: nn.Module, data: Data) -> nn.Module:
    pair.prior = pv.VampPrior.of_data(encoder, data.train.x, components=500)
    return pair


def _one_level(data: Data) -> pv.VAE:
    return pv.VAE.mlp(data.shape, latent_dim=40, hidden=(300, 300), activation=nn.GLU)


def _two_levels(data: Data) -> pv.HierarchicalVAE:
    return pv.HierarchicalVAE.mlp(
        data.shape, latent_dim=(40, 40), hidden=(300, 300), normalize=False, activation=nn.GLU
    )


def _ladder(data: Data) -> pv.HierarchicalVAE:
    widths, dims = (512, 256, 128, 64, 32), (64, 32, 16, 8, 4)

    def network(inputs: Any, width: int, outputs: int | None) -> pv.MLP:
        return pv.MLP(inputs, (width, width), outputs, nn.LeakyReLU, normalize=True)

    def normal(network: nn.Module, dim: int) -> pv.Factor:
        return pv.Factor(network, pv.DiagonalNormal(), (dim,))

    below = ([data.shape], *widths)
    trunks = [network(seen, width, None) for seen, width in zip(below, widths, strict=False)]
    messages = [
        normal(pv.MLP(width, (), 2 * dim), dim) for width, dim in zip(widths, dims, strict=True)
    ]
    levels = [
        normal(network(above, width, 2 * dim), dim)
        for dim, above, width in zip(dims, dims[1:], widths[1:], strict=False)
    ]
    decoder = pv.Factor(network(dims[0], widths[0], 784), pv.Bernoulli(), data.shape)
    inference, prior = pv.TopDown(trunks, messages), pv.StandardNormal(dims[-1])
    return pv.HierarchicalVAE(inference, decoder, levels, prior, markov=True)


TOMCZAK = "Tomczak & Welling 2018"

ROWS = {
    "vae-standard": Row(
        "VAE, standard prior", f"NLL 84.50 ({TOMCZAK})", _one_level, epochs=300, warm_up=50
    ),
    "vae-vamp": Row(
        "VAE, VampPrior",
        f"NLL 82.38 ({TOMCZAK})",
        lambda data: _vamp(pair := _one_level(data), pair.encoder, data),
        epochs=170,
        warm_up=50,
    ),
    "hierarchical-standard": Row(
        "two levels, standard prior",
        f"NLL 82.42 ({TOMCZAK})",
        _two_levels,
        epochs=150,
        warm_up=50,
    ),
    "hierarchical-vamp": Row(
        "two levels, VampPrior",
        f"NLL 81.24 ({TOMCZAK})",
        lambda data: _vamp(pair := _two_levels(data), pair.inference.top(), data),
        epochs=150,
        warm_up=50,
    ),
    "ladder": Row(
        "ladder of five levels, layer normalization",
        "NLL 81.2 to 81.7, batch normalization (Sønderby et al. 2016)",
        _ladder,
        epochs=2000,
        warm_up=200,
    ),
}

COMMON = {
    "batch_size": 100,
    "learning_rate": 1e-3,
    "engine": "compiled",
    "precision": "bfloat16",
    "seed": SEED,
    "checkpoint_seconds": 60.0,
}


def run(name: str, data: Data, epochs: int | None, num_samples: int) -> None:
    """Fit a row, or continue it, and measure it."""
    row = ROWS[name]
    length = epochs or row.epochs
    folder = RUNS / (name if length == row.epochs else f"{name}-{length}")
    if (folder / "result.json").exists():
        return
    with seeded(SEED):
        pair = row.make(data)
    warm_up = row.warm_up * length / row.epochs
    history = pv.fit(
        pair,
        data.train.x,
        validation=data.validation.x,
        objective=Trace_ELBO(),
        beta=pv.LinearSchedule(warm_up) if warm_up else 1.0,
        learning_rate_schedule=pv.CosineSchedule(length),
        epochs=length,
        out=folder,
        resume=(folder / run_files.CHECKPOINT).exists(),
        **COMMON,
    )
    if num_samples == 0:
        return
    result = measure(pair, data, num_samples)
    result |= {
        "row": name,
        "epochs": length,
        "full_length": length == row.epochs,
        "best_epoch": history.best_epoch,
        "hours": sum(history["seconds"]) / 3600,
        "settings": COMMON | {"warm_up": warm_up},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "date": time.strftime("%Y-%m-%d"),
        "versions": run_folder.versions(),
    }
    run_files.write_json(folder / "result.json", result)


def measure(pair: nn.Module, data: Data, num_samples: int) -> dict[str, Any]:
    """Return the bound and its parts, active units, and the NLL by importance samples."""
    x = data.test.x
    result = pv.evaluate(pair, x, num_samples=num_samples, engine="compiled", progress=True)
    return {
        "num_samples": num_samples,
        "nll": result.nll,
        "nll_standard_error": result.log_likelihood_standard_error,
        "elbo": result.elbo,
        "kl_by_site": result.kl_by_site,
        "active_units": result.active_units,
    }


def table() -> str:
    """Return all results as Markdown."""
    lines = [
        "| row | published | NLL (samples) | ELBO | KL by site | active | epochs (best) | hours |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for path in sorted(RUNS.glob("*/result.json")):
        found = json.loads(path.read_text())
        row = ROWS[found["row"]]
        label = row.what if found["full_length"] else f"{row.what}, shorter run"
        kl = ", ".join(f"{site} {value:.1f}" for site, value in found["kl_by_site"].items())
        units = ", ".join(f"{site} {count}" for site, count in found["active_units"].items())
        lines.append(
            f"| {label} | {row.published} | {found['nll']:.2f} ({found['num_samples']}) | "
            f"{found['elbo']:.2f} | {kl} | "
            f"{units} | {found['epochs']} ({found['best_epoch']}) | {found['hours']:.1f} |"
        )
    return "\n".join(lines)


def curves(path: Path) -> None:
    """Draw the validation ELBO of every row by epoch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), dpi=130, layout="constrained")
    axis = figure.subplots()
    for folder in sorted(path.parent for path in RUNS.glob("*/history.csv")):
        with open(folder / "history.csv", newline="") as file:
            elbo = [float(row["validation_elbo"]) for row in csv.DictReader(file)]
        axis.plot(range(1, len(elbo) + 1), elbo, label=folder.name, linewidth=1.2)
    axis.set(xlabel="epoch", ylabel="validation ELBO, nats per example", ylim=(-96, -85))
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--samples", type=int, default=5000, help="for the NLL; 0 only fits")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--curves", type=Path, help="draw the validation ELBO into this file")
    options = parser.parse_args()
    if unknown := [name for name in options.rows if name not in ROWS]:
        parser.error(f"unknown row '{unknown[0]}'; the rows are {', '.join(ROWS)}")
    if not options.table:
        data = pv.load_data("mnist", options.data_dir)
        for name in options.rows or ROWS:
            run(name, data, options.epochs, options.samples)
    print(table())
    if options.curves:
        curves(options.curves)


if __name__ == "__main__":
    main()

"""An article's VAE and its loss; what three omissions do, and what a learned scale changes.

    python examples/article.py [--epochs 150] [--out FOLDER]
    python examples/article.py --data-dir DIR [--epochs 5]      # MNIST, with the article's sizes

The loss is sum ||x - x'||^2 / (2 N) + beta KL, with N the images of the minibatch. It is the
negative ELBO of a Gaussian likelihood of scale 1, less a constant:
docs/benchmarks/article.md says more.

Expect, on the digits, errors of 74 thousandths with the loss as it is (beta = 1), where every
reconstruction is the mean digit, and of 16 with beta = 0.02. Without the KL the codes spread to 3.4
times the prior, with its sign wrong to millions. A learned scale ends at 0.127, with log p(x) at
about 30 nats per digit instead of -61. Takes a minute of one core.
"""

import argparse
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pyro import distributions as dist
from torch import Tensor
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae.data.split import Data

BETA = 0.02  # about the variance of the pixels' noise: at 1 the codes say nothing of x
FIRST_SCALE = 0.1  # of the learned one: from 1 the codes say nothing for the first 50 epochs
BATCH_SIZE = 32
LEARNING_RATE = 1e-3
NUM_SAMPLES = 200  # importance samples for log p(x)
OUT = "runs/example-article"


class Sizes(NamedTuple):
    """The article's for MNIST, and smaller ones for images of 64 pixels."""

    hidden: tuple[int, ...]
    latent_dim: int
    epochs: int


SIZES = {"mnist": Sizes((128, 64), 20, 5), "digits": Sizes((64, 32), 10, 150)}


class Intensities(pv.Gaussian):
    """A Gaussian whose means are in [0, 1], by a sigmoid."""

    def forward(self, raw: Tensor, shape: tuple[int, ...]) -> dist.TorchDistribution:
        return super().forward(raw.sigmoid(), shape)


class Point(pv.Family):
    """A posterior without a scale: the code is what the network says."""

    def outputs(self, shape: tuple[int, ...]) -> int:
        return shape[0]

    def forward(self, raw: Tensor, shape: tuple[int, ...]) -> dist.TorchDistribution:
        return dist.Delta(raw, event_dim=1)


class Variant(NamedTuple):
    """One way to train the article's VAE."""

    name: str
    beta: float = BETA
    scale: float = 1.0
    learned: bool = False
    posterior: type[pv.Family] = pv.DiagonalNormal


VARIANTS = (
    Variant("mended, β = 1", beta=1.0),
    Variant(f"mended, β = {BETA}"),
    Variant("no KL", beta=0.0),
    Variant("no posterior scale", posterior=Point),
    Variant("KL of wrong sign", beta=-BETA),
    Variant("learned scale, β = 1", beta=1.0, scale=FIRST_SCALE, learned=True),
)


def fitted(variant: Variant, data: Data, epochs: int) -> pv.VAE:
    torch.manual_seed(0)  # the same first weights for all
    sizes = SIZES[data.name]
    vae = pv.VAE.mlp(
        data.shape,
        latent_dim=sizes.latent_dim,
        hidden=sizes.hidden,
        likelihood=Intensities(variant.scale, variant.learned),
        posterior=variant.posterior,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table says whose posterior has collapsed
        pv.fit(
            vae,
            data.train.x,
            beta=variant.beta,
            epochs=epochs,
            batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
        )
    return vae


@torch.no_grad()
def measured(variant: Variant, vae: pv.VAE, x: Tensor) -> dict[str, str]:
    """A row of the table, of held-out images in [0, 1]."""
    q, error = vae.encoder(x), F.mse_loss(pv.reconstruct(vae, x), x).item()
    row = {"error": f"{1000 * error:.1f}", "code": f"{q.mean.std(0).mean().item():.3g}"}
    row["scale"] = f"{vae.decoder(q.mean).base_dist.scale.mean().item():.3f}"
    if variant.posterior is Point:
        return row | {"KL": "infinite"}
    row["KL"] = f"{kl_divergence(q, vae.prior()).mean().item():.3g}"
    if variant.beta > 0:
        weighed = pv.log_likelihood(vae, x, num_samples=NUM_SAMPLES)
        row["log p(x)"] = f"{weighed.value:.1f}"
    return row


@torch.no_grad()
def figure(vaes: dict[str, pv.VAE], x: Tensor, labels: Tensor) -> Figure:
    """A column for each variant: reconstructions, draws, codes."""
    drawn = Figure(figsize=(2.1 * len(vaes) + 0.3, 6.5), layout="constrained")
    axes = drawn.subplots(3, len(vaes))
    for (name, vae), column in zip(vaes.items(), axes.T, strict=True):
        column[0].set_title(name, fontsize=11)
        pairs = torch.stack([x[:18], pv.reconstruct(vae, x[:18])], 1).unflatten(0, (3, 6))
        show_images(column[0], pairs.transpose(1, 2).flatten(0, 2))
        show_images(column[1], pv.sample(vae, 36, means=True, seed=0))
        show_codes(column[2], vae, x, labels)
    titles = ("data and reconstructions", "draws", "codes, and N(0, I) in gray")
    for axis, title in zip(axes[:, 0], titles, strict=True):
        axis.set_ylabel(title, fontsize=10)
    return drawn


def show_images(axis: Axes, images: Tensor) -> None:
    """Images, six in a row."""
    framed = F.pad(images.squeeze(1), (1, 1, 1, 1), value=0.35)
    axis.imshow(
        framed.unflatten(0, (-1, 6)).permute(0, 2, 1, 3).flatten(2).flatten(0, 1),
        cmap="gray",
        vmin=0,
        vmax=1,
        interpolation="nearest",
    )
    axis.set(xticks=[], yticks=[])


def show_codes(axis: Axes, vae: pv.VAE, x: Tensor, labels: Tensor) -> None:
    """Means of codes by class, in the plane in which the classes' means differ most."""
    codes = vae.encoder(x).mean
    means = torch.stack([codes[labels == label].mean(0) for label in labels.unique()])
    plane = torch.linalg.svd(means - means.mean(0)).Vh[:2].T
    prior = torch.randn(1000, codes.shape[1], generator=torch.Generator().manual_seed(0))
    axis.scatter(*(prior @ plane).T, s=2, color="#c8c8c8", linewidths=0)
    axis.scatter(*(codes[:1000] @ plane).T, s=4, c=labels[:1000], cmap="tab10", linewidths=0)
    axis.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
    axis.set_xlabel(f"standard deviation {codes.std(0).mean().item():.2g}", fontsize=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--data-dir", default=None, help="folder of MNIST; else embedded digits")
    parser.add_argument("--out", type=Path, default=Path(OUT), help="folder for the picture")
    options = parser.parse_args()
    data = pv.load_data("mnist" if options.data_dir else "digits", options.data_dir)
    epochs = options.epochs or SIZES[data.name].epochs
    x = data.test.x / 255

    columns = ("error", "KL", "code", "scale", "log p(x)")
    print(f"{'':<22}" + "".join(f"{column:>10}" for column in columns))
    vaes = {}
    for variant in VARIANTS:
        vaes[variant.name] = fitted(variant, data, epochs)
        row = measured(variant, vaes[variant.name], x)
        print(f"{variant.name:<22}" + "".join(f"{row.get(column, ''):>10}" for column in columns))
    options.out.mkdir(parents=True, exist_ok=True)
    figure(vaes, x, data.test.labels).savefig(options.out / "article.png", dpi=100)
    print(f"picture: {options.out / 'article.png'}")


if __name__ == "__main__":
    main()

"""MNIST with few labels: M1 + M2 (Kingma et al., 2014), and a plain classifier of its codes.

    python benchmarks/semisupervised.py --data-dir DIR [--out runs/semisupervised] [--visits 40]

M1 is a VAE of softplus layers 784-400-400-50 on all training images, binarized at each visit,
without labels. M2 is fitted to several draws of q(z | x) by M1 for each image, for the units that
M1 uses (those with a KL over 0.05 nats). 100 or 1,000 of the 50,000 training images have labels,
with the same number for each class, in three draws of labels. The rows with labels are repeated,
each time with other draws, so that they are a tenth of each minibatch. M2 predicts from the means
of q(z | x). The labels of the 10,000 validation images chose the settings. The labels of test
images are used only for the results.

Each stage writes a file into the folder. A stage whose file exists does not run again. M1 writes
its run folder and codes.pt. Each number of labels and each draw writes a JSON of settings, seeds
and results. So you can continue a run that was stopped. If the folder holds an M1 with another
number of epochs, this M1 is kept.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.data.split import Data
from pyro_vae.diagnostics.labels import calibration_error

USED = 0.05
"""Units of M1 whose KL, in nats, is above this value are the codes."""


@dataclass(frozen=True)
class Settings:
    """Settings of M2."""

    num_labels: int
    draw: int
    visits: int
    draws: int = 10
    hidden: tuple[int, ...] = (512,)
    latent_dim: int = 5
    classification_weight: float = 20.0
    labeled_rows: int = 6000
    batch_size: int = 500
    learning_rate: float = 3e-3


def lower(data: Data, run: Path, epochs: int) -> nn.Module:
    """Load M1 from its folder, or fit it."""
    if (run / "history.csv").exists():
        return pv.load(run)
    torch.manual_seed(0)
    vae = pv.VAE.mlp(data.shape, latent_dim=50, hidden=(400, 400), activation=nn.Softplus)
    pv.fit(
        vae,
        data.train.x,
        validation=data.validation.x,
        epochs=epochs,
        batch_size=200,
        beta=pv.LinearSchedule(15),
        learning_rate_schedule=pv.CosineSchedule(epochs),
        out=run,
    )
    return vae


def codes(data: Data, out: Path, epochs: int) -> dict[str, Tensor]:
    """Means of q(z | x) by M1 for each part of the data, and scales for the training part."""
    path = out / "codes.pt"
    if not path.exists():
        vae = lower(data, out / "m1", epochs)
        mean, scale = (pv.encode(vae, data.train.x, what=what)["z"] for what in ("mean", "scale"))
        used = (0.5 * (mean**2 + scale**2 - 1) - scale.log()).mean(0) > USED
        parts = {"train": mean, "scale": scale} | {
            name: pv.encode(vae, getattr(data, name).x)["z"] for name in ("validation", "test")
        }
        torch.save({name: part[:, used] for name, part in parts.items()}, path)
    return torch.load(path, weights_only=True)


def upper(data: Data, x: dict[str, Tensor], settings: Settings) -> dict[str, object]:
    """Results of M2 with these settings, and of a logistic regression on the same labels."""
    labels = pv.hide_labels(data.train.labels, settings.num_labels, seed=settings.draw)
    known = (labels >= 0).nonzero()[:, 0]
    rows = torch.cat(
        [torch.arange(len(labels)), known.repeat(settings.labeled_rows // len(known))]
    ).repeat(settings.draws)
    torch.manual_seed(settings.draw)
    z = x["train"][rows] + x["scale"][rows] * torch.randn(len(rows), x["train"].shape[1])
    epochs = settings.visits // settings.draws
    pair = pv.SemiSupervisedVAE.mlp(
        tuple(x["train"].shape[1:]),
        10,
        settings.classification_weight,
        latent_dim=settings.latent_dim,
        hidden=settings.hidden,
        likelihood=pv.Gaussian,
    )
    began = time.perf_counter()
    pv.fit(
        pair,
        z,
        labels[rows],
        epochs=epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        learning_rate_schedule=pv.CosineSchedule(epochs),
        seed=settings.draw,
    )
    found: dict[str, object] = {
        "seconds": time.perf_counter() - began,
        "units": x["train"].shape[1],
    }
    plain = LogisticRegression(max_iter=2000).fit(x["train"][known].numpy(), labels[known].numpy())
    for part in ("validation", "test"):
        true = getattr(data, part).labels
        sure, guess = pv.predict(pair, x[part]).max(1)
        right = (guess == true).double()
        found[f"{part}_accuracy"] = right.mean().item()
        found[f"{part}_calibration_error"] = calibration_error(sure, right)
        found[f"{part}_plain_accuracy"] = plain.score(x[part].numpy(), true.numpy())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/semisupervised"))
    parser.add_argument("--m1-epochs", type=int, default=100)
    parser.add_argument("--visits", type=int, default=40)
    parser.add_argument("--num-labels", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    data = pv.load_data("mnist", options.data_dir)
    x = codes(data, options.out, options.m1_epochs)
    for num_labels in options.num_labels:
        results = []
        for draw in options.draws:
            path = options.out / f"{num_labels}-labels-draw-{draw}.json"
            if not path.exists():
                settings = Settings(num_labels, draw, options.visits)
                found = asdict(settings) | upper(data, x, settings)
                path.write_text(json.dumps(found, indent=2) + "\n")
            results.append(json.loads(path.read_text()))
        for name in ("accuracy", "plain_accuracy", "calibration_error"):
            values = [result[f"test_{name}"] for result in results]
            print(f"{num_labels} labels, {name}: {statistics.mean(values):.4f}", values)


if __name__ == "__main__":
    main()

"""Network and settings of Pyro's own VAE example on MNIST: this library and a stock loop.

    python benchmarks/pyro_example.py --data-dir DIR [--epochs 96] [--loop-epochs 21]

784-400-50-400-784, softplus, batch 256, Adam 1e-3, all 60,000 training images, gray targets under a
Bernoulli. With gray targets the numbers are not likelihoods; they check that both programs do the
same work. The stock loop does the same as Pyro's example: a DataLoader, ``pyro.module``,
``SVI.step``. Both run in turns of five epochs, so other load on the machine affects both. The test
ELBO is that of the 10,000 test images, in nats per example. The seconds of an epoch include it.
Expect about -104.6 after epoch 20 and -101.3 after epoch 95 (counted from 0), as read off the curve
that Pyro publishes.
"""

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import pyro.optim
import torch
from matplotlib.figure import Figure
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

import pyro_vae as pv

TURN = 5
PUBLISHED = [(0, -155.8), (5, -113.3), (10, -107.8), (20, -104.6), (50, -102.4), (95, -101.3)]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(784, 400), nn.Softplus())
        self.loc, self.log_scale = nn.Linear(400, 50), nn.Linear(400, 50)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(x.reshape(-1, 784))
        return self.loc(hidden), self.log_scale(hidden).exp()


class StockLoop:
    """The same model in stock Pyro, with the loader that torchvision suggests."""

    def __init__(self, data_dir: str) -> None:
        kind, transform = datasets.MNIST, transforms.ToTensor()
        self.train_data = DataLoader(
            kind(data_dir, train=True, transform=transform), batch_size=256, shuffle=True
        )
        self.test_data = DataLoader(
            kind(data_dir, train=False, transform=transform), batch_size=256
        )
        self.encoder = Encoder()
        self.decoder = nn.Sequential(nn.Linear(50, 400), nn.Softplus(), nn.Linear(400, 784))
        adam = pyro.optim.Adam({"lr": 1e-3})
        self.svi = SVI(self.model, self.guide, adam, loss=Trace_ELBO())
        self.elbo: list[float] = []
        self.seconds: list[float] = []

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 50), 1.0).to_event(1))
            likelihood = dist.Bernoulli(logits=self.decoder(z), validate_args=False)
            pyro.sample("x", likelihood.to_event(1), obs=x.reshape(-1, 784))

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*self.encoder(x)).to_event(1))

    def train(self) -> None:
        for x, _ in self.train_data:
            self.svi.step(x)

    def test(self) -> float:
        total = sum(self.svi.evaluate_loss(x) for x, _ in self.test_data)
        return -total / len(self.test_data.dataset)

    def epoch(self) -> None:
        began = time.perf_counter()
        self.train()
        self.elbo.append(self.test())
        self.seconds.append(time.perf_counter() - began)


def draw(results: dict, path: Path) -> None:
    """Draw both curves, and the points read off the published curve."""
    figure = Figure(figsize=(6.5, 3.6), dpi=130, layout="constrained")
    axis = figure.subplots()
    axis.plot(results["library"]["elbo"], color="#1f6f8b", label="pyro_vae")
    axis.plot(results["stock"]["elbo"], color="#d1603d", linestyle="--", label="stock loop")
    axis.plot(*zip(*PUBLISHED, strict=True), "k+", label="published curve")
    axis.set_ylim(-120, -100)
    axis.set_xlabel("epoch")
    axis.set_ylabel("test ELBO (gray targets), nats per example")
    axis.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--epochs", type=int, default=96)
    parser.add_argument("--loop-epochs", type=int, default=21)
    parser.add_argument("--out", type=Path, default=Path("runs/pyro_example.json"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="gr[ae]y intensities")  # intended, see above

    train = datasets.MNIST(options.data_dir, train=True).data[:, None]
    test = datasets.MNIST(options.data_dir, train=False).data[:, None]
    torch.manual_seed(0)
    loop = StockLoop(options.data_dir)
    vae = pv.VAE.mlp((1, 28, 28), latent_dim=50, hidden=(400,), activation=nn.Softplus)
    with tempfile.TemporaryDirectory() as run:
        done, history = 0, None
        while done < options.epochs:
            end = min(done + TURN, options.epochs)
            history = pv.fit(
                vae,
                train,
                validation=test,
                epochs=end,
                batch_size=256,
                binarize="none",
                out=run,
                resume=done > 0,
                progress=False,
                checkpoint_seconds=1e9,
            )
            for _ in range(done, min(end, options.loop_epochs)):
                loop.epoch()
            done = end
            last = f"stock loop {loop.elbo[-1]:.2f}, {sum(loop.seconds) / len(loop.seconds):.1f} s"
            print(
                f"after {done} epochs: library {history['validation_elbo'][-1]:.2f}, "
                f"{sum(history['seconds']) / done:.1f} s an epoch; {last}",
                flush=True,
            )
    assert history is not None
    shown = [e for e in (0, 5, 10, 20, 50, 95) if e < options.epochs]
    print("\n| epoch | library | stock loop |\n| --- | --- | --- |")
    for epoch in shown:
        stock = f"{loop.elbo[epoch]:.2f}" if epoch < len(loop.elbo) else "not run"
        print(f"| {epoch} | {history['validation_elbo'][epoch]:.2f} | {stock} |")
    results = {
        "library": {"elbo": history["validation_elbo"], "seconds": history["seconds"]},
        "stock": {"elbo": loop.elbo, "seconds": loop.seconds},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results))
    draw(results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()

"""Image completion: predict the rest of a digit from one quadrant.

    python examples/completion.py [--epochs 150] [--out completion.png]

The context is the upper left quadrant, 16 pixels; the data are the other 48 pixels. The program
compares a conditional VAE with a learned prior p(z | quadrant), and a network that maps the
quadrant directly to the distribution of each missing pixel. Both have the same likelihood and the
same training settings. The network is also a pair, without latents.

Expect: log p(x | quadrant) of about -73 nats for the network and -61.5 for the conditional VAE, on
test digits. Given the quadrant, the pixels of the network are independent, so it paints the average
of all digits that fit. The VAE first draws which digit it is. The figure shows both. The program
takes about half a minute on two cores.
"""

import argparse
from pathlib import Path

import pyro
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.pairs import figures
from pyro_vae.plots import canvas

LATENT_DIM = 8
HIDDEN = (128, 128)
LEVELS = 17  # the gray levels of the original digits, 0 to 16
GIVEN = torch.zeros(8, 8, dtype=torch.bool)
GIVEN[:4, :4] = True


class Network(nn.Module):
    """Predict the missing pixels directly from the quadrant: a pair without latents."""

    def __init__(self, decoder: pv.Factor) -> None:
        super().__init__()
        self.decoder = decoder

    def model(self, x: Tensor, quadrant: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", self.decoder(quadrant), obs=x)

    def guide(self, x: Tensor, quadrant: Tensor) -> None:
        pass


def parts(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the missing pixels (n, 48) and the quadrant (n, 16), on the grid 0, 1/16, ..., 1."""
    gray = (images[:, 0].float() * (LEVELS - 1) / 255).round() / (LEVELS - 1)
    return gray[:, ~GIVEN], gray[:, GIVEN]


def whole(missing: Tensor, quadrant: Tensor) -> Tensor:
    """Combine both to images (n, 1, 8, 8)."""
    images = torch.empty(len(missing), 8, 8)
    images[:, ~GIVEN], images[:, GIVEN] = missing, quadrant
    return images[:, None]


def make_network() -> Network:
    family = pv.DiscretizedLogistic(LEVELS)
    return Network(pv.Factor(pv.MLP(16, HIDDEN, family.outputs((48,))), family, (48,)))


def make_vae() -> pv.VAE:
    prior = pv.Factor(pv.MLP(16, HIDDEN, 2 * LATENT_DIM), pv.DiagonalNormal(), (LATENT_DIM,))
    likelihood = pv.DiscretizedLogistic(LEVELS)
    return pv.VAE.mlp((48,), LATENT_DIM, HIDDEN, likelihood, prior=prior, context_shapes=[(16,)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("completion.png"))
    options = parser.parse_args()
    torch.manual_seed(0)  # for the initial weights

    digits = pv.load_data("digits")
    train, validation, test = (
        parts(part.x) for part in (digits.train, digits.validation, digits.test)
    )
    network, vae = make_network(), make_vae()
    for pair, beta in ((network, 1.0), (vae, pv.LinearSchedule(20))):
        pv.fit(
            pair,
            *train,
            validation=validation,
            beta=beta,
            epochs=options.epochs,
            batch_size=64,
            learning_rate=1e-3,
        )
    plain = pv.log_likelihood(network, *test, num_samples=1)  # exact: the pair has no latents
    result = pv.evaluate(vae, *test, num_samples=1000)
    print(result)
    print(f"log p(x | quadrant) of the network         {plain.value:.1f}")
    print(f"log p(x | quadrant) of the conditional VAE {result.log_likelihood:.1f}")

    shown = [int((digits.test.labels == label).nonzero()[0]) for label in range(10)]
    missing, quadrant = (part[shown] for part in test)
    with torch.no_grad():
        average = network.decoder(quadrant).mean
    rows = [
        ("given", whole(torch.full((10, 48), 0.5), quadrant)),
        ("network", whole(average, quadrant)),
    ]
    for seed in range(5):
        drawn = pv.sample(vae, 10, quadrant, means=True, seed=seed)
        rows.append((f"draw {seed + 1}", whole(drawn, quadrant)))
    rows.append(("truth", whole(missing, quadrant)))
    options.out.write_bytes(figures.png(canvas.grid(rows, "completions of a quadrant")))
    print(options.out)


if __name__ == "__main__":
    main()

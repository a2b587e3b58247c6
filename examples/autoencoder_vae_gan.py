"""An autoencoder, a VAE, a GAN and a VAE-GAN side by side, and a VAE without its KL or scale.

    python examples/autoencoder_vae_gan.py [--epochs 200] [--seeds 1]

All models have the same decoder, the same 1257 digits and the same number of decoder steps.
docs/concepts/autoencoders-and-gans.md explains the numbers of the table and shows them for three
seeds.

Expect: coverage of held-out digits by draws from N(0, I) of about 0.66 for the VAE, 0.78 for the
GAN and 0.02 for the autoencoder, which reconstructs better than the VAE. log p(x) is about 36 nats
per digit. The program takes a minute and a quarter on one core.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pyro import distributions as dist
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import pyro_vae as pv

LATENT_DIM = 10
HIDDEN = (128, 64)  # of encoders and critics; decoders reverse them
PIXELS = 64
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
TINY = 1e-3  # the fixed scale of the posterior in the VAE without a learned scale
ADVERSARIAL_BETAS = (0.0, 0.99)  # of Adam: no momentum, because the other side also moves
GRADIENT_PENALTY = 1.0  # R1 (Mescheder et al., 2018)
AVERAGE = 0.999  # decay of the moving average of weights trained against a critic
KL_WEIGHT = 0.01  # of the KL of the VAE-GAN, relative to squared errors of the critic's features
CLASSIFIER_EPOCHS = 40
NEIGHBORS = 3
HALVINGS = 10  # random halves of the held-out digits: one half counts as real
SEARCH_STARTS, SEARCH_STEPS, SEARCH_RATE = 4, 200, 0.05
NUM_SAMPLES = 200  # importance samples for log p(x)
COLUMNS = ("error", "precision", "recall", "coverage", "halfway", "log p(x)", "seconds")
LINES = ((0, 1), (2, 7), (3, 8), (4, 9), (5, 6))  # classes to interpolate between
OUT = "runs/example-autoencoder-vae-gan"

Draw = Callable[[int], Tensor]
Row = dict[str, float]


class Model(NamedTuple):
    """A trained model: it maps images to codes, and codes to images."""

    name: str
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    vae: pv.VAE | None = None
    also: Mapping[str, Draw] = MappingProxyType({})
    """Other ways to draw images than from codes of N(0, I), by name."""

    def draws(self) -> dict[str, Draw]:
        """Return all ways to draw n images."""
        return {self.name: lambda n: self.decode(torch.randn(n, LATENT_DIM)), **self.also}


class Digits(NamedTuple):
    """Rows of pixels in [0, 1] with their classes; validation and test data are held out."""

    x: Tensor
    labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor


def load() -> Digits:
    data = pv.load_data("digits")
    held_out = torch.cat([data.validation.x, data.test.x])
    labels = torch.cat([data.validation.labels, data.test.labels])
    return Digits(pixels_of(data.train.x), data.train.labels, pixels_of(held_out), labels)


def pixels_of(images: Tensor) -> Tensor:
    return images.flatten(1) / 255


# The models


def make_decoder() -> nn.Module:
    return nn.Sequential(pv.MLP(LATENT_DIM, HIDDEN[::-1], PIXELS), nn.Sigmoid())


def make_critic() -> nn.Module:
    first, second = (nn.Linear(*widths) for widths in ((PIXELS, HIDDEN[0]), HIDDEN))
    features = nn.Sequential(first, nn.LeakyReLU(0.2), second, nn.LeakyReLU(0.2))
    return nn.Sequential(features, nn.Linear(HIDDEN[-1], 1))


def fit_autoencoder(x: Tensor, epochs: int) -> Model:
    encoder, decoder = pv.MLP(PIXELS, HIDDEN, LATENT_DIM), make_decoder()
    optimizer = adam(encoder, decoder)
    for batch in minibatches(x, epochs, "autoencoder"):
        step(optimizer, F.mse_loss(decoder(encoder(batch)), batch))
    codes = encoder(x).detach()
    fitted = dist.MultivariateNormal(codes.mean(0), codes.T.cov())
    also = {"autoencoder, z from a fitted normal": lambda n: decoder(fitted.sample((n,)))}
    return Model("autoencoder", encoder, decoder, also=also)


def fit_vae(x: Tensor, epochs: int) -> Model:
    model = fit_any_vae(x, epochs, "VAE")
    noisy = {"VAE, with the pixels' noise": lambda n: pv.sample(model.vae, n).clamp(0, 1)}
    return model._replace(also=noisy)


def fit_vae_without_kl(x: Tensor, epochs: int) -> Model:
    return fit_any_vae(x, epochs, "VAE, β = 0", beta=0.0)


def fit_vae_without_scale(x: Tensor, epochs: int) -> Model:
    return fit_any_vae(x, epochs, f"VAE, scale {TINY}", posterior=FixedNormal())


def fit_any_vae(
    x: Tensor,
    epochs: int,
    name: str,
    beta: float = 1.0,
    posterior: pv.Family | None = None,
) -> Model:
    encoder = make_encoder(posterior or pv.DiagonalNormal())
    decoder = pv.Factor(make_decoder(), pv.Gaussian(0.1, learned=True), (PIXELS,))
    vae = pv.VAE(encoder, decoder, pv.StandardNormal(LATENT_DIM))
    settings = {"epochs": epochs, "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE}
    pv.fit(vae, x, beta=beta, seed=torch.initial_seed(), **settings)
    return Model(name, lambda x: encoder(x).mean, decoder.network, vae)


def make_encoder(posterior: pv.Family) -> pv.Factor:
    network = pv.MLP(PIXELS, HIDDEN, posterior.outputs((LATENT_DIM,)))
    return pv.Factor(network, posterior, (LATENT_DIM,))


class FixedNormal(pv.Family):
    r"""A posterior with a fixed, tiny scale s, :math:`N(\mu(x), s^2 I)`."""

    def outputs(self, shape: tuple[int, ...]) -> int:
        return shape[0]

    def forward(self, raw: Tensor, shape: tuple[int, ...]) -> dist.TorchDistribution:
        return dist.Normal(raw, TINY, validate_args=False).to_event(1)


def fit_gan(x: Tensor, epochs: int) -> Model:
    generator, critic = make_decoder(), make_critic()
    average = moving_average(generator)
    forward, against = (adam(side, betas=ADVERSARIAL_BETAS) for side in (generator, critic))
    for real in minibatches(x, epochs, "GAN"):
        step(against, critic_loss(critic, real, generator(torch.randn(len(real), LATENT_DIM))))
        step(forward, fooling_loss(critic, generator(torch.randn(len(real), LATENT_DIM))))
        average.update_parameters(generator)
    return Model("GAN", lambda x: search(average, x), average)


def fit_vae_gan(x: Tensor, epochs: int) -> Model:
    """A VAE that measures its error in the features of a critic (Larsen et al., 2016)."""
    pair, critic = nn.ModuleList([make_encoder(pv.DiagonalNormal()), make_decoder()]), make_critic()
    average = moving_average(pair)
    forward, against = (adam(side, betas=ADVERSARIAL_BETAS) for side in (pair, critic))
    for real in minibatches(x, epochs, "VAE-GAN"):
        loss, fake = vae_gan_loss(*pair, critic, real)
        step(forward, loss)
        step(against, critic_loss(critic, real, fake))
        average.update_parameters(pair)
    encoder, decoder = average.module
    return Model("VAE-GAN", lambda x: encoder(x).mean, decoder)


def vae_gan_loss(
    encoder: nn.Module, decoder: nn.Module, critic: nn.Module, real: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the loss of encoder and decoder, and the generated images for the critic."""
    q, prior = encoder(real), pv.StandardNormal(LATENT_DIM)()
    z = q.rsample()
    features, wanted = critic[0](decoder(z)), critic[0](real).detach()
    error = F.mse_loss(features, wanted, reduction="sum") / len(real)
    fake = decoder(torch.cat([z.detach(), prior.sample((len(real),))]))  # not for the encoder
    kl = kl_divergence(q, prior).mean()
    return KL_WEIGHT * kl + error + fooling_loss(critic, fake), fake


def critic_loss(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """Separate real from generated images, with a penalty on the slope at the real ones (R1)."""
    real = real.detach().requires_grad_()
    verdict = critic(real)
    (slope,) = torch.autograd.grad(verdict.sum(), real, create_graph=True)
    penalty = GRADIENT_PENALTY / 2 * slope.square().sum(1).mean()
    return F.softplus(-verdict).mean() + F.softplus(critic(fake.detach())).mean() + penalty


def fooling_loss(critic: nn.Module, fake: Tensor) -> Tensor:
    """The non-saturating loss of the generator (Goodfellow et al., 2014)."""
    return F.softplus(-critic(fake)).mean()


def search(decoder: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Find the codes whose images are nearest to x, since a GAN has no encoder."""
    z = torch.randn(SEARCH_STARTS, len(x), LATENT_DIM, requires_grad=True)
    optimizer = torch.optim.Adam([z], SEARCH_RATE, fused=True)
    with torch.enable_grad():
        for _ in range(SEARCH_STEPS):
            step(optimizer, (decoder(z) - x).square().sum())
    errors = (decoder(z) - x).square().sum(-1)
    return z.detach()[errors.argmin(0), torch.arange(len(x))]


def minibatches(x: Tensor, epochs: int, title: str) -> Iterator[Tensor]:
    for _ in tqdm(range(epochs), title, leave=False, mininterval=5):
        for rows in torch.randperm(len(x)).split(BATCH_SIZE):
            yield x[rows]


def adam(*modules: nn.Module, **options: object) -> torch.optim.Optimizer:
    parameters = [p for module in modules for p in module.parameters()]
    return torch.optim.Adam(parameters, LEARNING_RATE, fused=True, **options)


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def moving_average(module: nn.Module) -> AveragedModel:
    return AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))


# Measures


def fit_features(digits: Digits) -> nn.Module:
    """Return the last hidden layer of a classifier of the training digits."""
    wide, narrow = (nn.Linear(*widths) for widths in ((PIXELS, 128), (128, 32)))
    features = nn.Sequential(wide, nn.ReLU(), nn.Dropout(0.2), narrow, nn.ReLU())
    classifier = nn.Sequential(features, nn.Linear(32, 10))
    optimizer = adam(classifier)
    for rows in minibatches(torch.arange(len(digits.x)), CLASSIFIER_EPOCHS, "classifier"):
        step(optimizer, F.cross_entropy(classifier(digits.x[rows]), digits.labels[rows]))
    taken = classifier.eval()(digits.held_out).argmax(1)
    right = (taken == digits.held_out_labels).float().mean()
    print(f"classifier for the features: {right:.1%} of the held-out digits are correct")
    return features


def within(points: Tensor, others: Tensor) -> Tensor:
    """Whether point i is within the k-th neighbor distance of other j, (points, others)."""
    exact = {"compute_mode": "donot_use_mm_for_euclid_dist"}
    radii = torch.cdist(others, others, **exact).kthvalue(NEIGHBORS + 1).values
    return torch.cdist(points, others, **exact) <= radii


def quality(real: Tensor, made: Tensor) -> Row:
    """Precision and recall (Kynkäänniemi et al., 2019) and coverage (Naeem et al., 2020)."""
    near = within(made, real)
    found = {"precision": near.any(1), "recall": within(real, made).any(1), "coverage": near.any(0)}
    return {name: hit.float().mean().item() for name, hit in found.items()}


class Judge(NamedTuple):
    """Real digits for the comparison: all models use the same halves of the held-out digits."""

    digits: Digits
    features: nn.Module
    halvings: list[tuple[Tensor, Tensor]]

    def __call__(self, make: Callable[[Tensor], Tensor]) -> Row:
        """Mean quality of the images that ``make`` returns for the rows of the other halves."""
        made = [(self.digits.held_out[real], make(others)) for real, others in self.halvings]
        rows = [quality(self.features(real), self.features(images)) for real, images in made]
        return {name: statistics.mean(row[name] for row in rows) for name in rows[0]}


def make_judge(digits: Digits) -> Judge:
    orders = [torch.randperm(len(digits.held_out)) for _ in range(HALVINGS)]
    return Judge(digits, fit_features(digits), [order.chunk(2) for order in orders])


@torch.no_grad()
def anchors(judge: Judge) -> dict[str, Row]:
    """Results of perfect samples, and of bad ones with each pixel from another training digit."""
    x, held_out = judge.digits.x, judge.digits.held_out
    pixels = torch.arange(PIXELS)
    halfway = judge(lambda rows: halves(held_out[rows]))["precision"]
    return {
        "held-out digits": judge(lambda rows: held_out[rows]) | {"halfway": halfway},
        "training digits": judge(lambda rows: x[torch.randperm(len(x))[: len(rows)]]),
        "pixels of many digits": judge(
            lambda rows: x[torch.randint(len(x), (len(rows), PIXELS)), pixels]
        ),
    }


@torch.no_grad()
def measures(judge: Judge, model: Model) -> dict[str, Row]:
    """Return a row for each way to draw; the first row has the measures of the model itself."""
    held_out = judge.digits.held_out
    codes = model.encode(held_out)
    own = {"error": 1000 * F.mse_loss(model.decode(codes), held_out).item()}
    own["halfway"] = judge(lambda rows: model.decode(halves(codes[rows])))["precision"]
    if model.vae is not None:
        own["log p(x)"] = pv.log_likelihood(model.vae, held_out, num_samples=NUM_SAMPLES).value
    ways = model.draws().items()
    found = {name: judge(lambda rows, draw=draw: draw(len(rows))) for name, draw in ways}
    found[model.name] |= own
    return found


def halves(rows: Tensor) -> Tensor:
    """Return the point halfway between each row and the row before it."""
    return (rows + rows.roll(1, 0)) / 2


def run(digits: Digits, epochs: int, seed: int) -> tuple[dict[str, Row], list[Model]]:
    """Fit and measure all models once."""
    torch.manual_seed(seed)
    judge = make_judge(digits)
    rows, models = anchors(judge), []
    for fit in KINDS:
        torch.manual_seed(seed)
        began = time.process_time()
        model = fit(digits.x, epochs)
        seconds = time.process_time() - began
        rows |= measures(judge, model)
        rows[model.name]["seconds"] = seconds
        models.append(model)
    return rows, models


def table(runs: list[dict[str, Row]]) -> str:
    """Markdown: means over the seeds, with standard deviations if there are several seeds."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|" + " --- |" * (len(COLUMNS) + 1)]
    for name in runs[0]:
        cells = [cell(column, [run[name].get(column) for run in runs]) for column in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(column: str, values: list[float | None]) -> str:
    if None in values:
        return ""
    places = {"seconds": 0, "error": 1, "log p(x)": 1}.get(column, 2)
    spread = f" ± {statistics.stdev(values):.{places}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{places}f}{spread}"


# The figure


@torch.no_grad()
def figure(digits: Digits, models: list[Model], across: int = 3) -> Figure:
    """A block for each model: draws, interpolations of held-out digits, and their codes."""
    drawn = Figure(figsize=(7.6, 6.3 * len(models) / across), layout="constrained")
    heights = (6, 5, 6) * (len(models) // across)
    axes = drawn.subplots(len(heights), across, height_ratios=heights)
    blocks = axes.reshape(-1, 3, across).transpose(0, 2, 1).reshape(-1, 3)
    for model, column in zip(models, blocks, strict=True):
        column[0].set_title(model.name, fontsize=13)
        show_images(column[0], sheet(model))
        show_images(column[1], between(model, digits))
        show_codes(column[2], model, digits)
    for axis, title in zip(axes[:, 0], ("draws", "interpolations", "codes") * 2, strict=False):
        axis.set_ylabel(title, fontsize=12)
    return drawn


def sheet(model: Model, side: int = 6) -> Tensor:
    """Draws in rows, with the same number for each way to draw."""
    ways = model.draws().values()
    drawn = torch.cat([draw(side * side // len(ways)) for draw in ways])
    return drawn.unflatten(0, (side, side))


def between(model: Model, digits: Digits, steps: int = 6) -> Tensor:
    """Two held-out digits, with decoded points on the line between their codes."""
    ends = [[int((digits.held_out_labels == c).nonzero()[0]) for c in pair] for pair in LINES]
    first, last = digits.held_out[torch.tensor(ends)].unbind(1)
    weights = torch.linspace(0, 1, steps)[:, None]
    codes = torch.lerp(model.encode(first)[:, None], model.encode(last)[:, None], weights)
    return torch.cat([first[:, None], model.decode(codes), last[:, None]], 1)


def show_images(axis: Axes, images: Tensor) -> None:
    """Show images of shape (rows, columns, pixels) as one image with lines between them."""
    framed = F.pad(images.unflatten(-1, (8, 8)), (1, 1, 1, 1), value=0.35)
    whole = framed.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    axis.imshow(whole, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set(xticks=[], yticks=[])


def show_codes(axis: Axes, model: Model, digits: Digits) -> None:
    """Show the plane in which the class means differ most, with draws of N(0, I) in gray."""
    codes, labels = model.encode(digits.held_out), digits.held_out_labels
    means = torch.stack([codes[labels == label].mean(0) for label in range(10)])
    plane = torch.linalg.svd(means - means.mean(0)).Vh[:2].T
    axis.scatter(*(torch.randn(1000, LATENT_DIM) @ plane).T, s=2, color="#c8c8c8", linewidths=0)
    axis.scatter(*(codes @ plane).T, s=4, c=labels, cmap="tab10", linewidths=0)
    for label, mean in enumerate(means @ plane):
        axis.text(*mean, str(label), ha="center", va="center", fontsize=12)
    axis.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")


KINDS = (
    fit_autoencoder,
    fit_vae,
    fit_vae_without_kl,
    fit_vae_without_scale,
    fit_gan,
    fit_vae_gan,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", default=OUT)
    options = parser.parse_args()
    digits = load()
    found = [run(digits, options.epochs, seed) for seed in range(options.seeds)]
    print(table([rows for rows, _ in found]))
    path = Path(options.out) / "side-by-side.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    figure(digits, found[0][1]).savefig(path, dpi=100)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()

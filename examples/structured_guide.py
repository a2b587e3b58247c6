"""What mean field costs: two guides of a global latent, with the exact posterior beside them.

    python examples/structured_guide.py [--epochs 1000] [--num-samples 500] [--out FILE]

The model is a regression with an unknown slope w and a true value z_i behind each measurement:

    w ~ N(0, 1),  z_i ~ N(w c_i, 1),  x_i ~ N(z_i, 2)

All is linear and Gaussian, so p(w | x) and p(x) have closed forms. The mean-field guide
q(w) q(z | x) draws each z_i without knowing w, and so it sees w as if all z_i were known. The
structured guide q(w) q(z | x, w) draws z_i given w. Both have about ten parameters.

Expect: the standard deviation of w is 0.16 by the closed form and under the structured guide, and
0.07 under mean field. The ELBO of all 200 data is 0.9 nats below log p(x) under mean field, and 0.1
nats below under the structured guide. The importance weights of w do not trust the mean-field guide
(Pareto k 0.7), and confirm the structured one. The program takes about half a minute on two cores.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import pyro_vae as pv

N = 200
SLOPE, NOISE = 0.8, 2.0
BATCH_SIZE = 200
LEARNING_RATE = 0.1


class Regression(nn.Module):
    """x is a noisy measurement of z, which depends on the covariate c with slope w."""

    def __init__(self, structured: bool) -> None:
        super().__init__()
        self.structured = structured
        self.mean, self.log_scale = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.encoder = nn.Linear(2, 1)
        self.local_log_scale = nn.Parameter(torch.zeros(()))

    def model(self, x: Tensor, c: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(w * c[:, 0], 1.0))
            pyro.sample("x", dist.Normal(z[..., None], NOISE).to_event(1), obs=x)

    def guide(self, x: Tensor, c: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(self.mean, self.log_scale.exp()))
        with pyro.plate("data", len(x), dim=-1):
            known = w * c[:, 0] if self.structured else c[:, 0]
            features = torch.stack([x[:, 0].expand(known.shape), known], -1)
            loc = self.encoder(features)[..., 0]
            pyro.sample("z", dist.Normal(loc, self.local_log_scale.exp()))


def exact(x: Tensor, c: Tensor) -> tuple[float, float, float]:
    """The mean and the standard deviation of w given x, and log p(x) of all data."""
    variance = 1 + NOISE**2
    precision = 1 + c.square().sum() / variance
    mean = (c * x).sum() / variance / precision
    covariance = c @ c.T + variance * torch.eye(len(x))
    marginal = torch.distributions.MultivariateNormal(torch.zeros(len(x)), covariance)
    return mean.item(), precision.item() ** -0.5, marginal.log_prob(x[:, 0]).item()


def fitted(structured: bool, x: Tensor, c: Tensor, epochs: int) -> Regression:
    torch.manual_seed(0)  # for the initial weights
    pair = Regression(structured)
    pv.fit(
        pair,
        x,
        c,
        epochs=epochs,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        learning_rate_schedule=pv.CosineSchedule(epochs),
        engine="eager",
        progress=False,
    )
    return pair


def bound(pair: Regression, x: Tensor, c: Tensor, num_samples: int) -> float:
    """The ELBO of all data together, by stock Pyro."""
    with torch.no_grad():
        loss = [Trace_ELBO().loss(pair.model, pair.guide, x, c) for _ in range(num_samples)]
    return -sum(loss) / len(loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=1000)
    parser.add_argument("--num-samples", type=int, default=500)
    parser.add_argument("--out", default="runs/structured-guide.png")
    options = parser.parse_args()
    torch.manual_seed(0)
    c = torch.randn(N, 1)
    x = SLOPE * c + torch.randn(N, 1) + NOISE * torch.randn(N, 1)

    mean, scale, log_p = exact(x, c)
    print(f"{'':<14}{'w':>16}{'bound on log p(x)':>20}{'Pareto k':>10}{'w by weights':>18}")
    print(f"{'exact':<14}{f'{mean:.3f} ± {scale:.3f}':>16}{log_p:>20.2f}")
    draws = {}
    for name, structured in (("mean field", False), ("structured", True)):
        pair = fitted(structured, x, c, options.epochs)
        guide, spread = pv.encode(pair, x, c)["w"], pv.encode(pair, x, c, what="scale")["w"]
        found = pv.global_weights(pair, x, c, num_draws=options.num_samples, progress=False)
        weighed = f"{found.mean[0]:.3f} ± {found.standard_deviation[0]:.3f}"
        elbo = bound(pair, x, c, options.num_samples)
        print(
            f"{name:<14}{f'{guide:.3f} ± {spread:.3f}':>16}{elbo:>20.2f}"
            f"{found.pareto_k:>10.2f}{weighed if found.reliable else 'not reliable':>18}"
        )
        draws[name] = pv.posterior(pair, x, c, draws=max(100, options.num_samples), progress=False)
    row = int(c.abs().argmax())
    path = Path(options.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn(draws, mean, scale, x, c, row).savefig(path, dpi=120)
    print(f"\nfigure: {path}")


def drawn(
    draws: dict[str, Mapping[str, Tensor]],
    mean: float,
    scale: float,
    x: Tensor,
    c: Tensor,
    row: int,
) -> Figure:
    """Draw the posterior of w, and joint draws of w and of the true value behind one datum."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    colors = {"mean field": "#d1603d", "structured": "#1f6f8b"}
    left, *right = figure.subplots(1, 3)
    axis = torch.linspace(mean - 4 * scale, mean + 4 * scale, 200)
    density = torch.distributions.Normal(mean, scale).log_prob(axis).exp()
    left.fill_between(axis, density, color="#8a8a8a", alpha=0.4, linewidth=0, label="exact")
    for name, found in draws.items():
        q = torch.distributions.Normal(found["w"].mean(), found["w"].std())
        left.plot(axis, q.log_prob(axis).exp(), color=colors[name], label=name)
    left.set(xlabel="slope w", yticks=[], title="posterior of w")
    left.legend(fontsize=8, frameon=False)
    variance = NOISE**2 / (1 + NOISE**2)  # of z given x and w
    turn = torch.linspace(0, 2 * torch.pi, 100)
    w = mean + 2 * scale * turn.cos()
    z = variance * c[row] * w + (1 - variance) * x[row] + 2 * variance**0.5 * turn.sin()
    for axes, (name, found) in zip(right, draws.items(), strict=True):
        axes.scatter(found["w"], found["z"][:, row], s=4, color=colors[name], alpha=0.5)
        axes.plot(w, z, color="black", linewidth=1)
        axes.set(xlabel="slope w", ylabel=f"z of row {row}", title=f"{name} (line: exact, 2 sd)")
        axes.set(xlim=(mean - 4 * scale, mean + 4 * scale))
        axes.set(ylim=(float(z.min()) - 1, float(z.max()) + 1))
    for axes in (left, *right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()

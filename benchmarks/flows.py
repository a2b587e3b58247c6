"""Flows of this library beside those of zuko: held-out nats, time of a step, and engines.

    python benchmarks/flows.py [--steps 1500] [--rounds 15] [--seconds 4] [--seeds 3] [--only step]

Both libraries get the same number of layers, hidden layers of the same widths, ELU and the same
bins. "couplings" are spline couplings (`FlowPrior` here, `NSF(passes=2)` in zuko). "autoregressive"
is the affine autoregressive flow (`AutoregressiveLayer` here, `MAF` in zuko).

- accuracy: a flow is fitted to data by maximum likelihood. The table shows the mean log density of
  held-out rows in nats, and the standard deviation over seeds.
- step: a pair with flows in the prior (couplings) and in the guide (autoregressive, drawn and
  scored in one pass). Both libraries alternate in one process. The table shows medians of the
  processor time over the rounds.
- engines: the ELBO of each engine after a few epochs from the same start.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import zuko
from pyro.contrib.zuko import ZukoToPyro
from pyro.infer import Trace_ELBO
from sklearn.datasets import load_breast_cancer, make_moons
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.parts.flows import Flow, stack
from pyro_vae.training.engine import Engine, Step
from pyro_vae.training.optimizer import Optimizer

HIDDEN, BINS = (64, 64), 8


class Ours(nn.Module):
    """A stack of our layers, with zuko's interface: a call gives the distribution."""

    def __init__(self, dim: int, context_dim: int, layers: int, couplings: bool) -> None:
        super().__init__()
        kind, bijection = (
            (pv.CouplingLayer, pv.Spline(BINS))
            if couplings
            else (pv.AutoregressiveLayer, pv.Affine())
        )
        self.dim = dim
        self.layers = stack(kind, layers, dim, context_dim, HIDDEN, bijection)

    def forward(self, context: Tensor | None = None) -> Flow:
        context = torch.zeros(0) if context is None else context
        return Flow(torch.zeros(self.dim), torch.ones(self.dim), context, self.layers)


class Zuko(nn.Module):
    """The same flow of zuko; ``inverse`` gives the direction that draws in one pass."""

    def __init__(
        self, dim: int, context_dim: int, layers: int, couplings: bool, inverse: bool = False
    ) -> None:
        super().__init__()
        options = {"transforms": layers, "hidden_features": HIDDEN, "activation": nn.ELU}
        if couplings:
            flow = zuko.flows.NSF(dim, context_dim, bins=BINS, passes=2, **options)
        else:
            flow = zuko.flows.MAF(dim, context_dim, **options)
        self.flow = zuko.flows.Flow(flow.transform.inv, flow.base) if inverse else flow

    def forward(self, context: Tensor | None = None) -> ZukoToPyro:
        return ZukoToPyro(self.flow(context))


def datasets() -> Iterator[tuple[str, Tensor]]:
    """Yield standardized tables."""
    generator = np.random.default_rng(0)
    moons = make_moons(6000, noise=0.08, random_state=0)[0]
    a, b = generator.normal(size=(2, 6000))
    banana = np.stack([2 * a, b / 2 + a**2], 1)
    cancer = generator.permutation(load_breast_cancer().data[:, :10])
    for name, x in (("two moons", moons), ("banana", banana), ("breast cancer", cancer)):
        yield name, torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)


def held_out(flow: nn.Module, x: Tensor, steps: int) -> float:
    """Return the mean log density of the test rows at the step with the best validation."""
    train, validation, test = x.tensor_split([len(x) * 6 // 10, len(x) * 8 // 10])
    optimizer = torch.optim.Adam(flow.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best = (-float("inf"), 0.0)
    for step in range(steps):
        loss = -flow().log_prob(train[torch.randint(len(train), (256,))]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 24:
            with torch.no_grad():
                best = max(
                    best, tuple(flow().log_prob(part).mean().item() for part in (validation, test))
                )
    return best[1]


def fits(x: Tensor, couplings: bool, layers: int, steps: int, seeds: int) -> list[str]:
    """Return the cells of both libraries, and their numbers of parameters."""
    cells, sizes = [], []
    for make in (Ours, Zuko):
        found = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            flow = make(x.shape[1], 0, layers, couplings)
            found.append(held_out(flow, x, steps))
        spread = statistics.stdev(found) if seeds > 1 else 0.0
        cells.append(f"{statistics.mean(found):.3f} ({spread:.3f})")
        sizes.append(str(sum(parameter.numel() for parameter in flow.parameters())))
    return [*cells, " / ".join(sizes)]


def accuracy(steps: int, seeds: int, depths: Sequence[int]) -> None:
    print("\n| data | flow | layers | ours | zuko | parameters, ours / zuko |")
    print("| --- | --- | --- | --- | --- | --- |")
    for (name, x), couplings, layers in product(datasets(), (True, False), depths):
        kind = "couplings" if couplings else "autoregressive"
        cells = fits(x, couplings, layers, steps, seeds)
        print(f"| {name} | {kind} | {layers} | {' | '.join(cells)} |", flush=True)


class Pair(nn.Module):
    """A flow as the prior, and an inverse autoregressive flow as the guide."""

    def __init__(self, make: Callable[..., nn.Module], layers: int, dim: int = 8) -> None:
        super().__init__()
        self.prior = make(dim, 0, layers, True)
        self.posterior = make(dim, 32, layers, False, **({"inverse": True} if make is Zuko else {}))
        self.encoder = nn.Sequential(nn.Linear(32, 32), nn.ELU())
        self.decoder = nn.Linear(dim, 32)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.posterior(self.encoder(x)))


def stepper(make: Any, layers: int, engine: str, x: Tensor) -> Callable[[], object]:
    torch.manual_seed(0)
    pair = Pair(make, layers)
    loss = Engine(pair, Trace_ELBO(), engine, declare=False)
    optimizer = Optimizer(torch.optim.Adam, dict(pair.named_parameters()), 1e-3)
    svi = Step(pair.model, pair.guide, optimizer, loss)

    def step() -> float:
        with pyro.get_param_store().scope():
            return float(svi.step(x))

    step()
    assert loss.engine == engine, f"{make.__name__}: {engine} fell back to {loss.engine}"
    return step


def timed(step: Callable[[], object], repeats: int) -> float:
    began = time.process_time()  # so that other programs matter less; pass one thread
    for _ in range(repeats):
        step()
    return (time.process_time() - began) / repeats * 1e3


def step_times(rounds: int, seconds: float, names: Sequence[str]) -> None:
    print(
        "\n| layers | engine | ours, ms | zuko, ms | zuko ÷ ours |\n| --- | --- | --- | --- | --- |"
    )
    x = torch.randn(128, 32)
    for layers in (2, 8):
        for engine in names:
            steps = [stepper(make, layers, engine, x) for make in (Ours, Zuko)]
            repeats = [max(2, int(1e3 * seconds / rounds / 2 / timed(step, 3))) for step in steps]
            times = [
                [timed(s, n) for s, n in zip(steps, repeats, strict=True)] for _ in range(rounds)
            ]
            ratio = statistics.median(b / a for a, b in times)
            a, b = (statistics.median(column) for column in zip(*times, strict=True))
            print(f"| {layers} | {engine} | {a:.2f} | {b:.2f} | {ratio:.2f} |", flush=True)


def engines() -> None:
    print("\n| flows | eager | traced | compiled |\n| --- | --- | --- | --- |")
    x = torch.randn(64, 32)
    for make in (Ours, Zuko):
        ends = []
        for engine in ("eager", "traced", "compiled"):
            torch.manual_seed(0)
            pair = Pair(make, 2)
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a warning would mean another engine
                history = pv.fit(pair, x, epochs=5, batch_size=32, engine=engine, progress=False)
            ends.append(f"{history['elbo'][-1]:.6f}")
        print(f"| {make.__name__.lower()} | {' | '.join(ends)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="steps of each fit by likelihood")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8], help="for accuracy")
    parser.add_argument("--engines", nargs="+", default=["eager", "traced", "compiled"])
    parser.add_argument("--only", choices=["engines", "step", "accuracy"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=4.0, help="seconds for each comparison")
    options = parser.parse_args()
    parts = {
        "engines": engines,
        "step": lambda: step_times(options.rounds, options.seconds, options.engines),
        "accuracy": lambda: accuracy(options.steps, options.seeds, options.layers),
    }
    for name, part in parts.items():
        if options.only in (None, name):
            part()
    print(
        f"\nzuko {zuko.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()

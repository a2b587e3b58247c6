"""One training step: the engines, stock Pyro, hand-written torch, and the bare products.

    python benchmarks/step.py [--rounds 15] [--seconds 8] [--device cpu] [--batches N ...]
                              [--out FILE]

All contenders of a setting are in one process and alternate, so other load on the machine affects
all of them. The table shows medians over the rounds, with quartiles. The contenders do the same
work: a Bernoulli VAE of ReLU layers, one draw of the latents, Adam at 1e-3.

- products: only the matrix products of the step, forward and backward, each by the fastest way;
- products, Adam: the same, and one fused update of the same number of parameters;
- by hand: plain torch, the KL in closed form, `torch.optim.Adam` with its defaults;
- by hand, compiled: the same under `torch.compile`, with a fused Adam (on a GPU, another contender
  is the whole step in a captured CUDA graph);
- stock: `pyro.infer.SVI` with `pyro.optim.Adam` and `Trace_ELBO`, as in Pyro's documentation;
- traced, compiled, compiled bf16: the engines of `pyro_vae.fit`.
"""

import argparse
import gc
import json
import logging
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from math import prod
from pathlib import Path

import pyro
import pyro.optim
import torch
import torch.nn.functional as F
from bare_products import in_sequence
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.training.engine import Engine, Step
from pyro_vae.training.optimizer import Optimizer

SETTINGS = {
    "784-400-50, batch 256": (784, (400,), 50, 256),
    "784-128-64-20, batch 32": (784, (128, 64), 20, 32),
    "784-200-200-50, batch 20": (784, (200, 200), 50, 20),
    "784-500-20, batch 128": (784, (500,), 20, 128),
}


class ByHand(nn.Module):
    """The loss of a Bernoulli VAE in plain torch."""

    def __init__(self, data_dim: int, hidden: tuple[int, ...], latent_dim: int) -> None:
        super().__init__()
        self.encoder = layers((data_dim, *hidden), 2 * latent_dim)
        self.decoder = layers((latent_dim, *hidden[::-1]), data_dim)

    def forward(self, x: Tensor) -> Tensor:
        mean, log_variance = self.encoder(x).chunk(2, -1)
        z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
        return F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum") + kl


def layers(widths: tuple[int, ...], outputs: int) -> nn.Sequential:
    hidden = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(widths[-1], outputs))


def products(x: Tensor, hidden: tuple[int, ...], latent_dim: int) -> Callable[[], object]:
    """Return the matrix products of a step, without that of the gradient of the data."""
    batch, data_dim = x.shape
    encoder = [*pairwise((data_dim, *hidden, 2 * latent_dim))]
    pairs = []
    for i, (a, b) in enumerate([*encoder, *pairwise((latent_dim, *hidden[::-1], data_dim))]):
        rows, weight = x.new_empty(batch, a).normal_(), x.new_empty(b, a).normal_()
        slopes = x.new_empty(batch, b).normal_()
        pairs += [(rows, weight.t()), (slopes.t(), rows)] + ([(slopes, weight)] if i else [])
    return in_sequence(pairs)


def with_adam(run: Callable[[], object], make: Callable[[], nn.Module]) -> Callable[[], object]:
    """Return the same, followed by a fused update of parameters from constant gradients."""
    parameters = dict(make().named_parameters())
    optimizer = Optimizer(torch.optim.Adam, parameters, 1e-3)
    norm = torch.ones((), device=next(iter(parameters.values())).device)
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)

    def step() -> None:
        run()
        optimizer([], norm=norm)

    return step


def by_hand(x: Tensor, sizes: tuple, compiled: bool) -> Callable[[], object]:
    module = ByHand(*sizes).to(x.device)
    loss_of = torch.compile(module) if compiled else module
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, fused=compiled or None)

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of(x)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def captured(x: Tensor, sizes: tuple) -> Callable[[], object]:
    """Return the hand-written step with its optimizer, as one CUDA graph."""
    module = ByHand(*sizes).to(x.device)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, fused=True, capturable=True)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = module(x)
        loss.backward()
        optimizer.step()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(kept: tuple = (module, optimizer)) -> None:  # the graph writes to their memory
        graph.replay()

    return replay


def stock(x: Tensor, make: Callable[[], nn.Module]) -> Callable[[], object]:
    vae = make()
    pyro.clear_param_store()
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    return lambda: svi.step(x)


def ours(
    x: Tensor, make: Callable[[], nn.Module], engine: str, precision: str = "float32"
) -> Callable[[], object]:
    vae = make()
    optimizer = Optimizer(torch.optim.Adam, dict(vae.named_parameters()), 1e-3)
    loss = Engine(
        vae,
        Trace_ELBO(),
        engine,
        precision=precision,
        declare=False,
        noise=True,
        optimizer=optimizer,
    )
    svi = Step(vae.model, vae.guide, optimizer, loss)

    def step() -> object:
        found = svi.step(x)
        return found if x.is_cuda else float(found)

    step()
    assert loss.engine == engine, f"{engine} fell back to {loss.engine}"
    return step


def contenders(x: Tensor, hidden: tuple[int, ...], latent_dim: int) -> dict[str, Callable]:
    sizes = (x.shape[1], hidden, latent_dim)

    def make() -> nn.Module:
        return pv.VAE.mlp(x.shape[1:], latent_dim=latent_dim, hidden=hidden).to(x.device)

    found = {
        "products": products(x, hidden, latent_dim),
        "products, Adam": with_adam(products(x, hidden, latent_dim), make),
        "stock": stock(x, make),
        "by hand": by_hand(x, sizes, False),
        "by hand, compiled": by_hand(x, sizes, True),
        "traced": ours(x, make, "traced"),
        "compiled": ours(x, make, "compiled"),
        "compiled, bf16": ours(x, make, "compiled", "bfloat16"),
    }
    if x.is_cuda:
        found["by hand, CUDA graph"] = captured(x, sizes)
        found["traced, bf16"] = ours(x, make, "traced", "bfloat16")
    return found


def rounds(steps: dict[str, Callable], number: int, seconds: float, wait: Callable) -> dict:
    """Return milliseconds of each contender in each round."""

    def timed(step: Callable, repeats: int) -> float:
        wait()
        began = time.perf_counter()
        for _ in range(repeats):
            step()
        wait()
        return (time.perf_counter() - began) / repeats * 1e3

    for step in steps.values():
        timed(step, 5)
    share = 1e3 * seconds / number / len(steps)
    repeats = {name: max(2, int(share / timed(step, 5))) for name, step in steps.items()}
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(number):
        for name, step in steps.items():
            found[name].append(timed(step, repeats[name]))
    return found


RATIOS = [
    ("stock", "traced", "at least 1.8"),
    ("stock", "compiled", "at least 3.5"),
    ("by hand, compiled", "compiled", "at least 1.5"),
    ("compiled", "products, Adam", "at most 1.5"),
    ("stock", "by hand, CUDA graph", "none set"),
    ("traced", "by hand, CUDA graph", "at most 1.2"),
]


def table(found: dict[str, dict[str, list[float]]]) -> str:
    names = list(next(iter(found.values())))
    lines = [f"| milliseconds | {' | '.join(found)} |", "| --- |" + " --- |" * len(found)]
    for name in names:
        cells = []
        for times in found.values():
            low, middle, high = statistics.quantiles(times[name], n=4)
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| ratio | " + " | ".join(found) + " | geometric mean | target |"]
    lines.append("| --- |" + " --- |" * (len(found) + 2))
    for slow, fast, wanted in RATIOS:
        if slow not in names or fast not in names:
            continue
        values = [
            statistics.median(times[slow]) / statistics.median(times[fast])
            for times in found.values()
        ]
        mean = prod(values) ** (1 / len(values))
        cells = " | ".join(f"{value:.2f}" for value in values)
        lines.append(f"| {slow} ÷ {fast} | {cells} | **{mean:.2f}** | {wanted} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds for each setting")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--batches", nargs="+", type=int, help="the first network with these batch sizes instead"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the times of every round")
    options = parser.parse_args()
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    wait = torch.cuda.synchronize if options.device.startswith("cuda") else lambda: None
    found, settings = {}, SETTINGS
    if options.batches:
        first, *_ = SETTINGS.values()
        settings = {f"784-400-50, batch {n}": (*first[:3], n) for n in options.batches}
    for name, (data_dim, hidden, latent_dim, batch) in settings.items():
        torch.manual_seed(0)
        x = torch.rand(batch, data_dim, device=options.device).round()
        steps = contenders(x, hidden, latent_dim)
        found[name] = rounds(steps, options.rounds, options.seconds, wait)
        print({k: round(statistics.median(v), 3) for k, v in found[name].items()}, flush=True)
        del steps
        gc.collect()
        torch.compiler.reset()
    print(
        f"\n{torch.get_num_threads()} threads, torch {torch.__version__}, pyro {pyro.__version__}"
    )
    print("\n" + table(found))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()

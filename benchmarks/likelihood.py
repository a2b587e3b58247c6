"""log p(x) with 5,000 importance samples: each engine and its bare matrix products.

    python benchmarks/likelihood.py [--rows 400] [--samples 5000] [--rounds 3] [--engines compiled]

The model is 784-400-50, Bernoulli. The products are those of the decoder for every sample, in the
chunks of the library. The share of the encoder is small. All contenders alternate in one process.
The program also prints the resident memory that the first estimate adds, at a tenth of the samples
and at all samples.
"""

import argparse
import gc
import logging
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bare_products import in_sequence
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.inference import importance


def products(weights: list[Tensor], rows: int, cells: int) -> Callable[[], None]:
    """Return the matrix products of the decoder for a number of rows, chunk by chunk."""
    chunk = cells // weights[-1].shape[0]
    step = in_sequence([(torch.randn(chunk, w.shape[1]), w.t()) for w in weights])

    def run() -> None:
        for _ in range(-(-rows // chunk)):
            step()

    return run


def resident() -> float:
    """Return the resident memory in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", nargs="+", default=["eager", "traced", "compiled"])
    options = parser.parse_args()
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    torch.manual_seed(0)
    vae = pv.VAE.mlp((784,), latent_dim=50, hidden=(400,))
    x = torch.rand(options.rows, 784).round()

    def estimate(engine: str, samples: int = options.samples) -> Callable[[], object]:
        return lambda: pv.log_likelihood(vae, x, num_samples=samples, engine=engine)

    before = resident()
    estimate(options.engines[0], options.samples // 10)()
    tenth = resident() - before
    estimate(options.engines[0])()
    added = resident() - before
    print(f"memory added: {tenth:.0f} MiB at a tenth of the samples, {added:.0f} MiB at all")
    weights = [m.weight.detach() for m in vae.decoder.modules() if isinstance(m, nn.Linear)]
    steps = {"products": products(weights, options.rows * options.samples, importance.CELLS)}
    steps |= {engine: estimate(engine) for engine in options.engines}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(options.rounds):
        for name, step in steps.items():
            gc.collect()
            began = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - began)
    print("\n| | seconds (quartiles) | ÷ products |\n| --- | --- | --- |")
    base = statistics.median(times["products"])
    for name, found in times.items():
        low, middle, high = statistics.quantiles(found, n=4)
        print(f"| {name} | {middle:.2f} ({low:.2f} to {high:.2f}) | {middle / base:.2f} |")


if __name__ == "__main__":
    main()

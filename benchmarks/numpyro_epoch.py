"""An epoch of MNIST: `pyro_vae.fit` and NumPyro's compiled epoch, in turns.

    python -m venv JAX && JAX/bin/pip install '.[bench-jax]'     # or only numpyro
    python benchmarks/numpyro_epoch.py --data-dir DIR --jax-python JAX/bin/python [--epochs 8]

NumPyro runs each epoch as one jitted ``lax.scan`` over ``svi.update``, with no Python for each
step; this is its fastest form. Both programs do the same work: a Bernoulli VAE, Adam at 1e-3, the
rows of each minibatch gathered from 8-bit data, and binarization where a setting has it. Each
contender is a process of its own, and they alternate after each epoch, so other load on the machine
affects both. The first two epochs (compilation) do not count. Both draw their first parameters from
the same uniform distributions, and compute the posterior's scale by the same formula. The last
column is the training ELBO of the last epoch, in nats per example, for each seed.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from itertools import pairwise
from math import log, prod
from pathlib import Path
from typing import Any

SETTINGS = {
    "784-400-50, batch 256, softplus, gray": ((400,), 50, 256, "softplus", False),
    "784-128-64-20, batch 32, ReLU, binarized": ((128, 64), 20, 32, "relu", True),
    "784-200-200-50, batch 100, tanh, binarized": ((200, 200), 50, 100, "tanh", True),
}
FITS = {
    "fit": ("compiled", "float32"),
    "fit, bf16": ("compiled", "bfloat16"),
    "fit, traced": ("traced", "float32"),
}
SKIPPED = 2
LOW, HIGH = 1e-4, 10.0
"""The bounds of scales of the posterior in `pyro_vae.DiagonalNormal`."""


def turn(seconds: float) -> None:
    """Report an epoch and wait for the next turn."""
    print(f"seconds {seconds}", flush=True)
    sys.stdin.readline()


def fit(
    data: str, epochs: int, setting: str, seed: int, batches: int, how: tuple[str, str]
) -> None:
    import numpy as np
    import torch

    import pyro_vae as pv

    warnings.filterwarnings("ignore", message="gr[ae]y intensities")  # intended, see above
    hidden, latent_dim, batch_size, activation, binarized = SETTINGS[setting]
    batch_size = batches or batch_size
    kinds = {"softplus": torch.nn.Softplus, "relu": torch.nn.ReLU, "tanh": torch.nn.Tanh}
    torch.manual_seed(seed)
    vae = pv.VAE.mlp((784,), latent_dim=latent_dim, hidden=hidden, activation=kinds[activation])
    began = [time.perf_counter()]

    def took(_: object) -> None:
        turn(time.perf_counter() - began[0])
        began[0] = time.perf_counter()

    history = pv.fit(
        vae,
        torch.from_numpy(np.load(data)),
        epochs=epochs,
        batch_size=batch_size,
        binarize="dynamic" if binarized else "none",
        engine=how[0],
        seed=seed,
        precision=how[1],
        on_epoch=[took],
        progress=False,
    )
    print(f"elbo {history['elbo'][-1]}", flush=True)


def numpyro(data: str, epochs: int, setting: str, seed: int, batches: int) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import numpyro
    import numpyro.distributions as dist
    from jax import lax, random
    from numpyro.infer import SVI, Trace_ELBO

    hidden, latent_dim, batch_size, activation, binarized = SETTINGS[setting]
    batch_size = batches or batch_size
    activate = {"softplus": jax.nn.softplus, "relu": jax.nn.relu, "tanh": jnp.tanh}[activation]
    rows = jnp.asarray(np.load(data))
    span, share = log(HIGH / LOW), log(1 / LOW) / log(HIGH / LOW)
    slope, offset = 1 / (span * share * (1 - share)), log(share / (1 - share))
    steps = len(rows) // batch_size

    def network(name: str, x: Any, widths: list[int]) -> Any:
        for i, (a, b) in enumerate(pairwise(widths)):

            def start(shape: tuple[int, ...], a: int = a) -> Any:
                return lambda key: random.uniform(key, shape, minval=-1, maxval=1) / a**0.5

            weight = numpyro.param(f"{name}.weight{i}", start((a, b)))
            x = x @ weight + numpyro.param(f"{name}.bias{i}", start((b,)))
            x = activate(x) if i < len(widths) - 2 else x
        return x

    def model(x: Any) -> None:
        with numpyro.plate("data", len(x)):
            standard = dist.Normal(jnp.zeros((len(x), latent_dim)), 1.0).to_event(1)
            z = numpyro.sample("z", standard)
            logits = network("decoder", z, [latent_dim, *hidden[::-1], 784])
            likelihood = dist.BernoulliLogits(logits, validate_args=False).to_event(1)
            numpyro.sample("x", likelihood, obs=x)

    def guide(x: Any) -> None:
        h = network("encoder", x, [784, *hidden, 2 * latent_dim])
        with numpyro.plate("data", len(x)):
            curve = jax.nn.sigmoid(slope * h[:, latent_dim:] + offset)  # as in bounded_scale
            scale = jnp.exp(log(LOW) + span * curve)
            numpyro.sample("z", dist.Normal(h[:, :latent_dim], scale).to_event(1))

    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO())
    state = svi.init(random.PRNGKey(seed), rows[:batch_size].astype(jnp.float32) / 255)

    @jax.jit
    def epoch(state: Any, key: Any, rows: Any) -> Any:
        order = random.permutation(key, len(rows))[: steps * batch_size]

        def step(carry: Any, index: Any) -> Any:
            state, key = carry
            x = rows[index].astype(jnp.float32) / 255
            if binarized:
                key, own = random.split(key)
                x = (random.uniform(own, x.shape) < x).astype(jnp.float32)
            state, loss = svi.update(state, x)
            return (state, key), loss

        (state, _), losses = lax.scan(step, (state, key), order.reshape(steps, batch_size))
        return state, losses.mean()

    key = random.PRNGKey(1000 + seed)
    for _ in range(epochs):
        began = time.perf_counter()
        key, own = random.split(key)
        state, loss = epoch(state, own, rows)
        loss = float(loss)
        turn(time.perf_counter() - began)
    print(f"elbo {-loss / batch_size}", flush=True)


def work(name: str, *job: Any) -> None:
    """Run one contender in its own process."""
    sys.stdin.readline()
    if name == "NumPyro":
        numpyro(*job)
    else:
        fit(*job, FITS[name])


def answer(worker: subprocess.Popen, key: str) -> float:
    for line in worker.stdout:
        if line.startswith(key):
            return float(line.split()[1])
    raise SystemExit(f"a contender ended without printing '{key}'")


def measured(
    setting: str, options: argparse.Namespace, data: Path, seed: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the seconds of each epoch after the first ones, and the ELBO, of each contender."""
    words = [__file__, "--data", str(data), "--epochs", str(options.epochs), "--setting", setting]
    words += ["--seed", str(seed), "--batch-size", str(options.batch_size)]
    workers = {
        name: subprocess.Popen(
            [options.jax_python if name == "NumPyro" else sys.executable, *words, "--work", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},  # they share a GPU
        )
        for name in ("NumPyro", *options.fits)
    }
    times: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(options.epochs):
        for name, worker in workers.items():
            worker.stdin.write("\n")
            worker.stdin.flush()
            times[name].append(answer(worker, "seconds"))
    elbos = {}
    for name, worker in workers.items():
        worker.stdin.write("\n")
        worker.stdin.flush()
        elbos[name] = answer(worker, "elbo")
        worker.communicate()
    return {name: found[SKIPPED:] for name, found in times.items()}, elbos


def show(setting: str, times: dict[str, list[float]], elbos: dict[str, list[float]]) -> None:
    """Print the rows of the table."""
    for name, found in times.items():
        low, middle, high = statistics.quantiles(found, n=4)
        shown = ", ".join(f"{elbo:.2f}" for elbo in elbos[name])
        print(
            f"| {setting} | {name} | {middle:.2f} ({low:.2f} to {high:.2f}) | {shown} |", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="MNIST in torchvision's layout")
    parser.add_argument("--jax-python", help="the Python of an environment with NumPyro")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=0, help="instead of a setting's own")
    parser.add_argument("--settings", nargs="+", type=int, default=range(len(SETTINGS)))
    parser.add_argument(
        "--fits",
        nargs="+",
        choices=FITS,
        default=["fit", "fit, bf16"],
        help="without bfloat16 in the processor, leave out 'fit, bf16', which takes minutes",
    )
    for hidden in ("--work", "--data", "--setting"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        job = (options.setting, options.seed, options.batch_size)
        work(options.work, options.data, options.epochs, *job)
        return
    import numpy as np
    from torchvision import datasets

    print("| setting | | seconds for an epoch (quartiles) | training ELBO |\n" + "| --- " * 4 + "|")
    ratios: dict[str, list[float]] = {name: [] for name in options.fits}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "mnist.npy"
        np.save(data, datasets.MNIST(options.data_dir, train=True).data.reshape(-1, 784).numpy())
        for number in options.settings:
            setting = list(SETTINGS)[number]
            times: dict[str, list[float]] = {name: [] for name in ("NumPyro", *options.fits)}
            elbos: dict[str, list[float]] = {name: [] for name in times}
            for seed in range(options.seeds):
                seconds, bounds = measured(setting, options, data, seed)
                for name in times:
                    times[name] += seconds[name]
                    elbos[name].append(bounds[name])
            show(setting, times, elbos)
            for name in options.fits:
                pairs = zip(times["NumPyro"], times[name], strict=True)
                ratios[name].append(statistics.median([a / b for a, b in pairs]))
    ratios["best precision"] = [max(both) for both in zip(*ratios.values(), strict=True)]
    for name, found in ratios.items():
        mean = prod(found) ** (1 / len(found))
        shown = ", ".join(f"{value:.2f}" for value in found)
        print(f"NumPyro ÷ {name}: {shown}; geometric mean {mean:.2f}")


if __name__ == "__main__":
    main()

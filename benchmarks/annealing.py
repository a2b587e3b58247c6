"""Annealed importance sampling: this library and a hand-written loop for one model.

    python benchmarks/annealing.py [--rows 20] [--chains 16] [--temperatures 50] [--rounds 5]

The model is a VAE of 784-HIDDEN-LATENT, Bernoulli, with a diagonal normal guide, in float32. The
loop is plain torch. It computes mean and scale of the guide once. It writes out log p(x, z) and
log q(z|x), and autograd computes their gradients. Its Hamiltonian transitions are those of the
library, with five leapfrog steps. Both alternate in one process. The table shows seconds for the
same number of transitions.
"""

import argparse
import logging
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import pyro_vae as pv
from pyro_vae.inference import annealing, annealing_path
from pyro_vae.pairs.scope import using


def by_hand(vae: pv.VAE, x: Tensor, chains: int, temperatures: int) -> Tensor:
    """Return log weights (chains, n) of the same transitions, with a fixed step size."""
    q = vae.encoder(x).base_dist
    loc, scale = q.loc.detach(), q.scale.detach()
    network = vae.decoder.network
    weights = [p.detach() for p in network.parameters()]

    def densities(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z = z.detach().requires_grad_()
        h = F.relu(F.linear(z, weights[0], weights[1]))
        logits = F.linear(h, weights[2], weights[3])
        log_p = -F.binary_cross_entropy_with_logits(
            logits, x.expand_as(logits), reduction="none"
        ).sum(-1)
        log_p = log_p - 0.5 * z.square().sum(-1)
        log_q = -0.5 * ((z - loc) / scale).square().sum(-1) - scale.log().sum(-1)
        (of_p,) = torch.autograd.grad(log_p.sum(), z)
        (of_q,) = torch.autograd.grad(log_q.sum(), z)
        return log_p.detach(), log_q.detach(), of_p, of_q

    z = loc + scale * torch.randn(chains, *loc.shape)
    log_p, log_q, of_p, of_q = densities(z)
    log_weights, before = torch.zeros_like(log_p), 0.0
    for t in range(1, temperatures):
        beta = t / temperatures
        log_weights += (beta - before) * (log_p - log_q)
        before = beta
        momentum = torch.randn_like(z)
        stride = 0.5 * (0.5 + 0.5 * torch.rand_like(log_p))[..., None] * scale
        energy = torch.lerp(log_q, log_p, beta) - 0.5 * momentum.square().sum(-1)
        new, state = z, (log_p, log_q, of_p, of_q)
        for _ in range(5):
            momentum = momentum + 0.5 * stride * torch.lerp(state[3], state[2], beta)
            new = new + stride * momentum
            state = densities(new)
            momentum = momentum + 0.5 * stride * torch.lerp(state[3], state[2], beta)
        end = torch.lerp(state[1], state[0], beta) - 0.5 * momentum.square().sum(-1)
        moved = torch.rand_like(end) < (end - energy).exp()
        z = torch.where(moved[..., None], new, z)
        log_p, log_q = torch.where(moved, state[0], log_p), torch.where(moved, state[1], log_q)
        of_p = torch.where(moved[..., None], state[2], of_p)
        of_q = torch.where(moved[..., None], state[3], of_q)
    return log_weights + (1 - before) * (log_p - log_q)


def ours(
    vae: pv.VAE, x: Tensor, chains: int, temperatures: int, engine: str
) -> Callable[[], Tensor]:
    """Return only the forward run; its pilot run and its graph are made beforehand."""
    settings = annealing_path.AnnealingSettings(temperatures, chains, 5)
    run = annealing._AnnealingRun(vae, (x[:2],), settings, len(x), engine)
    with using(vae, 0):
        path = run.path((x,), lambda n: None)

    def forward() -> Tensor:
        with using(vae, 0):
            return path.forward(lambda n: None)[0]

    return forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--chains", type=int, default=16)
    parser.add_argument("--temperatures", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines", nargs="+", default=["traced", "compiled"])
    options = parser.parse_args()
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    print("| model | by hand | " + " | ".join(options.engines) + " |")
    for hidden, latent in ((64, 8), (400, 50)):
        torch.manual_seed(0)
        vae = pv.VAE.mlp((784,), latent_dim=latent, hidden=(hidden,)).eval()
        x = torch.rand(options.rows, 784).round()
        size = (vae, x, options.chains, options.temperatures)
        steps: dict[str, Callable[[], Tensor]] = {"by hand": lambda size=size: by_hand(*size)}
        steps |= {engine: ours(*size, engine) for engine in options.engines}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for i in range(options.rounds + 1):
            for name, step in steps.items():
                began = time.perf_counter()
                step()
                if i:
                    times[name].append(time.perf_counter() - began)
        medians = {name: statistics.median(found) for name, found in times.items()}
        cells = [f"{medians['by hand']:.2f}"]
        cells += [
            f"{medians[engine]:.2f} ({medians[engine] / medians['by hand']:.2f})"
            for engine in options.engines
        ]
        print(f"| 784-{hidden}-{latent} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

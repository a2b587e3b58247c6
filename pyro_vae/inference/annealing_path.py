"""The path from the guide to the posterior, and chains that follow it."""

from collections.abc import Callable, Sequence
from math import log
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.inference.joint import Joint
from pyro_vae.pairs.pair import Batch

TARGET = 0.7
"""The target acceptance of the step size adaptation."""

PILOT = 50
"""Temperatures at which the pilot run finds step sizes; other temperatures use the nearest."""

WARMUP = 20
"""Transitions of the pilot run at its first temperature, where its steps are large."""

LONGEST = 2.0
"""The largest step, in standard deviations of the guide."""


class AnnealingSettings(NamedTuple):
    num_temperatures: int
    num_chains: int
    leapfrog_steps: int

    @property
    def pilot(self) -> int:
        """The number of temperatures of the pilot run."""
        return min(PILOT, self.num_temperatures)

    @property
    def transitions(self) -> int:
        """The number of transitions of the pilot run and of one run, for each datum."""
        return WARMUP + self.pilot + self.num_temperatures - 1


class _State(NamedTuple):
    """The chains: z (chains, n, D), both log densities (chains, n), and their gradients."""

    z: Tensor
    joint: Tensor
    guide: Tensor
    of_joint: Tensor
    of_guide: Tensor

    def density(self, beta: float) -> Tensor:
        return torch.lerp(self.guide, self.joint, beta).double()

    def force(self, beta: float) -> Tensor:
        return torch.lerp(self.of_guide, self.of_joint, beta)


class AnnealingPath:
    """Chains along the path from the guide to the posterior of one batch."""

    def __init__(
        self, joint: Joint, batch: Batch, settings: AnnealingSettings, done: Callable[[int], Any]
    ) -> None:
        self.joint, self.batch, self.settings = joint, batch, settings
        self.n = len(batch[0])
        draws = joint.draw(max(32, settings.num_chains), *batch)
        self.scale = draws.std(0) * joint.counts(*batch)
        steps, last = self._pilot(draws[: settings.num_chains], done), settings.num_temperatures
        self.stops = [
            (beta, steps[round(t / last * (len(steps) - 1))])
            for t, beta in enumerate(_schedule(last))
        ]

    def forward(self, done: Callable[[int], Any]) -> tuple[Tensor, Tensor]:
        """Return log weights (chains, n) with mean p(x), and the acceptance (n,)."""
        z = self.joint.draw(self.settings.num_chains, *self.batch)
        return self._anneal(z, self.stops, done)

    def reverse(self, known: Tensor, done: Callable[[int], Any]) -> tuple[Tensor, Tensor]:
        """Return log weights (chains, n) with mean 1/p(x), from exact draws (n, D)."""
        z = known.expand(self.settings.num_chains, *known.shape)
        return self._anneal(z, self.stops[::-1], done)

    def _anneal(
        self, z: Tensor, stops: Sequence[tuple[float, Tensor]], done: Callable[[int], Any]
    ) -> tuple[Tensor, Tensor]:
        state, (beta, _) = self._state(z), stops[0]
        log_weights = torch.zeros_like(state.joint, dtype=torch.float64)
        accepted = []
        for i, (after, step) in enumerate(stops[1:], 2):
            log_weights += (after - beta) * (state.joint - state.guide).double()
            beta = after
            if i < len(stops):
                state, accept = self._transition(state, beta, step)
                accepted.append(accept.mean(0))
                done(self.n)
        acceptance = torch.stack(accepted).mean(0) if accepted else torch.ones(self.n)
        return log_weights, acceptance

    def _pilot(self, z: Tensor, done: Callable[[int], Any]) -> Tensor:
        """Find step sizes (temperatures, n) with separate chains."""
        state, found = self._state(z), []
        log_step = torch.full_like(state.z[0, :, 0], log(0.5))
        grid = [0.0] * WARMUP + _schedule(self.settings.pilot)[1:]
        for i, beta in enumerate(grid):
            state, accept = self._transition(state, beta, log_step.exp())
            gain = 1.0 if i < WARMUP // 2 else 0.3
            log_step = (log_step + gain * (accept.mean(0) - TARGET)).clamp(max=log(LONGEST))
            found.append(log_step)
            done(self.n)
        return torch.stack(found[WARMUP - 1 :]).exp()

    def _transition(self, state: _State, beta: float, step: Tensor) -> tuple[_State, Tensor]:
        """Move by Hamiltonian dynamics; return the new state and its acceptance (chains, n)."""
        momentum = torch.randn_like(state.z)
        # Random lengths prevent a trajectory from returning to its start.
        length = step.to(state.z.dtype) * (0.5 + 0.5 * torch.rand_like(state.joint))
        stride = length[..., None] * self.scale
        energy = state.density(beta) - 0.5 * momentum.square().sum(-1)
        end = state
        for _ in range(self.settings.leapfrog_steps):
            momentum = momentum + 0.5 * stride * end.force(beta)
            end = self._state(end.z + stride * momentum)
            momentum = momentum + 0.5 * stride * end.force(beta)
        change = end.density(beta) - 0.5 * momentum.square().sum(-1) - energy
        accept = change.clamp(max=0).exp().nan_to_num(0.0)
        moved = torch.rand_like(accept) < accept
        return _State(
            *(_where(moved, new, old) for new, old in zip(end, state, strict=True))
        ), accept

    def _state(self, z: Tensor) -> _State:
        found = self.joint.gradients(z, *self.batch)
        names = ("joint", "guide", "joint gradient", "guide gradient")
        return _State(z, *(found[name].clone() for name in names))  # a graph reuses its memory


def _where(moved: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(moved if new.dim() == moved.dim() else moved[..., None], new, old)


def _schedule(number: int) -> list[float]:
    """Return the ends of ``number`` steps from 0 to 1 along a sigmoid; outer steps are shorter."""
    points = (4 * torch.linspace(-1, 1, number + 1, dtype=torch.float64)).sigmoid()
    return ((points - points[0]) / (points[-1] - points[0])).tolist()

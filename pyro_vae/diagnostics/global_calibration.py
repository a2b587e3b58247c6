"""Simulation-based calibration of global and group latents, with a new fit for each simulation."""

import copy
import sys
import warnings
from collections.abc import Sequence
from itertools import chain
from time import perf_counter as _now
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyro_vae.diagnostics.calibration import LEAST_DRAWS, LEAST_SIMULATIONS, Calibration
from pyro_vae.diagnostics.ranks import ranks_of
from pyro_vae.errors import UsageError
from pyro_vae.inference.inference_data import unit_names
from pyro_vae.pairs.arrays import as_tensor, each_context
from pyro_vae.pairs.formatting import in_words
from pyro_vae.pairs.given_globals import draw_globals, pools
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import global_latents
from pyro_vae.pairs.pair import Batch, Pair
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.simulation import simulate
from pyro_vae.pairs.sites import latents, log_prob, sample_sites
from pyro_vae.pairs.template import template
from pyro_vae.pairs.threads import alone
from pyro_vae.pairs.traces import Given, trace
from pyro_vae.training.fit import fit


@alone()
def global_calibration(
    pair: nn.Module,
    *context: Any,
    num_examples: int = 100,
    num_simulations: int = LEAST_SIMULATIONS,
    num_draws: int = 99,
    level: float = 0.05,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> Calibration:
    r"""Test whether the guide of global and group latents equals their posterior, by new fits.

    Each simulation draws global latents :math:`w^* \sim p(w)` and a data set :math:`x \sim p(x |
    w^*)` of n rows, and fits the guide to it. The rank of :math:`w^*` among L draws of the fitted
    q(w) is uniform on 0, ..., L if q(w) is the posterior. The model stays fixed. Only parameters of
    the guide are fitted (those that the model does not use), from their present values. So the test
    is about the family of the guide and its training, not about the present values of q(w). A guide
    that computes q(w) from the rows (amortization) is not fitted again.

    Arguments:
        pair: any pair with ``template(n)`` and global or group latents.
        context: the context tensors of a conditional pair; every simulation uses all their rows.
        num_examples: n, the number of rows of each simulation, without context.
        num_simulations: number of simulations, each with one fit; at least 100.
        num_draws: L, at least 19.
        level: the largest probability that an exact guide is rejected.
        seed: random seed.
        progress: first print the number of fits and the estimated time on standard error, from
            the time of a short fit; then show a bar.
        settings: the keywords of `pyro_vae.fit`, such as epochs, batch_size, learning_rate. The
            default engine is "eager", because the fits are small.

    Returns a `Calibration` with the units of all global and group latents. Raises `UsageError` for
    a pair without global latents or template.
    Talts et al., 2018 (https://arxiv.org/abs/1804.06788).

    >>> import pyro_vae as pv
    >>> pair = pv.BayesianDecoder(pv.VAE.mlp((1,), latent_dim=1, hidden=()))
    >>> pv.global_calibration(pair, num_simulations=10, progress=False)
    Traceback (most recent call last):
    pyro_vae.errors.UsageError: num_simulations must be at least 100, got 10
    """
    for name, value, least in (
        ("num_simulations", num_simulations, LEAST_SIMULATIONS),
        ("num_draws", num_draws, LEAST_DRAWS),
        ("num_examples", num_examples, 2),
    ):
        if value < least:
            raise UsageError(f"must be at least {least}, got {value}", argument=name)
    given = tuple(
        as_tensor(part, f"context {i}") for i, part in enumerate(each_context(context), 1)
    )
    n = len(given[0]) if given else num_examples
    names = global_latents(pair, template(pair, n, given))
    if not names:
        raise UsageError(f"{type(pair).__name__} has no global latent; use pyro_vae.calibration")
    run = _Simulations(pair, given, n, names, num_draws, {"engine": "eager", **settings})
    if progress and run.refits:
        seconds = num_simulations * run.seconds()
        said = f"global_calibration: {num_simulations} fits, about {in_words(seconds)}"
        print(said, file=sys.stderr)
    with bar(progress, num_simulations, "calibration", delay=2) as shown:
        ranks = []
        for i in range(num_simulations):
            ranks.append(run.ranks(seed + i))
            shown.update()
    return Calibration(tuple(run.units), torch.cat(ranks), num_draws, level, {})


class _Simulations:
    """Simulated data sets, and ranks of their global latents among draws of a fitted guide."""

    def __init__(
        self,
        pair: nn.Module,
        context: Batch,
        n: int,
        names: Sequence[str],
        num_draws: int,
        settings: dict[str, Any],
    ) -> None:
        self.pair, self.context, self.n, self.names = pair, context, n, names
        self.num_draws, self.settings = num_draws, settings
        batch, truth = self._simulate(0)
        with using(pair, 0):
            self.refits = not pools(pair, batch, names)
        self.fitted = guide_parameters(pair, batch) if self.refits else []
        self.units = list(chain(*(unit_names(name, truth[name].shape) for name in names)))

    def seconds(self) -> float:
        """Return the approximate seconds of one fit, from fits of one and of three epochs."""
        batch, _ = self._simulate(0)
        times = []
        for epochs in (1, 1, 3):  # the first one includes work that is done only once
            start = _now()
            self._fit(batch, 0, epochs=epochs)
            times.append(_now() - start)
        epoch = max(0.0, times[2] - times[1]) / 2
        return times[1] + epoch * (self.settings.get("epochs", EPOCHS) - 1)

    def ranks(self, seed: int) -> Tensor:
        """Return the ranks of one simulation, of shape (1, units)."""
        batch, truth = self._simulate(seed)
        fitted = self._fit(batch, seed) if self.refits else self.pair
        with using(fitted, seed + 1):
            draws = [draw_globals(fitted, batch, self.names) for _ in range(self.num_draws)]
            parts = [
                ranks_of(
                    torch.stack([one[name] for one in draws]).reshape(self.num_draws, 1, -1),
                    truth[name].reshape(1, -1),
                )
                for name in self.names
            ]
        return torch.cat(parts, 1).cpu()

    def _simulate(self, seed: int) -> tuple[Batch, dict[str, Tensor]]:
        with using(self.pair, seed):
            return simulate(self.pair, self.n, self.context)

    def _fit(self, batch: Batch, seed: int, **settings: Any) -> nn.Module:
        own = copy.deepcopy(self.pair)
        for name, parameter in own.named_parameters():
            parameter.requires_grad_(name in self.fitted)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about collapse, in each of many fits
            chosen = {"epochs": EPOCHS, **self.settings, **settings}
            fit(own, *batch, progress=False, seed=seed, **chosen)
        return own


EPOCHS = 100
"""Default number of epochs of each fit."""


def guide_parameters(pair: nn.Module, batch: Batch) -> list[str]:
    """Return the parameters on which the guide depends and the model does not.

    Raises `UsageError` if there are none.
    """
    named = {name: p for name, p in pair.named_parameters() if p.requires_grad}
    with using(pair, 0), torch.enable_grad():
        guide = trace_guide(pair, batch)
        values = {name: site["value"] for name, site in latents(guide).items()}
        with Given({name: value.detach() for name, value in values.items()}):
            model = trace(cast(Pair, pair).model, batch)
        of_guide = [log_prob(site).sum() for site in latents(guide).values()]
        of_guide += [value.sum() for value in values.values() if value.is_floating_point()]
        of_model = [log_prob(site).sum() for site in sample_sites(model).values()]
        ours, theirs = _reached(of_guide, named), _reached(of_model, named)
    found = [name for name in named if name in ours and name not in theirs]
    if not found:
        raise UsageError("the guide has no parameters of its own, so it cannot be fitted again")
    return found


def _reached(terms: Sequence[Tensor], named: dict[str, nn.Parameter]) -> set[str]:
    """Return the parameters on which a sum depends."""
    total = torch.stack([term.double() for term in terms]).sum()
    if not total.requires_grad or not named:
        return set()
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return {name for name, gradient in zip(named, found, strict=True) if gradient is not None}

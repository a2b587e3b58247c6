"""An alarm for posterior collapse: a latent whose posterior is the prior, whatever the data."""

from collections.abc import Mapping
from math import ceil, inf
from typing import TYPE_CHECKING

from torch import nn

from pyro_vae import folding
from pyro_vae.pairs import Batch, is_local, latents, trace_guide, trace_model, using

if TYPE_CHECKING:
    from pyro_vae.history import Epoch

UNIT = 0.01
"""Nats for each unit of a latent site: the KL under which it has collapsed (Lucas et al., 2019)."""

SITE = 0.2
"""Nats for a whole site, however many units it has: what can be known of a datum from its code."""

EPOCHS, STEPS = 5, 100
"""Epochs and steps that the KL must stay so low, at the least; while training goes on, half of the
epochs that are planned."""


class CollapseAlarm:
    r"""Tells from the epochs of a training which latent sites have collapsed, each once.

    A site has collapsed where its KL is under :math:`\min(0.01\,d, 0.2)` nats per example for its d
    units, in each of the last epochs, at full weight on the KL: at 1, or no longer rising. They are
    half of the epochs that are planned, since a KL that falls at first may rise again, and 5 where
    training is over; 100 steps at least.

    Arguments:
        units: how many units each site has, from `units`.
        planned: epochs of the training.
        steps: steps of an epoch.
    """

    def __init__(self, units: Mapping[str, int], planned: int, steps: int) -> None:
        self.thresholds = {name: min(UNIT * count, SITE) for name, count in units.items()}
        self.least = max(EPOCHS, ceil(STEPS / steps))
        self.window = max(self.least, ceil(planned / 2))
        self.epochs = dict.fromkeys(units, 0)
        """For how many epochs each site has been collapsed."""
        self.said: set[str] = set()
        self._beta = inf

    def heard(self, epoch: "Epoch") -> list[str]:
        """Take in one epoch, and name the sites that are to be spoken of after it."""
        full = epoch.beta >= 1 or epoch.beta <= self._beta
        self._beta = epoch.beta
        for name, threshold in self.thresholds.items():
            low = full and epoch.kl.get(name, inf) < threshold
            self.epochs[name] = self.epochs[name] + 1 if low else 0
        return self._new(self.window)

    def over(self) -> list[str]:
        """The sites to be spoken of as training ends."""
        return self._new(self.least)

    @property
    def collapsed(self) -> tuple[str, ...]:
        """The sites that have been collapsed for long, and still are."""
        return tuple(name for name, epochs in self.epochs.items() if epochs >= self.least)

    def words(self, name: str) -> str:
        """The alarm for a site."""
        return (
            f"the posterior of latent site '{name}' has collapsed: its KL is under "
            f"{self.thresholds[name]:.2g} nats per example, for {self.epochs[name]} epochs now, so "
            "that the model explains x without it. Try KL warm-up (beta=pyro_vae.Linear(epochs)), "
            "free bits (pyro_vae.FreeBitsELBO), a weaker decoder (word dropout for text), or a "
            "longer training"
        )

    def _new(self, window: int) -> list[str]:
        names = [name for name, n in self.epochs.items() if n >= window and name not in self.said]
        self.said.update(names)
        return names


def units(pair: nn.Module, batch: Batch) -> dict[str, int]:
    """How many units each latent site in the data plate has for a datum, but for points."""
    few = tuple(tensor[:2] for tensor in batch)
    with using(pair, seed=0):
        sites = latents(trace_model(pair, few, trace_guide(pair, few)))
    points = folding.known(pair).points
    return {
        name: site["value"].numel() // len(few[0])
        for name, site in sites.items()
        if is_local(site) and name not in points
    }

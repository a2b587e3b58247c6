"""An alarm for posterior collapse, a posterior that is the prior whatever the data; and for a KL
that is negative, which shows that model and guide do not make a bound."""

from collections.abc import Mapping
from math import ceil, inf
from typing import TYPE_CHECKING

from pyro.poutine import Trace
from torch import nn

from pyro_vae.pairs import fold_plan, masks
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.places import is_local
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import latents, same_order

if TYPE_CHECKING:
    from pyro_vae.training.history import Epoch

UNIT = 0.01
"""Nats for each unit of a latent site: the KL under which it has collapsed (Lucas et al., 2019)."""

DISAGREE = (
    "no KL is, so that model and guide disagree about it and the ELBO is no bound. A mask, a scale "
    "or a factor that one of them has alone does this, and a density that does not integrate to 1"
)

SITE = 0.2
"""Nats for a whole site, however many units it has: what can be known of a datum from its code."""

NOISE = 8.0
"""Nats over the number of draws: a mean of so many draws that lies further below 0 is no KL.

Near the prior a draw has twice the KL k for a variance, so that four standard errors below it is
:math:`k - 4 \\sqrt{2k/n} \\ge -8/n` whatever k is."""

EPOCHS, STEPS = 5, 100
"""Epochs and steps that the KL must stay so low, at the least; while training goes on, half of the
epochs that are planned."""


class CollapseAlarm:
    r"""Tells from the epochs of a training which latent sites have collapsed, each once.

    A site has collapsed where its KL is under :math:`\min(0.01\,d, 0.2)` nats per example for its d
    units, in each of the last epochs, at full weight on the KL: at 1, or no longer rising. They are
    half of the epochs that are planned, since a KL that falls at first may rise again, and 5 where
    training is over; 100 steps at least. A site whose KL is negative beyond Monte Carlo error in
    the last 5 epochs, whatever its weight, has not collapsed: model and guide disagree about it.

    Arguments:
        units: how many units each site has, from `units`.
        planned: epochs of the training.
        steps: steps of an epoch.
        draws: draws of an epoch.
        are_kl: whether the term of each latent is a KL by itself, from `are_kl`: one that is none
            may be negative.
    """

    def __init__(
        self,
        units: Mapping[str, float],
        planned: int,
        steps: int,
        draws: int = 1,
        are_kl: bool = True,
    ) -> None:
        self.thresholds = {name: min(UNIT * count, SITE) for name, count in units.items()}
        self.least = max(EPOCHS, ceil(STEPS / steps))
        self.window = max(self.least, ceil(planned / 2))
        self.epochs = dict.fromkeys(units, 0)
        """For how many epochs each site has been collapsed."""
        self.draws, self.are_kl = draws, are_kl
        self.negative = dict.fromkeys(units, 0)
        """For how many epochs the KL of each site has been negative."""
        self.said: set[str] = set()
        self._beta = inf

    def heard(self, epoch: "Epoch") -> list[str]:
        """Take in one epoch, and name the sites that are to be spoken of after it."""
        full = epoch.beta >= 1 or epoch.beta <= self._beta
        self._beta = epoch.beta
        for name, threshold in self.thresholds.items():
            kl = epoch.kl.get(name, inf)
            below = is_negative(kl, self.draws)
            low = full and kl < threshold and not below
            self.epochs[name] = self.epochs[name] + 1 if low else 0
            self.negative[name] = self.negative[name] + 1 if below and self.are_kl else 0
        return self._new(self.window)

    def over(self) -> list[str]:
        """The sites to be spoken of as training ends."""
        return self._new(self.least)

    @property
    def collapsed(self) -> tuple[str, ...]:
        """The sites that have been collapsed for long, and still are."""
        return tuple(name for name, epochs in self.epochs.items() if epochs >= self.least)

    @property
    def inconsistent(self) -> tuple[str, ...]:
        """The sites whose KL has been negative for long, and still is."""
        return tuple(name for name, epochs in self.negative.items() if epochs >= self.least)

    def words(self, name: str) -> str:
        """The alarm for a site."""
        if name in self.inconsistent:
            return (
                f"the KL of latent site '{name}' is negative, for {self.negative[name]} epochs "
                f"now: {DISAGREE}"
            )
        return (
            f"the posterior of latent site '{name}' has collapsed: its KL is under "
            f"{self.thresholds[name]:.2g} nats per example, for {self.epochs[name]} epochs now, so "
            "that the model explains x without it. Try KL warm-up (beta=pyro_vae.Linear(epochs)), "
            "free bits (pyro_vae.FreeBitsELBO), a weaker decoder (word dropout for text), or a "
            "longer training"
        )

    def _new(self, window: int) -> list[str]:
        found = [name for name, n in self.epochs.items() if n >= window]
        names = [name for name in (*found, *self.inconsistent) if name not in self.said]
        self.said.update(names)
        return names


def is_negative(kl: float, draws: int) -> bool:
    """Whether the mean of so many draws is negative beyond Monte Carlo error, as no KL is."""
    return kl < -NOISE / draws


def units(pair: nn.Module, batch: Batch) -> dict[str, float]:
    """How many units each latent site of the model that is in the data plate has for a datum.

    Without point estimates. What a mask hides is not counted: a mean over the rows of the batch.
    """
    with using(pair, seed=0):
        model, _ = _traces(pair, batch)
        points = fold_plan.known(pair).points
        return {
            name: int(masks.scored(site).sum()) / len(batch[0])
            for name, site in latents(model).items()
            if is_local(site) and name not in points
        }


def are_kl(pair: nn.Module, batch: Batch) -> bool:
    """Whether the term of each latent site is a KL by itself, and so no less than 0.

    It is where model and guide draw the same latents in one order.
    """
    model, guide = _traces(pair, batch)
    return same_order(model, guide) and latents(model).keys() <= latents(guide).keys()


def _traces(pair: nn.Module, batch: Batch) -> tuple[Trace, Trace]:
    with using(pair, seed=0):
        guide = trace_guide(pair, batch)
        return trace_model(pair, batch, guide), guide

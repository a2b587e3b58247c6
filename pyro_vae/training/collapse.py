"""An alarm for posterior collapse and for a negative KL.

A posterior has collapsed if it equals the prior for all data. A negative KL shows that model and
guide do not give a bound.
"""

from collections.abc import Mapping
from math import ceil, inf
from typing import TYPE_CHECKING

from pyro.poutine import Trace
from torch import nn

from pyro_vae.compat import UNOBSERVED_PART
from pyro_vae.pairs import fold_plan, masks
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import latents, same_order

if TYPE_CHECKING:
    from pyro_vae.training.history import Epoch

UNIT = 0.01
"""A site with a KL below this many nats for each unit has collapsed (Lucas et al., 2019)."""

DISAGREE = (
    "a KL cannot be negative, so model and guide disagree about the site, and the ELBO is not a "
    "bound. Possible causes are a mask, a scale or a factor that only one of them has, and a "
    "density that does not integrate to 1"
)

SITE = 0.2
"""Nats for a whole site with any number of units. They bound the information of a code."""

NOISE = 8.0
"""Nats, divided by the number of draws: a mean below minus this value is not a KL.

Near the prior, a draw has a variance of twice the KL k. Therefore four standard errors below k are
:math:`k - 4 \\sqrt{2k/n} \\ge -8/n`, for any k."""

EPOCHS, STEPS = 5, 100
"""The KL must stay low for at least so many epochs and steps. During training, it must stay low for
half of the planned epochs."""


class CollapseAlarm:
    r"""Finds collapsed latent sites from the epochs of a training run, and names each site once.

    A site with d units has collapsed if its KL is below :math:`\min(0.01\,d, 0.2)` nats per example
    in each of the last epochs, at full weight on the KL. The weight is full if it is 1 or no longer
    rises. During training the last epochs are half of the planned ones, because a KL that falls
    at first may rise again. After training they are 5 epochs. They are at least 100 steps.

    If the KL of a site is negative beyond Monte Carlo error in the last 5 epochs, at any weight,
    the site has not collapsed. Then model and guide disagree about it.

    Arguments:
        units: the number of units of each site, from `units`.
        planned: the planned number of epochs.
        steps: the number of steps of an epoch.
        draws: the number of draws of an epoch.
        are_kl: whether the term of each latent is a KL by itself, from `are_kl`. Otherwise it may
            be negative.
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
        """The number of epochs for which each site has been collapsed."""
        self.draws, self.are_kl = draws, are_kl
        self.negative = dict.fromkeys(units, 0)
        """The number of epochs for which the KL of each site has been negative."""
        self.said: set[str] = set()
        self._beta = inf

    def heard(self, epoch: "Epoch") -> list[str]:
        """Take in one epoch, and return the sites to warn about."""
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
        """Return the sites to warn about at the end of training."""
        return self._new(self.least)

    @property
    def collapsed(self) -> tuple[str, ...]:
        """The sites that have been collapsed for long enough until now."""
        return tuple(name for name, epochs in self.epochs.items() if epochs >= self.least)

    @property
    def inconsistent(self) -> tuple[str, ...]:
        """The sites whose KL has been negative for long enough until now."""
        return tuple(name for name, epochs in self.negative.items() if epochs >= self.least)

    def words(self, name: str) -> str:
        """Return the warning for a site."""
        if name in self.inconsistent:
            return (
                f"the KL of latent site '{name}' has been negative for {self.negative[name]} "
                f"epochs: {DISAGREE}"
            )
        return (
            f"the posterior of latent site '{name}' has collapsed: its KL has been below "
            f"{self.thresholds[name]:.2g} nats per example for {self.epochs[name]} epochs, so the "
            "model explains x without it. Try KL warm-up (beta=pyro_vae.LinearSchedule(epochs)), "
            "free bits (pyro_vae.FreeBitsELBO), a weaker decoder (word dropout for text), or "
            "longer training"
        )

    def _new(self, window: int) -> list[str]:
        found = [name for name, n in self.epochs.items() if n >= window]
        names = [name for name in (*found, *self.inconsistent) if name not in self.said]
        self.said.update(names)
        return names


def is_negative(kl: float, draws: int) -> bool:
    """Whether the mean of so many draws is negative beyond Monte Carlo error."""
    return kl < -NOISE / draws


def units(pair: nn.Module, batch: Batch) -> dict[str, float]:
    """Return the number of units for a datum of each local latent of the model.

    Point estimates are left out, and so are missing entries of the data, which are not a code.
    Masked units do not count; the number is a mean over the rows.
    """
    with using(pair, seed=0):
        model, _ = _traces(pair, batch)
        points = fold_plan.known(pair).points
        return {
            name: int(masks.scored(site).sum()) / len(batch[0])
            for name, site in latents(model).items()
            if is_local(site) and name not in points and not name.endswith(UNOBSERVED_PART)
        }


def are_kl(pair: nn.Module, batch: Batch) -> bool:
    """Whether the term of each latent site is a KL by itself, and so at least 0.

    This holds if model and guide draw the same latents in the same order.
    """
    model, guide = _traces(pair, batch)
    return same_order(model, guide) and latents(model).keys() <= latents(guide).keys()


def _traces(pair: nn.Module, batch: Batch) -> tuple[Trace, Trace]:
    with using(pair, seed=0):
        guide = trace_guide(pair, batch)
        return trace_model(pair, batch, guide), guide

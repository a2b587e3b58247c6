"""Do global and group latents lie in the tail of their prior?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import (
    Cauchy,
    Exponential,
    HalfCauchy,
    HalfNormal,
    Independent,
    Laplace,
    Normal,
)

from pyro_vae.compat import scale_and_mask
from pyro_vae.inference.importance import CELLS
from pyro_vae.inference.inference_data import unit_names
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.pair import Batch, Site
from pyro_vae.pairs.sites import latents
from pyro_vae.pairs.traces import Given

DRAWS = 200
"""The largest number of posterior draws for the comparison with the prior."""

PRIOR_DRAWS = 1000
"""The largest number of draws of the prior for each posterior draw."""

CLOSED: dict[tuple[type, ...], Callable[[Tensor], Tensor]] = {
    (Normal, HalfNormal): lambda z: torch.erfc(z / 2**0.5),
    (Cauchy, HalfCauchy): lambda z: 2 / pi * torch.atan2(torch.ones_like(z), z),
    (Laplace, Exponential): lambda z: (-z).exp(),
}
"""Families whose density falls on both sides of ``loc``, or from 0 on: t at the distance z from
there, in units of the scale."""

SINGLE = 1000
"""A site of more numbers is compared as a whole, since one in so many is never surprising."""

CONFLICT = 1e-3
"""An element lies in the tail of its prior if its p-value is below this."""


@dataclass(frozen=True)
class PriorTails:
    r"""How far posterior draws of global and group latents lie in the tail of their prior.

    An element is one independent part of a site. For a posterior draw of its value w,

    .. math:: t = P(p(w') \le p(w)), \qquad w' \sim p(w' \mid \text{parents of w at this draw}).

    If the data come from the model, then a posterior draw is a draw of the prior, and t is uniform
    (Yuan & Johnson, Biometrics 2012). The draws of one posterior depend on each other, but twice
    the mean of such t is still a p-value (Meng, Annals of Statistics 1994).
    """

    elements: tuple[str, ...]
    """The names of the elements, such as "w[0]"."""
    tails: Tensor
    """t of each posterior draw and element, (draws, elements)."""
    prior_draws: Tensor
    """The number of draws of the prior for each t, (elements,); infinite for a closed form."""

    @property
    def p_values(self) -> Tensor:
        """The p-value of each element, multiplied by their number (Bonferroni), (elements,)."""
        return (len(self.elements) * 2 * self.tails.mean(0) + self._least).clamp(max=1)

    @property
    def _least(self) -> Tensor:
        """The least p-value of each element that the number of draws allows, (elements,)."""
        return len(self.elements) * 2 / (len(self.tails) * self.prior_draws)

    @property
    def unchecked(self) -> tuple[str, ...]:
        """The elements that are too many for the draws: no value of theirs could conflict."""
        few = (self._least >= CONFLICT).tolist()
        return tuple(name for name, out in zip(self.elements, few, strict=True) if out)

    @property
    def conflicts(self) -> dict[str, float]:
        """The p-values of the elements in the tail of their prior, the smallest first."""
        p = self.p_values
        return {self.elements[i]: p[i].item() for i in p.argsort().tolist() if p[i] < CONFLICT}

    def __str__(self) -> str:
        told = in_tail(self.conflicts)
        if few := self.unchecked:
            told += f"; not checked for {_listed(few)}, which are too many for the draws"
        return told


SHOWN = 3
"""Number of elements that the words name."""


def in_tail(conflicts: Mapping[str, float]) -> str:
    """Return in words which elements lie in the tail of their prior.

    >>> in_tail({"w[1]": 2e-6, "w[0]": 3e-4})
    "the posterior of 'w[1]' and 'w[0]' lies in the tail of the prior (p 2e-06)"
    """
    if not conflicts:
        return "no part of the posterior lies in the tail of the prior"
    told, least = _listed(list(conflicts)), min(conflicts.values())
    return f"the posterior of {told} lies in the tail of the prior (p {least:.0e})"


def _listed(elements: Sequence[str]) -> str:
    names = [f"'{name}'" for name in elements[:SHOWN]]
    if (more := len(elements) - SHOWN) > 0:
        names.append(f"{more} more")
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def prior_tails(pair: nn.Module, batch: Batch, draws: Mapping[str, Tensor]) -> PriorTails | None:
    """Compare posterior draws of global and group latents with their prior.

    Call it within `pyro_vae.pairs.scope.using`.

    Arguments:
        draws: equally weighted draws of all global and group latents by name, (draws, ...).

    Returns None if no prior of these latents can be drawn.
    """
    number = len(next(iter(draws.values())))
    found: list[dict[str, Tensor]] = []
    for i in torch.linspace(0, number - 1, min(number, DRAWS)).round().long().tolist():
        with Given({name: values[i] for name, values in draws.items()}):
            model = trace_model(pair, batch, trace_guide(pair, batch))
        sites = latents(model)
        found.append({name: _tail(sites[name]) for name in draws if name in sites})
    names = [name for name, tail in found[0].items() if tail.numel()]
    if not names:
        return None
    elements = [unit for name in names for unit in unit_names(name, found[0][name].shape[1:])]
    tails = torch.stack([torch.cat([one[name][0].flatten() for name in names]) for one in found])
    sizes = torch.cat([found[0][name][1].flatten() for name in names])
    return PriorTails(tuple(elements), tails.cpu(), sizes.cpu())


def resampled(weights: Tensor, number: int) -> Tensor:
    """Return the indices of equally weighted draws, by systematic resampling.

    >>> resampled(torch.tensor([0.5, 0.0, 0.25, 0.25]), 4)
    tensor([0, 0, 2, 3])
    """
    points = (torch.arange(number, device=weights.device) + 0.5) / number
    ends = weights.cumsum(0)
    return torch.searchsorted(ends / ends[-1], points.to(ends.dtype)).clamp(max=len(weights) - 1)


def _tail(site: Site) -> Tensor:
    """Return t of each element and the number of draws of the prior, (2, *elements).

    The result is empty if the prior cannot be drawn.
    """
    fn, value, mask = site["fn"], site["value"], site["mask"]
    while isinstance(fn, Independent) and value.numel() <= SINGLE:
        own = fn.reinterpreted_batch_ndims
        mask = mask[(..., *[None] * own)] if isinstance(mask, Tensor) else mask
        fn = fn.base_dist
    if (exact := _closed(fn, value)) is not None:
        used = torch.as_tensor(True if mask is None else mask, device=exact.device)
        below = torch.where(used, exact, 1.0)
        return torch.stack([below, torch.full_like(below, torch.inf)])
    number = max(1, min(PRIOR_DRAWS, CELLS // max(1, value.numel())))
    try:
        drawn = fn.sample((number,))
    except NotImplementedError:  # an improper prior
        return value.new_zeros(2, 0)
    above = fn.log_prob(drawn) - fn.log_prob(value)
    below = (scale_and_mask(above, mask=mask) <= 0).double().mean(0)
    return torch.stack([below, torch.full_like(below, number)])


def _closed(fn: Any, value: Tensor) -> Tensor | None:
    """Return t in closed form, or None if it has none."""
    for families, tail in CLOSED.items():
        if isinstance(fn, families):
            scale = 1 / fn.rate if isinstance(fn, Exponential) else fn.scale
            return tail(((value - getattr(fn, "loc", 0.0)).abs() / scale).double())
    return None

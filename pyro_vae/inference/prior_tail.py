"""Do global and group latents lie in the tail of their prior?"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import pi
from typing import Any, cast

import torch
from pyro.poutine import Trace
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
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.pair import Batch, Site
from pyro_vae.pairs.showing import shown_html
from pyro_vae.pairs.sites import factors, latents
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

ROUNDING = 1e-4
"""Log densities that differ by at most this, relative to 1 or to their size, are equal. Otherwise
rounding errors would order the values of a flat prior, such as LKJ with concentration 1."""

TOO_MANY = "too many for the draws"


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
    left_out: dict[str, str] = field(default_factory=dict)
    """The sites that cannot be compared, with the reason."""

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

    @property
    def not_checked(self) -> dict[str, str]:
        """The sites and elements that are not compared with their prior, with the reason."""
        return self.left_out | dict.fromkeys(self.unchecked, TOO_MANY)

    _repr_html_ = shown_html

    def __str__(self) -> str:
        checked = len(self.unchecked) < len(self.elements)
        told = [in_tail(self.conflicts)] if checked else []
        for why in dict.fromkeys(self.not_checked.values()):
            names = [name for name, reason in self.not_checked.items() if reason == why]
            told.append(f"prior and posterior are not compared for {_listed(names)}: {why}")
        return "; ".join(told)


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


def prior_tails(pair: nn.Module, batch: Batch, draws: Mapping[str, Tensor]) -> PriorTails:
    """Compare posterior draws of global and group latents with their prior.

    Call it within `pyro_vae.pairs.scope.using`.

    Arguments:
        draws: equally weighted draws of all global and group latents by name, (draws, ...).
    """
    number = len(next(iter(draws.values())))
    found: dict[str, list[Tensor]] = {name: [] for name in draws}
    left_out: dict[str, str] = {}
    chosen = torch.linspace(0, number - 1, min(number, DRAWS)).round().long().tolist()
    for i in chosen:
        with Given({name: values[i] for name, values in draws.items()}):
            model = trace_model(pair, batch, trace_guide(pair, batch))
        sites, changed = latents(model), [*_global_factors(model)]
        for name in draws:
            if name in left_out:
                continue
            try:
                found[name].append(_tail(sites.get(name), changed))
            except _NotComparable as error:
                left_out[name] = str(error)
    tails = {name: torch.stack(found[name], 1) for name in draws if name not in left_out}
    none = torch.zeros(len(chosen), 0, dtype=torch.double)
    return PriorTails(
        tuple(unit for name, tail in tails.items() for unit in unit_names(name, tail.shape[2:])),
        torch.cat([none, *(tail[0].reshape(len(chosen), -1).cpu() for tail in tails.values())], 1),
        torch.cat([none[0], *(tail[1, 0].flatten().cpu() for tail in tails.values())]),
        left_out,
    )


def in_metrics(tails: PriorTails | None) -> dict[str, Any]:
    """Return the entries for metrics.json; they are None without a comparison."""
    return {
        "in_tail_of_prior": None if tails is None else tails.conflicts,
        "not_compared_with_prior": None if tails is None else tails.not_checked,
    }


def resampled(weights: Tensor, number: int) -> Tensor:
    """Return the indices of equally weighted draws, by systematic resampling.

    >>> resampled(torch.tensor([0.5, 0.0, 0.25, 0.25]), 4)
    tensor([0, 0, 2, 3])
    """
    points = (torch.arange(number, device=weights.device) + 0.5) / number
    ends = weights.cumsum(0)
    return torch.searchsorted(ends / ends[-1], points.to(ends.dtype)).clamp(max=len(weights) - 1)


class _NotComparable(Exception):
    """A site has no prior for a comparison; the message tells why."""


def _global_factors(model: Trace) -> Iterator[str]:
    return (name for name, site in factors(model).items() if not is_local(site))


def _tail(site: Site | None, changed: Sequence[str]) -> Tensor:
    """Return t of each element and the number of draws of the prior, (2, *elements).

    Arguments:
        site: the site at a posterior draw; None if the model does not have it there.
        changed: the factors outside of the data plate. With one of them, the distribution of a site
            is not its prior.
    """
    if site is None:
        raise _NotComparable("the model does not draw it each time")
    if changed:
        raise _NotComparable(f"the pyro.factor '{changed[0]}' may be a part of the prior")
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Wishart: "Singular sample detected"
            drawn = fn.sample((number,))
            ours, theirs = fn.log_prob(value), fn.log_prob(drawn)
    except Exception as error:  # improper, without a density, or a draw that rounds to a bound
        kind = type(fn).__name__
        raise _NotComparable(f"the density of draws of {kind} cannot be computed") from error
    equal = torch.where(ours.isfinite(), ROUNDING * ours.abs().clamp(min=1), 0.0)
    above = scale_and_mask(theirs - ours - equal, mask=mask) > 0  # not where one of them is NaN
    below = (~above).double().mean(0)
    return torch.stack([below, torch.full_like(below, number)])


def _closed(fn: Any, value: Tensor) -> Tensor | None:
    """Return t in closed form, or None if it has none."""
    for families, tail in CLOSED.items():
        # A subclass may have a density of its own, such as that of a truncated normal.
        if cast(Any, type(fn)).log_prob in [cast(Any, family).log_prob for family in families]:
            scale = 1 / fn.rate if isinstance(fn, Exponential) else fn.scale
            return tail(((value - getattr(fn, "loc", 0.0)).abs() / scale).double())
    return None

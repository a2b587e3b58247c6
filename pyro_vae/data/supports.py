"""The values that the likelihood of a pair can score."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.pairs.pair import Batch, Site
from pyro_vae.parts.by_column import ByColumn
from pyro_vae.parts.distributions import LevelCategorical
from pyro_vae.parts.missing import PartlyObserved


@dataclass(frozen=True)
class Allowed:
    """The values of x that a likelihood can score, to check rows that arrive later."""

    site: Site
    support: Any
    dtype: torch.dtype
    """The type of the pair."""
    integers: bool
    """Whether the pair takes integers."""
    eight_bit: bool
    """Whether 8-bit x are intensities."""
    gray: bool
    """Whether values from 0 to 1 are intensities, which are binarized."""
    run: Callable[[Batch], Tensor | None]
    """Runs the pair on unprepared rows, and tells which entries of x it can score (`scored`)."""

    def holds(self, x: Tensor) -> bool:
        """Whether all entries of finite, unprepared rows of x are allowed, without a mask."""
        if x.dtype == torch.uint8 and self.eight_bit:
            return self.gray or self.support is not constraints.boolean or bool(self(x).all())
        if x.dtype == self.dtype and x.numel():
            # These take a fourth of the time of the full check, or less.
            if self.gray:
                low, high = x.aminmax()
                fast = bool(low >= 0) and bool(high <= 1)
            elif self.support is constraints.boolean:
                fast = torch.equal(x * x, x)
            else:
                least: Any = getattr(self.support, "lower_bound", None)
                whole = type(self.support) is _COUNTS and isinstance(least, int)
                fast = whole and torch.equal(x.round(), x) and bool(x.min() >= least)
            if fast:
                return True
        return bool(self(x).all())

    def closer(self, batch: Batch) -> Tensor | None:
        """Which entries of x are allowed, or hidden by a mask that only these rows need.

        None if the pair does not observe x itself in these rows.
        """
        scored = self.run(batch)
        return None if scored is None else scored | self(batch[0]).to(scored.device)

    def __call__(self, x: Tensor) -> Tensor:
        """Which entries of unprepared rows of x are allowed; missing ones (NaN) are."""
        if x.dtype == torch.uint8 and self.eight_bit:
            every = self.gray or self.support is not constraints.boolean
            return torch.ones_like(x, dtype=torch.bool) if every else (x == 0) | (x == 255)
        bounds = [bound for bound in vars(self.support).values() if isinstance(bound, Tensor)]
        x = x.to(bounds[0].device if bounds else x.device)
        x = x.to(torch.int64 if self.integers else self.dtype)
        return x.isnan() | ((x >= 0) & (x <= 1) if self.gray else self.support.check(x))

    def words(self, x: Tensor, inside: Tensor, row: int, of: str) -> str:
        """The message about the first row of x that has a value outside.

        Arguments:
            row: the number of the first row of x.
            of: follows the number in the message.
        """
        at = int((~inside).reshape(len(x), -1).any(1).nonzero()[0])
        value = x[at][~inside[at].to(x.device)].flatten()[0].item()
        between = 0 < value < (255 if x.dtype == torch.uint8 and self.eight_bit else 1)
        if self.support is constraints.boolean and not self.gray and between:
            return (
                f"x holds {value:g} in row {row + at}{of}, but its first rows have only the values "
                f"0 and {255 if x.dtype == torch.uint8 else 1}, so x is not treated as "
                "intensities: binarize x, or let rows with intensities come first"
            )
        shown = outside(value, x, self.site)
        return shown.replace(f"{value:g},", f"{value:g} in row {row + at}{of},", 1)


_COUNTS = type(constraints.nonnegative_integer)

_FAMILIES = {
    "TruncatedExponential": "ContinuousBernoulli",
    "LevelCategorical": "Categorical",
    "LevelLogistic": "DiscretizedLogistic",
    "ByColumn": "Columns",
    "MixtureSameFamily": "mixture",
    "ExactPoisson": "Poisson",
    "ExactNegativeBinomial": "NegativeBinomial",
    "ZeroInflatedDistribution": "zero-inflated",
}


def outside(value: float, x: Tensor, site: Site) -> str:
    """The message that a value of x is outside the support of a site."""
    eight_bit, x = x.dtype == torch.uint8, x[~x.isnan()].double()
    low, high = x.min().item(), x.max().item()
    whole = bool((x == x.round()).all())
    if eight_bit or (low >= 0 and high <= 1):
        fit = "for values in [0, 1], use a ContinuousBernoulli or Gaussian likelihood"
    elif whole and low >= 0 and high <= 255:
        fit = "whole numbers up to 255 look like 8-bit pixels: pass them as uint8"
    elif whole and low >= 0:
        fit = "for counts, use a Poisson or NegativeBinomial likelihood"
    else:
        fit = "for real values, use a Gaussian likelihood"
    fn = getattr(site["fn"], "base_dist", site["fn"])
    fn = fn.base_dist if isinstance(fn, PartlyObserved) else fn
    name = _FAMILIES.get(type(fn).__name__, type(fn).__name__)
    codes = isinstance(fn, LevelCategorical) and (fn.whole or fn.levels != 256)
    if codes and whole and low >= 0 and not eight_bit:
        levels = int(max(high + 1, fn.levels))
        fit = f"for whole numbers from 0 to {levels - 1}, use Categorical({levels}, tokens=True)"
    elif isinstance(fn, ByColumn):
        fit = "counts are whole numbers from 0, positive numbers are above 0, codes are 0, 1, ..."
    return (
        f"x holds {value:g}, outside the support of the {name} likelihood of site "
        f"'{site['name']}' (data range {low:g} to {high:g}); {fit}"
    )

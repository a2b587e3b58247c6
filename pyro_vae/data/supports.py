"""The values that the likelihood of a pair can score."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.pairs.pair import Site
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

    def __call__(self, x: Tensor) -> Tensor:
        """Which entries of unprepared rows of x are allowed; missing ones (NaN) are."""
        if x.dtype == torch.uint8 and self.eight_bit:
            return torch.ones_like(x, dtype=torch.bool)
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
        if self.support is constraints.boolean and not self.gray and 0 < value < 1:
            return (
                f"x holds {value:g} in row {row + at}{of}, but its first rows have only the values "
                "0 and 1, so x is not treated as intensities: binarize x, or let rows with "
                "intensities come first"
            )
        shown = outside(value, x, self.site)
        return shown.replace(f"{value:g},", f"{value:g} in row {row + at}{of},", 1)


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

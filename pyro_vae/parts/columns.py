"""The likelihood of a row of a table: a part for each column, and what the encoder sees of it."""

from collections.abc import Sequence
from math import isfinite, pi
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_vae.errors import UsageError
from pyro_vae.parts.by_column import ByColumn, Codes
from pyro_vae.parts.circular import Circular
from pyro_vae.parts.distributions import ExactNegativeBinomial
from pyro_vae.parts.factors import Family, bounded_scale, unbounded_scale
from pyro_vae.parts.missing import PartlyObserved
from pyro_vae.parts.networks import Shape
from pyro_vae.parts.standardized import require_precision, require_rows, varies

NUMERIC = ("continuous", "positive", "count")
"""Kinds of columns that hold numbers."""

CIRCULAR = ("circular",)
"""Kinds of columns that hold numbers on a circle, such as angles."""

CODED = ("binary", "categorical", "ordinal")
"""Kinds of columns that hold codes 0, 1, ... of categories."""

KINDS = (*NUMERIC, *CIRCULAR, *CODED)


class Columns(Family):
    r"""The likelihood of a row of a table, :math:`p(x|z) = \prod_j p_j(x_j|z)`, by column.

    ============ ==================================================== =======
    kind         :math:`p_j(x_j|z)`                                   outputs
    ============ ==================================================== =======
    continuous   Student-t, or a normal with ``robust=False``         3 or 2
    positive     log-normal                                           2
    count        negative binomial                                    2
    circular     von Mises, see `pyro_vae.parts.circular.Circular`    3
    binary       Bernoulli, over the codes 0 and 1                    1
    categorical  categorical, over the codes 0 to levels - 1          levels
    ordinal      ordered logistic: :math:`P(x_j \le k) =              1
                 \sigma(c_k - f)` with learned cutpoints :math:`c`
    ============ ==================================================== =======

    Arguments:
        kinds: the kind of each column.
        levels: the number of categories of each column; 0 for numbers.
        robust: whether continuous columns are Student-t, with degrees of freedom predicted for each
            entry, at least 2.1.
        bounds: the smallest and the largest scale, in standard deviations of the column.
        periods: the period of each column; 0 for columns that are not circular. The default is
            :math:`2\pi` for circular columns.

    NaN marks a missing entry, which does not contribute. The encoder sees the standardized numbers,
    an embedding of each category (0 where missing), and the mask. `standardize` sets the constants,
    which are buffers of the family, so a loaded pair takes raw rows. Densities are in the units of
    the data. The stand-in of a category's mean is its mode.

    Raises `UsageError` for unknown kinds, and for levels that do not fit the kinds.

    >>> likelihood = Columns(["continuous", "categorical"], [0, 3])
    >>> x = torch.tensor([[40.0, 2.0], [60.0, torch.nan]])
    >>> likelihood.standardize(x).center
    tensor([50.,  0.])
    >>> fn = likelihood(torch.zeros(2, 6), (2,))
    >>> fn.base_dist.log_prob(x)
    tensor([[-3.7707, -1.0986],
            [-3.7707,  0.0000]])
    """

    center: Tensor
    spread: Tensor

    def __init__(
        self,
        kinds: Sequence[str],
        levels: Sequence[int],
        robust: bool = True,
        bounds: tuple[float, float] = (1e-2, 1e2),
        periods: Sequence[float] = (),
    ) -> None:
        super().__init__()
        _require_kinds(kinds, levels)
        self.periods = _checked_periods(kinds, periods)
        self.kinds, self.levels, self.robust = tuple(kinds), tuple(levels), robust
        self.bounds = tuple(bounds)
        self.register_buffer("center", torch.zeros(len(self.kinds)))
        self.register_buffer("spread", torch.ones(len(self.kinds)))
        steps = sum(self.levels[j] - 2 for j in self.of_kind("ordinal"))
        firsts = len(self.of_kind("ordinal"))
        # A cutpoint is the one before it plus softplus of a parameter; the first is free.
        self.first_cutpoints = nn.Parameter(torch.full((firsts,), -1.0))
        self.cutpoint_steps = nn.Parameter(torch.zeros(steps))

    def of_kind(self, *kinds: str) -> list[int]:
        """The indices of the columns of these kinds."""
        return [j for j, kind in enumerate(self.kinds) if kind in kinds]

    def standardize(self, x: Tensor) -> "Columns":
        """Set the constants from rows (n, columns): mean and standard deviation of each column.

        They are those of log x for positive columns, of log(1 + x) for counts, and 0 and 1 for
        categories. Missing entries are left out. Returns the family. Raises `UsageError` for rows
        of another shape, and for a standard deviation that is too small beside the mean, too small
        or too large.
        """
        require_rows(x, (len(self.kinds),))
        seen = self.transformed(x.double())
        center = seen.nanmean(0)
        spread = (seen - center).square().nanmean(0).sqrt()
        numeric = torch.tensor([kind in NUMERIC for kind in self.kinds])
        require_precision(center, spread * numeric, self.center.dtype)
        usable = numeric & center.isfinite()
        self.center.copy_(torch.where(usable, center, 0.0))
        self.spread.copy_(torch.where(usable & varies(center, spread), spread, 1.0))
        for j in self.of_kind("circular"):
            if bool((x[:, j] < 0).any()):  # the circle starts at the opposite of 0
                self.center[j] = -self.periods[j] / 2
        return self

    def transformed(self, x: Tensor) -> Tensor:
        """Numbers on the scale where they are standardized; NaN remains NaN."""
        kinds = self.kinds
        logged = torch.tensor([kind == "positive" for kind in kinds], device=x.device)
        counted = torch.tensor([kind == "count" for kind in kinds], device=x.device)
        safe = torch.where(logged, x.clamp(min=torch.finfo(x.dtype).tiny), 1.0).log()
        more = torch.where(counted, x.clamp(min=0), 0.0).log1p()
        found = torch.where(logged, safe, torch.where(counted, more, x))
        return torch.where(x.isnan(), torch.nan, found)

    def view(self, shape: Shape) -> nn.Module | None:
        self._require(shape)
        return ColumnsView(self)

    def outputs(self, shape: Shape) -> int:
        self._require(shape)
        return sum(self._widths())

    def _widths(self) -> list[int]:
        """The number of outputs of each column."""
        known = {"continuous": 3 if self.robust else 2, "positive": 2, "count": 2}
        known |= {"binary": 1, "ordinal": 1, "circular": 3}
        return [known.get(k, n) for k, n in zip(self.kinds, self.levels, strict=True)]

    def _require(self, shape: Shape) -> None:
        if tuple(shape) != (len(self.kinds),):
            raise UsageError(
                f"Columns has {len(self.kinds)} columns, so rows must have shape "
                f"({len(self.kinds)},), got {tuple(shape)}"
            )

    def forward(self, raw: Tensor, shape: Shape) -> dist.TorchDistribution:
        by_column = raw.split(self._widths(), -1)
        makers = {
            "continuous": self._continuous,
            "positive": self._positive,
            "count": self._counts,
            "circular": self._circular,
        }
        parts: list[tuple[list[int], Any]] = []
        for kind, make in makers.items():
            if index := self.of_kind(kind):
                outputs = torch.stack([by_column[j] for j in index], -2)
                parts.append((index, make(outputs.unbind(-1), index)))
        if index := self.of_kind(*CODED):
            logits = [self._logits(j, by_column[j]) for j in index]
            widest = max(self.levels[j] for j in index)
            padded = [F.pad(one, (0, widest - one.shape[-1]), value=IMPOSSIBLE) for one in logits]
            levels = torch.tensor([self.levels[j] for j in index], device=raw.device)
            parts.append((index, Codes(torch.stack(padded, -2), levels)))
        return PartlyObserved(ByColumn(parts)).to_event(1)

    def _scaled(self, raw: Tensor, index: list[int]) -> Tensor:
        return bounded_scale(raw, *self.bounds) * self.spread[index]

    def _continuous(self, raw: Sequence[Tensor], index: list[int]) -> Any:
        loc, scale = raw[0] * self.spread[index] + self.center[index], self._scaled(raw[1], index)
        if not self.robust:
            return dist.Normal(loc, scale, validate_args=False)
        start = unbounded_scale(8.0, 0.1, 1e3)  # a network output of 0 gives 10 degrees
        freedom = 2 + bounded_scale(raw[2] + start, 0.1, 1e3)
        return dist.StudentT(freedom, loc, scale, validate_args=False)

    def _positive(self, raw: Sequence[Tensor], index: list[int]) -> Any:
        loc, scale = raw[0] * self.spread[index] + self.center[index], self._scaled(raw[1], index)
        return dist.LogNormal(loc, scale, validate_args=False)

    def _counts(self, raw: Sequence[Tensor], index: list[int]) -> Any:
        usual = torch.expm1(self.center[index]).clamp(min=0.1)
        mean = bounded_scale(raw[0], 1e-6, 1e6) * usual
        inverse = bounded_scale(raw[1], 1e-4, 1e4)
        return ExactNegativeBinomial(
            inverse, logits=mean.log() - inverse.log(), validate_args=False
        )

    def _circular(self, raw: Sequence[Tensor], index: list[int]) -> Any:
        period = raw[0].new_tensor([self.periods[j] for j in index])
        # An output of 0 is the direction 0, where atan2 has a gradient.
        loc = torch.atan2(raw[1], 1 + raw[0]) * period / (2 * pi)
        concentration = bounded_scale(raw[2], 1e-2, 1e4)
        return Circular(loc, concentration, self.center[index], period)

    def _logits(self, j: int, raw: Tensor) -> Tensor:
        """Unnormalized log probabilities of the categories of a column, (..., levels)."""
        if self.kinds[j] == "categorical":
            return raw
        if self.kinds[j] == "binary":
            return torch.cat([torch.zeros_like(raw), raw], -1)
        # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b))
        below = self._cutpoints(j) - raw
        inner = F.logsigmoid(below[..., 1:]) + F.logsigmoid(-below[..., :-1])
        gaps = torch.log(-torch.expm1(below[..., :-1] - below[..., 1:]))
        ends = F.logsigmoid(below[..., :1]), F.logsigmoid(-below[..., -1:])
        return torch.cat([ends[0], inner + gaps, ends[1]], -1)

    def _cutpoints(self, j: int) -> Tensor:
        ordinal = self.of_kind("ordinal")
        at = ordinal.index(j)
        start = sum(self.levels[i] - 2 for i in ordinal[:at])
        steps = F.softplus(self.cutpoint_steps[start : start + self.levels[j] - 2]) + 1e-3
        return torch.cat([self.first_cutpoints[at : at + 1], steps]).cumsum(0)


IMPOSSIBLE = -1e9
"""The logit of a code that a column does not have, when columns with fewer codes are padded."""


class ColumnsView(nn.Module):
    """What the encoder sees of a row: standardized numbers, sine and cosine of circular numbers,
    embeddings of categories, and the mask.

    Arguments:
        columns: the likelihood, whose constants standardize the numbers.

    >>> ColumnsView(Columns(["continuous", "binary"], [0, 2]))(torch.zeros(5, 2)).shape
    torch.Size([5, 4])
    """

    columns: Columns

    def __init__(self, columns: Columns) -> None:
        super().__init__()
        # PyroModule would give the family a second name; with torch's method it keeps its own.
        nn.Module.add_module(self, "columns", columns)
        self.embeddings = nn.ModuleList(
            nn.Embedding(columns.levels[j], embedding_dim(columns.levels[j]))
            for j in columns.of_kind(*CODED)
        )

    def forward(self, x: Tensor) -> Tensor:
        columns = self.columns
        seen = ~x.isnan()
        numbers = (columns.transformed(x) - columns.center) / columns.spread
        numbers = torch.where(seen, numbers, 0.0)[..., columns.of_kind(*NUMERIC)]
        found = [numbers]
        for j in columns.of_kind("circular"):
            angle = torch.where(seen[..., j], x[..., j], 0.0) * (2 * pi / columns.periods[j])
            both = torch.stack([angle.sin(), angle.cos()], -1)
            found.append(both * seen[..., j : j + 1])
        for j, embedding in zip(columns.of_kind(*CODED), self.embeddings, strict=True):
            code = torch.where(seen[..., j], x[..., j], 0.0).long()
            code = code.clamp(0, columns.levels[j] - 1)  # a template may hold anything
            found.append(embedding(code) * seen[..., j : j + 1])
        return torch.cat([*found, seen.to(x.dtype)], -1)


def embedding_dim(levels: int) -> int:
    """The width of the embedding of a category: levels - 1 for a few levels, 16 at most."""
    return min(16, max(1, levels - 1))


def _require_kinds(kinds: Sequence[str], levels: Sequence[int]) -> None:
    if not kinds:
        raise UsageError("must name at least one column, got none", argument="kinds")
    if len(kinds) != len(levels):
        raise UsageError(f"got {len(kinds)} kinds but {len(levels)} levels; they must match")
    for j, (kind, count) in enumerate(zip(kinds, levels, strict=True)):
        if kind not in KINDS:
            raise UsageError(
                f"the kind of column {j} must be one of {', '.join(KINDS)}, got '{kind}'"
            )
        least = {"binary": 2, "categorical": 2, "ordinal": 2}.get(kind, 0)
        if count < least or (kind == "binary" and count != 2) or (kind not in CODED and count):
            raise UsageError(f"column {j} is {kind}, so it cannot have {count} levels")


def _checked_periods(kinds: Sequence[str], periods: Sequence[float]) -> tuple[float, ...]:
    """The period of each column, 0 for those that are not circular."""
    found = tuple(periods) or tuple(2 * pi * (kind in CIRCULAR) for kind in kinds)
    if len(found) != len(kinds):
        raise UsageError(f"got {len(kinds)} kinds but {len(found)} periods; they must match")
    for j, (kind, period) in enumerate(zip(kinds, found, strict=True)):
        if kind in CIRCULAR and not (period > 0 and isfinite(period)):
            raise UsageError(f"column {j} is circular, so its period must be above 0, got {period}")
        if kind not in CIRCULAR and period:
            raise UsageError(f"column {j} is {kind}, so it cannot have the period {period}")
    return found

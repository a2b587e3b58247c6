"""The distribution of a row of a table: independent columns of several families."""

from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.parts.circular import Circular
from pyro_vae.parts.distributions import LevelCategorical


class Codes(LevelCategorical):
    """Codes 0 to levels - 1 of categories, where columns have their own number of levels."""

    def __init__(self, logits: Tensor, own: Tensor) -> None:
        self.own = own
        super().__init__(logits, whole=True)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Codes":
        return Codes(self.logits.expand(*batch_shape, self.levels), self.own)

    def within(self, value: Tensor) -> Tensor:
        return (value >= 0) & (value < self.own) & (value == value.round())


WITHOUT_MEAN = (Codes, Circular)
"""Families whose values have a mode but not a mean."""


class EntrySupport(constraints.Constraint):
    """The support of `ByColumn`, checked entry by entry."""

    is_discrete = False
    event_dim = 0

    def __init__(self, fn: "ByColumn") -> None:
        self.fn = fn

    def check(self, value: Tensor) -> Tensor:
        return self.fn.gathered(
            [
                part.within(value[..., index])
                if isinstance(part, Codes)
                else part.support.check(value[..., index])
                for index, part in self.fn.parts
            ]
        )


class ByColumn(dist.TorchDistribution):
    """Independent columns of several families; the last batch dimension holds the columns.

    Arguments:
        parts: the indices of columns, and the distribution of these columns, of batch shape
            (..., number of these columns).
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, parts: Sequence[tuple[list[int], Any]]) -> None:
        self.parts = list(parts)
        order = [j for index, _ in self.parts for j in index]
        self.order = [order.index(j) for j in range(len(order))]
        shape = torch.Size((*self.parts[0][1].batch_shape[:-1], len(order)))
        super().__init__(shape, validate_args=False)

    def gathered(self, values: Sequence[Tensor]) -> Tensor:
        """The values of the parts, (..., columns of the part), in the order of the columns."""
        together = values[0] if len(values) == 1 else torch.cat(list(values), -1)
        return together if self.order == sorted(self.order) else together[..., self.order]

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return all(part.has_rsample for _, part in self.parts)

    @property
    def stand_in(self) -> Tensor:
        """A value inside the support of each column."""
        like = self.parts[0][1]
        device = getattr(like, "logits", getattr(like, "loc", None)).device  # type: ignore
        inside = [
            float(isinstance(part, dist.LogNormal)) for index, part in self.parts for _ in index
        ]
        return torch.tensor(inside, device=device)[self.order]

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> Any:
        return EntrySupport(self)

    @property
    def mean(self) -> Tensor:
        """The means of numbers, and NaN for categories and circular numbers, which have none."""
        return self.gathered([part.mean for _, part in self.parts])

    @property
    def mode(self) -> Tensor:
        """The modes of categories and circular numbers, and the means of numbers."""
        return self.gathered(
            [part.mode if isinstance(part, WITHOUT_MEAN) else part.mean for _, part in self.parts]
        )

    @property
    def variance(self) -> Tensor:
        """The variances of numbers, and NaN for those without a mean."""
        return self.gathered(
            [
                torch.full_like(part.mean, torch.nan)
                if isinstance(part, WITHOUT_MEAN)
                else part.variance
                for _, part in self.parts
            ]
        )

    @property
    def period(self) -> Tensor:
        """The period of each circular column, and 0 for other columns, (columns,)."""
        found = [
            part.period if isinstance(part, Circular) else torch.zeros(len(index))
            for index, part in self.parts
        ]
        device = found[0].device
        return self.gathered([one.to(device) for one in found])

    def wrapped(self, value: Tensor) -> Tensor:
        """The same values, those of circular columns within the period that is drawn."""
        found = [
            part.wrapped(value[..., index]) if isinstance(part, Circular) else value[..., index]
            for index, part in self.parts
        ]
        return self.gathered(found)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "ByColumn":
        front = tuple(batch_shape)[:-1]
        return ByColumn([(i, part.expand((*front, len(i)))) for i, part in self.parts])

    def log_prob(self, value: Tensor) -> Tensor:
        return self.gathered([part.log_prob(value[..., index]) for index, part in self.parts])

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape)
        drawn = [part.sample(shape) for _, part in self.parts]
        real = next((one.dtype for one in drawn if one.is_floating_point()), None)
        real = real or torch.get_default_dtype()
        return self.gathered([one.to(real) for one in drawn])

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape)
        return self.gathered([part.rsample(shape) for _, part in self.parts])

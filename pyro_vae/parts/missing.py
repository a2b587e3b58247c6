"""Missing entries: NaN in the data marks an entry that is not observed, under any likelihood."""

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.errors import UsageError
from pyro_vae.parts.factors import Family, made
from pyro_vae.parts.networks import Shape


class OrMissing(constraints.Constraint):
    """A support, and NaN, which marks a missing entry."""

    def __init__(self, base_constraint: Any) -> None:
        self.base_constraint = base_constraint
        super().__init__()

    @property
    def is_discrete(self) -> bool:  # type: ignore[override]
        return bool(self.base_constraint.is_discrete)

    @property
    def event_dim(self) -> int:  # type: ignore[override]
        return int(self.base_constraint.event_dim)

    def check(self, value: Tensor) -> Tensor:
        return self.base_constraint.check(value) | value.isnan()


class PartlyObserved(dist.TorchDistribution):
    r"""Independent entries, of which those that are NaN are not observed: their density is 1.

    Arguments:
        base_dist: a distribution whose batch shape contains the entries. Its property ``stand_in``,
            if it has one, is a value inside its support that replaces NaN; the default is 0.

    NaN never reaches the density, so it never reaches a gradient. Draws are complete.

    >>> fn = PartlyObserved(dist.Normal(torch.zeros(2), 1.0))
    >>> fn.log_prob(torch.tensor([0.0, torch.nan]))
    tensor([-0.9189,  0.0000])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, base_dist: Any) -> None:
        self.base_dist = base_dist
        super().__init__(base_dist.batch_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return bool(self.base_dist.has_rsample)

    @constraints.dependent_property
    def support(self) -> Any:
        return OrMissing(self.base_dist.support)

    @property
    def mean(self) -> Tensor:
        return self.base_dist.mean

    @property
    def mode(self) -> Tensor:
        return self.base_dist.mode

    @property
    def variance(self) -> Tensor:
        return self.base_dist.variance

    def expand(self, batch_shape: Any, _instance: Any = None) -> "PartlyObserved":
        return PartlyObserved(self.base_dist.expand(torch.Size(batch_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        missing = value.isnan()
        stand_in = getattr(self.base_dist, "stand_in", 0.0)
        density = self.base_dist.log_prob(torch.where(missing, stand_in, value))
        return torch.where(missing, 0.0, density)

    def elements(self, value: Tensor) -> Tensor:
        """1 for each entry that is observed, and so counts in the density."""
        return (~value.isnan()).to(value.dtype)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.base_dist.sample(torch.Size(sample_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.base_dist.rsample(torch.Size(sample_shape))


class SeenAndMask(nn.Module):
    """The view of partly observed data: the values, with 0 for NaN, and 1 where they are observed.

    Arguments:
        inner: the view of the likelihood itself, or None.

    The mask is concatenated on the first dimension of a datum.

    >>> SeenAndMask(None, 1)(torch.tensor([2.0, torch.nan]))
    tensor([2., 0., 1., 0.])
    """

    def __init__(self, inner: nn.Module | None, dims: int) -> None:
        super().__init__()
        self.inner, self.dims = inner, dims

    def forward(self, x: Tensor) -> Tensor:
        seen = ~x.isnan()
        values = torch.where(seen, x, 0.0)
        if self.inner is not None:
            values = self.inner(values)
        if values.shape == seen.shape:
            values = torch.where(seen, values, 0.0)  # also where the inner view moves 0
        return torch.cat([values, seen.to(values.dtype)], -self.dims)


class Missing(Family):
    r"""A likelihood of data with missing entries: the sum over observed entries only.

    :math:`p(x_{obs}|z) = \prod_{d\,\text{observed}} p(x_d|z)`, where NaN marks entries that are not
    observed. The encoder sees the values, with 0 for NaN, and the mask.

    Arguments:
        likelihood: the family of each entry, or its class. Its entries must be independent given
            the latents. `pyro_vae.Columns` needs no such wrapper.

    With `pyro_vae.ImportanceWeightedELBO` this is MIWAE (Mattei & Frellsen, 2019,
    https://arxiv.org/abs/1812.02633). Data without NaN have exactly the bound of ``likelihood``.
    `pyro_vae.impute` draws the missing entries.

    >>> import torch, pyro_vae as pv
    >>> vae = pv.VAE.mlp((4,), latent_dim=2, likelihood=pv.Missing(pv.Gaussian))
    >>> x = torch.tensor([[0.5, torch.nan, 1.0, torch.nan]])
    >>> pv.encode(vae, x)["z"].shape
    torch.Size([1, 2])
    """

    def __init__(self, likelihood: Family | type[Family]) -> None:
        super().__init__()
        self.likelihood = made(likelihood)

    @property
    def context(self) -> int:  # type: ignore[override]
        return self.likelihood.context

    def view(self, shape: Shape) -> nn.Module | None:
        return SeenAndMask(self.likelihood.view(shape), len(shape))

    def outputs(self, shape: Shape) -> int:
        return self.likelihood.outputs(shape)

    def forward(self, raw: Tensor, shape: Shape, *context: Tensor) -> dist.TorchDistribution:
        fn = self.likelihood(raw, shape, *context)
        if not isinstance(fn, torch.distributions.Independent):
            raise UsageError(
                f"{type(self.likelihood).__name__} does not have independent entries, so a part of "
                "them cannot be observed alone"
            )
        return PartlyObserved(fn.base_dist).to_event(len(shape))

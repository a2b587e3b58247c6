"""Distributions that torch and Pyro do not have, or compute with too few digits."""

from math import log, pi
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints


class TruncatedExponential(dist.TorchDistribution):
    r"""The continuous Bernoulli with logits l, :math:`p(x) = e^{lx}\,l / (e^l - 1)` on [0, 1].

    torch's ``ContinuousBernoulli`` clamps probabilities but not logits. For large logits (from
    about 15 in float32), it does not integrate to one.

    >>> TruncatedExponential(torch.tensor(1000.0)).log_prob(torch.tensor(1.0))  # log 1000
    tensor(6.907...)
    """

    arg_constraints: ClassVar = {"logits": constraints.real}
    support = constraints.unit_interval
    has_rsample = False

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        super().__init__(logits.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "TruncatedExponential":
        return TruncatedExponential(self.logits.expand(batch_shape))

    @property
    def mean(self) -> Tensor:
        small = self.logits.abs() < 0.2
        logits = torch.where(small, 1.0, self.logits)
        exact = -1 / torch.expm1(-logits) - 1 / logits
        near = 0.5 + self.logits / 12 - self.logits**3 / 720 + self.logits**5 / 30240
        return torch.where(small, near, exact)

    def log_prob(self, value: Tensor) -> Tensor:
        # log((e^l - 1) / l) = l/2 + log(sinh(l/2) / (l/2)); the second term is even in l.
        half = self.logits / 2
        small = half.abs() < 0.1
        size = torch.where(small, 1.0, half.abs())
        exact = size + torch.log1p(-torch.exp(-2 * size)) - torch.log(2 * size)
        near = half**2 / 6 - half**4 / 180 + half**6 / 2835
        return self.logits * value - half - torch.where(small, near, exact)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            uniform = torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device)
            size = self.logits.abs().clamp(min=1e-4)
            upper = 1 + torch.log(uniform + (1 - uniform) * torch.exp(-size)) / size
            upper = upper.clamp(0, 1)
            return torch.where(self.logits < 0, 1 - upper, upper)


class _Levels(constraints.Constraint):
    """The grid {0, 1/(levels - 1), ..., 1}."""

    is_discrete = True

    def __init__(self, levels: int) -> None:
        self.levels = levels

    def check(self, value: Tensor) -> Tensor:
        index = value * (self.levels - 1)
        return (value >= 0) & (value <= 1) & ((index - index.round()).abs() < 1e-2)

    def __repr__(self) -> str:
        return f"Levels(k/{self.levels - 1} for k = 0 ... {self.levels - 1})"


class _LevelDistribution(dist.TorchDistribution):
    """A distribution over the grid of levels."""

    has_rsample = False
    levels: int

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        return _Levels(self.levels)


class LevelCategorical(_LevelDistribution):
    """A categorical distribution over the values k/(levels - 1), for k = 0 to levels - 1.

    Arguments:
        logits: unnormalized log probabilities of shape ``(..., levels)``.
        whole: whether the values are the integers k instead.
    """

    arg_constraints: ClassVar = {"logits": constraints.independent(constraints.real, 1)}

    def __init__(self, logits: Tensor, whole: bool = False) -> None:
        self.logits, self.whole = logits, whole
        self.levels = logits.shape[-1]
        self.greatest = self.levels - 1 if whole else 1
        super().__init__(logits.shape[:-1], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "LevelCategorical":
        return LevelCategorical(self.logits.expand(*batch_shape, self.levels), self.whole)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        whole = constraints.integer_interval(0, self.levels - 1)
        return whole if self.whole else _Levels(self.levels)

    @property
    def mean(self) -> Tensor:
        """The mean of levels; NaN for integers k, which are class names, as in torch."""
        if self.whole:
            return torch.full_like(self.logits[..., 0], torch.nan)
        grid = torch.arange(self.levels, dtype=self.logits.dtype, device=self.logits.device)
        return (self.logits.softmax(-1) * grid).sum(-1) / (self.levels - 1)

    @property
    def mode(self) -> Tensor:
        index = self.logits.argmax(-1)
        return index.to(self.logits.dtype) / ((self.levels - 1) / self.greatest)

    def log_prob(self, value: Tensor) -> Tensor:
        index = (value * ((self.levels - 1) / self.greatest)).round().long()
        inside = (index >= 0) & (index < self.levels)
        index = index.clamp(0, self.levels - 1).unsqueeze(-1)
        logits, index = torch.broadcast_tensors(self.logits, index)
        found = logits.log_softmax(-1).gather(-1, index[..., :1]).squeeze(-1)
        return torch.where(inside, found, -torch.inf)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            index = torch.distributions.Categorical(logits=self.logits, validate_args=False).sample(
                sample_shape
            )
        return index.to(self.logits.dtype) / ((self.levels - 1) / self.greatest)


class LevelLogistic(_LevelDistribution):
    """A logistic distribution cut into bins around the values k/(levels - 1).

    Arguments:
        loc, scale: location and scale of the logistic distribution, broadcast together.
        levels: the number of levels.
    """

    arg_constraints: ClassVar = {"loc": constraints.real, "scale": constraints.positive}

    def __init__(self, loc: Tensor, scale: Tensor, levels: int = 256) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "LevelLogistic":
        return LevelLogistic(
            self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.levels
        )

    @property
    def mean(self) -> Tensor:
        # E[k] is the sum over j >= 1 of P(k >= j).
        total = torch.zeros_like(self.loc)
        for k in range(1, self.levels):
            edge = (k - 0.5) / (self.levels - 1)
            total += torch.sigmoid((self.loc - edge) / self.scale)
        return total / (self.levels - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        # log(σ(b) - σ(a)) = log σ(b) + log σ(-a) + log(1 - exp(a - b)), without cancellation.
        half = 0.5 / (self.levels - 1)
        above = (value + half - self.loc) / self.scale
        below = (value - half - self.loc) / self.scale
        lower, upper = F.logsigmoid(above), F.logsigmoid(-below)
        inside = lower + upper + torch.log(-torch.expm1(-2 * half / self.scale))
        return torch.where(value < half, lower, torch.where(value > 1 - half, upper, inside))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            uniform = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
            uniform = uniform.clamp(1e-6, 1 - 1e-6)
            draw = self.loc + self.scale * torch.logit(uniform)
            return (draw * (self.levels - 1)).round().clamp(0, self.levels - 1) / (self.levels - 1)


class ExactPoisson(dist.Poisson):
    """Pyro's Poisson, with the log density computed in double precision.

    In single precision, for a count of a million, the terms of log p are rounded to whole nats.

    >>> ExactPoisson(torch.tensor(1e6)).log_prob(torch.tensor(1e6))  # -log(2 pi 1e6) / 2
    tensor(-7.8267)
    """

    def log_prob(self, value: Tensor) -> Tensor:
        exact = torch.distributions.Poisson(self.rate.double(), validate_args=False)
        return exact.log_prob(value.double()).to(self.rate.dtype)


class ExactNegativeBinomial(dist.NegativeBinomial):
    """Pyro's negative binomial, with the log density computed in double precision.

    See `ExactPoisson` for the reason.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        exact = torch.distributions.NegativeBinomial(
            self.total_count.double(), logits=self.logits.double(), validate_args=False
        )
        return exact.log_prob(value.double()).to(self.logits.dtype)


class CholeskyNormal(dist.MultivariateNormal):
    r"""A multivariate normal that keeps the noise of its last draw, :math:`z = \mu + L \epsilon`.

    The density of this draw is that of the noise, :math:`\log N(\epsilon; 0, I) - \sum_j \log
    L_{jj}`. torch solves for the noise instead. In float32 the solution of 20 coordinates has no
    correct digit if the diagonal of L is 0.05 and the rest is about 0.3.

    >>> L = torch.full((20, 20), 0.3).tril(-1) + 0.05 * torch.eye(20)
    >>> normal = CholeskyNormal(torch.zeros(20), scale_tril=L)
    >>> z = normal.rsample()
    >>> bool((normal.log_prob(z) + 0.5 * normal.noise.square().sum() - 41.5).abs() < 0.1)
    True
    """

    drawn: Tensor | None = None
    noise: Tensor

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        self.noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        self.drawn = self.loc + (self.scale_tril @ self.noise[..., None])[..., 0]
        return self.drawn

    def log_prob(self, value: Tensor) -> Tensor:
        if value is not self.drawn or not self._follows(value):
            return super().log_prob(value)
        diagonal = self.scale_tril.diagonal(dim1=-2, dim2=-1)
        constant = 0.5 * log(2 * pi) * self.noise.shape[-1]
        return -0.5 * self.noise.square().sum(-1) - diagonal.log().sum(-1) - constant

    def _follows(self, value: Tensor) -> bool:
        """Whether the draw moves with the parameters, so that the noise stays the same."""
        trained = self.loc.requires_grad or self.scale_tril.requires_grad
        return value.requires_grad or not trained or not torch.is_grad_enabled()

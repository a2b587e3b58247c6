"""Likelihood families: what a decoder's outputs say about the data.

Data meet a likelihood on the scale of its support: intensities in [0, 1] for images, whatever the
likelihood, so that 8-bit pixels k stand as k/255 for the discrete likelihoods too.
"""

from math import prod
from typing import Any, ClassVar, cast

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.errors import UsageError
from pyro_vae.factors import Family, bounded_scale, split, unbounded_scale
from pyro_vae.networks import Shape


class Bernoulli(Family):
    r"""Binary data, :math:`p(x|z) = \prod_d \sigma(l_d)^{x_d} (1 - \sigma(l_d))^{1 - x_d}`.

    The network gives the logits :math:`l`: one output for each element. Grey intensities are no
    binary data: the tools draw pixels from them (see `pyro_vae.data.Preparation`).

    >>> Bernoulli()(torch.zeros(2, 4), (4,)).log_prob(torch.ones(2, 4)) / 4
    tensor([-0.6931, -0.6931])
    """

    def outputs(self, shape: Shape) -> int:
        return prod(shape)

    def forward(self, raw: Tensor, shape: Shape) -> dist.TorchDistribution:
        (logits,) = split(raw, shape, 1)
        return dist.Bernoulli(logits=logits, validate_args=False).to_event(len(shape))


class ContinuousBernoulli(Family):
    r"""Intensities in [0, 1], :math:`p(x|z) \propto \prod_d \lambda_d^{x_d}(1-\lambda_d)^{1-x_d}`.

    The network gives the logits of :math:`\lambda`: one output for each element.
    Loaiza-Ganem & Cunningham, The continuous Bernoulli, 2019 (https://arxiv.org/abs/1907.06845).

    >>> ContinuousBernoulli()(torch.zeros(1, 1), (1,)).log_prob(torch.tensor([[0.3]]))
    tensor([0.])
    """

    def outputs(self, shape: Shape) -> int:
        return prod(shape)

    def forward(self, raw: Tensor, shape: Shape) -> dist.TorchDistribution:
        (logits,) = split(raw, shape, 1)
        return TruncatedExponential(logits).to_event(len(shape))


class Gaussian(Family):
    r"""Real data, :math:`p(x|z) = \prod_d N(x_d; \mu_d, s_d^2)`.

    Arguments:
        scale: the standard deviation :math:`s`, the same for every element; None lets the network
            predict one for each element, within ``bounds``.
        learned: whether that one scale is a parameter that starts at ``scale``.
        bounds: the least and greatest scale, learned or predicted.

    The network gives the means and, where ``scale`` is None, the unbounded scales after them.

    >>> Gaussian(scale=0.5)(torch.zeros(1, 2), (2,)).log_prob(torch.zeros(1, 2))
    tensor([-0.4516])
    """

    def __init__(
        self,
        scale: float | None = None,
        learned: bool = False,
        bounds: tuple[float, float] = (1e-3, 1e3),
    ) -> None:
        super().__init__()
        if learned and scale is None:
            scale = 1.0
        if scale is not None and not bounds[0] < scale < bounds[1]:
            raise UsageError(
                f"scale must be positive, between {bounds[0]} and {bounds[1]}, {scale} came"
            )
        self.scale, self.learned, self.bounds = scale, learned, tuple(bounds)
        if learned:
            self.raw_scale = nn.Parameter(torch.tensor(unbounded_scale(scale or 1.0, *bounds)))

    def outputs(self, shape: Shape) -> int:
        return prod(shape) * (2 if self.scale is None else 1)

    def forward(self, raw: Tensor, shape: Shape) -> dist.TorchDistribution:
        loc, *predicted = split(raw, shape, 2 if self.scale is None else 1)
        if self.learned:
            scale = bounded_scale(self.raw_scale, *self.bounds)
        elif predicted:
            scale = bounded_scale(predicted[0], *self.bounds)
        else:
            scale = torch.full_like(loc[..., :1], cast(float, self.scale))
        return dist.Normal(loc, scale, validate_args=False).to_event(len(shape))


class Categorical(Family):
    r"""Grey levels without order, :math:`p(x|z) = \prod_d \mathrm{softmax}(l_d)_{k_d}`.

    Arguments:
        levels: the number of levels; level k stands in the data as k/(levels - 1).

    The network gives the logits: ``levels`` outputs for each element.

    >>> Categorical(256)(torch.zeros(1, 256), (1,)).log_prob(torch.tensor([[1.0]])).exp() * 256
    tensor([1.])
    """

    def __init__(self, levels: int = 256) -> None:
        super().__init__()
        self.levels = levels

    def outputs(self, shape: Shape) -> int:
        return self.levels * prod(shape)

    def forward(self, raw: Tensor, shape: Shape) -> dist.TorchDistribution:
        logits = torch.stack(split(raw, shape, self.levels), -1)
        return LevelCategorical(logits).to_event(len(shape))


class DiscretizedLogistic(Family):
    r"""Ordered grey levels, a logistic distribution cut into bins.

    :math:`p(x|z) = \prod_d \sigma\big(\tfrac{x_d + h - \mu_d}{s_d}\big) -
    \sigma\big(\tfrac{x_d - h - \mu_d}{s_d}\big)`, with :math:`h` half the distance of two levels,
    and the outer bins open.

    Arguments:
        levels: the number of levels; level k stands in the data as k/(levels - 1).
        bounds: the least and greatest scale :math:`s`.

    The network gives the locations, then the unbounded scales: two outputs for each element.
    Kingma et al., Improved variational inference with inverse autoregressive flow, 2016
    (https://arxiv.org/abs/1606.04934).

    >>> family, grid = DiscretizedLogistic(4), torch.arange(4.0)[:, None] / 3
    >>> family(torch.zeros(4, 2), (1,)).log_prob(grid).exp().sum()
    tensor(1.)
    """

    def __init__(self, levels: int = 256, bounds: tuple[float, float] = (1e-3, 1e1)) -> None:
        super().__init__()
        self.levels, self.bounds = levels, tuple(bounds)

    def outputs(self, shape: Shape) -> int:
        return 2 * prod(shape)

    def forward(self, raw: Tensor, shape: Shape) -> dist.TorchDistribution:
        loc, scale = split(raw, shape, 2)
        # A network that says nothing yet is mid-grey, with a scale of a tenth of the range.
        scale = bounded_scale(scale + unbounded_scale(0.1, *self.bounds), *self.bounds)
        return LevelLogistic(loc + 0.5, scale, self.levels).to_event(len(shape))


class TruncatedExponential(dist.TorchDistribution):
    r"""The continuous Bernoulli by its logits, :math:`p(x) = e^{lx}\,l / (e^l - 1)` on [0, 1].

    torch's own ``ContinuousBernoulli`` clamps probabilities but not logits, and stops being a
    density where the logits are large: from about 15 in float32.

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
        # log((e^l - 1) / l) = l/2 + log(sinh(l/2) / (l/2)), whose second term is even in l.
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
    """A categorical distribution whose outcome k is the value k/(levels - 1).

    Arguments:
        logits: unnormalised log probabilities of shape ``(..., levels)``.
    """

    arg_constraints: ClassVar = {"logits": constraints.independent(constraints.real, 1)}

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.levels = logits.shape[-1]
        super().__init__(logits.shape[:-1], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "LevelCategorical":
        return LevelCategorical(self.logits.expand(*batch_shape, self.levels))

    @property
    def mean(self) -> Tensor:
        grid = torch.arange(self.levels, dtype=self.logits.dtype, device=self.logits.device)
        return (self.logits.softmax(-1) * grid).sum(-1) / (self.levels - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        index = (value * (self.levels - 1)).round().long()
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
        return index.to(self.logits.dtype) / (self.levels - 1)


class LevelLogistic(_LevelDistribution):
    """A logistic distribution cut into bins around the values k/(levels - 1).

    Arguments:
        loc, scale: of the logistic distribution, of one shape.
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
        # E[k] is the sum over k >= 1 of the probability of at least k.
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

"""Likelihood families: distributions of the data, given the outputs of a decoder.

The data are on the scale of the support of the likelihood. Images have intensities in [0, 1]: an
8-bit pixel k is k/255, also for the likelihoods of levels. Counts and tokens are integers.
"""

from math import prod
from typing import cast

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.errors import UsageError
from pyro_vae.parts.distributions import (
    ExactNegativeBinomial,
    ExactPoisson,
    LevelCategorical,
    LevelLogistic,
    TruncatedExponential,
)
from pyro_vae.parts.factors import Family, bounded_scale, split, unbounded_scale
from pyro_vae.parts.networks import Log1p, OneHot, Shape


class Bernoulli(Family):
    r"""Binary data, :math:`p(x|z) = \prod_d \sigma(l_d)^{x_d} (1 - \sigma(l_d))^{1 - x_d}`.

    The network outputs the logits :math:`l`: one output for each element. Gray intensities are not
    binary data; the tools draw binary pixels from them (see
    `pyro_vae.data.preparation.Preparation`).

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

    The network outputs the logits of :math:`\lambda`: one output for each element.
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
        scale: the standard deviation :math:`s`, the same for every element. With None, the network
            predicts one for each element, within ``bounds``.
        learned: whether the common scale is a parameter that starts at ``scale``.
        bounds: the smallest and the largest scale, learned or predicted.
        start: the scale where the network outputs 0, if it predicts the scale.

    The network outputs the means and, if ``scale`` is None, then the unbounded scales.

    Raises `UsageError` if ``scale`` or ``start`` is not between the ``bounds``.

    >>> Gaussian(scale=0.5)(torch.zeros(1, 2), (2,)).log_prob(torch.zeros(1, 2))
    tensor([-0.4516])
    """

    def __init__(
        self,
        scale: float | None = None,
        learned: bool = False,
        bounds: tuple[float, float] = (1e-3, 1e3),
        start: float = 1.0,
    ) -> None:
        super().__init__()
        if learned and scale is None:
            scale = 1.0
        for name, value in (("scale", scale), ("start", start)):
            if value is not None and not bounds[0] < value < bounds[1]:
                raise UsageError(
                    f"must be positive, between {bounds[0]} and {bounds[1]}, got {value}",
                    argument=name,
                )
        self.scale, self.learned, self.bounds = scale, learned, tuple(bounds)
        self.start = start
        if learned:
            self.raw_scale = nn.Parameter(torch.tensor(unbounded_scale(scale or 1.0, *bounds)))

    def outputs(self, shape: Shape) -> int:
        return prod(shape) * (2 if self.scale is None else 1)

    def forward(self, raw: Tensor, shape: Shape) -> dist.TorchDistribution:
        loc, *predicted = split(raw, shape, 2 if self.scale is None else 1)
        if self.learned:
            scale = bounded_scale(self.raw_scale, *self.bounds)
        elif predicted:
            offset = 0.0 if self.start == 1 else unbounded_scale(self.start, *self.bounds)
            scale = bounded_scale(predicted[0] + offset, *self.bounds)
        else:
            scale = torch.full_like(loc[..., :1], cast(float, self.scale))
        return dist.Normal(loc, scale, validate_args=False).to_event(len(shape))


class StudentT(Family):
    r"""Real data with outliers, :math:`p(x|z) = \prod_d t_\nu((x_d - \mu_d)/s_d)/s_d`.

    Arguments:
        degrees_of_freedom: :math:`\nu`, the same for every element. With None, the network predicts
            one for each element. It must be between 1.01 and 1001, so that the mean exists.
        learned: whether the common :math:`\nu` is a parameter that starts at
            ``degrees_of_freedom``, by default at 4.
        bounds: the smallest and the largest scale :math:`s`, which the network predicts.

    The network outputs the locations, the unbounded scales and, if ``degrees_of_freedom`` is None,
    the unbounded :math:`\nu`. A predicted :math:`\nu` starts near 4. A learned or predicted
    :math:`\nu` stays between 1.01 and 1001. For large :math:`\nu` the family approaches `Gaussian`.

    Raises `UsageError` if ``degrees_of_freedom`` is out of range.

    >>> StudentT(3.0)(torch.zeros(1, 2), (1,)).log_prob(torch.zeros(1, 1))
    tensor([-1.0009])
    """

    def __init__(
        self,
        degrees_of_freedom: float | None = None,
        learned: bool = False,
        bounds: tuple[float, float] = (1e-3, 1e3),
    ) -> None:
        super().__init__()
        if learned and degrees_of_freedom is None:
            degrees_of_freedom = 4.0
        if degrees_of_freedom is not None and not 1.01 < degrees_of_freedom < 1001:
            raise UsageError(
                f"must be between 1.01 and 1001, got {degrees_of_freedom}",
                argument="degrees_of_freedom",
            )
        self.degrees_of_freedom, self.learned = degrees_of_freedom, learned
        self.bounds = tuple(bounds)
        if learned:
            excess = cast(float, degrees_of_freedom) - 1
            self.raw_excess = nn.Parameter(torch.tensor(unbounded_scale(excess, 1e-2, 1e3)))

    def outputs(self, shape: Shape) -> int:
        return prod(shape) * (3 if self.degrees_of_freedom is None else 2)

    def forward(self, raw: Tensor, shape: Shape) -> dist.TorchDistribution:
        pieces = 3 if self.degrees_of_freedom is None else 2
        loc, scale, *predicted = split(raw, shape, pieces)
        if self.learned:
            freedom = 1 + bounded_scale(self.raw_excess, 1e-2, 1e3)
        elif predicted:
            start = unbounded_scale(3.0, 1e-2, 1e3)
            freedom = 1 + bounded_scale(predicted[0] + start, 1e-2, 1e3)
        else:
            freedom = torch.full_like(loc[..., :1], cast(float, self.degrees_of_freedom))
        scale = bounded_scale(scale, *self.bounds)
        return dist.StudentT(freedom, loc, scale, validate_args=False).to_event(len(shape))


class Categorical(Family):
    r"""Unordered levels or tokens, :math:`p(x|z) = \prod_d \mathrm{softmax}(l_d)_{k_d}`.

    Arguments:
        levels: the number of levels; the data hold level k as k/(levels - 1).
        tokens: whether the data hold k itself, as for words and categories. The encoder then sees
            the one-hot code of each element.

    The network outputs the logits: ``levels`` outputs for each element.

    >>> Categorical(256)(torch.zeros(1, 256), (1,)).log_prob(torch.tensor([[1.0]])).exp() * 256
    tensor([1.])
    >>> Categorical(4, tokens=True)(torch.zeros(1, 8), (2,)).log_prob(torch.tensor([[0, 3]])).exp()
    tensor([0.0625])
    """

    def __init__(self, levels: int = 256, tokens: bool = False) -> None:
        super().__init__()
        self.levels, self.tokens = levels, tokens

    def outputs(self, shape: Shape) -> int:
        return self.levels * prod(shape)

    def view(self, shape: Shape) -> nn.Module | None:
        return OneHot(self.levels, len(shape)) if self.tokens else None

    def forward(self, raw: Tensor, shape: Shape) -> dist.TorchDistribution:
        logits = torch.stack(split(raw, shape, self.levels), -1)
        return LevelCategorical(logits, self.tokens).to_event(len(shape))


class DiscretizedLogistic(Family):
    r"""Ordered gray levels: a logistic distribution, or a mixture of them, discretized into bins.

    :math:`p(x|z) = \prod_d \sum_j \pi_{dj} \big[\sigma\big(\tfrac{x_d + h - \mu_{dj}}{s_{dj}}\big)
    - \sigma\big(\tfrac{x_d - h - \mu_{dj}}{s_{dj}}\big)\big]`, where :math:`h` is half the distance
    between two levels. The first and the last bin extend to infinity.

    Arguments:
        levels: the number of levels; the data hold level k as k/(levels - 1).
        bounds: the smallest and the largest scale :math:`s`.
        components: the number of logistics in the mixture, at least 1. All elements are independent
            given the latents, including the channels of a pixel.

    The network outputs the locations, then the unbounded scales: two outputs for each element. For
    a mixture it outputs the logits of :math:`\pi`, the locations and the unbounded scales:
    ``3 * components`` outputs for each element. Raises `UsageError` if ``components`` is below 1.
    Kingma et al., Improved variational inference with inverse autoregressive flow, 2016
    (https://arxiv.org/abs/1606.04934); Salimans et al., PixelCNN++, 2017
    (https://arxiv.org/abs/1701.05517), without its dependence between channels.

    >>> family, grid = DiscretizedLogistic(4), torch.arange(4.0)[:, None] / 3
    >>> family(torch.zeros(4, 2), (1,)).log_prob(grid).exp().sum()
    tensor(1.)
    """

    def __init__(
        self,
        levels: int = 256,
        bounds: tuple[float, float] = (1e-3, 1e1),
        components: int = 1,
    ) -> None:
        super().__init__()
        if components < 1:
            raise UsageError(f"must be at least 1, got {components}", argument="components")
        self.levels, self.bounds, self.components = levels, tuple(bounds), components

    def outputs(self, shape: Shape) -> int:
        return prod(shape) * (2 if self.components == 1 else 3 * self.components)

    def forward(self, raw: Tensor, shape: Shape) -> dist.TorchDistribution:
        if self.components == 1:
            loc, scale = split(raw, shape, 2)
            return self._logistic(loc, scale, 0.5).to_event(len(shape))
        pieces = torch.stack(split(raw, shape, 3 * self.components), -1)
        logits, loc, scale = pieces.chunk(3, -1)
        # If the network outputs 0, the components are spread evenly over the range.
        start = (torch.arange(self.components, device=raw.device) + 0.5) / self.components
        mixed = dist.MixtureSameFamily(
            dist.Categorical(logits=logits, validate_args=False),
            self._logistic(loc, scale, start.to(raw.dtype)),
            validate_args=False,
        )
        return mixed.to_event(len(shape))

    def _logistic(self, loc: Tensor, scale: Tensor, start: Tensor | float) -> LevelLogistic:
        # If the network outputs 0, the location is mid-gray and the scale a tenth of the range.
        scale = bounded_scale(scale + unbounded_scale(0.1, *self.bounds), *self.bounds)
        return LevelLogistic(loc + start, scale, self.levels)


class _Counts(Family):
    """Families of counts that are given by their means; see `Poisson`."""

    def __init__(self, library_size: bool, bounds: tuple[float, float]) -> None:
        super().__init__()
        self.library_size, self.bounds = library_size, tuple(bounds)
        self.context = 1 if library_size else 0

    def view(self, shape: Shape) -> nn.Module | None:
        return Log1p()

    def _mean(self, raw: Tensor, shape: Shape, context: tuple[Tensor, ...]) -> Tensor:
        if not self.library_size:
            return bounded_scale(raw, *self.bounds)
        (log_library,) = context
        library = log_library.exp().reshape(*log_library.shape[:-1], *(1 for _ in shape))
        shares = raw.flatten(-len(shape)).softmax(-1).reshape(raw.shape)
        return library * shares + TINY


TINY = 1e-8
"""Added to means that are shares of a library size, so that they are positive."""


class Poisson(_Counts):
    r"""Counts, :math:`p(x|z) = \prod_d e^{-m_d}\,m_d^{x_d} / x_d!`.

    Arguments:
        library_size: whether the means are shares of a library size, :math:`m = \ell\,
            \mathrm{softmax}(f)`. The last context tensor of the factor, of shape (n, 1), is then
            :math:`\log \ell`. For single cells or documents, :math:`\ell` is the total of the row.
            The decoder's network does not see it.
        bounds: the smallest and the largest mean without a library size; :math:`m` is about
            :math:`e^f` near 1 (see `pyro_vae.parts.factors.bounded_scale`).

    The network outputs one number :math:`f` for each element. The encoder sees log(1 + x). Counts
    may be floats or integers of any type, and are not rescaled.

    >>> Poisson()(torch.zeros(1, 1), (1,)).log_prob(torch.tensor([[0.0]]))
    tensor([-1.0000])
    >>> log_library = torch.tensor([[30.0]]).log()
    >>> Poisson(library_size=True)(torch.zeros(1, 3), (3,), log_library).mean
    tensor([[10.0000, 10.0000, 10.0000]])
    """

    def __init__(
        self, library_size: bool = False, bounds: tuple[float, float] = (1e-6, 1e8)
    ) -> None:
        super().__init__(library_size, bounds)

    def outputs(self, shape: Shape) -> int:
        return prod(shape)

    def forward(self, raw: Tensor, shape: Shape, *context: Tensor) -> dist.TorchDistribution:
        (raw_mean,) = split(raw, shape, 1)
        mean = self._mean(raw_mean, shape, context)
        return ExactPoisson(mean, validate_args=False).to_event(len(shape))


class NegativeBinomial(_Counts):
    r"""Overdispersed counts: their variance :math:`m_d + m_d^2 / r_d` is larger than a Poisson's.

    :math:`p(x|z) = \prod_d \tfrac{\Gamma(x_d + r_d)}{\Gamma(r_d)\,x_d!}
    \big(\tfrac{r_d}{r_d + m_d}\big)^{r_d} \big(\tfrac{m_d}{r_d + m_d}\big)^{x_d}`

    Arguments:
        zero_inflated: whether an element is 0 with an additional probability :math:`g_d`, and
            follows the distribution above otherwise.
        library_size, bounds: as in `Poisson`.
        dispersion_bounds: the smallest and the largest inverse dispersion :math:`r`.

    The network outputs the unbounded means (:math:`f` in `Poisson`), the unbounded inverse
    dispersions and, with ``zero_inflated``, the logits of :math:`g`: two or three outputs for each
    element. The encoder sees log(1 + x).
    Lopez et al., Deep generative modeling for single-cell transcriptomics, 2018
    (https://doi.org/10.1038/s41592-018-0229-2).

    >>> NegativeBinomial()(torch.zeros(1, 2), (1,)).log_prob(torch.tensor([[0.0]]))  # log 1/2
    tensor([-0.6931])
    """

    def __init__(
        self,
        zero_inflated: bool = False,
        library_size: bool = False,
        bounds: tuple[float, float] = (1e-6, 1e8),
        dispersion_bounds: tuple[float, float] = (1e-4, 1e4),
    ) -> None:
        super().__init__(library_size, bounds)
        self.zero_inflated, self.dispersion_bounds = zero_inflated, tuple(dispersion_bounds)

    def outputs(self, shape: Shape) -> int:
        return prod(shape) * (3 if self.zero_inflated else 2)

    def forward(self, raw: Tensor, shape: Shape, *context: Tensor) -> dist.TorchDistribution:
        raw_mean, dispersion, *gate = split(raw, shape, 3 if self.zero_inflated else 2)
        mean = self._mean(raw_mean, shape, context)
        inverse = bounded_scale(dispersion, *self.dispersion_bounds)
        counts: dist.TorchDistribution = ExactNegativeBinomial(
            inverse, logits=mean.log() - inverse.log(), validate_args=False
        )
        if gate:
            counts = dist.ZeroInflatedDistribution(counts, gate_logits=gate[0], validate_args=False)
        return counts.to_event(len(shape))

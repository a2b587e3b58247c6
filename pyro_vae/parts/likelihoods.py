"""Likelihood families: what a decoder's outputs say about the data.

Data meet a likelihood on the scale of its support: intensities in [0, 1] for images, so that 8-bit
pixels k stand as k/255 for the likelihoods of levels too; counts and tokens as whole numbers.
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

    The network gives the logits :math:`l`: one output for each element. Grey intensities are no
    binary data: the tools draw pixels from them (see `pyro_vae.data.preparation.Preparation`).

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


class StudentT(Family):
    r"""Real data with outliers, :math:`p(x|z) = \prod_d t_\nu((x_d - \mu_d)/s_d)/s_d`.

    Arguments:
        degrees_of_freedom: :math:`\nu`, the same for every element; None lets the network predict
            one for each element. More than 1, so that there is a mean.
        learned: whether that one number is a parameter that starts at ``degrees_of_freedom``.
        bounds: the least and greatest scale :math:`s`, which the network predicts.

    The network gives the locations, the unbounded scales and, where ``degrees_of_freedom`` is
    None, what :math:`\nu` is made of. Learned or predicted, it starts near 4 and stays between
    1.01 and 1001. As :math:`\nu` grows the family becomes `Gaussian`.

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
                f"degrees_of_freedom must be between 1.01 and 1001, {degrees_of_freedom} came"
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
    r"""Levels or tokens without order, :math:`p(x|z) = \prod_d \mathrm{softmax}(l_d)_{k_d}`.

    Arguments:
        levels: the number of levels; level k stands in the data as k/(levels - 1).
        tokens: whether k stands in the data as k itself, as words and categories do. The encoder
            then sees each element as a row of zeros with a one at k.

    The network gives the logits: ``levels`` outputs for each element.

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
    r"""Ordered grey levels, a logistic distribution, or a mixture of them, cut into bins.

    :math:`p(x|z) = \prod_d \sum_j \pi_{dj} \big[\sigma\big(\tfrac{x_d + h - \mu_{dj}}{s_{dj}}\big)
    - \sigma\big(\tfrac{x_d - h - \mu_{dj}}{s_{dj}}\big)\big]`, with :math:`h` half the distance of
    two levels, and the outer bins open.

    Arguments:
        levels: the number of levels; level k stands in the data as k/(levels - 1).
        bounds: the least and greatest scale :math:`s`.
        components: how many logistics are mixed; elements, the channels of a pixel too, are
            independent given the latents.

    The network gives the locations, then the unbounded scales: two outputs for each element. For
    a mixture it gives the logits of :math:`\pi`, the locations and the unbounded scales:
    ``3 * components`` outputs for each element. Kingma et al., Improved variational inference
    with inverse autoregressive flow, 2016 (https://arxiv.org/abs/1606.04934); Salimans et al.,
    PixelCNN++, 2017 (https://arxiv.org/abs/1701.05517), without its dependence of channels.

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
            raise UsageError(f"components must be 1 or more, {components} came")
        self.levels, self.bounds, self.components = levels, tuple(bounds), components

    def outputs(self, shape: Shape) -> int:
        return prod(shape) * (2 if self.components == 1 else 3 * self.components)

    def forward(self, raw: Tensor, shape: Shape) -> dist.TorchDistribution:
        if self.components == 1:
            loc, scale = split(raw, shape, 2)
            return self._logistic(loc, scale, 0.5).to_event(len(shape))
        pieces = torch.stack(split(raw, shape, 3 * self.components), -1)
        logits, loc, scale = pieces.chunk(3, -1)
        # Of a network that says nothing yet the components share the range.
        start = (torch.arange(self.components, device=raw.device) + 0.5) / self.components
        mixed = dist.MixtureSameFamily(
            dist.Categorical(logits=logits, validate_args=False),
            self._logistic(loc, scale, start.to(raw.dtype)),
            validate_args=False,
        )
        return mixed.to_event(len(shape))

    def _logistic(self, loc: Tensor, scale: Tensor, start: Tensor | float) -> LevelLogistic:
        # A network that says nothing yet is mid-grey, with a scale of a tenth of the range.
        scale = bounded_scale(scale + unbounded_scale(0.1, *self.bounds), *self.bounds)
        return LevelLogistic(loc + start, scale, self.levels)


class _Counts(Family):
    """Families of counts by their means; see `Poisson`."""

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
"""Added to means that are shares of a library size, so that none is 0."""


class Poisson(_Counts):
    r"""Counts, :math:`p(x|z) = \prod_d e^{-m_d}\,m_d^{x_d} / x_d!`.

    Arguments:
        library_size: whether the means are shares of a library size, :math:`m = \ell\,
            \mathrm{softmax}(f)`. The factor's last context tensor, of shape (n, 1), is then
            :math:`\log \ell`; for single cells, documents and the like :math:`\ell` is the total of
            the row. The decoder's network does not see it.
        bounds: the least and greatest mean without a library size, :math:`m` being about
            :math:`e^f` near 1 (see `pyro_vae.parts.factors.bounded_scale`).

    The network gives one output :math:`f` for each element. The encoder sees log(1 + x). Counts
    may come as floats or integers of any type, and are taken as they are.

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
    r"""Counts that scatter more than a Poisson's: variance :math:`m_d + m_d^2 / r_d`.

    :math:`p(x|z) = \prod_d \tfrac{\Gamma(x_d + r_d)}{\Gamma(r_d)\,x_d!}
    \big(\tfrac{r_d}{r_d + m_d}\big)^{r_d} \big(\tfrac{m_d}{r_d + m_d}\big)^{x_d}`

    Arguments:
        zero_inflated: whether an element is 0 with a probability :math:`g_d` of its own, and
            drawn as above otherwise.
        library_size, bounds: of the means, as those of `Poisson`.
        dispersion_bounds: the least and greatest inverse dispersion :math:`r`.

    The network gives what the means are made of, the unbounded inverse dispersions and, where
    ``zero_inflated``, the logits of :math:`g`: two or three outputs for each element. The encoder
    sees log(1 + x). Lopez et al., Deep generative modeling for single-cell transcriptomics, 2018
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

"""Factors: modules with a network and a family, whose forward returns a distribution."""

from collections.abc import Callable
from math import log, prod

import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae.errors import UsageError
from pyro_vae.parts.networks import Shape, Viewed


class Family(PyroModule):
    """Turns the outputs of a network into a distribution; likelihoods and posteriors are families.

    Your own family needs ``outputs`` and ``forward``, and then works like the families of the
    library. If the family itself uses context, as counts use a library size, set ``context`` to the
    number of these tensors. The factor then passes its last ``context`` inputs to ``forward``,
    after the shape, and not to the network.
    """

    context: int = 0

    def __init__(self) -> None:
        super().__init__()

    def view(self, shape: Shape) -> nn.Module | None:
        """A module that transforms the data before the encoder sees them, or None."""
        return None

    def outputs(self, shape: Shape) -> int:
        """The number of network outputs for one event of this shape."""
        raise NotImplementedError

    def forward(self, raw: Tensor, shape: Shape) -> TorchDistribution:
        """The distribution over events of this shape, given ``raw`` of shape (..., outputs)."""
        raise NotImplementedError


class Factor(PyroModule):
    r"""A conditional distribution :math:`p(\text{event} \mid \text{inputs})`: network and family.

    Arguments:
        network: maps the inputs to a tensor of shape ``(..., family.outputs(shape))``.
        family: turns the network's outputs into a distribution.
        shape: the shape of one event, such as ``(latent_dim,)`` or ``(channels, height, width)``.

    A call with inputs returns a Pyro distribution with event shape ``shape``. Under autocast, the
    network runs in bfloat16 and the distribution in at least float32.

    Raises `UsageError` if the width of the network's output is not the width that the family needs.

    >>> import torch, pyro_vae as pv
    >>> decoder = pv.Factor(pv.MLP(20, (400,), 784), pv.Bernoulli(), (1, 28, 28))
    >>> decoder(torch.zeros(5, 20)).event_shape
    torch.Size([1, 28, 28])
    """

    def __init__(self, network: nn.Module, family: Family, shape: Shape) -> None:
        super().__init__()
        self.network, self.family, self.shape = network, family, tuple(shape)

    def forward(self, *inputs: Tensor) -> TorchDistribution:
        seen = len(inputs) - self.family.context
        raw = self.network(*inputs[:seen])
        if raw.shape[-1] != self.family.outputs(self.shape):
            raise UsageError(
                f"{type(self.family).__name__} over events of shape {self.shape} needs "
                f"{self.family.outputs(self.shape)} network outputs, got {raw.shape[-1]}"
            )
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        return self.family(raw, self.shape, *inputs[seen:])


def made(family: Family | type[Family]) -> Family:
    """A family, given a family or its class; raises `UsageError` for anything else."""
    found = family() if isinstance(family, type) else family
    if not isinstance(found, Family):
        raise UsageError(
            "likelihoods and posteriors must be families such as pyro_vae.Bernoulli, got "
            f"{family!r}"
        )
    return found


def made_prior(prior: nn.Module | Callable[[int], nn.Module], latent_dim: int) -> nn.Module:
    """A prior, given a module or a function of latent_dim that returns one.

    Raises `UsageError` for anything else.
    """
    if isinstance(prior, nn.Module):
        return prior
    if not callable(prior):
        raise UsageError(
            "must be a module, or a class or function of latent_dim such as "
            f"pyro_vae.GaussianMixture or pyro_vae.FlowPrior, got {prior!r}; set a VampPrior "
            "afterwards: pair.prior = pyro_vae.VampPrior.of_data(pair.encoder, x)",
            argument="prior",
        )
    return prior(latent_dim)


def image_of(family: Family, shape: Shape) -> Shape:
    """The output shape of a convolutional decoder for images of this shape.

    The channels hold all outputs of the family for one pixel. Raises `UsageError` if the data are
    not images.
    """
    if len(shape) != 3:
        raise UsageError(
            f"a convolutional VAE needs data of shape (channels, height, width), got {shape}"
        )
    return (family.outputs(shape) // prod(shape[1:]), *shape[1:])


def viewed(make: Callable[[Shape], nn.Module], likelihood: Family, shape: Shape) -> nn.Module:
    """An encoder network for data of this shape, behind the view of the likelihood, if any."""
    view = likelihood.view(shape)
    if view is None:
        return make(shape)
    return Viewed(make(tuple(view(torch.zeros(shape)).shape)), view)


def split(raw: Tensor, shape: Shape, pieces: int) -> tuple[Tensor, ...]:
    """Split ``(..., pieces * prod(shape))`` into ``pieces`` tensors of shape ``(..., *shape)``."""
    if pieces == 1:  # unbind would cost a copy in the backward pass
        return (raw.reshape(*raw.shape[:-1], *shape),)
    return raw.reshape(*raw.shape[:-1], pieces, *shape).unbind(-1 - len(shape))


def bounded_scale(raw: Tensor, low: float, high: float) -> Tensor:
    r"""A scale between ``low`` and ``high``, for any output ``raw`` of a network.

    :math:`\log s = \log l + (\log h - \log l)\,\sigma(k\,r + c)`, with :math:`k, c` such that
    :math:`s = 1` and :math:`ds/dr = 1` at :math:`r = 0`. Near zero it is close to :math:`e^r`. Far
    from zero it approaches its bounds and does not overflow.

    >>> bounded_scale(torch.tensor([-1e9, 0.0, 1e9]), 1e-4, 10.0)
    tensor([1.0000e-04, 1.0000e+00, 1.0000e+01])
    """
    span, slope, offset = _curve(low, high)
    return torch.exp(log(low) + span * torch.sigmoid(slope * raw + offset))


def unbounded_scale(scale: float, low: float, high: float) -> float:
    """The inverse of `bounded_scale`: the number that it maps to this scale.

    >>> round(unbounded_scale(1.0, 1e-4, 10.0), 6)
    0.0
    """
    span, slope, offset = _curve(low, high)
    fraction = log(scale / low) / span
    return (log(fraction / (1 - fraction)) - offset) / slope


def _curve(low: float, high: float) -> tuple[float, float, float]:
    span, fraction = log(high / low), log(1 / low) / log(high / low)
    return span, 1 / (span * fraction * (1 - fraction)), log(fraction / (1 - fraction))

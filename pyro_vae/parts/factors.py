"""A factor is a module whose forward returns a distribution: a network, and a family over it."""

from collections.abc import Callable
from math import log, prod

import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae.errors import UsageError
from pyro_vae.parts.networks import Shape, Viewed


class Family(PyroModule):
    """What turns a network's outputs into a distribution; likelihoods and posteriors are families.

    A family of your own has ``outputs`` and ``forward``, and works wherever ours do. One that
    takes context itself, as counts do a library size, says by ``context`` how many tensors: the
    factor's last so many inputs go to ``forward`` after the shape, and not to the network.
    """

    context: int = 0

    def __init__(self) -> None:
        super().__init__()

    def view(self, shape: Shape) -> nn.Module | None:
        """What stands between data of this family and their encoder; None where nothing does."""
        return None

    def outputs(self, shape: Shape) -> int:
        """How many numbers the network must give for one event of this shape."""
        raise NotImplementedError

    def forward(self, raw: Tensor, shape: Shape) -> TorchDistribution:
        """The distribution over events of this shape, from ``raw`` of shape (..., outputs)."""
        raise NotImplementedError


class Factor(PyroModule):
    r"""A conditional distribution :math:`p(\text{event} \mid \text{inputs})`: family over network.

    Arguments:
        network: maps the inputs to a tensor of shape ``(..., family.outputs(shape))``.
        family: makes a distribution of those numbers.
        shape: the shape of one event, ``(latent_dim,)`` or ``(channels, height, width)``.

    Called with inputs it returns a Pyro distribution with event shape ``shape``. Under autocast
    the network runs in bfloat16, the distribution in at least float32.

    Raises `UsageError` where the network's output has another width than the family needs.

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
                f"{self.family.outputs(self.shape)} network outputs, {raw.shape[-1]} came"
            )
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        return self.family(raw, self.shape, *inputs[seen:])


def made(family: Family | type[Family]) -> Family:
    """A family from a family or its class; `UsageError` where it is neither."""
    found = family() if isinstance(family, type) else family
    if not isinstance(found, Family):
        raise UsageError(f"a family such as pyro_vae.Bernoulli is expected, {family!r} came")
    return found


def made_prior(prior: nn.Module | Callable[[int], nn.Module], latent_dim: int) -> nn.Module:
    """A prior from a prior, or from what makes one for this dimension; `UsageError` for others."""
    if isinstance(prior, nn.Module):
        return prior
    if not callable(prior):
        raise UsageError(
            "prior is a module, or what makes one for a latent_dim, such as "
            f"pyro_vae.GaussianMixture or pyro_vae.FlowPrior, {prior!r} came; a VampPrior is set "
            "afterwards: pair.prior = pyro_vae.VampPrior.of_data(pair.encoder, x)"
        )
    return prior(latent_dim)


def image_of(family: Family, shape: Shape) -> Shape:
    """The image that a convolutional decoder gives for data of this shape: channels of outputs."""
    if len(shape) != 3:
        raise UsageError(
            f"a convolutional VAE needs data of shape (channels, height, width), {shape} came"
        )
    return (family.outputs(shape) // prod(shape[1:]), *shape[1:])


def viewed(make: Callable[[Shape], nn.Module], likelihood: Family, shape: Shape) -> nn.Module:
    """An encoding network, made for what the likelihood lets it see of data of this shape."""
    view = likelihood.view(shape)
    if view is None:
        return make(shape)
    return Viewed(make(tuple(view(torch.zeros(shape)).shape)), view)


def split(raw: Tensor, shape: Shape, pieces: int) -> tuple[Tensor, ...]:
    """Cut ``(..., pieces * prod(shape))`` into as many tensors of shape ``(..., *shape)``."""
    if pieces == 1:  # a cut would cost a copy in the backward pass
        return (raw.reshape(*raw.shape[:-1], *shape),)
    return raw.reshape(*raw.shape[:-1], pieces, *shape).unbind(-1 - len(shape))


def bounded_scale(raw: Tensor, low: float, high: float) -> Tensor:
    r"""A scale that stays within bounds, whatever the network says.

    :math:`\log s = \log l + (\log h - \log l)\,\sigma(k\,r + c)`, with :math:`k, c` such that
    :math:`s = 1` and :math:`ds/dr = 1` at :math:`r = 0`: near zero it acts as :math:`e^r`, far
    away it levels off instead of overflowing.

    >>> bounded_scale(torch.tensor([-1e9, 0.0, 1e9]), 1e-4, 10.0)
    tensor([1.0000e-04, 1.0000e+00, 1.0000e+01])
    """
    span, slope, offset = _curve(low, high)
    return torch.exp(log(low) + span * torch.sigmoid(slope * raw + offset))


def unbounded_scale(scale: float, low: float, high: float) -> float:
    """The number that `bounded_scale` takes to this scale.

    >>> round(unbounded_scale(1.0, 1e-4, 10.0), 6)
    0.0
    """
    span, slope, offset = _curve(low, high)
    fraction = log(scale / low) / span
    return (log(fraction / (1 - fraction)) - offset) / slope


def _curve(low: float, high: float) -> tuple[float, float, float]:
    span, fraction = log(high / low), log(1 / low) / log(high / low)
    return span, 1 / (span * fraction * (1 - fraction)), log(fraction / (1 - fraction))

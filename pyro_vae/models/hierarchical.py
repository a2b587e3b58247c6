"""The hierarchical variational autoencoder: levels of latents, each given the levels above it."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae.errors import UsageError
from pyro_vae.parts.convolutions import ConvDecoder, ConvEncoder
from pyro_vae.parts.factors import Factor, Family, image_of, made, made_prior, viewed
from pyro_vae.parts.likelihoods import Bernoulli
from pyro_vae.parts.networks import MLP, Chain, Shape, require_sizes
from pyro_vae.parts.posteriors import DiagonalNormal, product
from pyro_vae.parts.priors import StandardNormal
from pyro_vae.training.bounds import FreeBitsELBO
from pyro_vae.training.schedules import LinearSchedule

Modules: Any = PyroModule[nn.ModuleList]
"""A module list that gives its items distinct Pyro names, so that parameters do not clash."""

Above: TypeAlias = Callable[..., TorchDistribution]
"""Returns p(z_l | latents above, context), given the level l, these latents, and the context."""


class HierarchicalVAE(PyroModule):
    r"""A hierarchical VAE: each datum has latents in any number of levels.

    :math:`z_L \sim p(z_L|c),\ z_l \sim p(z_l|z_{l+1..L}, c),\ x \sim p(x|z_{1..L}, c)`, with an
    amortized guide for all levels. The latent sites are z1 (next to the data) to zL.

    Arguments:
        inference: the guide, a `TopDown` or a `BottomUp`.
        decoder: a factor that returns p(x | z_1, ..., z_L, context).
        levels: factors that return p(z_l | z_{l+1}, ..., z_L, context), for l = 1 to L - 1.
        prior: a module that returns p(z_L | context).
        markov: whether the data and each level depend only on the level directly above.
        context_shapes: the shape of one row of each context tensor.

    Rezende, Mohamed & Wierstra, 2014; Sønderby et al., Ladder variational autoencoders, 2016
    (https://arxiv.org/abs/1602.02282).

    >>> import torch, pyro_vae as pv
    >>> vae = pv.HierarchicalVAE.mlp((1, 8, 8), latent_dim=(8, 4), hidden=(32,))
    >>> pv.encode(vae, torch.ones(5, 1, 8, 8))["z2"].shape
    torch.Size([5, 4])
    """

    def __init__(
        self,
        inference: "TopDown | BottomUp",
        decoder: Factor,
        levels: Sequence[Factor],
        prior: nn.Module,
        markov: bool = False,
        context_shapes: Sequence[Shape] = (),
    ) -> None:
        super().__init__()
        self.inference, self.decoder, self.prior, self.markov = inference, decoder, prior, markov
        self.levels = Modules(levels)
        self.context_shapes = tuple(map(tuple, context_shapes))

    def model(self, x: Tensor, *context: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z: list[Tensor] = []
            for level in range(len(self.levels) + 1, 0, -1):
                z.insert(0, pyro.sample(f"z{level}", self.above(level, z, *context)))
            pyro.sample("x", self.decoder(*self._seen(z), *context), obs=x)

    def guide(self, x: Tensor, *context: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            self.inference(self.above, x, *context)

    def above(self, level: int, z: Sequence[Tensor], *context: Tensor) -> TorchDistribution:
        """The model's distribution of the latents of a level, given the latents above."""
        factor = self.levels[level - 1] if z else self.prior
        return factor(*self._seen(z), *context)

    def _seen(self, z: Sequence[Tensor]) -> Sequence[Tensor]:
        return z[:1] if self.markov else z

    def template(self, n: int) -> tuple[Tensor, ...]:
        """A batch of n rows of the right shapes; the values have no meaning."""
        return tuple(torch.zeros(n, *shape) for shape in (self.decoder.shape, *self.context_shapes))

    def recipe(self, epochs: int) -> dict[str, Any]:
        """The defaults of `pyro_vae.fit` for this pair, which counteract posterior collapse.

        They are a KL warm-up over the first fifth of the epochs, and free bits of 0.02 nats for
        each unit.
        """
        return {"beta": LinearSchedule(epochs / 5), "objective": FreeBitsELBO(0.02)}

    @classmethod
    def mlp(
        cls,
        data_shape: Shape,
        latent_dim: Sequence[int] = (32, 16),
        hidden: Sequence[int] = (256, 128),
        likelihood: Family | type[Family] = Bernoulli,
        prior: nn.Module | Callable[[int], nn.Module] = StandardNormal,
        top_down: bool = True,
        markov: bool = False,
        normalize: bool = True,
        context_shapes: Sequence[Shape] = (),
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> "HierarchicalVAE":
        """A hierarchical VAE with multilayer perceptrons between all levels.

        Arguments:
            data_shape: the shape of one datum.
            latent_dim: the dimension of each level, from the data to the top.
            hidden: the widths of the hidden layers of each network, from the data to the top.
            likelihood: a family, or its class.
            prior: a module that returns p(z_L | context), or a class or function of its dimension
                that returns such a module.
            top_down: whether the guide is a `TopDown`; otherwise it is a `BottomUp`.
            markov: as in the class.
            normalize: whether hidden layers are normalized over their units (see `pyro_vae.MLP`).
            context_shapes: the shape of one row of each context tensor.
            activation: a class or function that returns the nonlinearity.

        Raises `UsageError` if ``latent_dim`` or ``hidden`` is empty or has a size below 1.
        """
        style: dict[str, Any] = {"activation": activation, "normalize": normalize}
        family = made(likelihood)
        _require_levels(data_shape, latent_dim, hidden)
        return cls._of(
            lambda inputs: MLP(inputs, hidden, None, **style),
            lambda inputs, outputs: MLP(inputs, tuple(hidden)[::-1], outputs, **style),
            *(tuple(data_shape), latent_dim, hidden, family, prior),
            *(top_down, markov, context_shapes, style),
        )

    @classmethod
    def conv(
        cls,
        data_shape: Shape,
        latent_dim: Sequence[int] = (32, 16),
        channels: Sequence[int] = (32, 64),
        hidden: Sequence[int] = (128,),
        likelihood: Family | type[Family] = Bernoulli,
        prior: nn.Module | Callable[[int], nn.Module] = StandardNormal,
        top_down: bool = True,
        markov: bool = False,
        normalize: bool = True,
        context_shapes: Sequence[Shape] = (),
        activation: Callable[[], nn.Module] = nn.ReLU,
        blocks: int = 0,
    ) -> "HierarchicalVAE":
        """A hierarchical VAE for images, with convolutions of stride 2 next to the images.

        Between the levels are multilayer perceptrons. The arguments ``channels`` and ``blocks`` are
        as in `VAE.conv`, and all others as in `HierarchicalVAE.mlp`.
        """
        style: dict[str, Any] = {"activation": activation, "normalize": normalize}
        family = made(likelihood)
        _require_levels(data_shape, latent_dim, hidden)
        image, up = image_of(family, tuple(data_shape)), tuple(channels)[::-1]
        return cls._of(
            lambda inputs: ConvEncoder(inputs, channels, hidden, None, activation, blocks),
            lambda inputs, _: ConvDecoder(
                inputs, tuple(hidden)[::-1], up, image, activation, blocks
            ),
            *(tuple(data_shape), latent_dim, hidden, family, prior),
            *(top_down, markov, context_shapes, style),
        )

    @classmethod
    def _of(
        cls,
        encode: Callable[[Sequence[int | Shape]], nn.Module],
        decode: Callable[[Sequence[int | Shape], int], nn.Module],
        data_shape: Shape,
        latent_dim: Sequence[int],
        hidden: Sequence[int],
        likelihood: Family,
        prior: nn.Module | Callable[[int], nn.Module],
        top_down: bool,
        markov: bool,
        context_shapes: Sequence[Shape],
        style: dict[str, Any],
    ) -> "HierarchicalVAE":
        """A hierarchical VAE, given functions that build the two networks next to the data.

        Arguments:
            encode: builds the encoder network from the shapes of its inputs.
            decode: builds the decoder network from the shapes of its inputs and its output width.
        """
        context = [tuple(shape) for shape in context_shapes]
        given = context[: len(context) - likelihood.context]
        first = viewed(lambda shape: encode([shape, *context]), likelihood, data_shape)
        seen: list[int | Shape] = [*(latent_dim[:1] if markov else latent_dim), *given]
        decoder = decode(seen, likelihood.outputs(data_shape))
        return cls(
            _inference(first, latent_dim, hidden, context, top_down, style),
            Factor(decoder, likelihood, data_shape),
            _levels(latent_dim, hidden, context, markov, style),
            made_prior(prior, latent_dim[-1]),
            markov,
            context,
        )


class TopDown(PyroModule):
    r"""A ladder guide: features are computed bottom-up, and latents are drawn top-down.

    :math:`q(z_L|x) = m_L(x)` and :math:`q(z_l|z_{l+1..L}, x) \propto m_l(x)\,p(z_l|z_{l+1..L})`.
    The conditional of a level is the model's conditional times a message from the data. Both are
    diagonal normals.

    Arguments:
        trunks: one network for each level. The first maps the data (and context) to features. Each
            further network maps the features of the level below to the features of its level.
        messages: factors that return :math:`m_l`, given the features of each level.

    Sønderby et al., Ladder variational autoencoders, 2016 (https://arxiv.org/abs/1602.02282).
    """

    def __init__(self, trunks: Sequence[nn.Module], messages: Sequence[Factor]) -> None:
        super().__init__()
        self.trunks, self.messages = Modules(trunks), Modules(messages)

    def forward(self, above: Above, x: Tensor, *context: Tensor) -> None:
        said, features = [], x
        for i, (trunk, message) in enumerate(zip(self.trunks, self.messages, strict=True)):
            features = trunk(features, *(() if i else context))
            said.append(message(features))
        z: list[Tensor] = []
        for level in range(len(said), 0, -1):
            q = product(said[level - 1], above(level, z, *context)) if z else said[-1]
            z.insert(0, pyro.sample(f"z{level}", q))

    def top(self) -> Chain:
        """q(z_L | x, context), made of the same parts: the encoder for a `pyro_vae.VampPrior`."""
        return Chain([*self.trunks, self.messages[-1]])


class BottomUp(PyroModule):
    r"""A bottom-up guide, :math:`q(z_1|x, c),\ q(z_{l+1}|z_l, c)`.

    Arguments:
        factors: factors that return these distributions, from the data to the top.
    """

    def __init__(self, factors: Sequence[Factor]) -> None:
        super().__init__()
        self.factors = Modules(factors)

    def forward(self, above: Above, x: Tensor, *context: Tensor) -> None:
        value = x
        for level, factor in enumerate(self.factors, 1):
            value = pyro.sample(f"z{level}", factor(value, *context))


def _inference(
    first: nn.Module,
    latent_dim: Sequence[int],
    hidden: Sequence[int],
    context: Sequence[Shape],
    top_down: bool,
    style: dict[str, Any],
) -> TopDown | BottomUp:
    if top_down:
        trunks = [first, *(MLP(hidden[-1], hidden, None, **style) for _ in latent_dim[1:])]
        return TopDown(trunks, [_normal(MLP(hidden[-1], (), 2 * dim), dim) for dim in latent_dim])
    lowest = Chain([first, MLP(hidden[-1], (), 2 * latent_dim[0])])
    factors = [_normal(lowest, latent_dim[0])]
    for below, dim in pairwise(latent_dim):
        factors.append(_normal(MLP([below, *context], hidden, 2 * dim, **style), dim))
    return BottomUp(factors)


def _levels(
    latent_dim: Sequence[int],
    hidden: Sequence[int],
    context: Sequence[Shape],
    markov: bool,
    style: dict[str, Any],
) -> list[Factor]:
    levels = []
    for i, dim in enumerate(latent_dim[:-1], 1):
        above = latent_dim[i : i + 1] if markov else latent_dim[i:]
        network = MLP([*above, *context], tuple(hidden)[::-1], 2 * dim, **style)
        levels.append(_normal(network, dim))
    return levels


def _normal(network: nn.Module, dim: int) -> Factor:
    return Factor(network, DiagonalNormal(), (dim,))


def _require_levels(data_shape: Shape, latent_dim: Sequence[int], hidden: Sequence[int]) -> None:
    if not isinstance(latent_dim, Sequence) or not latent_dim or not hidden:
        raise UsageError(
            "`latent_dim` must give the dimension of each level, from the data to the top, and "
            f"`hidden` at least one layer, got {latent_dim} and {hidden}"
        )
    for dim in latent_dim:
        require_sizes(data_shape, dim, hidden)

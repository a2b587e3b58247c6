"""Priors over latents: modules that return p(z | context)."""

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae.errors import UsageError
from pyro_vae.pairs.arrays import as_tensor
from pyro_vae.pairs.rng import seeded
from pyro_vae.parts.bijections import Bijection, Spline
from pyro_vae.parts.factors import bounded_scale
from pyro_vae.parts.flows import CouplingLayer, Flow, stack
from pyro_vae.parts.networks import Shape, shapes_of


class StandardNormal(PyroModule):
    r"""The prior :math:`p(z) = N(z; 0, I)`, which ignores the context.

    Arguments:
        latent_dim: the dimension of z.

    >>> StandardNormal(3)().event_shape
    torch.Size([3])
    """

    zero: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.register_buffer("zero", torch.zeros(latent_dim), persistent=False)

    def forward(self, *context: Tensor) -> dist.TorchDistribution:
        return dist.Normal(self.zero, torch.ones_like(self.zero), validate_args=False).to_event(1)


class GaussianMixture(PyroModule):
    r"""A learned mixture of normals, with the component summed out.

    :math:`p(z) = \sum_c \pi_c \prod_j N(z_j; m_{cj}, s_{cj}^2)`. It ignores the context and is
    trained with the rest of the pair.

    Arguments:
        latent_dim: the dimension of z.
        components: the number of normals, at least 1. The means start at draws from a standard
            normal, and the scales at 1.
        low, high: bounds of every :math:`s_{cj}` (see `pyro_vae.parts.factors.bounded_scale`).

    The KL from a posterior to this prior does not have a closed form and is estimated at the draw.
    Dilokthanakul et al., 2016 (https://arxiv.org/abs/1611.02648), without the discrete site.

    >>> GaussianMixture(3, 5)().event_shape
    torch.Size([3])
    """

    def __init__(
        self, latent_dim: int, components: int = 10, low: float = 1e-2, high: float = 1e2
    ) -> None:
        super().__init__()
        if components < 1:
            raise UsageError(f"must be at least 1, got {components}", argument="components")
        self.latent_dim, self.components, self.low, self.high = latent_dim, components, low, high
        self.logits = nn.Parameter(torch.zeros(components))
        self.means = nn.Parameter(torch.randn(components, latent_dim))
        self.raw_scales = nn.Parameter(torch.zeros(components, latent_dim))

    def forward(self, *context: Tensor) -> dist.TorchDistribution:
        scales = bounded_scale(self.raw_scales, self.low, self.high)
        normals = dist.Normal(self.means, scales, validate_args=False).to_event(1)
        weights = dist.Categorical(logits=self.logits, validate_args=False)
        return dist.MixtureSameFamily(weights, normals, validate_args=False)


class FlowPrior(PyroModule):
    r"""A standard normal transformed by learned invertible layers.

    :math:`z = f(\epsilon),\ \epsilon \sim N(0, I)`. It ignores the context, starts as the standard
    normal, and is trained with the rest of the pair.

    Arguments:
        latent_dim: the dimension of z.
        layer: `pyro_vae.CouplingLayer` or `pyro_vae.AutoregressiveLayer`. With `CouplingLayer`, a
            draw and a log density take one pass each. With `AutoregressiveLayer`, a log density
            takes ``latent_dim`` passes.
        bijection: the map of each coordinate in a layer; the default is `pyro_vae.Spline`.
        layers: the number of layers, at least 1.
        hidden: the widths of the hidden layers in the network of each layer.

    The KL from a posterior to this prior does not have a closed form and is estimated at the draw.
    Chen et al., Variational Lossy Autoencoder, 2017 (https://arxiv.org/abs/1611.02731).

    >>> FlowPrior(3)().log_prob(torch.zeros(3)).shape
    torch.Size([])
    """

    zero: Tensor

    def __init__(
        self,
        latent_dim: int,
        layer: type[nn.Module] = CouplingLayer,
        bijection: Bijection | None = None,
        layers: int = 4,
        hidden: Sequence[int] = (64,),
    ) -> None:
        super().__init__()
        self.latent_dim, self.layer, self.layers, self.hidden = (
            latent_dim,
            layer,
            layers,
            tuple(hidden),
        )
        self.bijection = bijection or Spline()
        self.flow = stack(layer, layers, latent_dim, 0, hidden, self.bijection)
        self.register_buffer("zero", torch.zeros(latent_dim), persistent=False)

    def forward(self, *context: Tensor) -> dist.TorchDistribution:
        return Flow(self.zero, torch.ones_like(self.zero), self.zero[:0], self.flow)


class VampPrior(PyroModule):
    r"""A mixture of posteriors at learned pseudo-inputs, :math:`p(z) = \tfrac1K \sum_k q(z|u_k)`.

    Arguments:
        encoder: the encoder of the pair, a factor that returns q(z | x, context). The prior shares
            it, so it changes together with the posteriors.
        inputs: the shape (or width) of x, or a list with the shape of x and of each context
            tensor, as for `pyro_vae.MLP`. A pseudo-input contains all inputs of the encoder.
        components: K, the number of pseudo-inputs, at least 1. They start at uniform draws in
            [0, 1]. `of_data` starts them at data, which is better.

    The prior with the highest ELBO is the average of the posteriors of all data. This prior
    approximates it with few terms. The KL from a posterior to this prior does not have a closed
    form and is estimated at the draw.
    Tomczak & Welling, VAE with a VampPrior, 2018 (https://arxiv.org/abs/1705.07120).

    >>> import torch, pyro_vae as pv
    >>> x = torch.rand(50, 4).round()
    >>> vae = pv.VAE.mlp((4,), latent_dim=3)
    >>> vae.prior = VampPrior.of_data(vae.encoder, x, components=5)
    >>> pv.sample(vae, 2).shape
    torch.Size([2, 4])
    """

    def __init__(
        self, encoder: nn.Module, inputs: int | Sequence[int | Shape], components: int = 500
    ) -> None:
        super().__init__()
        if components < 1:
            raise UsageError(f"must be at least 1, got {components}", argument="components")
        # PyroModule would give the encoder a new name; with torch's method it keeps its name.
        nn.Module.add_module(self, "encoder", encoder)
        self.inputs, self.components = inputs, components
        self.pseudo_inputs = nn.ParameterList(
            torch.rand(components, *shape) for shape in shapes_of(inputs)
        )

    def forward(self, *context: Tensor) -> dist.TorchDistribution:
        posteriors = self.encoder(*self.pseudo_inputs)
        weights = dist.Categorical(
            logits=self.pseudo_inputs[0].new_zeros(self.components), validate_args=False
        )
        return dist.MixtureSameFamily(weights, posteriors, validate_args=False)

    @classmethod
    def of_data(
        cls,
        encoder: nn.Module,
        x: Tensor,
        *context: Tensor,
        components: int | None = None,
        whole: bool = False,
        seed: int = 0,
    ) -> "VampPrior":
        """A prior whose pseudo-inputs start at random rows of the data.

        Arguments:
            encoder: the encoder of the pair.
            x: the data, of shape (n, *data_shape).
            context: the context tensors, with n rows each.
            components: the number of pseudo-inputs, at most n; the default is 500, or n if n is
                smaller.
            whole: whether 8-bit x are integers such as counts, which do not change. Otherwise they
                are intensities and are divided by 255, unless all are 0 or 1, as in `pyro_vae.fit`.
            seed: the random seed for the choice of rows.

        Raises `UsageError` if ``components`` is more than n.
        """
        components = min(500, len(x)) if components is None else components
        if len(x) < components:
            raise UsageError(
                f"must be at most {len(x)}, the number of rows, got {components}",
                argument="components",
            )
        with seeded(seed):
            chosen = torch.randperm(len(x))[:components]
        rows = [as_tensor(tensor, "x")[chosen] for tensor in (x, *context)]
        intensities = rows[0].dtype == torch.uint8 and int(as_tensor(x, "x").max()) > 1
        if intensities and not whole:
            rows[0] = rows[0] / 255
        prior = cls(encoder, [tuple(tensor.shape[1:]) for tensor in rows], components)
        with torch.no_grad():
            for start, tensor in zip(prior.pseudo_inputs, rows, strict=True):
                start.copy_(tensor)
        return prior

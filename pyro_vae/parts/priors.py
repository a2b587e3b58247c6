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
    r"""The prior :math:`p(z) = N(z; 0, I)`, whatever the context.

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
    r"""A mixture of normals that is learnt with the rest, the component summed out.

    :math:`p(z) = \sum_c \pi_c \prod_j N(z_j; m_{cj}, s_{cj}^2)`, whatever the context.

    Arguments:
        latent_dim: the dimension of z.
        components: how many normals; they start at draws of a standard normal with scale 1.
        low, high: bounds of every :math:`s_{cj}` (see `pyro_vae.parts.factors.bounded_scale`).

    Its KL from a posterior has no closed form and is estimated at the draw.
    Dilokthanakul et al., 2016 (https://arxiv.org/abs/1611.02648), without the discrete site.

    >>> GaussianMixture(3, 5)().event_shape
    torch.Size([3])
    """

    def __init__(
        self, latent_dim: int, components: int = 10, low: float = 1e-2, high: float = 1e2
    ) -> None:
        super().__init__()
        if components < 1:
            raise UsageError(f"components must be 1 or more, {components} came")
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
    r"""A standard normal bent by invertible layers, learnt with the rest, whatever the context.

    :math:`z = f(\epsilon),\ \epsilon \sim N(0, I)`; it starts as the standard normal.

    Arguments:
        latent_dim: the dimension of z.
        layer: `pyro_vae.CouplingLayer`, which is drawn from and scored in one pass, or
            `pyro_vae.AutoregressiveLayer`, which takes ``latent_dim`` passes to be scored.
        bijection: what a layer does to each coordinate: `pyro_vae.Spline` by default.
        layers: how many.
        hidden: widths of the network of each layer.

    Its KL from a posterior has no closed form and is estimated at the draw.
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
    r"""The mixture of posteriors of learnt pseudo-inputs, :math:`p(z) = \tfrac1K \sum_k q(z|u_k)`.

    Arguments:
        encoder: the encoder of the pair, a factor that returns q(z | x, context); it is shared, so
            that the prior moves along with the posteriors.
        inputs: the shape (or width) of x, or a list with those of x and of each context, as for
            `pyro_vae.MLP`: a pseudo-input has all that the encoder takes.
        components: K, how many pseudo-inputs. They start at uniform draws in [0, 1]; `of_data`
            starts them at data, which is where they should.

    The best prior for the ELBO is the posterior averaged over all data; this is its stand-in with
    few terms. Its KL from a posterior has no closed form and is estimated at the draw.
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
            raise UsageError(f"components must be 1 or more, {components} came")
        # As torch adds a part, not as Pyro does: the encoder keeps its place and name in the pair.
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
        """A prior whose pseudo-inputs start at rows of the data, drawn with a seed.

        Arguments:
            components: at most as many as there are rows; 500 by default, or all rows where there
                are fewer.
            whole: 8-bit x are whole numbers, such as counts, and stay so. Without it they are
                intensities and become floats in [0, 1], unless all are 0 and 1, as `pyro_vae.fit`
                shows them to the pair.
        """
        components = min(500, len(x)) if components is None else components
        if len(x) < components:
            raise UsageError(f"{components} pseudo-inputs cannot start at {len(x)} rows of data")
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

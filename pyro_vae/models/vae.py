"""The variational autoencoder, which is conditional if there is context."""

from collections.abc import Callable, Sequence

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae.parts.convolutions import ConvDecoder, ConvEncoder
from pyro_vae.parts.factors import Factor, Family, image_of, made, made_prior, viewed
from pyro_vae.parts.likelihoods import Bernoulli
from pyro_vae.parts.networks import MLP, Shape, require_sizes
from pyro_vae.parts.posteriors import DiagonalNormal
from pyro_vae.parts.priors import StandardNormal
from pyro_vae.parts.recurrent import TokenEncoder
from pyro_vae.parts.sequences import Autoregressive


class VAE(PyroModule):
    r"""A variational autoencoder: each datum has a latent vector z.

    :math:`z_i \sim p(z|c_i),\ x_i \sim p(x|z_i, c_i)`, with the amortized guide
    :math:`q(z_i|x_i, c_i)`. Without context :math:`c` this is the VAE of Kingma & Welling, 2014
    (https://arxiv.org/abs/1312.6114). With context it is the conditional VAE of Sohn, Lee & Yan,
    2015.

    Arguments:
        encoder: a factor that returns q(z | x, context).
        decoder: a factor that returns p(x | z, context).
        prior: a module that returns p(z | context).
        context_shapes: the shape of one row of each context tensor.

    >>> import torch, pyro_vae as pv
    >>> vae = pv.VAE.mlp((1, 28, 28), latent_dim=20, hidden=(400,))
    >>> pv.sample(vae, 3).shape
    torch.Size([3, 1, 28, 28])
    """

    def __init__(
        self,
        encoder: Factor,
        decoder: Factor,
        prior: nn.Module,
        context_shapes: Sequence[Shape] = (),
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.prior = encoder, decoder, prior
        self.context_shapes = tuple(map(tuple, context_shapes))

    def model(self, x: Tensor, *context: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior(*context))
            pyro.sample("x", self.decoder(z, *context), obs=x)

    def guide(self, x: Tensor, *context: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.encoder(x, *context))

    def template(self, n: int) -> tuple[Tensor, ...]:
        """A batch of n rows of the right shapes; the values have no meaning."""
        return tuple(torch.zeros(n, *shape) for shape in (self.decoder.shape, *self.context_shapes))

    @classmethod
    def mlp(
        cls,
        data_shape: Shape,
        latent_dim: int = 20,
        hidden: Sequence[int] = (128, 64),
        likelihood: Family | type[Family] = Bernoulli,
        posterior: Family | type[Family] = DiagonalNormal,
        prior: nn.Module | Callable[[int], nn.Module] = StandardNormal,
        context_shapes: Sequence[Shape] = (),
        activation: Callable[[], nn.Module] = nn.ReLU,
        linear: bool = False,
    ) -> "VAE":
        """A VAE of two multilayer perceptrons; the decoder has the encoder's widths in reverse.

        Arguments:
            data_shape: the shape of one datum.
            latent_dim: the dimension of z.
            hidden: the widths of the encoder's hidden layers, from the data to the latents.
            likelihood, posterior: families, or their classes.
            prior: a module that returns p(z | context), or a class or function of latent_dim that
                returns such a module.
            context_shapes: the shape of one row of each context tensor; empty without context.
            activation: a class or function that returns the nonlinearity.
            linear: whether each perceptron adds a linear map, as in `pyro_vae.MLP`.
        """
        require_sizes(data_shape, latent_dim, hidden)
        likelihood, posterior = made(likelihood), made(posterior)
        data_shape, context = tuple(data_shape), [tuple(shape) for shape in context_shapes]
        given = context[: len(context) - likelihood.context]

        def encoder(seen: Shape) -> nn.Module:
            outputs = posterior.outputs((latent_dim,))
            return MLP([seen, *context], hidden, outputs, activation, linear=linear)

        widths, outputs = tuple(hidden)[::-1], likelihood.outputs(data_shape)
        decoder = MLP([latent_dim, *given], widths, outputs, activation, linear=linear)
        return cls(
            Factor(viewed(encoder, likelihood, data_shape), posterior, (latent_dim,)),
            Factor(decoder, likelihood, data_shape),
            made_prior(prior, latent_dim),
            context,
        )

    @classmethod
    def conv(
        cls,
        data_shape: Shape,
        latent_dim: int = 20,
        channels: Sequence[int] = (32, 64),
        hidden: Sequence[int] = (128,),
        likelihood: Family | type[Family] = Bernoulli,
        posterior: Family | type[Family] = DiagonalNormal,
        prior: nn.Module | Callable[[int], nn.Module] = StandardNormal,
        context_shapes: Sequence[Shape] = (),
        activation: Callable[[], nn.Module] = nn.ReLU,
        blocks: int = 0,
    ) -> "VAE":
        """A VAE for images of shape (channels, height, width), with convolutions of stride 2.

        Arguments:
            channels: the output channels of the encoder's convolutions, from the data to the
                latents.
            hidden: the widths of the layers between the convolutions and the latents.
            blocks: the number of residual blocks next to each convolution.
            data_shape, latent_dim, likelihood, posterior, prior, context_shapes, activation: as in
                `VAE.mlp`.

        Images in the context may have any size. The encoder and the decoder have their own
        convolutions for each of them.
        """
        require_sizes(data_shape, latent_dim, hidden)
        likelihood, posterior = made(likelihood), made(posterior)
        data_shape, context = tuple(data_shape), [tuple(shape) for shape in context_shapes]
        image = image_of(likelihood, data_shape)
        given = context[: len(context) - likelihood.context]

        def encoder(seen: Shape) -> nn.Module:
            outputs = posterior.outputs((latent_dim,))
            return ConvEncoder([seen, *context], channels, hidden, outputs, activation, blocks)

        decoder = ConvDecoder(
            [latent_dim, *given],
            tuple(hidden)[::-1],
            tuple(channels)[::-1],
            image,
            activation,
            blocks,
        )
        return cls(
            Factor(viewed(encoder, likelihood, data_shape), posterior, (latent_dim,)),
            Factor(decoder, likelihood, data_shape),
            made_prior(prior, latent_dim),
            context,
        )

    @classmethod
    def recurrent(
        cls,
        data_shape: Shape,
        tokens: int,
        latent_dim: int = 20,
        hidden: int = 128,
        embedding_dim: int = 32,
        word_dropout: float = 0.0,
        posterior: Family | type[Family] = DiagonalNormal,
        prior: nn.Module | Callable[[int], nn.Module] = StandardNormal,
        context_shapes: Sequence[Shape] = (),
    ) -> "VAE":
        """A VAE for rows of tokens, such as the characters of sentences, with one z for each row.

        Arguments:
            data_shape: ``(length,)``, the number of tokens in a row; token 0 ends a row.
            tokens: the number of different tokens, including the end token 0.
            latent_dim: the dimension of z.
            hidden: the units of the decoder's LSTM, and of each of the encoder's two LSTMs.
            embedding_dim, word_dropout: as in `pyro_vae.Autoregressive`.
            posterior, prior, context_shapes: as in `VAE.mlp`.

        Bowman et al., 2016 (https://arxiv.org/abs/1511.06349).

        >>> import pyro_vae as pv
        >>> pv.sample(pv.VAE.recurrent((9,), tokens=5, hidden=8), 2).shape
        torch.Size([2, 9])
        """
        require_sizes(data_shape, latent_dim, (hidden, embedding_dim))
        likelihood = Autoregressive(tokens, embedding_dim, hidden, word_dropout)
        posterior, data_shape = made(posterior), tuple(data_shape)
        context = [tuple(shape) for shape in context_shapes]
        outputs = posterior.outputs((latent_dim,))
        encoder = TokenEncoder(tokens, embedding_dim, hidden, outputs, context)
        decoder = MLP([latent_dim, *context], (), likelihood.outputs(data_shape))
        return cls(
            Factor(encoder, posterior, (latent_dim,)),
            Factor(decoder, likelihood, data_shape),
            made_prior(prior, latent_dim),
            context,
        )

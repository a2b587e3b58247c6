"""Convolutional networks for images: encoder, decoder and residual blocks."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod

from torch import Tensor, nn

from pyro_vae.parts.networks import (
    MLP,
    Shape,
    all_sizes,
    require_number,
    require_shape,
    require_ungated,
    shapes_of,
    zip_sizes,
)


class Convolutions(nn.Module):
    """Convolutions of stride 2 over each input that is an image; other inputs do not change.

    Arguments:
        inputs: the shape of each input. A shape of three numbers, (channels, height, width), is an
            image, of any size.
        channels: the output channels of each convolution; each halves height and width.
        activation: a class or function that returns the nonlinearity.
        blocks: the number of residual blocks after each convolution.

    Each image has its own convolutions, also in the context. Returns a list of features with the
    shapes in the attribute ``shapes``.

    >>> import torch
    >>> layers = Convolutions([(3, 17, 30), 5], (8, 16))
    >>> [tuple(part.shape) for part in layers(torch.zeros(2, 3, 17, 30), torch.zeros(2, 5))]
    [(2, 16, 5, 8), (2, 5)]
    """

    def __init__(
        self,
        inputs: Sequence[int | Shape],
        channels: Sequence[int],
        activation: Callable[[], nn.Module] = nn.ReLU,
        blocks: int = 0,
    ) -> None:
        super().__init__()
        self.inputs, self.channels = list(inputs), tuple(channels)
        self.activation, self.blocks = activation, blocks
        require_ungated(activation)
        self.given = shapes_of(inputs)
        self.images = nn.ModuleList(self._over(shape) for shape in self.given if len(shape) == 3)
        self.shapes = [
            (self.channels[-1], *all_sizes(shape, len(channels))[-1]) if len(shape) == 3 else shape
            for shape in self.given
        ]

    def _over(self, image: Shape) -> nn.Sequential:
        layers: list[nn.Module] = []
        for before, after in pairwise((image[0], *self.channels)):
            layers.append(nn.Conv2d(before, after, 3, stride=2, padding=1))
            layers += [ResidualBlock(after, self.activation) for _ in range(self.blocks)]
            layers.append(self.activation())
        return nn.Sequential(*layers)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        require_number(inputs, self.given)
        networks, features = iter(self.images), []
        for tensor, shape in zip_sizes(inputs, self.given):
            require_shape(tensor, shape)
            if len(shape) == 3:
                image = next(networks)(tensor.reshape(-1, *shape))
                tensor = image.reshape(*tensor.shape[:-3], *image.shape[1:])
            features.append(tensor)
        return features


class ResidualBlock(nn.Module):
    r"""Two convolutions that learn a residual, :math:`x + f(x)`.

    Before each convolution are a normalization and the nonlinearity. The normalization is over the
    channels and positions of each image (group normalization with one group), so it does not depend
    on the other images of the minibatch.
    He et al., Identity mappings in deep residual networks, 2016 (https://arxiv.org/abs/1603.05027);
    Wu & He, Group normalization, 2018 (https://arxiv.org/abs/1803.08494).

    Arguments:
        channels: the channels of the image (n, channels, height, width). The output has the same
            shape.
        activation: a class or function that returns the nonlinearity.

    >>> import torch
    >>> ResidualBlock(4)(torch.zeros(2, 4, 5, 7)).shape
    torch.Size([2, 4, 5, 7])
    """

    def __init__(self, channels: int, activation: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.channels, self.activation = channels, activation
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.GroupNorm(1, channels), activation()]
            layers.append(nn.Conv2d(channels, channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class ConvEncoder(nn.Module):
    """Convolutions of stride 2 over images of any size, then an MLP that also sees the context.

    Arguments:
        inputs: the shape of the image ``(channels, height, width)``, then the shape of each
            context tensor. Images in the context have their own convolutions.
        channels: the output channels of each convolution; each halves height and width.
        hidden: the widths of the hidden layers of the MLP after the convolutions.
        outputs: the width of the output; with None, the last hidden layer is the output.
        activation: a class or function that returns the nonlinearity.
        blocks: the number of residual blocks after each convolution (see `ResidualBlock`).

    >>> import torch
    >>> ConvEncoder([(3, 17, 30)], (8, 16), (32,), 12)(torch.zeros(2, 3, 17, 30)).shape
    torch.Size([2, 12])
    """

    def __init__(
        self,
        inputs: Sequence[int | Shape],
        channels: Sequence[int],
        hidden: Sequence[int],
        outputs: int | None,
        activation: Callable[[], nn.Module] = nn.ReLU,
        blocks: int = 0,
    ) -> None:
        super().__init__()
        self.inputs, self.channels, self.hidden = list(inputs), tuple(channels), tuple(hidden)
        self.outputs, self.activation, self.blocks = outputs, activation, blocks
        self.layers = Convolutions(inputs, channels, activation, blocks)
        self.head = MLP(self.layers.shapes, hidden, outputs, activation)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.head(*self.layers(*inputs))


class ConvDecoder(nn.Module):
    """The mirror image of `ConvEncoder`: an MLP, then transposed convolutions of stride 2.

    Arguments:
        inputs: the width of the latents, or a list with the shapes of latents and context. Images
            in the context have their own convolutions, as in `ConvEncoder`.
        hidden: the widths of the hidden layers of the MLP before the convolutions.
        channels: the input channels of each transposed convolution; each doubles height and width.
        image: the shape ``(channels, height, width)`` of the output before it is flattened.
        activation: a class or function that returns the nonlinearity.
        blocks: the number of residual blocks before each transposed convolution (see
            `ResidualBlock`).

    >>> import torch
    >>> ConvDecoder(5, (32,), (16, 8), (3, 17, 30))(torch.zeros(7, 2, 5)).shape
    torch.Size([7, 2, 1530])
    """

    def __init__(
        self,
        inputs: int | Sequence[int | Shape],
        hidden: Sequence[int],
        channels: Sequence[int],
        image: Shape,
        activation: Callable[[], nn.Module] = nn.ReLU,
        blocks: int = 0,
    ) -> None:
        super().__init__()
        self.inputs, self.hidden, self.channels = inputs, tuple(hidden), tuple(channels)
        self.image, self.activation, self.blocks = tuple(image), activation, blocks
        sizes = all_sizes(self.image, len(channels))[::-1]
        self.small = (channels[0], *sizes[0])
        self.context = Convolutions(shapes_of(inputs), self.channels[::-1], activation, blocks)
        self.head = MLP(self.context.shapes, hidden, prod(self.small), activation)
        layers: list[nn.Module] = []
        for before, after, (height, width) in zip(
            channels, (*channels[1:], image[0]), sizes[1:], strict=True
        ):
            even = (1 - height % 2, 1 - width % 2)
            layers += [ResidualBlock(before, activation) for _ in range(blocks)]
            layers += [
                activation(),
                nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=even),
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, *inputs: Tensor) -> Tensor:
        features = self.head(*self.context(*inputs))
        image = self.layers(features.reshape(-1, *self.small))
        return image.reshape(*features.shape[:-1], -1)

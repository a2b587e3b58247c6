"""Networks: plain torch modules that map inputs and context to a flat vector of outputs."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.errors import UsageError

Shape = tuple[int, ...]


class MLP(nn.Module):
    r"""A multilayer perceptron over the concatenation of all its inputs.

    :math:`f(a, b, \dots) = W_L\,\sigma(\cdots\sigma(W_1 [a; b; \dots] + c_1)\cdots) + c_L`

    Arguments:
        inputs: the width of the one input, or a list with the shape (or width) of each input.
        hidden: the width of each hidden layer; none gives a linear map.
        outputs: the width of the output; None ends with the last hidden layer.
        activation: makes the nonlinearity after each hidden layer; ``nn.GLU`` gives gated layers,
            :math:`(W h + b) \odot \sigma(V h + c)`.
        normalize: normalise each hidden layer over its units before the nonlinearity, row by row
            (Ba, Kiros & Hinton, 2016), so that no row depends on the others of its minibatch.

    Inputs have shape ``(..., *shape)``; their leading dimensions are broadcast against each
    other, so that context of shape ``(batch, 10)`` meets latents of shape
    ``(samples, batch, 20)``. The output has shape ``(..., outputs)``.

    >>> import torch
    >>> network = MLP([(1, 28, 28), 10], (400,), 40)
    >>> network(torch.zeros(5, 1, 28, 28), torch.zeros(5, 10)).shape
    torch.Size([5, 40])
    """

    def __init__(
        self,
        inputs: int | Sequence[int | Shape],
        hidden: Sequence[int],
        outputs: int | None,
        activation: Callable[[], nn.Module] = nn.ReLU,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        self.inputs, self.hidden, self.outputs = inputs, tuple(hidden), outputs
        self.activation, self.normalize = activation, normalize
        self.shapes = shapes_of(inputs)
        _require_maker(activation)
        widths = [sum(map(prod, self.shapes)), *hidden]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            width = 2 * after if activation is nn.GLU else after
            layers.append(nn.Linear(before, width))
            layers += [nn.LayerNorm(width)] if normalize else []
            layers.append(activation())
        if outputs is not None:
            layers.append(nn.Linear(widths[-1], outputs))
        self.layers = nn.Sequential(*layers)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.layers(join(inputs, self.shapes))


class Chain(nn.Module):
    """Modules one after another, each fed by the one before; the first takes the context too.

    Arguments:
        parts: the modules; the last may be a `pyro_vae.Factor`, so that a distribution comes out.

    >>> import torch
    >>> Chain([MLP([4, 2], (8,), 8), MLP(8, (), 3)])(torch.zeros(5, 4), torch.zeros(5, 2)).shape
    torch.Size([5, 3])
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor, *context: Tensor) -> Any:
        first, *rest = self.parts
        value = first(x, *context)
        for part in rest:
            value = part(value)
        return value


class Convolutions(nn.Module):
    """Convolutions of stride 2 over each input that is an image; other inputs pass as they are.

    Arguments:
        inputs: the shape of each input; those of three numbers, (channels, height, width), are
            images, of any size.
        channels: the output channels of each convolution; each halves height and width.
        activation: makes the nonlinearity.
        blocks: residual blocks after each convolution.

    Images of the context have convolutions of their own. Returns a list of features, whose shapes
    are ``shapes``.

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
        _require_ungated(activation)
        self.given = shapes_of(inputs)
        self.images = nn.ModuleList(self._over(shape) for shape in self.given if len(shape) == 3)
        self.shapes = [
            (self.channels[-1], *_sizes(shape, len(channels))[-1]) if len(shape) == 3 else shape
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
        _require_number(inputs, self.given)
        networks, features = iter(self.images), []
        for tensor, shape in _zip(inputs, self.given):
            _require(tensor, shape)
            if len(shape) == 3:
                image = next(networks)(tensor.reshape(-1, *shape))
                tensor = image.reshape(*tensor.shape[:-3], *image.shape[1:])
            features.append(tensor)
        return features


class ResidualBlock(nn.Module):
    r"""Two convolutions that learn a difference, :math:`x + f(x)`.

    Each is preceded by a normalisation over the channels and places of each image, which no other
    image of the minibatch enters (group normalisation in one group), and by the nonlinearity.
    He et al., Identity mappings in deep residual networks, 2016 (https://arxiv.org/abs/1603.05027);
    Wu & He, Group normalization, 2018 (https://arxiv.org/abs/1803.08494).

    Arguments:
        channels: of the image (n, channels, height, width), which keeps its shape.
        activation: makes the nonlinearity.

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
        inputs: the shape of the image ``(channels, height, width)``, then that of each context;
            images in the context go through convolutions of their own.
        channels: the output channels of each convolution; each halves height and width.
        hidden: the hidden widths of the MLP after the convolutions.
        outputs: the width of the output; None ends with the last hidden layer.
        activation: makes the nonlinearity.
        blocks: residual blocks after each convolution (see `ResidualBlock`).

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
        inputs: the width of the latents, or a list with the shapes of latents and context; images
            in the context go through convolutions of their own, as in `ConvEncoder`.
        hidden: the hidden widths of the MLP before the convolutions.
        channels: the input channels of each transposed convolution; each doubles the size.
        image: the shape ``(channels, height, width)`` of the output before it is flattened.
        activation: makes the nonlinearity.
        blocks: residual blocks before each transposed convolution (see `ResidualBlock`).

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
        sizes = _sizes(self.image, len(channels))[::-1]
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


class Viewed(nn.Module):
    """A network whose first input is shown to it through a view, such as `Log1p`.

    Arguments:
        network: takes what the view makes of the first input, then the other inputs.
        view: any elementwise module.

    >>> import torch
    >>> Viewed(MLP([2, 1], (), 3), Log1p())(torch.ones(5, 2), torch.zeros(5, 1)).shape
    torch.Size([5, 3])
    """

    def __init__(self, network: nn.Module, view: nn.Module) -> None:
        super().__init__()
        self.network, self.view = network, view

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        return self.network(self.view(x), *context)


class Log1p(nn.Module):
    """Counts x as log(1 + x), what is below 0 (a pseudo-input of `pyro_vae.VampPrior`) as 0.

    >>> Log1p()(torch.tensor([0.0, 1e6]))
    tensor([ 0.0000, 13.8155])
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return torch.log1p(x.clamp(min=0))


class OneHot(nn.Module):
    """Tokens 0 to levels - 1 as rows of zeros with a one, the levels put before the channels.

    Arguments:
        levels: how many tokens there are.
        dims: the dimensions of one datum: (..., 5, 8, 8) becomes (..., 5 * levels, 8, 8) for 3.

    >>> OneHot(3, 1)(torch.tensor([[0, 2]]))
    tensor([[1., 0., 0., 0., 0., 1.]])
    """

    def __init__(self, levels: int, dims: int) -> None:
        super().__init__()
        self.levels, self.dims = levels, dims

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.arange(self.levels, device=x.device).reshape(-1, *[1] * self.dims)
        rows = (x.unsqueeze(-1 - self.dims) == tokens).flatten(-1 - self.dims, -self.dims)
        return rows.to(x.dtype if x.is_floating_point() else torch.get_default_dtype())


def _require_maker(activation: Any) -> None:
    if not callable(activation):
        raise UsageError(f"activation is a class such as torch.nn.ReLU, {activation!r} came")


def _require_ungated(activation: Callable[[], nn.Module]) -> None:
    _require_maker(activation)
    if activation is nn.GLU:
        raise UsageError("nn.GLU is for multilayer perceptrons, convolutions take another one")


def require_sizes(data_shape: Shape, latent_dim: int, hidden: Sequence[int]) -> None:
    """Raise `UsageError` where a size is none."""
    for name, value in (("data_shape", data_shape), ("hidden", hidden)):
        if not isinstance(value, Sequence):
            raise UsageError(f"{name} is a tuple of whole numbers, {value!r} came")
    if min(latent_dim, *hidden, *data_shape) < 1:
        raise UsageError(
            f"sizes must be positive: data_shape {tuple(data_shape)}, latent_dim {latent_dim}, "
            f"hidden {tuple(hidden)} came"
        )


def join(inputs: Sequence[Tensor], shapes: Sequence[Shape]) -> Tensor:
    """Flatten each input by its shape, broadcast the leading dimensions, and concatenate."""
    _require_number(inputs, shapes)
    leading = [tensor.shape[: tensor.dim() - len(shape)] for tensor, shape in _zip(inputs, shapes)]
    for tensor, shape in _zip(inputs, shapes):
        _require(tensor, shape)
    common = torch.broadcast_shapes(*leading)
    flat = [
        tensor.reshape(*front, prod(shape)).expand(*common, prod(shape))
        for tensor, front, shape in zip(inputs, leading, shapes, strict=True)
    ]
    return flat[0] if len(flat) == 1 else torch.cat(flat, -1)


def _require_number(inputs: Sequence[Tensor], shapes: Sequence[Shape]) -> None:
    if len(inputs) != len(shapes):
        raise UsageError(f"the network takes {len(shapes)} inputs, {len(inputs)} came")


def _require(tensor: Tensor, shape: Shape) -> None:
    if tensor.dim() < len(shape) or tuple(tensor.shape[tensor.dim() - len(shape) :]) != shape:
        raise UsageError(
            f"the network takes an input of shape (..., {', '.join(map(str, shape))}), "
            f"one of shape {tuple(tensor.shape)} came"
        )


def _zip(inputs: Sequence[Tensor], shapes: Sequence[Shape]) -> zip:
    return zip(inputs, shapes, strict=True)


def shapes_of(inputs: int | Sequence[int | Shape]) -> list[Shape]:
    """The shape of each input, of widths, shapes or one width."""
    if isinstance(inputs, int):
        inputs = [inputs]
    return [(item,) if isinstance(item, int) else tuple(item) for item in inputs]


def _sizes(image: Shape, halvings: int) -> list[tuple[int, int]]:
    """Height and width before the first and after each convolution of stride 2."""
    _, height, width = image
    sizes = [(height, width)]
    for _ in range(halvings):
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    return sizes

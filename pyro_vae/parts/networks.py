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


def require_ungated(activation: Callable[[], nn.Module]) -> None:
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
    require_number(inputs, shapes)
    leading = [
        tensor.shape[: tensor.dim() - len(shape)] for tensor, shape in zip_sizes(inputs, shapes)
    ]
    for tensor, shape in zip_sizes(inputs, shapes):
        require_shape(tensor, shape)
    common = torch.broadcast_shapes(*leading)
    flat = [
        tensor.reshape(*front, prod(shape)).expand(*common, prod(shape))
        for tensor, front, shape in zip(inputs, leading, shapes, strict=True)
    ]
    return flat[0] if len(flat) == 1 else torch.cat(flat, -1)


def require_number(inputs: Sequence[Tensor], shapes: Sequence[Shape]) -> None:
    if len(inputs) != len(shapes):
        raise UsageError(f"the network takes {len(shapes)} inputs, {len(inputs)} came")


def require_shape(tensor: Tensor, shape: Shape) -> None:
    if tensor.dim() < len(shape) or tuple(tensor.shape[tensor.dim() - len(shape) :]) != shape:
        raise UsageError(
            f"the network takes an input of shape (..., {', '.join(map(str, shape))}), "
            f"one of shape {tuple(tensor.shape)} came"
        )


def zip_sizes(inputs: Sequence[Tensor], shapes: Sequence[Shape]) -> zip:
    return zip(inputs, shapes, strict=True)


def shapes_of(inputs: int | Sequence[int | Shape]) -> list[Shape]:
    """The shape of each input, of widths, shapes or one width."""
    if isinstance(inputs, int):
        inputs = [inputs]
    return [(item,) if isinstance(item, int) else tuple(item) for item in inputs]


def all_sizes(image: Shape, halvings: int) -> list[tuple[int, int]]:
    """Height and width before the first and after each convolution of stride 2."""
    _, height, width = image
    sizes = [(height, width)]
    for _ in range(halvings):
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    return sizes
